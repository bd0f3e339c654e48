package e2e

// Under bad circumstances each message names the cause and the cure, and running sandboxes go on.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

func TestBadCircumstancesAreTold(t *testing.T) {
	area(t, "bad")
	w := newPair(t)
	serve(t, w.far)
	t.Run("no /dev/net/tun", func(t *testing.T) {
		n := newNetns(t, "bare")
		empty := filepath.Join(n.dir, "empty")
		os.MkdirAll(empty, 0o755)
		mount(t, n, empty, "/dev/net")
		n.sluiceRun(t, "run", "--", "true").wantStatus(t, 125).wantMessage(t, "sluice: ", "/dev/net/tun", "modprobe tun")
	})
	t.Run("no permission on /dev/net/tun", func(t *testing.T) {
		if privileged {
			t.Skip("root is permitted everything: asked in the ordinary user's run")
		}
		n := newNetns(t, "bare")
		// A file that the user owns would be no obstacle: root inside may open it.
		mount(t, n, forbiddenDevice(t), "/dev/net/tun")
		n.sluiceRun(t, "run", "--", "true").wantStatus(t, 125).wantMessage(t, "sluice: ", "/dev/net/tun", "permission denied", "chmod")
	})
	t.Run("user namespaces off", func(t *testing.T) {
		if privileged {
			t.Skip("root may do without them: asked in the ordinary user's run")
		}
		n := newNetns(t, "nouserns")
		if err := n.trySysctl("user.max_user_namespaces", "0"); err != nil {
			t.Fatal(err)
		}
		defer n.trySysctl("user.max_user_namespaces", "10000")
		n.sluiceRun(t, "run", "--", "true").wantStatus(t, 125).wantMessage(t, "sluice: ", "user namespace", "max_user_namespaces")
	})
	t.Run("a port that is taken", func(t *testing.T) {
		w.host.start(t, peerBin(), "serve", "-base", "9300").waitText(t, "listening", 5*time.Second)
		w.host.sluiceRun(t, "run", "-p", "9300:80", "--", "true").wantStatus(t, 125).wantMessage(t, "sluice: ", "9300", "taken")
	})
	t.Run("a port that needs privilege", func(t *testing.T) {
		if privileged {
			t.Skip("root may take any port: asked in the ordinary user's run")
		}
		w.host.sluiceRun(t, "run", "-p", "80:80", "--", "true").wantStatus(t, 125).wantMessage(t, "sluice: ", "80", "ip_unprivileged_port_start")
	})
	t.Run("an empty resolv.conf", func(t *testing.T) {
		n := newNetns(t, "nodns")
		n.file(t, "/etc/resolv.conf", "")
		sb := n.sandbox(t)
		r := run(t, sb, 15*time.Second, "dig", "+time=2", "+tries=1", "web.test")
		if !strings.Contains(r.out, "SERVFAIL") && !strings.Contains(r.out, "REFUSED") {
			t.Errorf("without upstreams the answer is not SERVFAIL or REFUSED\n%s", r)
		}
		if r := n.sluiceOK(t, "logs", sb.name); !strings.Contains(r.out+sb.run.result("").err, "resolv.conf") {
			t.Errorf("nothing tells that resolv.conf names no server\n%s", r)
		}
	})
	t.Run("wrong flags", func(t *testing.T) {
		for _, row := range []struct{ flags, want string }{
			{"--mtu 100", "1280"},
			{"--mtu 70000", "65520"},
			{"--link bridge", "tap"},
			{"-p 80", "80"},
			{"-p 99999:80", "99999"},
			{"-p 9000-9002:80", "9000-9002:80"},
			{"--policy /no/such/file", "/no/such/file"},
			{"--name a/b", "a/b"},
			{"--dns nowhere", "nowhere"},
		} {
			r := w.host.sluiceRun(t, append(append([]string{"run"}, strings.Fields(row.flags)...), "--", "true")...)
			if r.status != 125 {
				t.Errorf("status %d, not 125\n%s", r.status, r)
			}
			r.wantMessage(t, row.want)
		}
	})
}

