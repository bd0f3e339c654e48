package console

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The monitor's side of CMD's terminal: a copy of bytes between the caller's terminal and
// the master of the sandbox's own.
//
// While Console has the caller's terminal, the terminal is raw: all keys are bytes, and the
// sandbox's terminal turns them into signals, echo and lines. Console has it only after Begin, only
// in the foreground, and not while suspended. A command may start in the background, or beside
// another program of a pipeline that may want the keys (a pager). The caller's terminal is then
// left alone until the command reads from its own: the kernel stops it with SIGTTIN, the stage
// reports that, and the monitor calls Begin.
//
// Output is copied from the start. Each direction has one buffer and waits for a reader that does
// not read; the monitor's other duties wait for neither.

const (
	consoleBuffer = 16 << 10
	// maxPending bounds how much is copied after CMD's end. A terminal holds no more than that, and
	// a process that CMD left behind may go on writing.
	maxPending = 256 << 10
	// drainPatience is how long the copy then waits for a caller's terminal that accepts nothing.
	drainPatience = 5 * time.Second
	// foregroundCheck is how often a console in the background checks whether it is still there. A
	// shell sends no signal when it brings a running job to the foreground.
	foregroundCheck = 200 * time.Millisecond
)

// Console copies between the caller's terminal and CMD's. A nil Console means that there is no
// terminal, and its methods do nothing.
type Console struct {
	master *os.File
	tty    int    // the caller's terminal, to set its modes
	in     int    // to read from it, or -1
	out    int    // to write to it
	both   bool   // standard input and output are both terminals
	wake   [2]int // a pipe that ends a wait for input

	output   chan struct{} // closed when output has ended
	progress chan struct{} // holds a token when a chunk was written
	inputs   sync.WaitGroup

	mu     sync.Mutex
	saved  unix.Termios // the terminal's modes before it became raw
	raw    bool
	begun  bool
	paused bool
	over   bool
}

// NewConsole takes ownership of master. streams are the files that CMD would have had as 0, 1 and
// 2.
func NewConsole(master *os.File, streams [3]*os.File) (*Console, error) {
	c := &Console{tty: -1, in: -1, out: -1, output: make(chan struct{}), progress: make(chan struct{}, 1)}
	terminals := 0
	for i, n := range []int{1, 2, 0} { // write to standard output first
		fd := int(streams[n].Fd())
		if !IsTerminal(fd) {
			continue
		}
		if n != 2 {
			terminals++
		}
		mode, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		mode &= unix.O_ACCMODE
		if mode != unix.O_WRONLY && (c.in < 0 || i == 2) { // read from standard input if possible
			c.in = fd
		}
		if mode != unix.O_RDONLY && c.out < 0 {
			c.out = fd
		}
		c.tty = fd
	}
	c.both = terminals == 2
	if c.in >= 0 {
		c.tty = c.in
	}
	if err := unix.Pipe2(c.wake[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		master.Close()
		return nil, err
	}
	// Duplicated for Go's poller, so that a wait for the sandbox's terminal can be ended.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	master.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		c.closePipe()
		return nil, err
	}
	c.master = os.NewFile(uintptr(fd), "sandbox's terminal")
	// Owned by the Console; ends with the master, or when Close ends the reading.
	go c.copyOut()
	return c, nil
}

func (c *Console) closePipe() {
	unix.Close(c.wake[0])
	unix.Close(c.wake[1])
}

// Whole reports whether CMD starts in the foreground: its standard input and output are the
// terminal, and the caller may read from that.
func (c *Console) Whole() bool { return c != nil && c.both && c.Foreground() }

// Foreground reports whether the caller's terminal may be read and set. A terminal that does not
// control our session has no background.
func (c *Console) Foreground() bool {
	if c == nil {
		return false
	}
	group, err := unix.IoctlGetInt(c.tty, unix.TIOCGPGRP)
	return errors.Is(err, unix.ENOTTY) || err == nil && group == unix.Getpgrp()
}

// Begin starts copying input.
func (c *Console) Begin() {
	if c == nil {
		return
	}
	c.mu.Lock()
	first := !c.begun && !c.over
	c.begun = true
	c.mu.Unlock()
	c.enter()
	if first {
		// Owned by the Console; ended by Close, or with the caller's terminal.
		c.inputs.Go(c.copyIn)
	}
}

// Resize gives CMD's terminal the window size of the caller's.
func (c *Console) Resize() {
	if c == nil {
		return
	}
	if conn, err := c.master.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { CopyWindow(int(fd), c.tty) })
	}
}

// Suspend gives the terminal back to the caller until Resume.
func (c *Console) Suspend() {
	if c == nil {
		return
	}
	c.mu.Lock()
	c.paused = true
	c.leave()
	c.mu.Unlock()
	c.poke()
}

