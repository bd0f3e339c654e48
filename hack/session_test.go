package hack

import (
	"bufio"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestSessionIsTheSameForEveryCaller starts a command as `make test` starts the tests, from each
// state that a caller may be in.
func TestSessionIsTheSameForEveryCaller(t *testing.T) {
	// The C library keeps signals 32 and 33 for itself: no program can reset them.
	const state = `for of in SigBlk SigIgn; do set -- $(grep "^$of:" /proc/self/status); echo "$1 $((0x$2 & ~0x180000000))"; done; readlink /proc/$$/fd/0; set -- $(cat /proc/$$/stat); echo "terminal $7"; exit 3`
	const want = "SigBlk: 0\nSigIgn: 0\n/dev/null\nterminal 0\n"
	for _, row := range []struct{ name, shell string }{
		{"a plain caller", `"$@"`},
		{"nohup", `nohup "$@"`},
		{"a shell that ignores HUP, INT, QUIT, PIPE and TERM", `trap '' HUP INT QUIT PIPE TERM; "$@"`},
		{"standard input closed", `"$@" <&-`},
		{"in the background", `"$@" & wait $!`},
		{"a terminal", `script -qec "$(printf '%q ' "$@")" /dev/null | tr -d '\r'; exit ${PIPESTATUS[0]}`},
	} {
		t.Run(row.name, func(t *testing.T) {
			if strings.HasPrefix(row.shell, "script") {
				if _, err := exec.LookPath("script"); err != nil {
					t.Skip("script is not installed")
				}
			}
			out, err := exec.Command("bash", "-c", row.shell, "bash", "./session.sh", "sh", "-c", state).Output()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 3 || string(out) != want {
				t.Errorf("%v, want status 3\n%s\nwant\n%s", err, out, want)
			}
		})
	}
}

func TestSessionPassesSignalsOn(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
		cmd := exec.Command("./session.sh", "sh", "-c", "echo ready; exec sleep 60")
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(pipe).ReadString('\n'); err != nil || line != "ready\n" {
			t.Errorf("got %q, %v", line, err)
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Error(err)
		}
		// If the signal were not passed on, the command would run to its end and exit with status
		// 0.
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 128+int(signal) {
			t.Errorf("after %v: %v", signal, err)
		}
	}
}
