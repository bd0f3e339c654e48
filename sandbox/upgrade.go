package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/logring"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// A new binary takes a running attachment over.
//
//	client ── upgrade ─► old monitor: asks the binary whether it knows how
//	                       stops the worker in order: proxied connections are reset
//	                       starts a guardian of its own binary, with all that it holds
//	                       execve, in the same process
//	                     new monitor: the same pid, lock, socket and devices
//	                       starts its own worker, and lets the guardian go
//	client ◄── result ── and answers
//
// What stays: the devices with whatever waits in them, the pod's addresses, the
// control socket (a client that connects meanwhile waits), the policy in force, its
// generation and the tunables, the flows of the inbound path (they pass as packets,
// and are remembered: forwarder.Config.Memory), the log's lines and the flow log.
// What does not: connections that the worker terminates; both their ends are told by
// a reset. The process is the same to whoever has noted its pid and start time.
//
// If the new binary ends, crashes or hangs before its worker serves, the guardian is
// the monitor, with the binary that the pod had and a pid of its own. From then on it
// is the supervisor's to try: a pod is never given up.

// takeoverVersion is that of resumption and attachmentStart: a binary takes over
// from one of the same version.
const takeoverVersion = "sluice attachment 3"

// probeArgument, in the place of a name, makes AttachmentMain print takeoverVersion.
const probeArgument = "--version"

// probeTimeout bounds that.
const probeTimeout = 5 * time.Second

// resumption is what one binary leaves to the next, beside the configuration. The
// numbers are descriptors.
type resumption struct {
	Started    time.Time            `json:"started"`
	Rules      channel.RulesMessage `json:"rules"`
	Generation uint64               `json:"generation"`
	Sysctls    map[string]string    `json:"sysctls,omitempty"`
	Restarts   uint64               `json:"restarts"`
	Log        []api.LogLine        `json:"log,omitempty"`
	Lock       int                  `json:"lock"`
	Listener   int                  `json:"listener"`
	Memory     int                  `json:"memory"` // of flows
	// Client is the connection that asked; 0 once it was answered.
	Client int `json:"client,omitempty"`
	// Told is where the new monitor says that its worker serves, or why not, to the
	// guardian, which is GuardianPID; 0 once it has.
	Told        int `json:"told,omitempty"`
	GuardianPID int `json:"guardianPID,omitempty"`
	// Guard is the other end, in the guardian's own resumption, and failure what it
	// was told, or found out.
	Guard   int `json:"guard,omitempty"`
	failure string
}

// takeover is a request for an upgrade that was found good.
type takeover struct {
	exe    string
	client *net.UnixConn
	// failed gets the error that kept the old binary in place.
	failed chan error
}

// upgrade implements kind.
func (m *attachment) upgrade(ctx context.Context, c *net.UnixConn, req api.Request) error {
	var p api.UpgradeParams
	if err := api.DecodeStrict(req.Params, &p); err != nil {
		return &api.Error{Code: api.CodeBadRequest, Message: "upgrade: parameters: " + err.Error()}
	}
	exe, err := newBinary(ctx, p.Binary)
	if err != nil {
		return &api.Error{Code: api.CodeInvalid, Message: "upgrade: " + err.Error()}
	}
	t := takeover{exe: exe, client: c, failed: make(chan error, 1)}
	select {
	case m.takeovers <- t:
	case <-ctx.Done():
		return ctx.Err()
	}
	// Nobody but the worker's end, the guardian and the exec stand between here and an answer.
	select {
	case err := <-t.failed:
		return &api.Error{Code: api.CodeFailed, Message: "upgrade: " + err.Error()}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// newBinary finds the binary that is to take over, by default what is now at the
// path that this one was started from, and makes sure that it can.
func newBinary(ctx context.Context, path string) (string, error) {
	if path == "" {
		own, err := os.Readlink("/proc/self/exe")
		if err != nil {
			return "", err
		}
		path = strings.TrimSuffix(own, " (deleted)")
	}
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("the binary %q: want an absolute path", path)
	}
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("there is no binary %s: install it first, or name another", path)
	}
	if err != nil {
		return "", err
	}
	owner := registry.OwnerOf(fi)
	switch mode := fi.Mode(); {
	case !mode.IsRegular():
		return "", fmt.Errorf("%s is no regular file", path)
	case owner != 0 && owner != os.Geteuid() || mode.Perm()&0o022 != 0:
		return "", fmt.Errorf("%s can be changed by others than root (owner %d, mode %#o): chown and chmod it", path, owner, mode.Perm())
	case mode.Perm()&0o005 != 0o005:
		return "", fmt.Errorf("%s must be readable and executable for everyone, as its worker is nobody: chmod 755 it", path)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, AttachmentCommand, probeArgument).Output()
	if word := strings.TrimSpace(string(out)); err != nil || word != takeoverVersion {
		return "", fmt.Errorf("%s cannot take over: asked for %q it says %q (%v)", path, takeoverVersion, logring.CleanLine(word), err)
	}
	return path, nil
}

