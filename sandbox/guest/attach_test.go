package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/idmap"
	"sluice.dev/sluice/tun"
)

func init() {
	scripts["attach"] = driveAttach
	scripts["attach to own"] = driveAttachOwn
}

// driveAttach attaches, prints so, and stays until the target is gone.
func driveAttach(s scene) int {
	g, err := Attach(s.ctx(), *s.Target, s.Config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sluice:", err)
		return StatusOurs
	}
	fmt.Println("attached", len(g.Device()))
	if _, err := g.Socket("tcp4"); err != nil {
		fmt.Fprintln(os.Stderr, "sluice:", err)
	}
	_, err = g.Wait()
	must(err)
	must(g.Close())
	fmt.Println("target gone")
	return 0
}

// driveAttachOwn makes a target in namespaces of its own with unshare(1). While attached, it looks
// at the target through nsenter(1); at the end it lists what is left in the namespace.
func driveAttachOwn(s scene) int {
	mapping := "-r"
	if s.Config.User == idmap.KeepCaller {
		mapping = "-c"
	}
	target := exec.Command("unshare", "-Un", mapping, "sh", "-c", "readlink /proc/self/ns/net; read x")
	in, err := target.StdinPipe()
	must(err)
	out, err := target.StdoutPipe()
	must(err)
	target.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must(target.Start())
	buf := make([]byte, 100)
	n, err := out.Read(buf)
	must(err)
	ns := strings.TrimSpace(string(buf[:n]))
	tgt := Target{PID: target.Process.Pid}
	if s.Target != nil {
		tgt = Target{NetNS: fmt.Sprintf("/proc/%d/ns/net", target.Process.Pid)}
		if s.Target.UserNS != "" {
			tgt.UserNS = fmt.Sprintf("/proc/%d/ns/user", target.Process.Pid)
		}
	}
	g, err := Attach(s.ctx(), tgt, s.Config)
	must(err)
	look := func() {
		b, err := exec.Command("nsenter", "-t", fmt.Sprint(target.Process.Pid), "-U", "-n", "--preserve-credentials",
			"sh", "-c", "cat /proc/net/dev | grep -c tap0; ip -br addr show tap0; ip route; ip -6 route show default").CombinedOutput()
		fmt.Printf("%s%v\n", b, err)
	}
	look()
	in.Close()
	_, err = g.Wait()
	must(err)
	_ = target.Wait()
	must(g.Close())
	if left := holders(ns); len(left) > 0 {
		fmt.Println("left over:", left)
	}
	return 0
}

func TestAttachToNamespacesOfTheSameUser(t *testing.T) {
	needRoot(t)
	for _, row := range []struct {
		name   string
		uid    int
		user   idmap.UserMode
		target *Target // nil means by PID
	}{
		{"a process that is root in its user namespace", ordinary, idmap.MapRoot, nil},
		{"a process that kept its uid there", ordinary, idmap.KeepCaller, nil},
		{"the path of its namespace", ordinary, idmap.MapRoot, &Target{}},
		{"the path, and the user namespace named", ordinary, idmap.KeepCaller, &Target{UserNS: "own"}},
		{"by root, from outside the user namespace", 0, idmap.MapRoot, nil},
		{"by root, through the user namespace named", 0, idmap.MapRoot, &Target{UserNS: "own"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := scene{UID: row.uid, Target: row.target, Script: "attach to own", Config: baseConfig()}
			s.Config.Command, s.Config.User = nil, row.user
			got := play(t, s)
			want := "1\ntap0 UNKNOWN 10.0.2.100/24 fd00::100/64"
			flat := strings.Join(strings.Fields(strings.ReplaceAll(got.stdout, "\n", " ; ")), " ")
			if got.code != 0 || got.stderr != "" || !strings.Contains(flat, strings.ReplaceAll(want, "\n", " ; ")) ||
				!strings.Contains(got.stdout, "default via 10.0.2.2") || !strings.Contains(got.stdout, "default via fd00::2") ||
				strings.Contains(got.stdout, "left over") {
				t.Errorf("%+v", got)
			}
		})
	}
}

// netnsPath makes a namespace as ip-netns(8) does, under a directory of the test's.
func netnsPath(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("unshare", "--net="+path, "true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

func inNetns(t *testing.T, path, script string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+path, "sh", "-c", script).CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s (%v)", out, err)
	}
	return string(out)
}

