package main

// The supervisor sets what a run needs outside its own namespaces, starts the run as PID 1 of a PID
// namespace, and restores everything when the run ends, however it ends. If the supervisor itself
// is killed, the kernel ends the run and all it started; only then do the two settings below stay
// as they are.
//
//	/dev/net/tun                      mode 0666 (root only): candidates run as an ordinary user
//	net.ipv4.tcp_congestion_control   cubic (root only): namespaces made later inherit it

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	insideEnv     = "SLUICE_BENCH_INSIDE"
	ordinaryUID   = 65534
	tunDevice     = "/dev/net/tun"
	congestionKey = "/proc/sys/net/ipv4/tcp_congestion_control"
)

// restorer undoes changes once, in reverse order.
type restorer []func() error

func (r *restorer) add(f func() error) { *r = append(*r, f) }

func (r *restorer) run() (err error) {
	for i := len(*r) - 1; i >= 0; i-- {
		err = errors.Join(err, (*r)[i]())
	}
	*r = nil
	return err
}

func supervise(o options) (err error) {
	runtime.LockOSThread() // the run's death signal depends on this thread

	// Signals are caught from the first change on; SIGQUIT keeps Go's meaning.
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)

	var undo restorer
	defer func() { err = errors.Join(err, undo.run()) }()

	o.UID = os.Getuid()
	if o.UID == 0 {
		o.UID = ordinaryUID
		if err := openTun(&undo, &o); err != nil {
			return err
		}
	}
	if err := useCubic(&undo, &o); err != nil {
		return err
	}
	if err := gather(&undo, &o); err != nil {
		return err
	}
	return runInside(o, ends)
}

func openTun(undo *restorer, o *options) error {
	var st unix.Stat_t
	if err := unix.Stat(tunDevice, &st); err != nil {
		return fmt.Errorf("looking at %s: %w", tunDevice, err)
	}
	mode := st.Mode & 0o7777
	if mode&0o006 == 0o006 {
		return nil
	}
	if err := unix.Chmod(tunDevice, 0o666); err != nil {
		return fmt.Errorf("opening %s to ordinary users: %w", tunDevice, err)
	}
	undo.add(func() error { return unix.Chmod(tunDevice, mode) })
	o.Notes = append(o.Notes, tunDevice+" was opened to all users for the run, and closed again")
	return nil
}

func useCubic(undo *restorer, o *options) error {
	was, err := os.ReadFile(congestionKey)
	if err != nil || strings.TrimSpace(string(was)) == congestion {
		return err
	}
	if err := os.WriteFile(congestionKey, []byte(congestion), 0); err != nil {
		o.Notes = append(o.Notes, fmt.Sprintf("the machine's congestion control stayed %s (%v): the generator asks for %s itself, peers' own sockets may use another",
			strings.TrimSpace(string(was)), err, congestion))
		return nil
	}
	undo.add(func() error { return os.WriteFile(congestionKey, was, 0) })
	return nil
}

// gather puts the binaries where the candidates' user can execute them, and finds peers.
func gather(undo *restorer, o *options) error {
	dir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return err
	}
	undo.add(func() error { return os.RemoveAll(dir) })
	o.Dir = dir
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	for _, d := range []string{"runtime", "logs"} {
		d = filepath.Join(dir, d)
		if err := errors.Join(os.Mkdir(d, 0o700), os.Chown(d, o.UID, -1)); err != nil {
			return err
		}
	}
	if err := copyFile(o.Sluice, filepath.Join(dir, "sluice")); err != nil {
		return fmt.Errorf("%w (make build first)", err)
	}
	o.Sluice = filepath.Join(dir, "sluice")
	if err := copyFile("/proc/self/exe", filepath.Join(dir, "bench")); err != nil {
		return err
	}
	for name, text := range map[string][]byte{"rules.yaml": manyRules(10_000), "domains.yaml": manyDomains(1_000), "names.yaml": []byte(namesPolicy)} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return err
		}
	}
	for name, path := range map[string]*string{"pasta": &o.Pasta, "slirp4netns": &o.Slirp} {
		asked := *path
		if asked == "" {
			asked = name
		}
		found, err := exec.LookPath(asked)
		switch {
		case err == nil:
			if *path, err = filepath.Abs(found); err != nil {
				return err
			}
		case *path != "":
			return err
		default:
			o.Notes = append(o.Notes, name+" is not on PATH: not measured")
		}
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(0o755), out.Close())
}

func runInside(o options, ends <-chan os.Signal) error {
	config, err := json.Marshal(o)
	if err != nil {
		return err
	}
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // the terminal's signals reach only this process
	}
	if uid := os.Getuid(); uid != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_KILL}
	}
	cmd := exec.Command(filepath.Join(o.Dir, "bench"))
	cmd.Env = append(os.Environ(), insideEnv+"="+string(config))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("making namespaces for the run: %w (are user namespaces allowed: /proc/sys/user/max_user_namespaces?)", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // the kernel ends it with the run
	// The limit is well over the budget: even a run that hangs must end.
	hung := time.NewTimer(2*o.Budget + 10*time.Minute)
	defer hung.Stop()
	select {
	case err := <-ended:
		return err
	case s := <-ends:
		err = fmt.Errorf("ended by %v", s)
	case <-hung.C:
		err = errors.New("the run hung")
	}
	return errors.Join(err, cmd.Process.Kill(), ignore(<-ended))
}

// ignore drops an error that follows from a reported one.
func ignore(error) error { return nil }
