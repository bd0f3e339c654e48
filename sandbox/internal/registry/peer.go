package registry

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Who may use a control socket.
//
// The socket's directory is private, and covered in every sandbox. Neither is relied on:
// root in a sandbox looks, to the host, like the sandbox's user, and root in a sandbox of
// root's looks like root. So the kernel is asked where each peer lives:
//
//	uid                the monitor's own, or root's (SO_PEERCRED)
//	network namespace  the monitor's own, whoever asks: the inside of every sandbox, pod
//	                   and attachment is in another one
//	user namespace     the monitor's own; a sandbox of `sluice run` is in one below
//
// An accepted unix socket belongs to the network namespace of the socket that connected
// (unix_stream_connect in net/unix/af_unix.c), which SO_NETNS_COOKIE names without a
// look at the peer. A sandbox can neither enter the monitor's network namespace nor make
// a socket there: that takes CAP_SYS_ADMIN over it.
//
// Outer user namespaces. The kernel shows a process no user namespace above its own:
// NS_GET_PARENT of one's own fails with EPERM, and so does a look at a process above.
// Hence there is no walk: a peer that is not in the monitor's own user namespace is
// refused, unless it is the host's root and the monitor an ordinary user of the host.
// Then the peer's id maps, which anyone may read, must be those of the initial user
// namespace.
//
// A process number may pass to another process. The peer is held by its pidfd
// (SO_PEERPIDFD, Linux 6.5) while it is looked at; before that, the process that has the
// number must hold the other end of the connection.

var errPeer = errors.New("refused")

// InitialUserNS is the inode of the initial user namespace (PROC_USER_INIT_INO in
// linux/proc_ns.h), and part of the kernel's user interface since nsfs exists.
const InitialUserNS = 0xEFFFFFFD

// PeerPolicy judges the peers of a monitor that runs as uid.
type PeerPolicy struct{ Uid int }

// Check refuses a peer that may not control the sandbox.
func (p PeerPolicy) Check(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return refuse("peer: %v", err)
	}
	var judged error
	err = rc.Control(func(fd uintptr) { judged = p.judge(int(fd)) })
	return errors.Join(err, judged)
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errPeer}, args...)...)
}

// judge is check by the connection's descriptor.
func (p PeerPolicy) judge(conn int) error {
	cred, err := unix.GetsockoptUcred(conn, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return refuse("peer credentials: %v", err)
	}
	if int(cred.Uid) != p.Uid && cred.Uid != 0 {
		return refuse("uid %d does not own this sandbox", cred.Uid)
	}
	peer, err := openPeer(conn, int(cred.Pid))
	if err != nil {
		return refuse("cannot tell where the peer lives: %v", err)
	}
	defer peer.Close()
	switch same, err := peer.sharesNetwork(conn); {
	case err != nil:
		return refuse("cannot tell which network the peer is in: %v", err)
	case !same:
		return refuse("the peer is in another network namespace than this sandbox's monitor, as everything in a sandbox is")
	}
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &own); err != nil {
		return refuse("%v", err)
	}
	switch its, err := peer.namespace("user"); {
	case err == nil && its.Dev == own.Dev && its.Ino == own.Ino:
		return nil
	case err == nil:
		return refuse("the peer is in another user namespace than this sandbox's monitor, as what is in a sandbox is")
	case cred.Uid == 0 && own.Ino == InitialUserNS && peer.hasInitialMaps():
		return nil
	default:
		return refuse("cannot tell where the peer lives: %v (ask as the user who started the sandbox)", err)
	}
}

// PeerProcess is the process at the other end of a connection, held by its directory of
// /proc: once the process is gone that answers nothing, whoever has its number then.
type PeerProcess struct{ Dir int }

func (p PeerProcess) Close() { _ = unix.Close(p.Dir) }

// openPeer finds the process that connected. pid is its number in our PID namespace, or 0 if it has
// none there.
func openPeer(conn, pid int) (PeerProcess, error) {
	pidfd, err := unix.GetsockoptInt(conn, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	certain := err == nil
	if errors.Is(err, unix.ENOPROTOOPT) && pid > 0 {
		pidfd, err = unix.PidfdOpen(pid, 0)
	}
	if err != nil {
		return PeerProcess{}, fmt.Errorf("its process: %w", err)
	}
	defer unix.Close(pidfd)
	// The mount at /proc may be another PID namespace's.
	number, err := pidfdNumber(pidfd)
	if err != nil {
		return PeerProcess{}, err
	}
	dir, err := unix.Open("/proc/"+strconv.Itoa(number), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return PeerProcess{}, err
	}
	p := PeerProcess{dir}
	// Alive now, it had that number when the directory was opened.
	if !processAlive(pidfd) {
		err = errors.New("it is gone")
	} else if !certain {
		err = p.HoldsOtherEnd(conn)
	}
	if err != nil {
		p.Close()
		return PeerProcess{}, err
	}
	return p, nil
}

// pidfdNumber is the number of a pidfd's process in the PID namespace that /proc shows.
func pidfdNumber(pidfd int) (int, error) {
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(pidfd))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if v, ok := strings.CutPrefix(sc.Text(), "Pid:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(v))
			if err == nil && n <= 0 {
				err = errors.New("its process is not among those that /proc shows")
			}
			return n, err
		}
	}
	return 0, errors.New("a pidfd without a process number")
}

