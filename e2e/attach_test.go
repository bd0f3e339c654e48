package e2e

// sluice attach, called as container tools call such helpers.

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// container makes what a container tool makes before it calls a network helper: a process in a user
// namespace (for an ordinary user) and an empty network namespace.
func container(t *testing.T, on *netns) *proc {
	t.Helper()
	argv := []string{"unshare", "-n", "-m", "--", peerBin(), "agent"}
	if !privileged {
		argv = []string{"unshare", "-U", "-r", "-n", "-m", "--", peerBin(), "agent"}
	}
	p := on.startPlain(t, argv...)
	p.waitText(t, `"ready":true`, 10*time.Second)
	return p
}

// inContainer runs a command in the container's namespaces.
func inContainer(t *testing.T, on *netns, pid int, argv ...string) result {
	t.Helper()
	enter := []string{"nsenter", "-t", fmt.Sprint(pid), "-n", "-m"}
	if !privileged {
		enter = append(enter, "-U", "--preserve-credentials")
	}
	p := on.startPlain(t, append(append(enter, "--"), argv...)...)
	p.closeInput()
	return p.wait(t, 20*time.Second)
}

func TestAttachAsAContainerToolDoes(t *testing.T) {
	area(t, "attach", "nsenter", "unshare", "ip")
	for _, byPath := range []bool{true, false} {
		t.Run(map[bool]string{true: "by --netns", false: "by PID"}[byPath], func(t *testing.T) {
			w := newWorld(t)
			serve(t, w.far)
			serve(t, w.host)
			c := container(t, w.host)
			readyR, readyW, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer readyR.Close()
			exitR, exitW, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer exitW.Close()
			args := []string{"attach", "--ready-fd", "3", "--exit-fd", "4"}
			if byPath {
				args = append(args, "--netns", fmt.Sprintf("/proc/%d/ns/net", c.pid))
			} else {
				args = append(args, fmt.Sprint(c.pid))
			}
			cmd := exec.Command(sluiceBin(), args...)
			cmd.ExtraFiles = []*os.File{readyW, exitR}
			p := w.host.startCmd(t, w.host.plain, cmd)
			readyW.Close()
			exitR.Close()
			readyR.SetReadDeadline(time.Now().Add(10 * time.Second))
			buf := make([]byte, 8)
			n, err := readyR.Read(buf)
			if string(buf[:n]) != "1" {
				t.Fatalf("ready-fd said %q (%v), not 1\n%s", buf[:n], err, p.result("still running"))
			}
			if n, err := readyR.Read(buf); n != 0 || err == nil {
				t.Errorf("ready-fd is not closed after its 1: %d %v", n, err)
			}
			for _, f := range families {
				r := inContainer(t, w.host, c.pid, peerBin(), "dial", at(f.far, portWhoami))
				r.wantStatus(t, 0).wantOut(t, `"got":"`+strings.SplitAfter(at(f.host, 0), f.host)[0])
				// As for containers, the host's own addresses are open, unlike under run.
				inContainer(t, w.host, c.pid, peerBin(), "dial", at(f.host, portWhoami)).wantStatus(t, 0).wantOut(t, `"got":"`)
			}
			inContainer(t, w.host, c.pid, "ip", "-o", "addr").wantOut(t, "10.0.2.100/24")
			exitW.Close()
			if r := p.wait(t, 5*time.Second); r.status != 0 {
				t.Errorf("the exit fd's end is not success\n%s", r)
			}
			if r := inContainer(t, w.host, c.pid, "ip", "-o", "link"); strings.Contains(r.out, "tap") {
				t.Errorf("the device stays behind\n%s", r)
			}
		})
	}
	t.Run("it ends when the container does", func(t *testing.T) {
		w := newPair(t)
		c := container(t, w.host)
		p := w.host.sluice(t, "attach", fmt.Sprint(c.pid))
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			r := inContainer(t, w.host, c.pid, "ip", "-o", "link")
			return strings.Contains(r.out, "65520"), "no device appears\n" + r.String() + "\n" + p.result("").String()
		})
		c.signal(syscall.SIGKILL)
		<-c.done
		p.wait(t, 10*time.Second)
	})
	t.Run("a netns that is gone is told", func(t *testing.T) {
		w := newPair(t)
		c := container(t, w.host)
		path := fmt.Sprintf("/proc/%d/ns/net", c.pid)
		c.signal(syscall.SIGKILL)
		<-c.done
		w.host.sluiceRun(t, "attach", "--netns", path).wantMessage(t, "sluice: ", path, "gone")
		w.host.sluiceRun(t, "attach", fmt.Sprint(c.pid)).wantMessage(t, "sluice: ", fmt.Sprint(c.pid))
		plain := filepath.Join(w.host.dir, "not-a-netns")
		os.WriteFile(plain, nil, 0o644)
		w.host.sluiceRun(t, "attach", "--netns", plain).wantMessage(t, "sluice: ", plain, "namespace")
	})
}

