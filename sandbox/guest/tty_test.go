package guest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// jobShell does what matters here of an interactive shell: it leads the session, runs the driver as
// a foreground job, prints when the job has stopped, and continues it.
func jobShell(text string) int {
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", "stand", text)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL,
		Setpgid: true, Foreground: true, Ctty: 0,
	}
	must(cmd.Start())
	for {
		var ws unix.WaitStatus
		if _, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WUNTRACED, nil); err == unix.EINTR {
			continue
		} else if err != nil {
			return 99
		}
		if !ws.Stopped() {
			fmt.Printf("job ended %d\n", ws.ExitStatus())
			return ws.ExitStatus()
		}
		fmt.Println("job stopped")
		must(unix.Kill(-cmd.Process.Pid, unix.SIGCONT))
	}
}

func TestTerminalWorksAsWithoutUs(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, pidns := range []bool{false, true} {
			t.Run(fmt.Sprintf("PID namespace %v", pidns), func(t *testing.T) {
				master, slave := testutil.OpenPTY(t)
				script := `trap 'echo interrupted' INT; trap 'echo size $(stty size)' WINCH; trap 'echo continued' CONT; trap 'echo quit; exit 5' QUIT
tty -s && echo terminal; echo ready; while :; do read x; done`
				// A shell that Ctrl-Z catches while it starts a program (vfork(2)) does not stop,
				// whatever its terminal. So this one starts none meanwhile.
				s := scene{UID: uid, Relay: true, Config: baseConfig("sh", "-c", script)}
				s.Config.PIDNamespace = pidns
				cmd := exec.Command("/proc/self/exe", "shell", s.text(t))
				cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0, Pdeathsig: unix.SIGKILL}
				done := launch(t, cmd)
				lines := make(chan string, 100)
				go func() {
					sc := bufio.NewScanner(master)
					for sc.Scan() {
						lines <- strings.TrimSpace(sc.Text())
					}
				}()
				var seen []string
				expect := func(want string) {
					t.Helper()
					for {
						select {
						case l := <-lines:
							seen = append(seen, l)
							if strings.HasSuffix(l, want) {
								return
							}
						case <-time.After(15 * time.Second):
							t.Fatalf("no %q in %q", want, seen)
						}
					}
				}
				key := func(b byte) {
					if _, err := master.Write([]byte{b}); err != nil {
						t.Fatal(err)
					}
				}
				expect("terminal")
				expect("ready")
				key(3) // Ctrl-C
				expect("interrupted")
				if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 77}); err != nil {
					t.Fatal(err)
				}
				expect("size 33 77")
				key(26) // Ctrl-Z
				expect("job stopped")
				expect("continued")
				key(28) // Ctrl-\
				expect("quit")
				expect("job ended 5")
				<-done
				for _, l := range seen {
					if strings.Contains(l, "interrupted") && strings.Count(strings.Join(seen, "\n"), "interrupted") != 1 {
						t.Errorf("one Ctrl-C arrived more than once: %q", seen)
					}
				}
			})
		}
	})
}
