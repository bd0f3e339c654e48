package hostsock

// The dialer is the only part of the program that opens sockets to the outside. It opens each for a
// policy.Verdict, which only policy can make. The function that passes the address to the kernel
// compares it with the verdict's target once more, so nothing between the decision and the connect
// can change where the bytes go.

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/policy"
)

// errVerdict says that a dial was requested that policy did not allow. It is a defect of the
// caller, counted and refused.
var errVerdict = errors.New("the verdict does not allow this address")

// Dialer opens host sockets for verdicts.
type Dialer struct {
	Sockets   atomic.Int64   // open now
	refused   *atomic.Uint64 // asked for without a verdict that allows it
	exhausts  *atomic.Uint64 // EMFILE, ENFILE, ENOBUFS, ENOMEM
	log       *slog.Logger
	Pod       bool                      // see dialer_pod.go
	keepalive atomic.Pointer[Keepalive] // of new connections; never nil
	told      atomic.Int64              // when a shortage was last logged, in Unix seconds
}

// tellEvery is the least time between log lines about a shortage of descriptors, in seconds.
const tellEvery = 60

func NewDialer(s *count.Set, log *slog.Logger) *Dialer {
	d := &Dialer{refused: s.Counter("dial_without_verdict"), exhausts: s.Counter("dial_out_of_descriptors"), log: log}
	k := DefaultKeepalive()
	d.keepalive.Store(&k)
	return d
}

// TCPConnect starts a connection to the verdict's contact. Nothing may be written to it unless a
// verdict permits that; this one does not for a flow whose first bytes are awaited. connected
// reports that it is established already, as it is for most local targets. Otherwise the descriptor
// becomes writable when the attempt ends, and SO_ERROR says how. src is the sandbox's address, to
// which only a pod's sockets are bound.
func (d *Dialer) TCPConnect(v policy.Verdict, h packet.Meta, src netip.Addr) (fd int, connected bool, err error) {
	to := v.Contact()
	if !to.IsValid() || v.Proto() != unix.IPPROTO_TCP {
		d.refused.Add(1)
		return -1, false, errVerdict
	}
	fd, err = d.open(to.Addr(), unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return -1, false, err
	}
	if err := d.TuneStream(fd); err != nil {
		d.Close(fd)
		return -1, false, err
	}
	if err := setHops(fd, to.Addr().Is6(), h); err != nil {
		d.Close(fd)
		return -1, false, err
	}
	if err := d.prepareStream(fd, src); err != nil {
		d.Close(fd)
		return -1, false, err
	}
	if !v.PermitsContact(to) {
		d.refused.Add(1)
		d.Close(fd)
		return -1, false, errVerdict
	}
	if err := RecvErr(fd, to.Addr().Is6(), true); err != nil {
		d.Close(fd)
		return -1, false, err
	}
	switch err := unix.Connect(fd, ToSockaddr(to)); err {
	case nil:
		return fd, true, Dialed(fd, to.Addr().Is6())
	case unix.EINPROGRESS:
		return fd, false, nil
	default:
		return fd, false, err
	}
}

// PacketSocket opens a UDP socket of the family of the verdict's target. It is
// neither bound nor connected: one socket serves all peers of one sandbox
// endpoint, and every datagram goes through SendTo's check.
func (d *Dialer) PacketSocket(v policy.Verdict) (int, error) {
	if !v.Allowed() || v.Proto() != unix.IPPROTO_UDP {
		d.refused.Add(1)
		return -1, errVerdict
	}
	a := v.Target().Addr()
	fd, err := d.open(a, unix.SOCK_DGRAM, unix.IPPROTO_UDP)
	if err != nil {
		return -1, err
	}
	if err := TunePacket(fd, a.Is6()); err != nil {
		d.Close(fd)
		return -1, err
	}
	// Failure means a kernel without UDP_GRO: datagrams then come one by one.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	return fd, nil
}

