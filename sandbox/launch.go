package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/process"
	"sluice.dev/sluice/sandbox/internal/registry"
)

// Launching, finding and stopping the monitor of an attachment.
//
// The monitor is the launcher's own binary with the hidden command AttachmentCommand. It gets its
// configuration in a memory file and its devices as open descriptors, runs in its own session, and
// reports on a pipe that it serves, or why not. The launcher may then exit: nothing ties the two
// together.

// AttachmentCommand is the hidden command that becomes AttachmentMain. A name
// follows it, for people who read process lists.
const AttachmentCommand = "attachment"

// The descriptors that a monitor starts with, besides standard input, output and error.
const (
	attachmentConfigFD = 3 // attachmentStart as JSON
	attachmentFirstFD  = 4 // numbered by attachmentStart from here on
)

// attachmentStart is the content of the memory file. Its numbers are descriptors; 0 means that an
// optional one is absent.
type attachmentStart struct {
	Config AttachmentConfig `json:"config"`
	Device []int            `json:"device"`
	In0    int              `json:"in0"`
	Lock   int              `json:"lock,omitempty"`
	Ready  int              `json:"ready,omitempty"`
	// Resume is set when a binary has replaced another (upgrade.go).
	Resume *resumption `json:"resume,omitempty"`
}

// launchTimeout bounds a launch: the worker's start and a margin.
const launchTimeout = process.ReadyTimeout + 5*time.Second

// readyWord is what the monitor writes once it serves; anything else is its error.
const readyWord = "1"

// LaunchAttachment starts the monitor of an attachment from the binary exe ("" means the caller's
// own), which must call Init first. It returns when the worker serves. cfg.Ready and cfg.Stderr are
// not used. The process is identified by its pid and its start time, in clock ticks since boot
// (proc_pid_stat(5), field 22).
func LaunchAttachment(ctx context.Context, exe string, cfg AttachmentConfig) (pid int, start uint64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("launch the monitor of %s: %w", cfg.Name, err)
		}
	}()
	if _, err := cfg.withDefaults(); err != nil {
		return 0, 0, err
	}
	if exe == "" {
		exe = "/proc/self/exe"
	}
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return 0, 0, err
	}
	defer readyR.Close()
	defer readyW.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, 0, err
	}
	defer null.Close()
	errs := null
	if cfg.LogFile != "" {
		if errs, err = os.OpenFile(cfg.LogFile, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err != nil {
			return 0, 0, err
		}
		defer errs.Close()
	}
	s := attachmentStart{Config: cfg}
	handed := []*os.File{readyW}
	s.Ready = attachmentFirstFD
	for _, f := range cfg.Device {
		s.Device = append(s.Device, attachmentFirstFD+len(handed))
		handed = append(handed, f)
	}
	s.In0 = attachmentFirstFD + len(handed)
	handed = append(handed, cfg.In0)
	if cfg.Lock != nil {
		s.Lock = attachmentFirstFD + len(handed)
		handed = append(handed, cfg.Lock)
	}
	mem, err := s.file()
	if err != nil {
		return 0, 0, err
	}
	defer mem.Close()

	var fds []uintptr
	for _, f := range append([]*os.File{null, null, errs, mem}, handed...) {
		fds = append(fds, uintptr(channel.FDOf(f)))
	}
	p, err := startWithFDs(exe, []string{filepath.Base(os.Args[0]), AttachmentCommand, cfg.Name}, fds)
	if err != nil {
		return 0, 0, err
	}
	_ = readyW.Close()
	defer func() {
		if err != nil {
			_ = p.Kill()
			_, _ = p.Wait()
		}
	}()
	if start, err = processStart(p.Pid); err != nil {
		return 0, 0, err
	}
	if err := awaitReady(ctx, readyR); err != nil {
		return 0, 0, err
	}
	// A launcher that keeps running reaps the process; one that exits leaves it to init.
	go func() { _, _ = p.Wait() }()
	return p.Pid, start, nil
}

// startWithFDs starts a program in its own session with exactly these descriptors. They are passed
// without os.File's Fd, which would make them blocking.
func startWithFDs(exe string, args []string, fds []uintptr) (*os.Process, error) {
	pid, _, err := syscall.StartProcess(exe, args, &syscall.ProcAttr{
		Dir: "/", Env: []string{"GOTRACEBACK=single"}, Files: fds, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, err
	}
	return os.FindProcess(pid)
}

// file makes the memory file of a start.
func (s attachmentStart) file() (*os.File, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	return channel.BodyFile(b)
}

// awaitReady waits for a monitor's report.
func awaitReady(ctx context.Context, r *os.File) error {
	deadline := time.Now().Add(launchTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = r.SetReadDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := io.ReadAll(io.LimitReader(r, 64<<10))
	word := strings.TrimSpace(string(b))
	switch {
	case word == readyWord:
		return nil
	case word != "":
		return errors.New(word)
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("not ready after %s", launchTimeout)
	case err != nil:
		return err
	}
	return errors.New("it ended without a word")
}

// AttachmentMain is the main function of an attachment's monitor; it returns the
// exit status. version is the program's, for people to see.
func AttachmentMain(version string) int {
	if len(os.Args) > 2 && os.Args[2] == probeArgument {
		fmt.Println(takeoverVersion)
		return 0
	}
	cfg, ready, err := readStart()
	cfg.Version = version
	if err == nil && cfg.resume != nil && cfg.resume.Guard != 0 && cfg.resume.guarded() {
		return 0
	}
	if err == nil {
		cfg.Ready = func(api.Info) error {
			if ready == nil {
				return nil
			}
			_, err := ready.WriteString(readyWord)
			err = errors.Join(err, ready.Close())
			ready = nil
			return err
		}
		// We have no terminal, but a signal may go to the whole process group.
		signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGPIPE)
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		err = RunAttachment(ctx, cfg)
	}
	closeDevices(cfg)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "sluice: %v\n", err)
	if ready != nil {
		_, _ = ready.WriteString(err.Error())
		_ = ready.Close()
	}
	return 1
}

