package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/console"
	"sluice.dev/sluice/sandbox/internal/explain"
	"sluice.dev/sluice/sandbox/internal/idmap"
)

// Exit statuses, as shells and similar programs use them.
const (
	StatusOurs          = 125 // sluice itself failed
	StatusNotExecutable = 126
	StatusNotFound      = 127
	statusSignalled     = 128 // plus the signal
)

// setupTimeout bounds how long making a guest may take. It takes about ten milliseconds, and
// seconds only on a thrashing machine.
const setupTimeout = 20 * time.Second

// closeTimeout bounds how long Close waits for the stage to clean up by itself.
const closeTimeout = 3 * time.Second

var (
	// ErrStageGone means that the guest stage ended early: something killed it, and the sandbox
	// with it.
	ErrStageGone = errors.New("the guest stage ended unexpectedly")
	// ErrClosed means that Close was called.
	ErrClosed = errors.New("guest closed")
)

// ExecError reports that CMD could not be started. Status is the exit status to use:
// StatusNotFound, StatusNotExecutable or StatusOurs.
type ExecError struct {
	Status int
	Text   string
}

func (e *ExecError) Error() string { return e.Text }

// Status is how CMD ended. The zero value is success.
type Status struct {
	Code   int            // as a shell's $?: 0..255, 128+Signal when killed
	Signal syscall.Signal // 0 unless CMD was killed by it
}

// Guest is the inside of a sandbox, as the monitor sees it. Its methods may be called from any
// goroutine.
type Guest struct {
	ch      *channel
	proc    *stageProcess
	userns  nsID // the namespace we must clean up; zero when attached
	device  []*os.File
	diag    *os.File
	console *console.Console // nil without a terminal
	cookie  uint64           // of the guest's network namespace
	ephem   portRange
	notes   []string
	covered int
	gone    chan struct{} // closed by readLoop when the channel has ended
	exited  chan struct{} // closed once status or err is final
	started chan error    // the outcome of starting CMD, sent once
	stopped chan syscall.Signal
	stop    func() // ends the watch on an attached target; never nil

	mu       sync.Mutex
	status   Status
	err      error // what Wait returns; guarded by mu
	final    bool
	released bool
	closed   bool
	lastID   uint32
	asks     map[uint32]chan socketAnswer
}

type socketAnswer struct {
	file *os.File
	err  error
}

// Start makes a new sandbox, up to its device. CMD waits for Release. The context bounds only the
// setup. Every descriptor of this process from 3 on becomes close-on-exec.
func Start(ctx context.Context, cfg Config) (*Guest, error) {
	if err := cfg.validate(true); err != nil {
		return nil, err
	}
	if cfg.Env == nil {
		cfg.Env = os.Environ()
	}
	if cfg.Dir == "" {
		dir, err := os.Getwd()
		if errors.Is(err, unix.ENOENT) {
			// The directory was deleted. Staying in it would leave a way, through "..", beneath the
			// covers.
			dir, err = "/", nil
		}
		if err != nil {
			return nil, fmt.Errorf("finding the working directory: %w", err)
		}
		cfg.Dir = dir
	}
	maps, notes, err := idmap.PlanMaps(cfg.User, cfg.SubIDs)
	if err != nil {
		return nil, err
	}
	spec := stageSpec{Mode: modeRun, Config: cfg, Files: len(cfg.Files), PingGroups: maps.PingGroups()}
	return start(ctx, spec, notes, func(files []*os.File) (*stageProcess, error) {
		p, err := cloneStage(unix.CLONE_NEWUSER|unix.CLONE_NEWNS, cfg, files)
		if err != nil {
			return nil, explain.ExplainClone(err)
		}
		if err := maps.Write(p.pid); err != nil {
			p.kill()
			return nil, explain.ExplainMaps(err)
		}
		return p, nil
	})
}