// Resume undoes Suspend, and sets the modes again, which another program may have changed while the
// process was stopped.
func (c *Console) Resume() {
	if c == nil {
		return
	}
	c.mu.Lock()
	c.paused, c.raw = false, false
	c.mu.Unlock()
	c.enter()
	c.Resize()
	c.poke()
}

// Newline returns the current line ending of the caller's terminal.
func (c *Console) Newline() string {
	if c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.raw {
			return "\r\n"
		}
	}
	return "\n"
}

// Close copies what CMD has written, gives the terminal back and stops copying. If a terminal
// accepts nothing for drainPatience, the rest is lost, and a write that hangs in it ends with the
// process.
func (c *Console) Close() {
	if c == nil {
		return
	}
	c.mu.Lock()
	done := c.over
	c.over = true
	c.mu.Unlock()
	if done {
		return
	}
	c.poke()
	_ = c.master.SetDeadline(time.Now())
	for waiting := true; waiting; {
		select {
		case <-c.output:
			waiting = false
		case <-c.progress:
		case <-time.After(drainPatience):
			waiting = false
		}
	}
	c.inputs.Wait()
	c.mu.Lock()
	c.leave()
	c.mu.Unlock()
	_ = c.master.Close()
	c.closePipe()
}

func (c *Console) poke() { _, _ = unix.Write(c.wake[1], []byte{0}) }

// enter makes the terminal raw, unless it is not ours at the moment. It reports whether the
// terminal is ours.
func (c *Console) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begun || c.paused || c.over || !c.Foreground() {
		return false
	}
	if c.raw {
		return true
	}
	was, err := unix.IoctlGetTermios(c.tty, unix.TCGETS)
	if err != nil {
		return false
	}
	// Like cfmakeraw(3).
	now := *was
	now.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	now.Oflag &^= unix.OPOST
	now.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	now.Cflag = now.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	// A read must not block if another process has taken the input that poll(2) saw.
	now.Cc[unix.VMIN], now.Cc[unix.VTIME] = 0, 0
	if err := unix.IoctlSetTermios(c.tty, unix.TCSETS, &now); err != nil {
		return false
	}
	c.saved, c.raw = *was, true
	return true
}

// leave restores the terminal's modes. In the background it must not: by then they belong to
// another process. It is called with mu held.
func (c *Console) leave() {
	if c.raw && c.Foreground() {
		_ = unix.IoctlSetTermios(c.tty, unix.TCSETSW, &c.saved)
	}
	c.raw = false
}

func (c *Console) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

func (c *Console) copyIn() {
	buf := make([]byte, consoleBuffer)
	for {
		fds := []unix.PollFd{{Fd: int32(c.wake[0]), Events: unix.POLLIN}, {Fd: -1, Events: unix.POLLIN}}
		wait := int(foregroundCheck / time.Millisecond)
		if c.enter() {
			fds[1].Fd, wait = int32(c.in), -1
		}
		if _, err := unix.Poll(fds, wait); err != nil && err != unix.EINTR {
			return
		}
		if c.ended() {
			return
		}
		if fds[0].Revents != 0 {
			_, _ = unix.Read(c.wake[0], buf)
			continue // what to wait for may have changed
		}
		if fds[1].Revents == 0 || !c.enter() {
			continue
		}
		n, err := unix.Read(c.in, buf)
		if err == unix.EINTR || err == unix.EAGAIN || n == 0 && fds[1].Revents&unix.POLLHUP == 0 {
			continue
		}
		if err != nil || n == 0 {
			// The terminal hung up, so CMD's does too.
			_ = c.master.Close()
			return
		}
		if _, err := c.master.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (c *Console) copyOut() {
	defer close(c.output)
	buf := make([]byte, consoleBuffer)
	for {
		n, err := c.master.Read(buf)
		if n > 0 && !c.write(buf[:n]) {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return // every slave is closed, or the caller's terminal hung up
		}
	}
	// CMD has ended. The kernel returns everything written before it says EAGAIN.
	conn, err := c.master.SyscallConn()
	if err != nil {
		return
	}
	for left := maxPending; left > 0; {
		n := 0
		if conn.Control(func(fd uintptr) { n, _ = unix.Read(int(fd), buf) }) != nil || n <= 0 || !c.write(buf[:n]) {
			return
		}
		left -= n
	}
}

// write writes all of b to the caller's terminal, and reports whether there still is one. If there
// is none, CMD's output is lost.
func (c *Console) write(b []byte) bool {
	for len(b) > 0 {
		n, err := unix.Write(c.out, b)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN: // another process made the shared file description non-blocking
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(c.out), Events: unix.POLLOUT}}, -1)
			continue
		case err != nil:
			_ = c.master.Close()
			return false
		}
		b = b[n:]
		select {
		case c.progress <- struct{}{}:
		default:
		}
	}
	return true
}