// forbiddenDevice returns a device of the machine's root that this user may not open.
func forbiddenDevice(t *testing.T) string {
	t.Helper()
	entries, _ := os.ReadDir("/dev")
	for _, e := range entries {
		path := filepath.Join("/dev", e.Name())
		if e.Type()&os.ModeCharDevice != 0 {
			if errors.Is(unix.Access(path, unix.R_OK|unix.W_OK), os.ErrPermission) {
				return path
			}
		}
	}
	t.Skip("this user may open every device of the machine")
	return ""
}

// mount binds one path over another in a namespace.
func mount(t *testing.T, n *netns, source, target string) {
	t.Helper()
	var err error
	n.do(func() { err = unix.Mount(source, target, "", unix.MS_BIND, "") })
	if err != nil {
		t.Fatalf("binding %s: %v", target, err)
	}
}

func TestDescriptorsExhaustedKeepsFlows(t *testing.T) {
	area(t, "bad.descriptors")
	w := newPair(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	hold := sb.start(t, peerBin(), "hold", "-count", "20", at(far4, portEcho))
	hold.waitText(t, `"held","open":20`, 10*time.Second)
	worker := sb.worker()
	limit := unix.Rlimit{Cur: uint64(descriptors(worker) + 5), Max: uint64(descriptors(worker) + 5)}
	if err := unix.Prlimit(worker, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Skipf("the worker's limit cannot be changed from outside: %v", err)
	}
	more := sb.start(t, peerBin(), "hold", "-count", "40", "-timeout", "1s", at(far4, portEcho))
	more.waitText(t, `"held"`, 60*time.Second)
	hold.write([]byte("echo\n"))
	hold.waitText(t, `"echoed","open":20`, 20*time.Second)
	if sb.worker() != worker {
		t.Error("the worker died of the lack of descriptors")
	}
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		r := w.host.sluiceRun(t, "logs", sb.name)
		return strings.Contains(r.out, "descriptors") || strings.Contains(r.out, "open files"), "the logs do not tell of the lack of descriptors\n" + r.String()
	})
	for _, p := range []*proc{more, hold} {
		p.closeInput()
		p.wait(t, 10*time.Second)
	}
	d, r := dial(t, sb, "-timeout", "5s", at(far4, portWhoami))
	if d.Error != "" {
		t.Errorf("with descriptors free again a connection fails\n%s", r)
	}
}

func TestDiskFullDuringCapture(t *testing.T) {
	area(t, "bad.disk")
	w := newPair(t)
	serve(t, w.far)
	dir := filepath.Join(w.host.dir, "tiny")
	os.MkdirAll(dir, 0o777)
	var err error
	w.host.do(func() { err = unix.Mount("tiny", dir, "tmpfs", 0, "size=256k,mode=1777") })
	if err != nil {
		t.Fatal(err)
	}
	sb := w.host.sandbox(t)
	hold := sb.start(t, peerBin(), "hold", "-count", "5", at(far4, portEcho))
	hold.waitText(t, `"held","open":5`, 10*time.Second)
	p := w.host.sluice(t, "capture", "-w", filepath.Join(dir, "c.pcapng"), sb.name)
	time.Sleep(200 * time.Millisecond) // a capture starts at no moment visible from outside
	var got transfer
	ok(t, sb, 60*time.Second, peerBin(), "xfer", "-streams", "4", "-size", fmt.Sprint(16<<20), at(far4, portXfer)).into(t, &got)
	if got.OK != 4 {
		t.Errorf("the full disk harms the sandbox: %+v", got)
	}
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		p.signal(syscall.SIGINT)
	}
	r := p.wait(t, 5*time.Second)
	if r.status == 0 {
		t.Errorf("a capture on a full disk ends with success\n%s", r)
	}
	r.wantMessage(t, "no space left", "c.pcapng")
	hold.write([]byte("echo\n"))
	hold.waitText(t, `"echoed","open":5`, 10*time.Second)
	hold.closeInput()
	hold.wait(t, 5*time.Second)
}
