package guest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/tun"
)

// These tests run real sandboxes. The test binary plays three more roles:
//
//	test (root) ── "stand": a private mount namespace with a /dev/net/tun for
//	                all, and an /etc of its own; becomes the user ──►
//	               "drive": the monitor: Start, Release, Wait, Close ──►
//	               "guest": the stage
//
// so that the tests as an ordinary user change nothing on the machine.

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case StageCommand:
			os.Exit(Main(os.Args[2:]))
		case "stand":
			os.Exit(stand(os.Args[2]))
		case "drive":
			os.Exit(drive(os.Args[2]))
		case "shell":
			os.Exit(jobShell(os.Args[2]))
		}
	}
	os.Exit(m.Run())
}

// scene tells a driver what to do.
type scene struct {
	UID      int
	Config   Config
	Target   *Target
	Preserve int    // descriptors from 3 on that CMD gets
	Announce bool   // print the stage's PID before CMD starts
	Relay    bool   // pass signals on
	SubIDs   string // contents of /etc/subuid and /etc/subgid
	Resolv   string // "", "absent", "dangling", "link"
	Hosts    string
	Script   string // names what the driver does
	Tun      string // "", "absent", "locked"
	Nohup    bool   // as under nohup(1), with a low limit and a strict umask
	NoUserNS bool   // run the driver where user namespaces are off
}

const ordinary = 65534

func (s scene) text(t testing.TB) string {
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func baseConfig(command ...string) Config {
	return Config{
		Command: command,
		Env:     []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "MARK=x"},
		Dir:     "/",
		Link:    tun.Config{Name: "tap0", MTU: 1500},
		MAC:     []byte{0x02, 0, 0, 0, 0, 0x64},
		Addr4:   netip.MustParsePrefix("10.0.2.100/24"), Gateway4: netip.MustParseAddr("10.0.2.2"),
		Addr6: netip.MustParsePrefix("fd00::100/64"), Gateway6: netip.MustParseAddr("fd00::2"),
		DNS: []netip.Addr{netip.MustParseAddr("10.0.2.3")}, Search: []string{"example.test"},
		ResolvOptions: []string{"edns0"},
		Hosts:         []HostEntry{{netip.MustParseAddr("192.0.2.9"), []string{"added.test"}}},
	}
}

// users runs f as root and as an ordinary user.
func users(t *testing.T, f func(t *testing.T, uid int)) {
	needRoot(t)
	for name, uid := range map[string]int{"root": 0, "ordinary user": ordinary} {
		t.Run(name, func(t *testing.T) { f(t, uid) })
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to set the scene (it plays the ordinary user too)")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("no /dev/net/tun on this machine")
	}
}

// command prepares a driver.
func (s scene) command(t testing.TB) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "stand", s.text(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	return cmd
}

type outcome struct {
	code           int
	stdout, stderr string
}

// play runs a scene to its end.
func play(t *testing.T, s scene) outcome {
	t.Helper()
	cmd := s.command(t)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := <-launch(t, cmd)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// launch starts a driver and returns the channel that its end is reported on. One
// goroutine keeps the forking thread, to which the parent-death signal is tied.
func launch(t testing.TB, cmd *exec.Cmd) <-chan error {
	t.Helper()
	up, done := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		up <- err
		if err == nil {
			defer time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }).Stop()
			done <- cmd.Wait()
		}
	}()
	if err := <-up; err != nil {
		t.Fatal(err)
	}
	return done
}

// launchReading is launch that also returns a reader of the driver's output. Unlike the pipe of
// exec's StdoutPipe, it outlasts the driver.
func launchReading(t testing.TB, cmd *exec.Cmd) (*bufio.Reader, <-chan error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd.Stdout = w
	done := launch(t, cmd)
	w.Close()
	return bufio.NewReader(r), done
}

// playShell is play with a shell script as CMD, which must succeed.
func playShell(t *testing.T, s scene, script string) string {
	t.Helper()
	s.Config.Command = []string{"sh", "-c", script}
	got := play(t, s)
	if got.code != 0 || got.stderr != "" {
		t.Fatalf("%s\nstatus %d\nstdout %s\nstderr %s", script, got.code, got.stdout, got.stderr)
	}
	return got.stdout
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "stand:", err)
		os.Exit(99)
	}
}