func TestAttachByRootToAPath(t *testing.T) {
	needRoot(t)
	for _, row := range []struct {
		name    string
		change  func(*Config)
		script  string
		want    string
		missing string
	}{
		{"configured", func(*Config) {}, "ip route; ip link show lo", "default via 10.0.2.2", "state DOWN"},
		{"the device only", func(c *Config) { c.NoConfigure = true }, "ip link show tap0; ip route; ip addr show lo", "state DOWN", "10.0.2"},
		{"a TUN device with two queues", func(c *Config) { c.Link.Kind, c.Link.Queues = tun.TUN, 2 }, "ip -d link show tap0", "multi_queue", "link/ether"},
		{"the namespace's sysctls are left alone", func(*Config) {}, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "1024", "xxx"},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := netnsPath(t)
			cfg := baseConfig()
			row.change(&cfg)
			g, err := Attach(t.Context(), Target{NetNS: path}, cfg)
			if err != nil {
				t.Fatal(err)
			}
			if len(g.Notes()) != 0 {
				t.Error(g.Notes())
			}
			if got := inNetns(t, path, row.script); !strings.Contains(got, row.want) || strings.Contains(got, row.missing) {
				t.Errorf("got %s", got)
			}
			if err := g.Close(); err != nil {
				t.Error(err)
			}
			if got := inNetns(t, path, "ip link show tap0"); !strings.Contains(got, "does not exist") {
				t.Errorf("after Close: %s", got)
			}
		})
	}
}

// The target's root may trace the stage, and take what it has.
func TestAnAttachedStageHasNothingOfTheCallersTerminal(t *testing.T) {
	needRoot(t)
	g, err := Attach(t.Context(), Target{NetNS: netnsPath(t)}, baseConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for fd := range 3 {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", g.proc.pid, fd)); err != nil || to != os.DevNull {
			t.Errorf("descriptor %d of the stage is %s, %v", fd, to, err)
		}
	}
	if session, err := unix.Getsid(g.proc.pid); err != nil || session != g.proc.pid {
		t.Errorf("the stage is in session %d, %v", session, err)
	}
}

func TestAttachEndsWithItsTarget(t *testing.T) {
	needRoot(t)
	path := netnsPath(t)
	g, err := Attach(t.Context(), Target{NetNS: path}, baseConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	other := filepath.Join(filepath.Dir(path), "other")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Remove(other) // an event that is not about the target
	select {
	case <-g.exited:
		t.Fatal("ended too early")
	default:
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	if _, err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestAttachRefusesWithCauseAndCure(t *testing.T) {
	needRoot(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	path := netnsPath(t)
	first, err := Attach(t.Context(), Target{NetNS: path}, baseConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second := baseConfig()
	second.Link.Name = "tap1"
	for _, row := range []struct {
		name string
		s    scene
		want string
	}{
		{"a process that does not exist", scene{Target: &Target{PID: 1 << 22}}, "the target is gone: there is no process 4194304"},
		{"a path that does not exist", scene{Target: &Target{NetNS: "/run/netns/none"}}, "the target is gone: there is no /run/netns/none"},
		{"a path that is no namespace", scene{Target: &Target{NetNS: file}}, "is not a network namespace"},
		{"a namespace of the wrong type", scene{Target: &Target{NetNS: "/proc/self/ns/mnt"}}, "is not a network namespace"},
		{"neither process nor path", scene{Target: &Target{}}, "give either a process or the path"},
		{"somebody else's process", scene{UID: ordinary, Target: &Target{PID: os.Getpid()}}, "attach as the user who started it, or as root"},
		{"the host's own namespace", scene{UID: ordinary, Target: &Target{NetNS: "/proc/self/ns/net"}}, "belong"},
		{"a name that is taken", scene{Target: &Target{NetNS: path}, Config: baseConfig()}, "choose another name"},
		{"a default route that is there already", scene{Target: &Target{NetNS: path}, Config: second}, "has one already"},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.s.Script = "attach"
			got := play(t, row.s)
			if got.code != StatusOurs || !strings.Contains(got.stderr, row.want) {
				t.Errorf("%+v", got)
			}
		})
	}
}