// takeOver has another binary take the place of this one. It returns only if that
// could not be. There is no worker, and change is held.
func (m *attachment) takeOver(exe string, client *net.UnixConn) error {
	var fds inherited
	defer fds.close()
	guard, told, err := os.Pipe()
	if err != nil {
		return err
	}
	defer guard.Close()
	defer told.Close()
	guardian, err := m.startGuardian(guard, client)
	if err != nil {
		return fmt.Errorf("start the guardian of the upgrade: %w", err)
	}
	_ = guard.Close() // or the guardian's end would not be the last
	s := m.bequest(fds.keep, client)
	s.Resume.Told, s.Resume.GuardianPID = fds.keep(told), guardian.Pid
	mem, err := s.file()
	if err == nil {
		defer mem.Close()
		config := fds.keep(mem)
		if err = fds.survive(); err == nil {
			args := []string{os.Args[0], AttachmentCommand, m.cfg.Name, strconv.Itoa(config)}
			err = fmt.Errorf("execute %s: %w", exe, syscall.Exec(exe, args, os.Environ()))
		}
	}
	_ = guardian.Kill()
	_, _ = guardian.Wait()
	return err
}

// bequest is all that another process needs to go on. keep makes a descriptor the
// other's, and says its number there.
func (m *attachment) bequest(keep func(syscall.Conn) int, client *net.UnixConn) attachmentStart {
	r := &resumption{Lock: keep(m.dir.Lock), Listener: keep(m.listener), Memory: keep(m.memory)}
	m.mu.Lock()
	r.Started, r.Rules, r.Generation, r.Sysctls, r.Restarts = m.base.Started, m.rules, m.generation, m.sysctls, m.restarts
	m.mu.Unlock()
	r.Log, _ = m.log.Last(0)
	if client != nil {
		r.Client = keep(client)
	}
	s := attachmentStart{Config: m.cfg, In0: keep(m.cfg.In0), Resume: r}
	for _, f := range m.cfg.Device {
		s.Device = append(s.Device, keep(f))
	}
	return s
}

// startGuardian starts this binary anew, to take over if the next one fails.
func (m *attachment) startGuardian(guard *os.File, client *net.UnixConn) (*os.Process, error) {
	var fds inherited
	defer fds.close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	var handed []int
	keep := func(f syscall.Conn) int {
		handed = append(handed, fds.keep(f))
		return attachmentFirstFD + len(handed) - 1
	}
	s := m.bequest(keep, client)
	s.Resume.Guard = keep(guard)
	mem, err := s.file()
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	files := []uintptr{uintptr(channel.FDOf(null)), uintptr(channel.FDOf(null)), 2, uintptr(channel.FDOf(mem))}
	for _, fd := range handed {
		files = append(files, uintptr(fd))
	}
	if fds.err != nil {
		return nil, fds.err
	}
	return startWithFDs("/proc/self/exe", []string{os.Args[0], AttachmentCommand, m.cfg.Name}, files)
}