// stand sets the scene and becomes the user.
func stand(text string) int {
	runtime.LockOSThread()
	var s scene
	must(json.Unmarshal([]byte(text), &s))
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, "mode=0755"))
	if s.Tun != "absent" {
		must(unix.Mknod("/dev/net/tun", unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))))
	}
	if s.Tun == "" {
		must(os.Chmod("/dev/net/tun", 0o666))
	}
	etc := map[string]string{"hosts": s.Hosts, "subuid": s.SubIDs, "subgid": s.SubIDs}
	if s.NoUserNS {
		b, err := os.ReadFile("/proc/self/exe")
		must(err)
		must(os.WriteFile(self(), b, 0o755))
	}
	for _, f := range []string{"passwd", "group", "nsswitch.conf"} {
		b, err := os.ReadFile("/etc/" + f)
		must(err)
		etc[f] = string(b)
	}
	if s.Resolv == "" {
		etc["resolv.conf"] = "nameserver 192.0.2.53\n"
	}
	must(unix.Mount("tmpfs", "/etc", "tmpfs", 0, "mode=0755"))
	for name, content := range etc {
		must(os.WriteFile("/etc/"+name, []byte(content), 0o644))
	}
	switch s.Resolv {
	case "dangling":
		must(os.Symlink("/run/nowhere/resolv.conf", "/etc/resolv.conf"))
	case "link":
		must(unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"))
		must(os.WriteFile("/run/stub.conf", []byte("nameserver 127.0.0.53\n"), 0o644))
		must(os.Symlink("../run/stub.conf", "/etc/resolv.conf"))
	}
	if s.UID != 0 {
		must(os.Chown("/etc", s.UID, s.UID))
		must(syscall.Setgroups(nil))
		must(syscall.Setresgid(s.UID, s.UID, s.UID))
		must(syscall.Setresuid(s.UID, s.UID, s.UID))
	}
	if s.Nohup {
		signal.Ignore(unix.SIGHUP)
		unix.Umask(0o027)
		must(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 777, Max: 4096}))
	}
	if s.NoUserNS {
		must(syscall.Exec("/usr/bin/unshare", []string{"unshare", "-Ur", "sh", "-c",
			"echo 0 >/proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\"", self(), "drive", text}, os.Environ()))
	}
	must(syscall.Exec("/proc/self/exe", []string{"driver", "drive", text}, os.Environ()))
	return 99
}

// self returns a path of this binary that an ordinary user can reach too.
func self() string { return "/dev/net/self" }

func openFDs() []string {
	entries, _ := os.ReadDir("/proc/self/fd")
	var out []string
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			out = append(out, e.Name()+" "+target)
		}
	}
	return out
}

// drive is the monitor. It exits with 125 and a message on stderr if it fails, and with 98 if it
// leaks.
func drive(text string) int {
	var s scene
	must(json.Unmarshal([]byte(text), &s))
	for i := range s.Preserve {
		s.Config.Files = append(s.Config.Files, os.NewFile(uintptr(3+i), "preserved"))
	}
	if f, err := os.Open(os.DevNull); err == nil { // Go's poller opens its own descriptors, once
		f.Close()
	}
	if script := scripts[s.Script]; script != nil {
		return script(s)
	} else if s.Script != "" && s.Script != "twice" {
		fmt.Fprintln(os.Stderr, "no such script:", s.Script)
		return 99
	}
	code := driveOnce(s)
	before := len(openFDs())
	if s.Script == "twice" {
		code = driveOnce(s)
		if after := openFDs(); len(after) != before {
			fmt.Fprintln(os.Stderr, "leaked descriptors:", after)
			return 98
		}
	}
	return code
}

func driveOnce(s scene) int {
	complain := func(err error) int {
		fmt.Fprintln(os.Stderr, "sluice:", err)
		var exec *ExecError
		if errors.As(err, &exec) {
			return exec.Status
		}
		return StatusOurs
	}
	s.Config.Signals = InheritedSignals()
	g, err := Start(s.ctx(), s.Config)
	if err != nil {
		return complain(err)
	}
	if s.Announce {
		fmt.Printf("stage %d\n", g.PID())
	}
	if s.Relay {
		defer relay(g)()
	}
	if err := g.ReleaseJob(); err != nil {
		defer g.Close()
		return complain(err)
	}
	st, err := g.Wait()
	if cerr := g.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return complain(err)
	}
	return st.Code
}

// holders lists the processes in the network namespace.
func holders(ns string) []string {
	var out []string
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, l := range links {
		if got, err := os.Readlink(l); err == nil && got == ns {
			pid := strings.Split(l, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			out = append(out, pid+" "+strings.ReplaceAll(string(comm), "\x00", " "))
		}
	}
	return out
}
