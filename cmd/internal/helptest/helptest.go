// Package helptest holds the checks that both binaries' tests make of their help.
package helptest

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
)

// Check asks every command of a program for its help. The help must fit 80 columns and have an
// example, and its examples may use only flags that the command has. The program is built anew for
// each call, because the library changes it.
func Check(t *testing.T, program func() *cli.App) {
	t.Helper()
	t.Setenv("COLUMNS", "")
	commands := walk(nil, program().Commands)
	if len(commands) < 3 {
		t.Fatalf("only %d commands", len(commands))
	}
	for _, path := range append([][]string{nil}, commands...) {
		name := strings.Join(append([]string{program().Name}, path...), " ")
		t.Run(name, func(t *testing.T) {
			help := Run(t, program(), append(slices.Clone(path), "--help")...)
			for line := range strings.Lines(help) {
				if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > 80 {
					t.Errorf("a line of %d columns: %s", n, line)
				}
			}
			_, rest, ok := strings.Cut(help, "\nEXAMPLES:\n")
			if !ok || !strings.Contains(help, "USAGE:\n   "+name) {
				t.Fatalf("no example, or no usage:\n%s", help)
			}
			examples, _, _ := strings.Cut(rest, "\n\n")
			if !strings.Contains(examples, "   "+name) {
				t.Errorf("no example of %s:\n%s", name, examples)
			}
			for line := range strings.Lines(examples) {
				checkExample(t, program(), line)
			}
		})
	}
}

// Run runs a program and returns its output.
func Run(t *testing.T, app *cli.App, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	app.Writer, app.ErrWriter = &out, &out
	if err := app.Run(append([]string{app.Name}, args...)); err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out.String()
}

// walk lists the commands that are not hidden, each by the words that call it.
func walk(parent []string, commands []*cli.Command) (out [][]string) {
	for _, c := range commands {
		if !c.Hidden {
			path := append(slices.Clone(parent), c.Name)
			out = append(append(out, path), walk(path, c.Subcommands)...)
		}
	}
	return out
}

// checkExample checks that the commands and flags of an example exist. The line must run the
// program or be a comment.
func checkExample(t *testing.T, app *cli.App, line string) {
	t.Helper()
	for part := range strings.SplitSeq(line, "|") {
		words := strings.Fields(part)
		if len(words) == 0 || words[0] != app.Name {
			if !strings.HasPrefix(strings.TrimSpace(line), "#") && !strings.Contains(line, app.Name+" ") {
				t.Errorf("%q does not run %s", line, app.Name)
			}
			continue
		}
		flags, commands := app.Flags, app.Commands
		for _, w := range words[1:] {
			if w == "--" {
				break
			}
			if i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.Name == w }); i >= 0 {
				flags, commands = commands[i].Flags, commands[i].Subcommands
			} else if len(commands) > 0 {
				t.Errorf("%q: there is no command %s", line, w)
			}
			if len(w) > 1 && w[0] == '-' && !slices.ContainsFunc(flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), strings.TrimLeft(w, "-")) }) {
				t.Errorf("%q: there is no flag %s", line, w)
			}
		}
	}
}
