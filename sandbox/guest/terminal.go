package guest

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/console"
)

// The stage's side of CMD's terminal.
//
// CMD never has the caller's terminal: a process that holds a terminal may read what is typed into
// it, type into it where the kernel allows that, and change how it treats its bytes. The outer
// stage mounts a devpts instance of the sandbox's own over /dev/pts, makes a pseudo-terminal in it,
// replaces each of the descriptors 0 to 2 that is a terminal with its slave, and hands the master
// to the monitor, which copies (console/console.go). /dev/ptmx uses the devpts beside it, so it
// makes terminals of the sandbox's too.
//
// The inner stage leads a session of its own, in which /dev/tty is that terminal, or none. CMD is a
// process group below it, as a job is below a shell: it may be in the terminal's background, and
// Ctrl-Z stops it, which would not stop a session leader.

const ptsDir = "/dev/pts"

// terminal takes the caller's terminals away from the stage and all that it starts. The outer stage
// runs it, so that CMD cannot undo its mounts.
func (s *stage) terminal() error {
	if err := coverTerminals(); err != nil {
		return fmt.Errorf("covering the caller's terminal: %w", err)
	}
	// ptmxmode: CMD's uid can make terminals only through this node. Other groups may not be mapped.
	err := unix.Mount("devpts", ptsDir, "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
	callers, found := firstTerminal()
	if err != nil && (found || err != unix.ENOENT) {
		return fmt.Errorf("mounting terminals of the sandbox's own on %s: %w", ptsDir, err)
	}
	if !found {
		return nil
	}
	master, slave, err := makeTerminal(callers)
	if err != nil {
		return fmt.Errorf("making a terminal: %w", err)
	}
	defer master.Close()
	defer slave.Close()
	for fd := range 3 {
		if console.IsTerminal(fd) {
			if err := unix.Dup3(int(slave.Fd()), fd, 0); err != nil {
				return fmt.Errorf("replacing the terminal: %w", err)
			}
		}
	}
	return s.ch.send(message{Op: opTerminal}, int(master.Fd()))
}

// makeTerminal makes a pseudo-terminal with the settings and the window size of the terminal like.
func makeTerminal(like int) (master, slave *os.File, err error) {
	m, err := unix.Open(filepath.Join(ptsDir, "ptmx"), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(m), "terminal's master")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(m, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, err
	}
	if modes, err := unix.IoctlGetTermios(like, unix.TCGETS); err == nil {
		_ = unix.IoctlSetTermios(m, unix.TCSETS, modes)
	}
	console.CopyWindow(m, like)
	slave, err = os.OpenFile(fmt.Sprintf("%s/%d", ptsDir, n), os.O_RDWR|unix.O_NOCTTY, 0)
	return master, slave, err
}

// coverTerminals covers with /dev/null every device in /dev that is a terminal of the caller's: a
// virtual console, or the console that a container engine mounts.
func coverTerminals() error {
	callers := make(map[uint64]bool)
	add := func(fd int) {
		if n, err := unix.IoctlGetUint32(fd, unix.TIOCGDEV); err == nil {
			callers[unix.Mkdev(n>>8&0xfff, n&0xff|n>>12&0xfff00)] = true
		}
	}
	for fd := range 3 {
		add(fd)
	}
	if tty, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		add(tty)
		unix.Close(tty)
	}
	if len(callers) == 0 {
		return nil
	}
	entries, err := os.ReadDir("/dev")
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join("/dev", e.Name())
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || !callers[st.Rdev] {
			continue
		}
		if err := unix.Mount(os.DevNull, path, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// firstTerminal returns the lowest of the descriptors 0 to 2 that is a terminal.
func firstTerminal() (fd int, found bool) {
	for fd := range 3 {
		if console.IsTerminal(fd) {
			return fd, true
		}
	}
	return 0, false
}
