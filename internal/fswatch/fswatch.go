// Package fswatch opens descriptors that tell when a path may lead elsewhere than before.
//
// The kernel tells by inotify, of which each user has a bounded number of instances
// (fs.inotify.max_user_instances, 128 by default): on a desktop or a node with many pods
// they are used up by others. A change must be noticed there too, so what stands in for an
// instance is a timer, which asks its reader to look again each second.
package fswatch

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Every is how often a path that the kernel does not watch is to be looked at.
const Every = time.Second

// Open returns an inotify instance without watches, or, ticking, where none can be had, a
// Ticker. The descriptor is non-blocking and the caller's.
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

// Ticker returns a descriptor that becomes readable after each Every. A read takes the
// number of times that it did (timerfd_create(2)). It is non-blocking and the caller's.
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
