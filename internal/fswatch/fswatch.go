// Package fswatch opens descriptors that report when a path may have begun to lead elsewhere.
//
// The kernel reports it through inotify, but each user has a bounded number of instances
// (fs.inotify.max_user_instances, 128 by default). On a desktop, or a node with many pods, other
// programs may have used them up. A change must be noticed there too, so a timer stands in for the
// instance and makes its reader look again every second.
package fswatch

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Every is how often to check a path that the kernel does not watch.
const Every = time.Second

// Open returns an inotify instance without watches. If none is available, it returns a Ticker
// instead and ticking is true. The descriptor is non-blocking, and the caller owns it.
func Open() (fd int, ticking bool, err error) {
	return open(unix.InotifyInit1)
}

func open(inotify func(flags int) (int, error)) (fd int, ticking bool, err error) {
	if fd, err = inotify(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err == nil {
		return fd, false, nil
	}
	fd, err = Ticker()
	return fd, true, err
}

// Ticker returns a descriptor that becomes readable after each Every. A read returns how often it
// did (timerfd_create(2)). The descriptor is non-blocking, and the caller owns it.
func Ticker() (int, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("making a timer: %w", err)
	}
	every := unix.NsecToTimespec(int64(Every))
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: every, Value: every}, nil); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("starting a timer: %w", err)
	}
	return fd, nil
}