func TestAGuestMayConfigureItself(t *testing.T) {
	area(t, "attach.self", "nsenter", "unshare", "ip")
	w := newWorld(t)
	serve(t, w.far)
	c := container(t, w.host)
	p := w.host.sluice(t, "attach", "--no-configure", fmt.Sprint(c.pid))
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		r := inContainer(t, w.host, c.pid, "ip", "link", "set", "tap0", "up")
		return r.status == 0, "no device appears\n" + r.String() + "\n" + p.result("").String()
	})
	// The kernel asks for routers itself, and takes prefix and route from the answer.
	testutil.Within(t, 15*time.Second, func() (bool, string) {
		r := inContainer(t, w.host, c.pid, peerBin(), "dial", "-timeout", "2s", at(far6, portWhoami))
		return strings.Contains(r.out, host6), "the self-given IPv6 address does not reach the far side\n" + r.String()
	})
	inContainer(t, w.host, c.pid, "ip", "-6", "-o", "addr", "show", "dev", "tap0", "scope", "global").wantOut(t, "mngtmpaddr")
	p.stop(t, syscall.SIGTERM)
}

func TestAttachToABoundNetns(t *testing.T) {
	area(t, "attach.bound", "ip", "nsenter")
	asRoot(t, "a named network namespace is a mount on the machine")
	w := newWorld(t)
	serve(t, w.far)
	path := filepath.Join(w.host.dir, "bound")
	os.WriteFile(path, nil, 0o644)
	ok(t, w.host, 5*time.Second, "unshare", "--net="+path, "true")
	defer w.host.do(func() { unix.Unmount(path, unix.MNT_DETACH) })
	p := w.host.sluice(t, "attach", "--netns", path)
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		r := run(t, w.host, 10*time.Second, "nsenter", "--net="+path, peerBin(), "dial", "-timeout", "2s", at(far4, portWhoami))
		return strings.Contains(r.out, host4), "the namespace does not reach the far side\n" + r.String() + "\n" + p.result("").String()
	})
	p.stop(t, syscall.SIGTERM)
}

// It may be told to end while it is still starting.
func TestAttachEndsCleanlyWheneverItIsTold(t *testing.T) {
	area(t, "attach.ended", "unshare")
	asRoot(t, "a named network namespace is a mount on the machine")
	w := newWorld(t)
	path := filepath.Join(w.host.dir, "ended")
	os.WriteFile(path, nil, 0o644)
	ok(t, w.host, 5*time.Second, "unshare", "--net="+path, "true")
	defer w.host.do(func() { unix.Unmount(path, unix.MNT_DETACH) })
	for after := time.Duration(0); after < 120*time.Millisecond; after += 6 * time.Millisecond {
		p := w.host.sluice(t, "attach", "--netns", path)
		time.Sleep(after)
		p.stop(t, syscall.SIGTERM)
		if left := stateFiles(); len(left) > 0 {
			t.Fatalf("told to end after %v, it left %q", after, left)
		}
	}
}
