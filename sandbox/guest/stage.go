package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/confine"
	"sluice.dev/sluice/sandbox/internal/explain"
)

// The stage: the process inside. It trusts the monitor. In order, it reads its orders, waits for
// the id maps, builds the network and the mounts, hands out the device, starts CMD on request, and
// holds the namespaces until the channel ends. A new sandbox has an outer stage first (nest.go).

type stageMode uint8

const (
	modeRun stageMode = iota
	modeAttach
)

// stageSpec is the content of planFD.
type stageSpec struct {
	Mode       stageMode
	Config     Config
	Files      int    // number of descriptors for CMD, from firstFileFD on
	PingGroups string // for net.ipv4.ping_group_range
	Covered    int    // sockets that the outer stage covered, for the inner one to report
}

// guestSignals are the signals that may be meant for CMD. The stage survives them.
var guestSignals = []unix.Signal{
	unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP,
	unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH,
}

// Main runs the stage, as the hidden subcommand. The command line gives it no orders: they come
// over descriptors that only Start and Attach prepare.
func Main(args []string) int {
	s, err := newStage()
	if s != nil {
		s.inner = len(args) == 1 && args[0] == innerArgument
	}
	if err != nil || len(args) != 0 && !s.inner {
		fmt.Fprintf(os.Stderr, "sluice: %q is what sluice run and sluice attach start for themselves\n", StageCommand)
		return StatusOurs
	}
	return s.run()
}

type stage struct {
	ch    *channel
	spec  stageSpec
	inner bool     // of a new sandbox, in CMD's namespaces
	cmd   *command // nil until CMD is started
	front bool     // CMD is, or will be, in its terminal's foreground
	notes []string
}

func newStage() (*stage, error) {
	var st unix.Stat_t
	if err := unix.Fstat(channelFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, errors.New("no channel")
	}
	ch, err := newChannel(os.NewFile(channelFD, "guest channel"))
	if err != nil {
		return nil, err
	}
	plan := os.NewFile(planFD, "guest configuration")
	defer plan.Close()
	s := &stage{ch: ch}
	b, err := io.ReadAll(io.LimitReader(plan, maxConfigBytes+1))
	if err == nil {
		err = json.Unmarshal(b, &s.spec)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *stage) run() int {
	// A caught signal is back to its default in CMD; an ignored one stays ignored.
	s.spec.Config.Signals.ignore()
	for _, sig := range guestSignals {
		if !s.spec.Config.Signals.Ignored.has(sig) {
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	// CMD's descriptors are passed on by number; CMD inherits no others.
	if err := closeOnExecFrom(3); err != nil {
		return s.fail(fmt.Errorf("marking inherited descriptors: %w", err))
	}
	sig := parentDeath(s.spec.Config.PIDNamespace || s.spec.Mode == modeAttach)
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(sig), 0, 0, 0); err != nil {
		return s.fail(fmt.Errorf("tying the guest to its monitor: %w", err))
	}
	// If the monitor died before that, the channel has ended.
	if !s.inner {
		if m, _, err := s.ch.receive(0); err != nil || m.Op != opMapped {
			return StatusOurs
		}
		if s.spec.Mode == modeRun {
			if err := s.nest(); err != nil {
				return s.fail(explain.ExplainInside(err))
			}
			return 0
		}
	}
	if err := s.setup(); err != nil {
		return s.fail(explain.ExplainInside(err))
	}
	s.serve()
	if s.spec.Mode == modeRun && !s.spec.Config.PIDNamespace {
		s.clearUp()
	}
	return 0
}

// fail tells the monitor why there is no sandbox.
func (s *stage) fail(err error) int {
	text := err.Error()
	if len(text) > maxMessageBytes/8 {
		text = text[:maxMessageBytes/8]
	}
	_ = s.ch.send(message{Op: opFailed, Text: text})
	return StatusOurs
}

func (s *stage) note(format string, args ...any) {
	if len(s.notes) < 32 {
		s.notes = append(s.notes, fmt.Sprintf(format, args...))
	}
}

func (s *stage) setup() error {
	dev, err := s.network()
	if err != nil {
		return err
	}
	defer dev.Close()
	if s.spec.Mode == modeRun {
		if err := s.mounts(); err != nil {
			return err
		}
		// By path, to leave a working directory that is now covered.
		if err := os.Chdir(s.spec.Config.Dir); err != nil {
			return fmt.Errorf("entering the working directory: %w", err)
		}
	}
	diag, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return fmt.Errorf("opening the socket monitor: %w", err)
	}
	defer unix.Close(diag)
	ephemeral := readPortRange()
	return s.ch.send(message{
		Op: opReady, Notes: s.notes, Covered: s.spec.Covered, Number: int(ephemeral.first)<<16 | int(ephemeral.last),
	}, append(dev.FDs(), diag)...)
}

// serve answers the monitor until the channel ends.
func (s *stage) serve() {
	for {
		m, _, err := s.ch.receive(0)
		if err != nil {
			return
		}
		switch m.Op {
		case opExec:
			s.exec()
		case opSignal:
			if s.cmd != nil {
				s.cmd.signal(syscall.Signal(m.Number))
			}
		case opFront:
			s.toFront()
		case opSocket:
			s.socket(m)
		}
	}
}

func (s *stage) exec() {
	// This filters the stage itself too: root inside may trace it, and would have it make the
	// calls.
	if err := confine.FilterCommand(); err != nil {
		_ = s.ch.send(message{Op: opFailed, Number: StatusOurs, Text: err.Error()})
		return
	}
	cmd, err := startCommand(s.spec, s.front)
	if err != nil {
		_ = s.ch.send(message{Op: opFailed, Number: err.Status, Text: err.Text})
		return
	}
	s.cmd = cmd
	if s.ch.send(message{Op: opStarted}) != nil {
		return
	}
	// Ends with CMD. No other goroutine reports on CMD.
	go func() {
		ws := <-cmd.states
		for ; ws.Stopped(); ws = <-cmd.states {
			_ = s.ch.send(message{Op: opStopped, Signal: int(ws.StopSignal())})
		}
		m := message{Op: opExited, Number: ws.ExitStatus()}
		if ws.Signaled() {
			m.Number, m.Signal = statusSignalled+int(ws.Signal()), int(ws.Signal())
		}
		_ = s.ch.send(m)
	}()
}

// toFront puts CMD into its terminal's foreground, once. After that, CMD may give it away.
func (s *stage) toFront() {
	fd, found := firstTerminal()
	if !found || s.front {
		return
	}
	s.front = true
	if s.cmd != nil {
		// Until now the foreground was the stage's own group.
		_ = unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, s.cmd.pid)
	}
}

// clearUp kills every process left in the sandbox. The monitor does the same if it is alive.
func (s *stage) clearUp() {
	if own, err := namespaceID("/proc/self/ns/user"); err == nil {
		_ = sweep(own, closeTimeout)
	}
}

func closeOnExecFrom(first int) error {
	if err := unix.CloseRange(uint(first), ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err == nil {
		return nil
	}
	// Before Linux 5.11.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		var fd int
		if _, err := fmt.Sscan(e.Name(), &fd); err == nil && fd >= first {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
