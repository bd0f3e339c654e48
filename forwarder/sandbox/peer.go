package sandbox

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Who may use the control socket.
//
// The socket's directory is the caller's alone, and covered inside the sandbox.
// Neither is relied on: each peer is asked for by the kernel's SO_PEERCRED. It
// must be root or of the monitor's own uid, and a peer of that uid must not
// live in the sandbox's user namespace or below it, because whoever is root in
// there looks, to the host, like the caller. A peer whose namespace cannot be
// read is refused.

var errPeer = errors.New("refused")

// peerPolicy judges peers.
type peerPolicy struct {
	uid int
	// sandbox is the user namespace of the guest; nil when the guest has the
	// monitor's own (attached to a process of the host).
	sandbox *os.File
}

// check refuses a peer that may not control the sandbox.
func (p peerPolicy) check(c *net.UnixConn) error {
	cred, pidfd, err := peerCred(c)
	if err != nil {
		return fmt.Errorf("%w: peer credentials: %v", errPeer, err)
	}
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	if cred.Uid == 0 && p.uid != 0 {
		// The host's root, and not the sandbox's: no user but root can have 0
		// mapped into a namespace.
		return nil
	}
	if int(cred.Uid) != p.uid {
		return fmt.Errorf("%w: uid %d does not own this sandbox", errPeer, cred.Uid)
	}
	if p.sandbox == nil {
		return nil
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cred.Pid))
	if err != nil {
		return fmt.Errorf("%w: cannot tell where the peer lives: %v", errPeer, err)
	}
	defer ns.Close()
	// The number in cred may have passed to another process meanwhile; not if
	// the peer is alive still.
	if pidfd >= 0 && !processAlive(pidfd) {
		return fmt.Errorf("%w: the peer is gone", errPeer)
	}
	return p.outside(ns)
}

// outside walks from a user namespace to its ancestors until it meets the
// monitor's own. Meeting the sandbox's first, or leaving the tree below the
// monitor, is a refusal.
func (p peerPolicy) outside(ns *os.File) error {
	own, err := os.Stat("/proc/self/ns/user")
	if err != nil {
		return fmt.Errorf("%w: %v", errPeer, err)
	}
	sandbox, err := p.sandbox.Stat()
	if err != nil {
		return fmt.Errorf("%w: %v", errPeer, err)
	}
	at := ns
	// The kernel nests user namespaces 32 deep at most.
	for range 33 {
		fi, err := at.Stat()
		if err != nil {
			return fmt.Errorf("%w: %v", errPeer, err)
		}
		switch {
		case os.SameFile(fi, sandbox):
			return fmt.Errorf("%w: the peer is inside the sandbox", errPeer)
		case os.SameFile(fi, own):
			return nil
		}
		parent, err := parentNamespace(at)
		if err != nil {
			return fmt.Errorf("%w: the peer's user namespace is not the caller's: %v", errPeer, err)
		}
		defer parent.Close()
		at = parent
	}
	return fmt.Errorf("%w: user namespaces nested too deep", errPeer)
}

func parentNamespace(ns *os.File) (*os.File, error) {
	fd, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_PARENT)
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "user namespace"), nil
}

// peerCred returns the peer's credentials and, from Linux 6.5 on, its pidfd;
// otherwise that is -1.
func peerCred(c *net.UnixConn) (*unix.Ucred, int, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, -1, err
	}
	var cred *unix.Ucred
	pidfd := -1
	var cerr error
	err = rc.Control(func(fd uintptr) {
		if cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); cerr != nil {
			return
		}
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
			pidfd = n
		}
	})
	return cred, pidfd, errors.Join(err, cerr)
}

func processAlive(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 0
}
