package cmdline

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// script returns a shell's completion script for the program prog-x.
func script(t *testing.T, shell string) string {
	t.Helper()
	var out bytes.Buffer
	a := &cli.App{Name: "prog-x", Writer: &out, Commands: []*cli.Command{CompletionCommand("prog-x"), {Name: "run", Usage: "run it"}}}
	if err := a.Run([]string{"prog-x", "completion", shell}); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// prog stands in for the binary: it records how it was called, and answers.
const prog = `#!/bin/sh
echo "$*" >>"$CALLS"
printf '%s\n' --policy --publish -p run ps
`

// complete returns what a shell offers at the end of a line, and how it called the program.
func complete(t *testing.T, shell, script string, line []string) (found, calls string) {
	t.Helper()
	path, err := exec.LookPath(shell)
	if err != nil {
		t.Skipf("%s is not installed", shell)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "prog-x"), []byte(prog), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, append([]string{"-c", script, shell}, line...)...)
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "CALLS="+filepath.Join(dir, "calls"))
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", shell, err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(out)), " "), strings.TrimSpace(string(b))
}

// shells holds, for each shell, how to run the function as a completion would, without a terminal.
// zsh's own functions run only during a completion, so stand-ins play them.
var shells = map[string]struct{ before, after, other string }{
	"bash": {
		after: `
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_prog_x
printf '%s\n' "${COMPREPLY[@]}"
`,
	},
	"zsh": {
		before: `
compdef() { true; }
compadd() { shift; for w; do [[ $w == ${words[CURRENT]}* ]] && print -r -- $w; done; true; }
_files() { print files; }
_normal() { print "another command: ${words[*]}, word $CURRENT"; }
`,
		after: `
words=("$@") CURRENT=$#
_prog_x
`,
		other: "another command: make all, word 2",
	},
}

func TestCompletionAsksAndNeverRuns(t *testing.T) {
	for shell, harness := range shells {
		for _, row := range []struct {
			name         string
			line         []string
			found, calls string
		}{
			{"a command", []string{"prog-x", "r"}, "run", "--generate-bash-completion"},
			{"a flag", []string{"prog-x", "run", "--pol"}, "--policy", "run --pol --generate-bash-completion"},
			{"two dashes, which must not end the flags", []string{"prog-x", "run", "--"}, "--policy --publish", "run - --generate-bash-completion"},
			{"the other command, which must not be run", []string{"prog-x", "run", "--", "make", "all"}, harness.other, ""},
		} {
			t.Run(shell+" "+row.name, func(t *testing.T) {
				found, calls := complete(t, shell, harness.before+script(t, shell)+harness.after, row.line)
				if found != row.found || calls != row.calls {
					t.Errorf("found %q by asking %q; want %q by %q", found, calls, row.found, row.calls)
				}
			})
		}
	}
}

func TestFishReadsItsCompletion(t *testing.T) {
	path, err := exec.LookPath("fish")
	if err != nil {
		t.Skip("fish is not installed")
	}
	cmd := exec.Command(path, "--no-config", "-c", "source - && complete --do-complete 'prog-x r'")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.Stdin = strings.NewReader(script(t, "fish"))
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "run\trun it") {
		t.Errorf("%v\n%s", err, out)
	}
}