// start runs a stage made by spawn and waits for its device.
func start(ctx context.Context, spec stageSpec, notes []string, spawn func([]*os.File) (*stageProcess, error)) (*Guest, error) {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	// Descriptors that the caller left open and did not ask to keep must not be inherited, or the
	// stage would hold them for the life of the sandbox.
	if err := closeOnExecFrom(3); err != nil {
		return nil, fmt.Errorf("marking inherited descriptors: %w", err)
	}
	ch, far, err := channelPair()
	if err != nil {
		return nil, err
	}
	plan, err := planFile(spec)
	if err != nil {
		ch.close()
		far.Close()
		return nil, err
	}
	proc, err := spawn([]*os.File{far, plan})
	far.Close()
	plan.Close()
	if err != nil {
		ch.close()
		return nil, err
	}
	g := &Guest{
		ch: ch, proc: proc, notes: notes, stop: func() {},
		gone: make(chan struct{}), exited: make(chan struct{}), started: make(chan error, 1),
		stopped: make(chan syscall.Signal, 1),
		asks:    make(map[uint32]chan socketAnswer),
	}
	if spec.Mode == modeRun {
		if g.userns, err = namespaceID(fmt.Sprintf("/proc/%d/ns/user", proc.number())); err != nil {
			proc.kill()
			ch.close()
			return nil, fmt.Errorf("identifying the sandbox's user namespace: %w", err)
		}
	}
	undo := context.AfterFunc(ctx, proc.kill)
	err = g.await(spec)
	if !undo() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("making the sandbox: %w", cause)
		}
		_ = g.Close()
		return nil, err
	}
	go g.readLoop()
	return g, nil
}

// planFile writes the stage's orders to a file in memory, since CMD's environment may be larger
// than any packet.
func planFile(spec stageSpec) (*os.File, error) {
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encoding the guest's configuration: %w", err)
	}
	if len(b) > maxConfigBytes {
		return nil, fmt.Errorf("command and environment take %d bytes, at most %d can be passed on", len(b), maxConfigBytes)
	}
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("passing the configuration to the guest: %w", err)
	}
	f := os.NewFile(uintptr(fd), "guest configuration")
	if _, err = f.Write(b); err == nil {
		_, err = f.Seek(0, 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("passing the configuration to the guest: %w", err)
	}
	return f, nil
}

// await lets the stage go on and receives the device from it.
func (g *Guest) await(spec stageSpec) error {
	if err := g.ch.send(message{Op: opMapped}); err != nil {
		return g.orphaned(err)
	}
	queues := max(spec.Config.Link.Queues, 1)
	m, files, err := g.ch.receive(queues + 1)
	if err == nil && m.Op == opTerminal && len(files) == 1 {
		if g.console, err = console.NewConsole(files[0], spec.Config.streams()); err != nil {
			return fmt.Errorf("taking the terminal: %w", err)
		}
		m, files, err = g.ch.receive(queues + 1)
	}
	switch {
	case err != nil:
		return g.orphaned(err)
	case m.Op == opFailed:
		closeAll(files)
		return errors.New(m.Text)
	case m.Op != opReady || len(files) != queues+1:
		closeAll(files)
		return fmt.Errorf("%w: %q with %d descriptors instead of the device", errBadMessage, m.Op, len(files))
	}
	<-g.proc.settled // by now, or very soon: the inner stage has spoken
	g.device, g.diag = files[:queues], files[queues]
	g.notes = append(g.notes, m.Notes...)
	g.covered = m.Covered
	g.ephem = portRange{uint16(m.Number >> 16), uint16(m.Number)}
	cookie, err := netnsCookie(int(g.diag.Fd()))
	if err != nil && !errors.Is(err, unix.ENOPROTOOPT) { // older than Linux 5.14
		return fmt.Errorf("identifying the guest's network namespace: %w", err)
	}
	g.cookie = cookie
	return nil
}

// orphaned replaces the error of a dead channel with the stage's end, which says more.
func (g *Guest) orphaned(err error) error {
	select {
	case <-g.proc.done:
		return fmt.Errorf("%w: %s", ErrStageGone, g.proc.state())
	case <-time.After(time.Second):
		return fmt.Errorf("%w: %v", ErrStageGone, err)
	}
}

// Device returns the device's descriptors, one per queue. The Guest owns them until Close.
func (g *Guest) Device() []*os.File { return g.device }

// PID returns the stage's process ID, which is valid as long as the sandbox lives: /proc/PID/ns/net
// is the guest's network namespace, /proc/PID/ns/user its user namespace.
func (g *Guest) PID() int { return g.proc.number() }

// Notes returns what this machine could not provide and the sandbox does without.
func (g *Guest) Notes() []string { return g.notes }

// Covered returns the number of the host's sockets that CMD cannot reach.
func (g *Guest) Covered() int { return g.covered }