func processAlive(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 0
}

// HoldsOtherEnd verifies that the process has the socket that conn is connected to.
func (p PeerProcess) HoldsOtherEnd(conn int) error {
	var st unix.Stat_t
	if err := unix.Fstat(conn, &st); err != nil {
		return err
	}
	other, err := otherEnd(uint32(st.Ino))
	if err != nil {
		return fmt.Errorf("look up its socket: %w", err)
	}
	want := fmt.Sprintf("socket:[%d]", other)
	fds, err := p.readDir("fd")
	if err != nil {
		return err
	}
	buf := make([]byte, 64)
	for _, fd := range fds {
		if n, err := unix.Readlinkat(p.Dir, "fd/"+fd, buf); err == nil && string(buf[:n]) == want {
			return nil
		}
	}
	return errors.New("its process number is somebody else's by now")
}

// unixDiagRequest asks for one unix socket and its peer (struct unix_diag_req of
// linux/unix_diag.h).
type unixDiagRequest struct{ inode uint32 }

func (r unixDiagRequest) Len() int { return 24 }

func (r unixDiagRequest) Serialize() []byte {
	const showPeer, anyCookie = 1 << 2, ^uint64(0)
	b := make([]byte, r.Len())
	b[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // in every state
	binary.NativeEndian.PutUint32(b[8:], r.inode)
	binary.NativeEndian.PutUint32(b[12:], showPeer)
	binary.NativeEndian.PutUint64(b[16:], anyCookie)
	return b
}

// otherEnd returns the inode of the socket that the one with inode is connected to, or 0 if that is
// closed.
func otherEnd(inode uint32) (uint32, error) {
	const header, attrPeer = 16, 2 // struct unix_diag_msg; UNIX_DIAG_PEER
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	req.AddData(unixDiagRequest{inode})
	msgs, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	if err != nil || len(msgs) != 1 || len(msgs[0]) < header {
		return 0, cmp.Or(err, errors.New("the kernel does not tell"))
	}
	attrs, err := nl.ParseRouteAttr(msgs[0][header:])
	for _, a := range attrs {
		if a.Attr.Type == attrPeer && len(a.Value) == 4 {
			return binary.NativeEndian.Uint32(a.Value), nil
		}
	}
	return 0, err
}

func (p PeerProcess) readDir(name string) ([]string, error) {
	f, err := p.open(name, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func (p PeerProcess) open(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(p.Dir, name, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// namespace identifies one of the process's namespaces.
func (p PeerProcess) namespace(kind string) (st unix.Stat_t, err error) {
	err = unix.Fstatat(p.Dir, "ns/"+kind, &st, 0)
	return st, err
}

// sharesNetwork reports whether the connection was made in our own network namespace.
func (p PeerProcess) sharesNetwork(conn int) (bool, error) {
	own, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(own)
	theirs, err := unix.GetsockoptUint64(conn, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err == nil {
		ours, err := unix.GetsockoptUint64(own, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return ours == theirs, err
	}
	if !errors.Is(err, unix.ENOPROTOOPT) { // older than Linux 5.14
		return false, err
	}
	its, err := p.namespace("net")
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	err = unix.Stat("/proc/thread-self/ns/net", &st)
	return st.Dev == its.Dev && st.Ino == its.Ino, err
}

// hasInitialMaps reports whether the process has the id maps of the initial user
// namespace, seen from there: every id, as it is.
func (p PeerProcess) hasInitialMaps() bool {
	for _, name := range []string{"uid_map", "gid_map"} {
		f, err := p.open(name, 0)
		if err != nil {
			return false
		}
		text := make([]byte, 256)
		n, _ := f.Read(text)
		_ = f.Close()
		if strings.Join(strings.Fields(string(text[:n])), " ") != "0 0 4294967295" {
			return false
		}
	}
	return true
}