// guarded waits for the new binary, whose process is our parent. It reports whether
// that serves; otherwise everything is ours from here on.
func (r *resumption) guarded() bool {
	parent := registry.State{PID: os.Getppid()}
	parent.Start, _ = processStart(parent.PID)
	f := os.NewFile(uintptr(r.Guard), "guard")
	defer f.Close()
	ctx, cancel := context.WithTimeout(context.Background(), launchTimeout)
	defer cancel()
	err := awaitReady(ctx, f)
	if err == nil {
		return true
	}
	// One that hangs must not read what is the pod's beside us.
	_ = signalMonitor(parent, unix.SIGKILL)
	r.failure = "the new binary: " + err.Error()
	return false
}

// serves tells the guardian that it is not needed.
func (r *resumption) serves() {
	if r.tell(readyWord) {
		_, _ = unix.Wait4(r.GuardianPID, nil, 0, nil)
	}
}

// fails tells the guardian to take over; it reports whether there is one.
func (r *resumption) fails(err error) bool { return r.tell(err.Error()) }

func (r *resumption) tell(word string) bool {
	if r == nil || r.Told == 0 {
		return false
	}
	f := os.NewFile(uintptr(r.Told), "told")
	r.Told = 0
	_, err := f.WriteString(word)
	return errors.Join(err, f.Close()) == nil
}

// inherited are duplicates of descriptors that the next program gets.
type inherited struct {
	fds []int
	err error
}

func (h *inherited) keep(f syscall.Conn) int {
	rc, err := f.SyscallConn()
	if err != nil {
		h.err = errors.Join(h.err, err)
		return 0
	}
	fd := -1
	cerr := rc.Control(func(n uintptr) { fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 3) })
	if err = errors.Join(err, cerr); err != nil {
		h.err = errors.Join(h.err, err)
		return 0
	}
	h.fds = append(h.fds, fd)
	return fd
}

// survive has them outlive the execution of another program.
func (h *inherited) survive() error {
	for _, fd := range h.fds {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			h.err = errors.Join(h.err, err)
		}
	}
	return h.err
}

func (h *inherited) close() { channel.CloseAll(h.fds) }

// resume continues what the binary before this one did.
func (m *attachment) resume(r *resumption) error {
	m.rules, m.generation, m.sysctls, m.restarts = r.Rules, r.Generation, r.Sysctls, r.Restarts
	m.log.Lines = r.Log
	reg, err := registry.At(m.cfg.RuntimeDir)
	if err != nil {
		return err
	}
	m.dir = reg.Inherited(m.cfg.Name, os.NewFile(uintptr(r.Lock), registry.LockFile))
	unix.CloseOnExec(r.Lock)
	unix.CloseOnExec(r.Memory)
	if r.Told != 0 {
		unix.CloseOnExec(r.Told)
	}
	m.memory = os.NewFile(uintptr(r.Memory), "flows")
	f := os.NewFile(uintptr(r.Listener), registry.SocketFile)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("take the control socket over: %w", err)
	}
	m.listener = l.(*net.UnixListener)
	return nil
}

// tookOver ends the story: this process serves the pod, be it by the new binary or,
// with a failure, by the one of before.
func (m *attachment) tookOver(r *resumption) {
	r.serves()
	if r.failure != "" {
		m.log.Warnf("monitor", "an upgrade failed: %s: going on with version %s", r.failure, m.cfg.Version)
	} else {
		m.log.Infof("monitor", "version %s has taken over", m.cfg.Version)
	}
	c := r.client()
	if c == nil {
		return
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(api.RequestTimeout))
	if r.failure != "" {
		_ = api.WriteError(c, &api.Error{Code: api.CodeFailed, Message: "upgrade: " + r.failure + ": the old binary serves again"})
		return
	}
	_ = api.WriteResult(c, m.info())
}

// client is the connection of who asked for the upgrade, once.
func (r *resumption) client() *net.UnixConn {
	if r.Client == 0 {
		return nil
	}
	f := os.NewFile(uintptr(r.Client), "client")
	defer f.Close()
	r.Client = 0
	c, err := net.FileConn(f)
	if err != nil {
		return nil
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil
	}
	return u
}
