package cover

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Staging can be any directory: only the throw-away namespace sees it covered.
const Staging = "/proc"

// InScratch runs build in a mount namespace of its own, in which Staging is an empty tmpfs, and
// returns the detached tree that build opened.
func InScratch(build func() (int, error)) (int, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result)
	var scratch func()
	scratch = func() {
		// Never unlocked: the thread ends with the goroutine and takes the namespace along. The
		// main thread does not end, and /proc/self refers to it. If this is the main thread, it
		// stays locked here so that the other goroutine gets a different one.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			over := make(chan struct{})
			go func() { defer close(over); scratch() }()
			<-over
			runtime.UnlockOSThread()
			return
		}
		fd, err := -1, unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_FS)
		if err == nil {
			err = unix.Mount("tmpfs", Staging, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=32m")
		}
		if err == nil {
			fd, err = build()
		}
		done <- result{fd, err}
	}
	go scratch()
	r := <-done
	return r.fd, r.err
}
