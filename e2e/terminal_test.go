package e2e

// The caller's terminal is out of the command's reach, yet works as if it were not.

import (
	"strings"
	"testing"
	"time"
)

func TestTerminalIsTheCommandsOwn(t *testing.T) {
	area(t, "tty.own", "stty", "bash")
	w := newPair(t)
	// outside runs a script of the caller's shell, where $S is sluice run.
	outside := func(t *testing.T, script string) result {
		t.Helper()
		p, master := inTerminal(t, w.host, "sh", "-c", "S='"+sluiceBin()+" run --quiet --'; "+script+"; echo th''e end; read x")
		p.waitText(t, "the end", 30*time.Second) // so everything that was printed has been read
		master.Write([]byte("\n"))
		return p.wait(t, 30*time.Second).wantStatus(t, 0)
	}
	t.Run("no descriptor and no path leads to the caller's", func(t *testing.T) {
		r := outside(t, `id() { stat -Lc %d:%i:%Hr:%Lr /proc/self/fd/$1; }; mine=$(id 2 2>&2); name=$(tty)
echo "outside $mine"; $S sh -c 'for fd in 0 1 2; do test -t $fd || echo "$fd is none"; echo "inside $(stat -Lc %d:%i:%Hr:%Lr /proc/$$/fd/$fd)"; done
echo open >/dev/tty; echo "terminals $(ls /dev/pts | tr "\n" " ")"; echo "tty $(tty)"'; echo end`)
		_, rest, _ := strings.Cut(r.out, "outside ")
		mine, _, _ := strings.Cut(rest, "\r")
		if mine == "" || strings.Contains(r.out, "inside "+mine) || strings.Count(r.out, "inside ") != 3 || strings.Contains(r.out, "is none") {
			t.Errorf("the command has the caller's terminal %s, or none\n%s", mine, r)
		}
		r.wantOut(t, "terminals 0 ptmx").wantOut(t, "tty /dev/pts/0").wantOut(t, "open")
	})
	t.Run("nor does /dev/tty when no descriptor is a terminal", func(t *testing.T) {
		outside(t, `f=$(mktemp); $S sh -c 'if true <>/dev/tty; then echo reached; else echo refused; fi' </dev/null >$f 2>&1; cat $f; rm $f`).wantOut(t, "refused")
	})
	t.Run("the caller's modes are as before, also when the command changes its own and is killed", func(t *testing.T) {
		outside(t, `a=$(stty -a); $S sh -c 'stty raw -echo; kill -9 $$'; test $? = 137 && test "$(stty -a)" = "$a" && echo unchanged`).wantOut(t, "unchanged")
	})
	t.Run("a megabyte arrives whole", func(t *testing.T) {
		r := outside(t, `$S sh -c 'head -c 1048576 /dev/zero | tr "\0" "#"'`)
		if n := strings.Count(r.out, "#"); n != 1<<20 {
			t.Errorf("%d bytes of %d arrived", n, 1<<20)
		}
	})
	t.Run("redirected streams stay what they are", func(t *testing.T) {
		outside(t, `echo through | $S sh -c 'test ! -t 0 && test -t 1 && cat'; $S sh -c 'test -t 0 && test ! -t 1 && echo piped' | cat`).wantOut(t, "through").wantOut(t, "piped")
	})
	t.Run("a command of a pipeline takes the keyboard when it reads", func(t *testing.T) {
		p, master := inTerminal(t, w.host, "bash", "-ic", sluiceBin()+` run --quiet -- sh -c 'echo ready; read x </dev/tty; echo "got $x"' | cat; echo out""side; read x`)
		p.waitText(t, "ready", 10*time.Second)
		master.Write([]byte("typed\n"))
		p.waitText(t, "got typed", 10*time.Second)
		p.waitText(t, "outside", 10*time.Second) // before it, keys go to the command, which is at its end
		master.Write([]byte("\n"))
		p.wait(t, 10*time.Second).wantStatus(t, 0)
	})
	t.Run("the caller's shell stops and continues it as a job", func(t *testing.T) {
		p, master := inTerminal(t, w.host, "bash", "--norc", "-i")
		key := func(s string) { master.Write([]byte(s)) }
		key(sluiceBin() + " run --quiet -- sh -c 'echo re''ady; read x; echo got $x'\n")
		p.waitText(t, "ready", 10*time.Second)
		key("\x1a")
		p.waitText(t, "Stopped", 10*time.Second)
		key("fg; echo status $?\n")
		key("li" + "ne\n")
		p.waitText(t, "got line", 10*time.Second)
		p.waitText(t, "status 0", 10*time.Second)
		key("exit\n")
		p.wait(t, 10*time.Second)
	})
	t.Run("a shell inside has job control", func(t *testing.T) {
		p, master := inTerminal(t, w.host, sluiceBin(), "run", "--quiet", "--", "bash", "--norc", "-i")
		key := func(s string) { master.Write([]byte(s)) }
		key("echo $((40+2)) answers\n")
		p.waitText(t, "42 answers", 10*time.Second)
		// The job prints it itself: until it is a job, Ctrl-Z goes to the shell, which ignores it.
		key("sh -c 'echo sl\"\"eeping; exec sleep 60'\n")
		p.waitText(t, "sleeping", 10*time.Second)
		key("\x1a")
		p.waitText(t, "Stopped", 10*time.Second)
		// A shell with stopped jobs warns at the first exit, and leaves at the second.
		key("kill -9 %1; exit 4\nexit 4\n")
		r := p.wait(t, 10*time.Second).wantStatus(t, 4)
		if strings.Contains(r.out, "cannot set terminal process group") {
			t.Errorf("the shell has no job control\n%s", r)
		}
	})
}