// closeDevices closes the devices at the same time: the kernel takes some 20 ms for each, and the
// process that stops us waits for both.
func closeDevices(cfg AttachmentConfig) {
	var wg sync.WaitGroup
	for _, f := range append([]*os.File{cfg.In0}, cfg.Device...) {
		if f != nil {
			wg.Go(func() { _ = f.Close() })
		}
	}
	wg.Wait()
}

// readStart takes over the process's start state. After an exec in place, a last argument names the
// configuration's descriptor.
func readStart() (cfg AttachmentConfig, ready *os.File, err error) {
	config := attachmentConfigFD
	if len(os.Args) > 3 {
		if config, err = strconv.Atoi(os.Args[3]); err != nil {
			return cfg, nil, fmt.Errorf("the configuration's descriptor: %w: this command is for sluice itself", err)
		}
	}
	unix.CloseOnExec(config)
	b, err := channel.ReadBody(config)
	_ = unix.Close(config)
	if err != nil {
		return cfg, nil, fmt.Errorf("read the configuration: %w: this command is for sluice itself", err)
	}
	var s attachmentStart
	if err := json.Unmarshal(b, &s); err != nil {
		return cfg, nil, fmt.Errorf("decode the configuration: %w", err)
	}
	cfg, cfg.resume = s.Config, s.Resume
	if s.Ready != 0 {
		ready = guest.PlainFile(s.Ready)
	}
	for _, fd := range s.Device {
		cfg.Device = append(cfg.Device, guest.PlainFile(fd))
	}
	if s.In0 != 0 {
		cfg.In0 = guest.PlainFile(s.In0)
	}
	if s.Lock != 0 {
		cfg.Lock = guest.PlainFile(s.Lock)
	}
	return cfg, ready, nil
}

// StopAttachment ends the monitor of an attachment in order, or by force if that takes longer than
// ctx allows, and waits until it serves no more and its worker is gone; its devices end a moment
// later. It is no error if no monitor serves name. RuntimeDir is AttachmentConfig.RuntimeDir.
func StopAttachment(ctx context.Context, runtimeDir, name string) error {
	r, err := registry.At(runtimeDir)
	if err != nil {
		return err
	}
	if err := stopMonitor(ctx, r, name); err != nil {
		return fmt.Errorf("stop the monitor of %s: %w", name, err)
	}
	return nil
}

const (
	// stopGrace is how long a monitor may take to stop in order.
	stopGrace = stopTimeout + time.Second
	// stopPoll is how often its lock is checked meanwhile.
	stopPoll = 2 * time.Millisecond
)

func stopMonitor(ctx context.Context, r *registry.Registry, name string) error {
	if err := registry.CheckName(name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopGrace)
	defer cancel()
	for sig := unix.SIGTERM; ; {
		// Its lock ends with the process, so reap removes what the monitor could not.
		alive, err := r.Reap(name)
		if err != nil {
			return err
		}
		if !alive {
			// Its worker is gone. Only its devices remain, which take the kernel longest.
			return nil
		}
		if err := signalMonitor(r.State(name), sig); err != nil {
			return err
		}
		process.SleepContext(ctx, stopPoll)
		switch {
		case ctx.Err() == nil:
		case sig == unix.SIGKILL:
			return fmt.Errorf("it is still there %s after SIGKILL", stopTimeout)
		default:
			sig = unix.SIGKILL
			var force context.CancelFunc
			ctx, force = context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer force()
		}
	}
}

// AttachmentAlive returns nil if the monitor of an attachment and its worker serve, else an error
// that says which does not.
func AttachmentAlive(ctx context.Context, runtimeDir, name string) error {
	r, err := registry.At(runtimeDir)
	if err != nil {
		return err
	}
	socket, err := r.Socket(name)
	if err != nil {
		return err
	}
	var i api.Info
	if err := (api.Client{Path: socket}).Call(ctx, api.MethodInfo, nil, &i); err != nil {
		return fmt.Errorf("ask the monitor of %s: %w", name, err)
	}
	if i.State != api.StateRunning || i.WorkerPID == 0 {
		return fmt.Errorf("%s is %s: %s", name, i.State, i.LastFailure)
	}
	return nil
}

// AttachmentGone reports whether an attachment has no monitor. It looks at the lock, which ends
// with the process: a monitor that does not answer is not gone.
func AttachmentGone(runtimeDir, name string) (bool, error) {
	r, err := registry.At(runtimeDir)
	if err != nil {
		return false, err
	}
	if err := registry.CheckName(name); err != nil {
		return false, err
	}
	alive, err := r.Reap(name)
	return !alive, err
}

// processStart returns when a process started, in clock ticks since boot.
func processStart(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is in parentheses and may contain anything, so parse after the last
	// parenthesis.
	_, rest, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	const startTime = 22 - 3 // the rest begins with field 3
	fields := strings.Fields(rest)
	if len(fields) <= startTime {
		return 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	return strconv.ParseUint(fields[startTime], 10, 64)
}

// signalMonitor sends a signal to the monitor that wrote s, and never to another process that has
// its pid now. A state without a pid gets none.
func signalMonitor(s registry.State, sig unix.Signal) error {
	if s.PID == 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(s.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", s.PID, err)
	}
	defer unix.Close(fd)
	if start, err := processStart(s.PID); err != nil || start != s.Start {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", s.PID, err)
	}
	return nil
}
