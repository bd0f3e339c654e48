package e2e

// What a shell relies on in sluice run: exit statuses, signals, the terminal, and what is inside.

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

func TestExitStatusIsTheCommands(t *testing.T) {
	area(t, "exit")
	w := newPair(t)
	notExecutable := write(t, "text", "no program\n")
	for _, row := range []struct {
		what   string
		argv   []string
		status int
	}{
		{"success", []string{"true"}, 0},
		{"seven", []string{"sh", "-c", "exit 7"}, 7},
		{"a command that does not exist", []string{"no-such-command"}, 127},
		{"a path that does not exist", []string{"/no/such/command"}, 127},
		{"a file that cannot be executed", []string{notExecutable}, 126},
		{"a directory", []string{"/"}, 126},
		{"killed by TERM", []string{"sh", "-c", "kill -TERM $$"}, 128 + 15},
		{"killed by KILL", []string{"sh", "-c", "kill -KILL $$"}, 128 + 9},
		{"a segmentation fault", []string{"sh", "-c", "kill -SEGV $$"}, 128 + 11},
	} {
		t.Run(row.what, func(t *testing.T) {
			r := w.host.sluiceRun(t, append([]string{"run", "--"}, row.argv...)...).wantStatus(t, row.status)
			if row.status == 126 || row.status == 127 {
				r.wantMessage(t, "sluice: ", row.argv[0])
			}
		})
	}
	t.Run("an unknown flag is sluice's own failure", func(t *testing.T) {
		w.host.sluiceRun(t, "run", "--no-such-flag", "--", "true").wantStatus(t, 125).wantMessage(t, "no-such-flag")
	})
	t.Run("no command is sluice's own failure", func(t *testing.T) {
		w.host.sluiceRun(t, "run").wantStatus(t, 125)
	})
	t.Run("standard input, output and error are the command's", func(t *testing.T) {
		p := w.host.sluice(t, "run", "--", "sh", "-c", "cat; echo to-stderr >&2")
		p.write([]byte("through\n"))
		p.closeInput()
		r := p.wait(t, 20*time.Second).wantStatus(t, 0)
		said := r.err
		if privileged { // a first line says what root's sandbox means
			var first string
			if first, said, _ = strings.Cut(said, "\n"); !strings.HasPrefix(first, "sluice: started by root, uid 0 inside owns all files of root's") {
				t.Errorf("it does not say what a start by root means\n%s", r)
			}
		}
		if r.out != "through\n" || said != "to-stderr\n" {
			t.Errorf("the streams are not the command's alone\n%s", r)
		}
	})
	t.Run("TERM to sluice reaches the command", func(t *testing.T) {
		p := w.host.sluice(t, "run", "--", "sh", "-c", `trap 'echo got TERM; exit 3' TERM; echo ready; while :; do sleep 0.05; done`)
		p.waitText(t, "ready", 10*time.Second)
		syscall.Kill(p.pid, syscall.SIGTERM)
		p.wait(t, 10*time.Second).wantStatus(t, 3).wantOut(t, "got TERM")
	})
}

func TestInsideIsAsAsked(t *testing.T) {
	area(t, "inside", "ip")
	w := newWorld(t)
	uid := fmt.Sprint(os.Getuid())
	for _, row := range []struct {
		what  string
		flags []string
		sh    string
		want  []string
	}{
		{"the caller's uid is kept", nil, "id -u", []string{uid}},
		{"or root inside", []string{rootInside}, "id -u", []string{"0"}},
		{"slirp4netns's addresses", nil, "ip -o addr; ip route; ip -6 route", []string{"10.0.2.100/24", "default via 10.0.2.2", "default via fd"}},
		{"loopback works", nil, "ping -c1 -W1 127.0.0.1 && ping -c1 -W1 ::1", []string{"1 received"}},
		{"MTU", []string{"--mtu", "1400"}, "ip -o link", []string{"mtu 1400"}},
		{"the default MTU", nil, "ip -o link", []string{"mtu 65520"}},
		{"a TUN device", []string{"--link", "tun"}, "ip -o link; ping -c1 -W2 " + far4 + "; ping -c1 -W2 " + far6, []string{"POINTOPOINT", "1 received"}},
		{"the host name in hosts", nil, "cat /etc/hosts", []string{"localhost"}},
	} {
		t.Run(row.what, func(t *testing.T) {
			argv := append([]string{"run"}, row.flags...)
			r := w.host.sluiceOK(t, append(argv, "--", "sh", "-c", row.sh)...)
			for _, want := range row.want {
				r.wantOut(t, want)
			}
		})
	}
	t.Run("a PID namespace shows only its own", func(t *testing.T) {
		r := w.host.sluiceOK(t, "run", "--pid", "--", "sh", "-c", "ls /proc | grep -c '^[0-9]'")
		var n int
		fmt.Sscan(r.out, &n)
		if n > 6 {
			t.Errorf("%d processes are seen inside\n%s", n, r)
		}
	})
	t.Run("an ordinary user's sandbox works without a topology's help", func(t *testing.T) {
		serve(t, w.host)
		r := w.host.sluiceOK(t, "run", "--allow-host", "--", peerBin(), "get", url(host4, portHTTP, "/"))
		r.wantOut(t, "hello from peer")
	})
}

