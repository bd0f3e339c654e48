package ports

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/logring"
)

// Opening the host side of published ports. The monitor opens and keeps the sockets, in the
// caller's network namespace and with the caller's rights. The worker only accepts or receives on
// them, so a port outlives the worker.

const listenBacklog = 1024

// ListenOn opens a listening TCP or bound UDP socket, close-on-exec and
// non-blocking, and returns the address it got.
func ListenOn(proto string, at netip.AddrPort) (fd int, bound netip.AddrPort, err error) {
	domain, typ := unix.AF_INET, unix.SOCK_STREAM
	if at.Addr().Is6() {
		domain = unix.AF_INET6
	}
	if proto == "udp" {
		typ = unix.SOCK_DGRAM
	}
	fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, bound, fmt.Errorf("make a socket for %s/%s: %w%s", at, proto, err, cureSocket(err))
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
			fd = -1
		}
	}()
	if domain == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return fd, bound, fmt.Errorf("set IPV6_V6ONLY: %w", err)
		}
	}
	if proto == "tcp" {
		// Without it, a restarted sandbox would have to wait for its own sockets in TIME_WAIT.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return fd, bound, fmt.Errorf("set SO_REUSEADDR: %w", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return fd, bound, &BindFailure{Proto: proto, At: at, Err: err}
	}
	if proto == "tcp" {
		if err := unix.Listen(fd, listenBacklog); err != nil {
			return fd, bound, &BindFailure{Proto: proto, At: at, Err: err}
		}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return fd, bound, fmt.Errorf("read the address of %s/%s: %w", at, proto, err)
	}
	return fd, fromSockaddr(sa), nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	sa := &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	if z, err := strconv.ParseUint(a.Addr().Zone(), 10, 32); err == nil {
		sa.ZoneId = uint32(z)
	}
	return sa
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func cureSocket(err error) string {
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return " (raise the limit on open files: ulimit -n)"
	}
	return ""
}

// BindFailure says why ListenOn did not get a port. Explain adds what to do about it. It searches
// /proc, so it is left until an error is reported: several ports may be tried first.
type BindFailure struct {
	Proto string
	At    netip.AddrPort
	Err   error
}

func (f *BindFailure) Error() string { return fmt.Sprintf("publish %s/%s: %v", f.At, f.Proto, f.Err) }

func (f *BindFailure) Unwrap() error { return f.Err }

// Explain turns a BindFailure into an error that says why and what to do. It returns other errors
// unchanged.
func Explain(failed error) error {
	var f *BindFailure
	if !errors.As(failed, &f) {
		return failed
	}
	proto, at, err := f.Proto, f.At, f.Err
	what := fmt.Sprintf("publish %s/%s", at, proto)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		if who := portOwner(proto, at); who != "" {
			return fmt.Errorf("%s: the port is taken by %s: stop that, or choose another port: %w", what, who, err)
		}
		return fmt.Errorf("%s: the port is taken: choose another one: %w", what, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: ports below %s need privilege: choose a higher port, or lower net.ipv4.ip_unprivileged_port_start: %w",
			what, firstFreePort(), err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%s: no interface of this host has the address %s: %w", what, at.Addr(), err)
	}
	return failed
}

func firstFreePort() string {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return "1024"
	}
	return strings.TrimSpace(string(b))
}

// portOwner returns the process that holds a port as "NAME (pid N)", or "" if /proc does not tell.
func portOwner(proto string, at netip.AddrPort) string {
	inodes := make(map[string]bool)
	for _, suffix := range []string{"", "6"} {
		socketInodes("/proc/thread-self/net/"+proto+suffix, proto, at.Port(), inodes)
	}
	if len(inodes) == 0 {
		return ""
	}
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	for _, link := range fds {
		target, err := os.Readlink(link)
		if err != nil || !inodes[target] {
			continue
		}
		dir := filepath.Dir(filepath.Dir(link))
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue
		}
		return fmt.Sprintf("%s (pid %s)", logring.CleanLine(string(comm)), filepath.Base(dir))
	}
	return ""
}

// socketInodes adds to into the sockets in a /proc/net table that hold the local port, in the form
// that readlink prints.
func socketInodes(table, proto string, port uint16, into map[string]bool) {
	eachSocket(table, proto, func(p uint16, inode string) {
		if p == port {
			into["socket:["+inode+"]"] = true
		}
	})
}

// eachSocket yields the local ports and inodes of the sockets in a /proc/net table; of TCP sockets,
// those that listen. A missing table, as IPv6's may be, counts as empty. The table is the thread's
// own (/proc/thread-self): the process's is that of the main thread, which a goroutine may have
// left in another namespace.
func eachSocket(table, proto string, yield func(port uint16, inode string)) {
	f, err := os.Open(table)
	if err != nil {
		return
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		// sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
		if len(fields) < 10 {
			continue
		}
		if listening := fields[3] == "0A"; proto == "tcp" && !listening {
			continue
		}
		_, text, _ := strings.Cut(fields[1], ":")
		if port, err := strconv.ParseUint(text, 16, 16); err == nil {
			yield(uint16(port), fields[9])
		}
	}
}