// EchoSocket opens a ping socket (ICMP datagram socket) bound to no particular
// identifier: the kernel chooses one, and the caller translates.
func (d *Dialer) EchoSocket(v policy.Verdict) (int, error) {
	a := v.Target().Addr()
	proto := unix.IPPROTO_ICMP
	if a.Is6() {
		proto = unix.IPPROTO_ICMPV6
	}
	if !v.Allowed() || int(v.Proto()) != proto {
		d.refused.Add(1)
		return -1, errVerdict
	}
	fd, err := d.open(a, unix.SOCK_DGRAM, proto)
	if err != nil {
		return -1, err
	}
	if err := TunePacket(fd, a.Is6()); err != nil {
		d.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Check is called right before each datagram leaves. It fails unless to is an address that the
// verdict allowed.
func (d *Dialer) Check(v policy.Verdict, to netip.AddrPort) error {
	if !v.Allowed() || !v.Permits(to) {
		d.refused.Add(1)
		return errVerdict
	}
	return nil
}

func (d *Dialer) open(a netip.Addr, typ, proto int) (int, error) {
	domain := unix.AF_INET
	if a.Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		switch err {
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			d.exhausts.Add(1)
			d.tellLack(err)
		}
		return -1, fmt.Errorf("opening a host socket: %w", err)
	}
	d.Sockets.Add(1)
	return fd, nil
}

// tellLack logs, once in a while, what an operator can do about it.
func (d *Dialer) tellLack(err error) {
	now, last := time.Now().Unix(), d.told.Load()
	if now-last >= tellEvery && d.told.CompareAndSwap(last, now) {
		d.log.Warn(fmt.Sprintf("out of descriptors: new flows fail, those that exist go on (%v; raise the limit on open files: ulimit -n)", err))
	}
}

// Close closes a descriptor that this dialer opened.
func (d *Dialer) Close(fd int) {
	d.Sockets.Add(-1)
	unix.Close(fd)
}

// Reset closes a connected descriptor so that its peer gets a RST.
func (d *Dialer) Reset(fd int) {
	// The error is of no use: the socket is closed either way.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	d.Close(fd)
}

// Disconnect ends a stream socket's connection at once: bytes that the kernel has not sent are
// discarded, and the peer gets a reset (tcp_disconnect in net/ipv4/tcp.c). The descriptor still
// belongs to its owner, and reads and writes on it fail.
func (d *Dialer) Disconnect(fd int) {
	unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	// It fails only for a socket that has no connection.
	_, _, _ = syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
}

// TuneStream sets the options that every spliced TCP socket needs: no delay, because the other side
// has already chosen the segments in which bytes arrive; urgent data kept in line, because no byte
// may be lost; and probes while idle.
func (d *Dialer) TuneStream(fd int) error {
	for _, o := range [...]struct {
		level, name, value int
		what               string
	}{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1, "TCP_NODELAY"},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1, "SO_OOBINLINE"},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("setting %s: %w", o.what, err)
		}
	}
	return d.keepalive.Load().probeHost(fd)
}

// TunePacket asks for the ancillary data that faithful forwarding of datagrams needs: errors with
// their origin, hop limits, traffic classes, and the local address.
func TunePacket(fd int, v6 bool) error {
	level := unix.IPPROTO_IP
	names := []int{unix.IP_RECVERR, unix.IP_RECVTTL, unix.IP_RECVTOS, unix.IP_PKTINFO}
	if v6 {
		level = unix.IPPROTO_IPV6
		names = []int{unix.IPV6_RECVERR, unix.IPV6_RECVHOPLIMIT, unix.IPV6_RECVTCLASS, unix.IPV6_RECVPKTINFO}
	}
	for _, name := range names {
		if err := unix.SetsockoptInt(fd, level, name, 1); err != nil {
			return fmt.Errorf("asking for ancillary data: %w", err)
		}
	}
	return nil
}

// setHops applies the packet's traffic class, and its hop limit where it is so low that the sender
// must have meant it (traceroute); 0 leaves the default. A TCP connection of the host has a path of
// its own, so the host chooses an ordinary hop limit.
func setHops(fd int, v6 bool, h packet.Meta) error {
	level, ttl, tos := unix.IPPROTO_IP, unix.IP_TTL, unix.IP_TOS
	if v6 {
		level, ttl, tos = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_TCLASS
	}
	if h.Tos&^3 != 0 {
		if err := unix.SetsockoptInt(fd, level, tos, int(h.Tos&^3)); err != nil {
			return fmt.Errorf("setting the traffic class: %w", err)
		}
	}
	if h.TTL != 0 {
		if err := unix.SetsockoptInt(fd, level, ttl, int(h.TTL)); err != nil {
			return fmt.Errorf("setting the hop limit: %w", err)
		}
	}
	return nil
}

// RecvErr sets whether the kernel queues ICMP errors about a TCP socket. While it does, they also
// end an established connection (tcp_v4_err in net/ipv4/tcp_ipv4.c). RFC 1122 section 4.2.3.9 makes
// them soft, so that a connection outlives a temporary loss of its route.
func RecvErr(fd int, v6, on bool) error {
	level, name, value := unix.IPPROTO_IP, unix.IP_RECVERR, 0
	if v6 {
		level, name = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	if on {
		value = 1
	}
	if err := unix.SetsockoptInt(fd, level, name, value); err != nil {
		return fmt.Errorf("setting the use of the error queue: %w", err)
	}
	return nil
}

// Dialed returns the result of a dial that has ended. The error queue is meant for the dial: if it
// succeeded, the queue is turned off, and an error that arrived in between is discarded. If it
// failed, the queue is left to be read (DialError).
func Dialed(fd int, v6 bool) error {
	for range 2 { // an error may come before the queue is off
		errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			return err
		}
		if _, err := unix.Getpeername(fd); errno != 0 && err != nil {
			return unix.Errno(errno)
		}
		if err := RecvErr(fd, v6, false); err != nil {
			return err
		}
	}
	return nil
}

// ToSockaddr converts an address for the kernel, which never gets a 4-in-6 address: the address is
// unmapped here once more.
func ToSockaddr(a netip.AddrPort) unix.Sockaddr {
	ip := a.Addr().Unmap()
	if ip.Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: ip.As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: ip.As16()}
}
