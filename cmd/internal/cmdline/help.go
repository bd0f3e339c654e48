package cmdline

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

const (
	plainWidth = 80  // where there is no terminal
	minWidth   = 40  // a narrower terminal breaks the lines itself
	maxWidth   = 120 // longer lines are hard to read
	termWidth  = 22  // a longer term has its text below it
	indent     = 3
)

// The library prints help through a variable, and has no other hook that sees the command.
func init() {
	cli.HelpPrinter = func(w io.Writer, _ string, data any) {
		switch d := data.(type) {
		case *cli.App:
			appPage(d).print(w, width(w))
		case *cli.Command:
			newPage(d.HelpName, d).print(w, width(w))
		}
	}
}

// width returns the longest line that the help may have: COLUMNS, or the width of the terminal that
// w is.
func width(w io.Writer) int {
	n, err := strconv.Atoi(os.Getenv("COLUMNS"))
	if err != nil || n <= 0 {
		n = plainWidth
		if f, ok := w.(*os.File); ok {
			if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
				n = int(size.Col)
			}
		}
	}
	return min(max(n, minWidth), maxWidth)
}

// print writes the help; examples come first.
func (p *page) print(w io.Writer, width int) {
	t := text{width: width}
	t.heading("NAME")
	t.wrap(indent, 2*indent, p.name+" - "+p.summary)
	t.heading("USAGE")
	t.wrap(indent, 2*indent, strings.TrimSpace(p.name+" "+p.usage))
	if len(p.examples) > 0 {
		t.heading("EXAMPLES")
		for _, e := range p.examples {
			t.wrap(indent, 2*indent, e)
		}
	}
	if len(p.description) > 0 {
		t.heading("DESCRIPTION")
		for i, d := range p.description {
			if i > 0 {
				t.b.WriteByte('\n')
			}
			if d.verbatim {
				for _, l := range d.lines {
					t.wrap(2*indent, 3*indent, l)
				}
				continue
			}
			t.wrap(indent, indent, strings.Join(d.lines, " "))
		}
	}
	if len(p.commands) > 0 {
		t.heading("COMMANDS")
		t.entries(p.commands)
		t.b.WriteByte('\n')
		t.wrap(indent, indent, fmt.Sprintf("`%s COMMAND --help` says more about one of them.", p.name))
	}
	for _, c := range p.categories {
		t.heading(strings.TrimSpace(strings.ToUpper(c.name) + " OPTIONS"))
		var entries []entry
		for _, o := range c.options {
			entries = append(entries, entry{strings.TrimSpace(strings.Join(o.names, ", ") + " " + o.value), o.text})
		}
		t.entries(entries)
	}
	_, _ = io.WriteString(w, t.b.String())
}

// text builds the help.
type text struct {
	b     strings.Builder
	width int
}

func (t *text) heading(name string) {
	if t.b.Len() > 0 {
		t.b.WriteByte('\n')
	}
	t.b.WriteString(name + ":\n")
}

// entries writes each term with its text in a column beside it, or below a term too long for that.
func (t *text) entries(entries []entry) {
	column := 0
	for _, e := range entries {
		if n := utf8.RuneCountInString(e.term); n <= termWidth {
			column = max(column, indent+n+2)
		}
	}
	if column == 0 || t.width < 2*column {
		column = 2 * indent
	}
	for _, e := range entries {
		line := strings.Repeat(" ", indent) + e.term
		if pad := column - utf8.RuneCountInString(line); pad >= 2 {
			t.lines(line+strings.Repeat(" ", pad), column, e.text)
			continue
		}
		t.b.WriteString(line + "\n")
		t.wrap(column, column, e.text)
	}
}

// wrap writes words, indenting the first line by first and the rest by others.
func (t *text) wrap(first, others int, words string) {
	t.lines(strings.Repeat(" ", first), others, words)
}

// lines fills lines with words; the first begins with line. A word longer than a line gets a line
// of its own.
func (t *text) lines(line string, indent int, words string) {
	used, begun := utf8.RuneCountInString(line), false
	for _, word := range strings.Fields(words) {
		n := utf8.RuneCountInString(word)
		if begun && used+1+n > t.width {
			t.b.WriteString(line + "\n")
			line, used, begun = strings.Repeat(" ", indent), indent, false
		}
		if begun {
			line, used = line+" ", used+1
		}
		line, used, begun = line+word, used+n, true
	}
	t.b.WriteString(line + "\n")
}
