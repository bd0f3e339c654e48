package cmdline

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// example is a program with one of everything that the help prints.
func example() *cli.App {
	return &cli.App{
		Name: "prog", Usage: "be an example", ArgsUsage: "FILE", UsageText: "# first\nprog --size 4 file",
		Description: "One paragraph\nof two lines.\n\n   kept   as it is\n\nAnother.",
		Flags: append(InCategory("first",
			&cli.StringFlag{Name: "size", Aliases: []string{"s"}, Value: "3", Usage: "take `BYTES` at a time"},
			&cli.IntFlag{Name: "fd", Value: -1, DefaultText: "none", Usage: "write to descriptor `N`"},
			&cli.IntFlag{Name: "a-flag-with-a-long-name", Usage: "count"},
		), &cli.BoolFlag{Name: "plain", Usage: "stand in no category"}),
	}
}

func TestPrint(t *testing.T) {
	const want = `NAME:
   prog - be an example

USAGE:
   prog [flags] FILE

EXAMPLES:
   # first
   prog --size 4 file

DESCRIPTION:
   One paragraph of two lines.

      kept as it is

   Another.

FIRST OPTIONS:
   --size, -s BYTES  take BYTES at a time
                     (default: 3)
   --fd N            write to descriptor N
                     (default: none)
   --a-flag-with-a-long-name VALUE
                     count

OPTIONS:
   --plain     stand in no category
   --help, -h  show this help
`
	var out bytes.Buffer
	appPage(example()).print(&out, 44)
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestWidth(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	resize := func(columns uint16) {
		t.Helper()
		if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns}); err != nil {
			t.Fatal(err)
		}
	}
	for _, row := range []struct {
		name     string
		columns  string
		terminal uint16
		want     int
	}{
		{"no terminal", "", 0, 80},
		{"a terminal of 100 columns", "", 100, 100},
		{"COLUMNS, whatever the terminal has", "60", 100, 60},
		{"a COLUMNS that is no number", "wide", 100, 100},
		{"a narrow terminal", "", 10, 40},
		{"a wide terminal", "", 300, 120},
	} {
		t.Setenv("COLUMNS", row.columns)
		var got int
		if row.terminal > 0 {
			resize(row.terminal)
			got = width(master)
		} else {
			got = width(&bytes.Buffer{})
		}
		if got != row.want {
			t.Errorf("%s: %d, want %d", row.name, got, row.want)
		}
	}
}

func TestReference(t *testing.T) {
	a := example()
	a.Commands = []*cli.Command{
		{Name: "sub", Usage: "do *this* [thing]", Subcommands: []*cli.Command{{Name: "deep", Usage: "be deep"}}},
		{Name: "hidden", Usage: "be hidden", Hidden: true},
	}
	var names []string
	for _, p := range everyPage(a) {
		names = append(names, p.manual())
		text := p.markdown()
		for _, want := range []string{"# NAME\n\n" + p.manual() + " - ", "# SYNOPSIS\n", "# OPTIONS\n", "# SEE ALSO\n", "**--help**"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %q:\n%s", p.manual(), want, text)
			}
		}
		if p.name == "prog sub" && !strings.Contains(text, `do \*this\* \[thing\]`) {
			t.Errorf("markup was not escaped:\n%s", text)
		}
	}
	if got := strings.Join(names, " "); got != "prog prog-sub prog-sub-deep" {
		t.Errorf("pages %s", got)
	}
}