// Release starts CMD. It returns an *ExecError if CMD could not be started.
func (g *Guest) Release() error {
	g.mu.Lock()
	switch {
	case g.closed:
		g.mu.Unlock()
		return ErrClosed
	case g.released:
		g.mu.Unlock()
		return errors.New("the guest was released already")
	}
	g.released = true
	g.mu.Unlock()
	if err := g.ch.send(message{Op: opExec}); err != nil {
		return g.orphaned(err)
	}
	select {
	case err := <-g.started:
		return err
	case <-g.gone:
		select {
		case err := <-g.started:
			return err
		default:
			return g.orphaned(errors.New("channel closed"))
		}
	}
}

// Wait returns CMD's status, or an error that says why there is none. For an attached guest it
// returns when the target is gone.
func (g *Guest) Wait() (Status, error) {
	<-g.exited
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.status, g.err
}

// finish records the first outcome.
func (g *Guest) finish(s Status, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.final {
		g.final, g.status, g.err = true, s, err
		close(g.exited)
	}
}

// Console returns the console between the caller's terminal and CMD's, or nil if CMD has no
// terminal.
func (g *Guest) Console() *console.Console { return g.console }

// Stopped returns a channel of the signals that stopped CMD, for StopJob. While one signal is
// pending in it, later ones are dropped.
func (g *Guest) Stopped() <-chan syscall.Signal { return g.stopped }

// toFront puts CMD into its terminal's foreground; called before Release, CMD starts there.
func (g *Guest) toFront() error { return g.ch.send(message{Op: opFront}) }

// Signal sends sig to CMD, or to its process group if a terminal would have. Before Release and
// after CMD's end there is no process to signal, which is not an error.
func (g *Guest) Signal(sig syscall.Signal) error {
	if err := g.ch.send(message{Op: opSignal, Number: int(sig)}); err != nil {
		return fmt.Errorf("signalling the command: %w", err)
	}
	return nil
}

// readLoop is owned by the Guest and ends with the channel. Its input may come from a stage that
// CMD took over.
func (g *Guest) readLoop() {
	err := g.read()
	close(g.gone)
	if errors.Is(err, errBadMessage) {
		g.proc.kill()
		g.finish(Status{}, err)
	}
	g.failAsks()
	<-g.proc.done
	g.finish(Status{}, fmt.Errorf("%w: %s", ErrStageGone, g.proc.state()))
}

func (g *Guest) read() error {
	running := false
	for {
		m, files, err := g.ch.receive(1)
		if err != nil {
			return err
		}
		if m.Op == opMade || (m.Op == opFailed && m.ID != 0) {
			g.answer(m, files)
			continue
		}
		closeAll(files)
		switch {
		case m.Op == opStarted && !running:
			running = true
			g.started <- nil
		case m.Op == opFailed && !running:
			running = true
			code := m.Number
			if code != StatusNotFound && code != StatusNotExecutable {
				code = StatusOurs
			}
			g.started <- &ExecError{Status: code, Text: m.Text}
		case m.Op == opStopped && running && m.Signal > 0 && m.Signal <= 64:
			select {
			case g.stopped <- syscall.Signal(m.Signal):
			default:
			}
		case m.Op == opExited && running && m.Number >= 0 && m.Number <= 255 && m.Signal >= 0 && m.Signal <= 64:
			g.finish(Status{Code: m.Number, Signal: syscall.Signal(m.Signal)}, nil)
		default:
			return fmt.Errorf("%w: unexpected %.32q", errBadMessage, m.Op)
		}
	}
}

// Close ends the sandbox and everything in it. It returns when the last process is gone. The
// namespaces, their mounts and the device go with it, as soon as the worker has closed its copies
// of the descriptors.
func (g *Guest) Close() error {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil
	}
	g.closed = true
	g.mu.Unlock()
	g.finish(Status{}, ErrClosed)
	g.stop()
	g.console.Close()
	g.ch.close()
	if g.userns != (nsID{}) {
		outlive(g.device)
	}
	closeAll(g.device)
	if g.diag != nil {
		g.diag.Close()
	}
	select {
	case <-g.proc.done:
	case <-time.After(closeTimeout):
		g.proc.kill()
		<-g.proc.done
	}
	if g.userns == (nsID{}) {
		return nil
	}
	return sweep(g.userns, closeTimeout)
}

// outlive leaves the removal of a device to the end of its namespace, which is the sandbox's own
// and which the kernel cleans up by itself. Otherwise closing the last descriptor removes the
// device on the spot, and waits 10 to 20 ms for it.
func outlive(device []*os.File) {
	for _, f := range device {
		// If it fails, closing merely takes longer.
		_ = unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1)
	}
}
