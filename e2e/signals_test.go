package e2e

import (
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestCommandIgnoresAndBlocksWhatItsCallerDoes runs grep(1) under callers that change signals,
// alone and in a sandbox.
func TestCommandIgnoresAndBlocksWhatItsCallerDoes(t *testing.T) {
	area(t, "exit.inherited", "python3")
	w := newPair(t)
	const python = `import signal, subprocess, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, n) for n in sys.argv[1].split(",") if n])
sys.exit(subprocess.run(sys.argv[3:], restore_signals=sys.argv[2] == "restore").returncode)`
	grep := []string{"grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"}
	for _, row := range []struct {
		what, ignored, blocked string // bits of what grep shows
		caller                 []string
	}{
		{"nohup", "0000000000000001", "0000000000000000", []string{"nohup"}},
		{"a shell that ignores INT", "0000000000000002", "0000000000000000", []string{"sh", "-c", `trap '' INT; exec "$@"`, "sh"}},
		{"a shell that ignores TERM, QUIT, TSTP and USR1", "0000000000084204", "0000000000000000", []string{"sh", "-c", `trap '' TERM QUIT TSTP USR1; exec "$@"`, "sh"}},
		{"Python, which restores signals", "0000000000000000", "0000000000000000", []string{"python3", "-c", python, "", "restore"}},
		{"Python, which restores none", "0000000001001000", "0000000000000000", []string{"python3", "-c", python, "", "leave"}},
		{"a caller that blocks HUP, INT, USR1, TERM and WINCH", "0000000000000000", "0000000008004203", []string{"python3", "-c", python, "SIGHUP,SIGINT,SIGUSR1,SIGTERM,SIGWINCH", "restore"}},
	} {
		t.Run(row.what, func(t *testing.T) {
			alone := ok(t, w.host, 10*time.Second, append(row.caller, grep...)...)
			// The caller of this run may ignore others.
			for name, want := range map[string]string{"SigIgn:\t": row.ignored, "SigBlk:\t": row.blocked} {
				if all := signalSet(t, want); signalSet(t, after(alone.out, name))&all != all {
					t.Errorf("%swithout %s\n%s", name, want, alone)
				}
			}
			inside := ok(t, w.host, 20*time.Second, append(append(row.caller, sluiceBin(), "run", "--"), grep...)...)
			if inside.out != alone.out {
				t.Errorf("grep says\n%s in the sandbox, and alone\n%s", inside.out, alone.out)
			}
		})
	}
	t.Run("the monitor outlives what its caller ignores", func(t *testing.T) {
		script := `trap '' TERM HUP QUIT USR2; "$@" & kids=$!; read -r line <&3; kill -TERM $kids; kill -HUP $kids; kill -QUIT $kids; kill -USR2 $kids; echo go >&4; wait $kids; echo "status $?"`
		fifo := t.TempDir()
		run(t, w.host, 5*time.Second, "mkfifo", fifo+"/ready", fifo+"/go").wantStatus(t, 0)
		r := run(t, w.host, 20*time.Second, "sh", "-c", "exec 3<>"+fifo+"/ready 4<>"+fifo+"/go; "+script, "sh",
			sluiceBin(), "run", "--", "sh", "-c", "echo ready >"+fifo+"/ready; read -r go <"+fifo+"/go; echo alive; exit 3")
		if !strings.Contains(r.out, "alive") || !strings.Contains(r.out, "status 3") {
			t.Errorf("the command did not live on\n%s", r)
		}
	})
}

// signalSet parses a set of signals in the form of /proc/PID/status.
func signalSet(t *testing.T, hex string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// after returns the 16 characters after name.
func after(text, name string) string {
	_, rest, _ := strings.Cut(text, name)
	return rest[:min(16, len(rest))]
}

func TestCommandRunsThoughTheWorkingDirectoryWasDeleted(t *testing.T) {
	area(t, "exit")
	w := newPair(t)
	dir := t.TempDir() + "/gone"
	r := ok(t, w.host, 20*time.Second, "sh", "-c", `mkdir "$1"; cd "$1"; rmdir "$1"; shift; exec "$@"`, "sh", dir, sluiceBin(), "run", "--", "sh", "-c", "pwd; echo ran")
	r.wantOut(t, "/\nran\n")
}
