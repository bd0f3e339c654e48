package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The ports that the sandbox listens on, for --publish-auto.
//
// The kernel does not announce new listeners, so its tables are read every 150 ms: four dumps over
// a sock_diag(7) socket that the stage opened before CMD ran. The monitor reads from the kernel,
// not from the stage. Only differences are reported.

const scanInterval = 150 * time.Millisecond

// maxPorts bounds how many ports of one sandbox are reported. Further ones are left out until
// others are closed.
const maxPorts = 4096

// Port is a socket inside that waits for peers.
type Port struct {
	Network string // "tcp" or "udp"
	Addr    netip.Addr
	Port    uint16
	// DualStack is set for a socket on :: that accepts IPv4 too.
	DualStack bool
}

func (p Port) String() string {
	return fmt.Sprintf("%s %s", p.Network, netip.AddrPortFrom(p.Addr, p.Port))
}

// PortChange reports that a port appeared or went away.
type PortChange struct {
	Port
	Up bool
}

// portRange is the guest's net.ipv4.ip_local_port_range.
type portRange struct{ first, last uint16 }

func (r portRange) contains(p uint16) bool { return r.first <= p && p <= r.last }

func readPortRange() portRange {
	r := portRange{32768, 60999}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(b), &r.first, &r.last)
	}
	return r
}

// Listening reports the ports that the guest listens on: first all of them, then each change within
// 200 ms. A UDP socket in the ephemeral range is not reported, because a client waiting for its
// answer looks the same. The channel is closed when ctx or the guest ends. Call it once per Guest:
// the dumps share a socket.
func (g *Guest) Listening(ctx context.Context) <-chan []PortChange {
	out := make(chan []PortChange)
	// Ends with ctx or the channel to the stage; it is the only sender.
	go func() {
		defer close(out)
		tick := time.NewTicker(scanInterval)
		defer tick.Stop()
		known := map[Port]bool{}
		for {
			now, err := g.scan()
			if err == nil {
				if changes := difference(known, now); len(changes) > 0 {
					select {
					case out <- changes:
					case <-ctx.Done():
						return
					case <-g.gone:
						return
					}
				}
				known = now
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			case <-g.gone:
				return
			}
		}
	}()
	return out
}

func difference(old, now map[Port]bool) []PortChange {
	var out []PortChange
	for p := range maps.Keys(old) {
		if !now[p] {
			out = append(out, PortChange{p, false})
		}
	}
	for p := range maps.Keys(now) {
		if !old[p] {
			out = append(out, PortChange{p, true})
		}
	}
	slices.SortFunc(out, func(a, b PortChange) int {
		if a.Up != b.Up { // removals first, so that a port can move
			if b.Up {
				return -1
			}
			return 1
		}
		return int(a.Port.Port) - int(b.Port.Port)
	})
	return out
}

func (g *Guest) scan() (map[Port]bool, error) {
	found := map[Port]bool{}
	conn, err := g.diag.SyscallConn()
	if err != nil {
		return nil, err
	}
	var scanErr error
	err = conn.Control(func(fd uintptr) {
		for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
				if scanErr = dumpSockets(int(fd), family, proto, func(d diagSocket) {
					if len(found) < maxPorts {
						g.addPort(found, proto, d)
					}
				}); scanErr != nil {
					return
				}
			}
		}
	})
	return found, errors.Join(err, scanErr)
}

func (g *Guest) addPort(found map[Port]bool, proto uint8, d diagSocket) {
	p := Port{Network: "tcp", Addr: d.addr, Port: d.port}
	if proto == unix.IPPROTO_UDP {
		if d.peerPort != 0 || g.ephem.contains(d.port) {
			return
		}
		p.Network = "udp"
	}
	if p.Port == 0 {
		return
	}
	p.DualStack = d.addr.Is6() && d.addr.IsUnspecified() && !d.v6only
	found[p] = true
}

// diagSocket holds the fields read from an inet_diag_msg.
type diagSocket struct {
	addr     netip.Addr
	port     uint16
	peerPort uint16
	v6only   bool
}

// Layouts and numbers of linux/inet_diag.h and linux/sock_diag.h.
const (
	sockDiagByFamily = 20
	inetDiagMsgLen   = 72
	inetDiagV6Only   = 11 // INET_DIAG_SKV6ONLY
	tcpListen        = 10
	tcpClose         = 7 // the state of an unconnected UDP socket
)

var errDiag = errors.New("malformed answer of sock_diag")

// dumpSockets calls each for every socket of one family and protocol that waits for peers.
func dumpSockets(fd int, family, proto uint8, each func(diagSocket)) error {
	state := tcpListen
	if proto == unix.IPPROTO_UDP {
		state = tcpClose
	}
	req := make([]byte, unix.NLMSG_HDRLEN+56)
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[16], req[17] = family, proto
	binary.NativeEndian.PutUint32(req[20:], 1<<state)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 1000); err == unix.EINTR {
			continue
		} else if err != nil || n == 0 {
			return fmt.Errorf("sock_diag does not answer: %v", err)
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return err
		}
		done, err := parseDiag(buf[:n], each)
		if done || err != nil {
			return err
		}
	}
}

// parseDiag parses one datagram of a dump; done is true at its end.
func parseDiag(b []byte, each func(diagSocket)) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(b))
		typ := binary.NativeEndian.Uint16(b[4:])
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			return false, errDiag
		}
		body := b[unix.NLMSG_HDRLEN:n]
		switch typ {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, errDiag
			}
			if e := int32(binary.NativeEndian.Uint32(body)); e < 0 {
				if unix.Errno(-e) == unix.ENOENT { // this kernel has no such family or protocol
					return true, nil
				}
				return false, fmt.Errorf("sock_diag: %w", unix.Errno(-e))
			}
			return true, nil
		case sockDiagByFamily:
			d, ok := parseDiagMsg(body)
			if !ok {
				return false, errDiag
			}
			each(d)
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return false, nil
}

func parseDiagMsg(b []byte) (diagSocket, bool) {
	if len(b) < inetDiagMsgLen {
		return diagSocket{}, false
	}
	d := diagSocket{port: binary.BigEndian.Uint16(b[4:]), peerPort: binary.BigEndian.Uint16(b[6:])}
	switch b[0] {
	case unix.AF_INET:
		d.addr = netip.AddrFrom4([4]byte(b[8:12]))
	case unix.AF_INET6:
		d.addr = netip.AddrFrom16([16]byte(b[8:24]))
		if d.addr.Is4In6() { // bound to a mapped address: accepts IPv4 only
			d.addr = d.addr.Unmap()
		}
	default:
		return diagSocket{}, false
	}
	for b = b[inetDiagMsgLen:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return diagSocket{}, false
		}
		if binary.NativeEndian.Uint16(b[2:]) == inetDiagV6Only && n >= 5 {
			d.v6only = b[4] != 0
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return d, true
}