func TestTerminal(t *testing.T) {
	area(t, "tty", "stty")
	w := newPair(t)
	start := func(t *testing.T, sh string) (*proc, *os.File) {
		t.Helper()
		return inTerminal(t, w.host, sluiceBin(), "run", "--", "sh", "-c", sh)
	}
	t.Run("Ctrl-C reaches the command, and the status is 130", func(t *testing.T) {
		p, master := start(t, "echo ready; exec sleep 60")
		p.waitText(t, "ready", 10*time.Second)
		master.Write([]byte{3})
		p.wait(t, 5*time.Second).wantStatus(t, 130)
	})
	t.Run("a command that handles Ctrl-C keeps running", func(t *testing.T) {
		p, master := start(t, `trap 'echo interrupted' INT; echo ready; while ! read x; do :; done; echo "read $x"`)
		p.waitText(t, "ready", 10*time.Second)
		master.Write([]byte{3})
		p.waitText(t, "interrupted", 5*time.Second)
		master.Write([]byte("more\n"))
		p.waitText(t, "read more", 5*time.Second)
		p.wait(t, 5*time.Second).wantStatus(t, 0)
	})
	t.Run("the window's size and its change", func(t *testing.T) {
		p, master := start(t, `trap 'stty size' WINCH; stty size; echo ready; while ! read x; do :; done`)
		p.waitText(t, "ready", 10*time.Second)
		p.waitText(t, "31 97", time.Second)
		if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: 120}); err != nil {
			t.Fatal(err)
		}
		p.waitText(t, "40 120", 5*time.Second)
		master.Write([]byte("end\n"))
		p.wait(t, 5*time.Second).wantStatus(t, 0)
	})
	t.Run("it is a terminal", func(t *testing.T) {
		p, _ := start(t, "test -t 0 && test -t 1 && tty && echo terminal")
		p.waitText(t, "terminal", 10*time.Second)
		p.wait(t, 5*time.Second).wantStatus(t, 0)
	})
	t.Run("hanging up ends all", func(t *testing.T) {
		p, master := start(t, "echo ready; exec sleep 60")
		p.waitText(t, "ready", 10*time.Second)
		master.Close()
		p.wait(t, 5*time.Second)
	})
}

// inTerminal starts a command that leads the session of its own terminal.
func inTerminal(t *testing.T, n *netns, argv ...string) (*proc, *os.File) {
	t.Helper()
	master, slave := testutil.OpenPTY(t)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	p := n.startCmd(t, n.plain, cmd)
	slave.Close()
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			if err != nil {
				return
			}
			p.stream(&p.out).Write(buf[:n])
		}
	}()
	return p, master
}

func TestCommandLineHelps(t *testing.T) {
	area(t, "help")
	w := newPair(t)
	commands := []string{"run", "attach", "ps", "flows", "flow-log", "policy", "port", "capture", "stats", "logs", "version"}
	r := w.host.sluiceOK(t, "--help")
	for _, c := range commands {
		r.wantOut(t, c)
		w.host.sluiceOK(t, c, "--help").wantOut(t, "USAGE")
	}
	if v := w.host.sluiceOK(t, "version"); !strings.Contains(v.out, "sluice") && len(strings.TrimSpace(v.out)) == 0 {
		t.Errorf("no version\n%s", v)
	}
	for _, shell := range []string{"bash", "zsh"} {
		if r := w.host.sluiceRun(t, "completion", shell); r.status != 0 || !strings.Contains(r.out, "sluice") {
			t.Errorf("no completion for %s\n%s", shell, r)
		}
	}
}
