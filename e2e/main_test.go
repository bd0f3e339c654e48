package e2e

// A run gets its own world in three stages of the same test binary:
//
//	enter     the process that `go test` started. Builds what is not built, then starts
//	          the next stage in new namespaces and waits. Needs no privilege: an
//	          ordinary user's run maps its uid onto itself and keeps every capability
//	          of the new user namespace as ambient ones.
//	init      process 1 of the new PID namespace: mounts /proc and an empty /run, starts
//	          the next stage, reaps orphans. When it dies, by whatever means, the kernel
//	          ends all that the tests started.
//	tests     runs the tests.

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const stageEnv = "SLUICE_E2E_STAGE"

// privileged reports whether the run is root's on the machine itself. In an ordinary user's run the
// tests have capabilities too, but sluice has none.
var privileged = os.Getenv("SLUICE_E2E_PRIVILEGED") == "1"

func init() {
	// The main thread never changes its namespaces, because /proc/self describes it.
	runtime.LockOSThread()
}

func TestMain(m *testing.M) {
	flag.Parse()
	switch os.Getenv(stageEnv) {
	case "":
		if f := flag.Lookup("test.list"); f != nil && f.Value.String() != "" {
			os.Exit(m.Run())
		}
		os.Exit(enter())
	case "init":
		os.Exit(reap())
	}
	os.Exit(runTests(m))
}

func enter() int {
	if os.Getuid() == 0 {
		os.Setenv("SLUICE_E2E_PRIVILEGED", "1")
	}
	dir, err := os.MkdirTemp("", "sluice-e2e-")
	if err != nil {
		return complain(err)
	}
	defer os.RemoveAll(dir)
	os.Setenv("SLUICE_E2E_DIR", dir)
	os.Setenv("TMPDIR", dir) // the leftovers of a killed test go with it
	binaries := []struct{ name, pkg, tags string }{
		{"SLUICE_BIN", "sluice.dev/sluice/cmd/sluice", ""},
		{"PEER_BIN", "sluice.dev/sluice/e2e/peer", ""},
		{"SLUICE_CNI_BIN", "sluice.dev/sluice/cmd/sluice-cni", ""},
		{"SLUICE_CNI_FAULTS_BIN", "sluice.dev/sluice/cmd/sluice-cni", "faults"},
	}
	if os.Getenv("SLUICE_BIN") == "" && hasCompiler() { // a caller that provides one provides the other
		binaries = append(binaries, struct{ name, pkg, tags string }{"SLUICE_CGO_BIN", "sluice.dev/sluice/cmd/sluice", "cgo"})
	}
	for _, b := range binaries {
		if err := provide(b.name, b.pkg, filepath.Join(dir, b.tags), b.tags); err != nil {
			return complain(err)
		}
	}
	os.Chmod(dir, 0o755)
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL, // of the main thread, which waits below
	}
	if uid := os.Getuid(); uid != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		for c := range uintptr(unix.CAP_LAST_CAP + 1) {
			attr.AmbientCaps = append(attr.AmbientCaps, c)
		}
	}
	// The terminal sends these to the tests too. They are caught, not ignored, because every
	// command would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGQUIT)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"=init")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	case errors.As(err, &exit):
		return complain(fmt.Errorf("the run ended by %v", exit))
	}
	return complain(fmt.Errorf("making namespaces for the run: %w (are user namespaces allowed: /proc/sys/user/max_user_namespaces?)", err))
}

func complain(err error) int {
	fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
	return 1
}

// hasCompiler reports whether a C compiler is on PATH by a name that Go looks for.
func hasCompiler() bool {
	return slices.ContainsFunc([]string{"gcc", "cc"}, func(name string) bool {
		_, err := exec.LookPath(name)
		return err == nil
	})
}

// provide makes sure that the variable names a binary. The tag cgo asks for one with cgo.
func provide(name, pkg, dir, tags string) error {
	path := os.Getenv(name)
	if path == "" {
		path = filepath.Join(dir, filepath.Base(pkg))
		build := exec.Command("go", "build", "-tags", tags, "-o", path, pkg)
		cgo := "CGO_ENABLED=0"
		if tags == "cgo" {
			cgo = "CGO_ENABLED=1"
		}
		build.Env = append(os.Environ(), cgo)
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
		}
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return fmt.Errorf("%s=%s: %w", name, path, err)
	}
	return os.Setenv(name, path)
}

func reap() int {
	if os.Getpid() != 1 {
		return complain(errors.New("stage init is not process 1"))
	}
	for _, m := range []struct{ source, target, kind, data string }{
		{"none", "/", "", ""},
		{"proc", "/proc", "proc", ""},
		{"run", "/run", "tmpfs", "mode=755"},
	} {
		flags := uintptr(0)
		if m.kind == "" {
			flags = unix.MS_REC | unix.MS_PRIVATE
		}
		if err := unix.Mount(m.source, m.target, m.kind, flags, m.data); err != nil {
			return complain(fmt.Errorf("mounting %s: %w", m.target, err))
		}
	}
	os.Mkdir("/run/sshd", 0o755)
	os.Setenv(stageEnv, "tests")
	pid, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return complain(fmt.Errorf("starting the tests: %w", err))
	}
	for {
		var ws syscall.WaitStatus
		switch got, err := syscall.Wait4(-1, &ws, 0, nil); {
		case err == syscall.EINTR:
		case err != nil:
			return complain(err)
		case got == pid && ws.Signaled():
			return complain(fmt.Errorf("the tests were ended by %v", ws.Signal()))
		case got == pid:
			return ws.ExitStatus()
		}
	}
}

// runTests sets up what all tests share.
func runTests(m *testing.M) int {
	if err := prepareHome(); err != nil {
		return complain(err)
	}
	return m.Run()
}

// prepareHome gives the run's user a home, a runtime directory and a shell: the user nobody has
// none of these, and sshd requires them.
func prepareHome() error {
	home := filepath.Join(workDir(), "home")
	runtimeDir := filepath.Join(workDir(), "runtime")
	for _, d := range []string{home, runtimeDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	os.Setenv("HOME", home)
	os.Setenv("XDG_RUNTIME_DIR", runtimeDir)
	os.Setenv("LC_ALL", "C.UTF-8")
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	os.Unsetenv(stageEnv)
	for _, v := range []string{"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy",
		"GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		os.Unsetenv(v)
	}
	if privileged {
		return nil
	}
	passwd := filepath.Join(workDir(), "passwd")
	line := fmt.Sprintf("tester:x:%d:%d:tester:%s:/bin/sh\n", os.Getuid(), os.Getgid(), home)
	if err := os.WriteFile(passwd, []byte(line), 0o644); err != nil {
		return err
	}
	return unix.Mount(passwd, "/etc/passwd", "", unix.MS_BIND, "")
}

func workDir() string   { return os.Getenv("SLUICE_E2E_DIR") }
func sluiceBin() string { return os.Getenv("SLUICE_BIN") }
func peerBin() string   { return os.Getenv("PEER_BIN") }
