package e2e

// A watch over an interface, like tcpdump: it sees every packet that arrives there, so that a test
// can say what did not.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

type packet struct {
	src, dst     netip.Addr
	proto        int
	sport, dport int
	tos, ttl     int
	payload      int  // bytes after the header of TCP or UDP
	neighbour    bool // neighbour discovery or multicast listeners
}

func (p packet) String() string {
	return fmt.Sprintf("%v:%d>%v:%d proto %d tos %#x", p.src, p.sport, p.dst, p.dport, p.proto, p.tos)
}

type watcher struct {
	fd   int
	keep func(packet) bool // nil keeps all
	stop chan struct{}     // closed by the test's end

	mu      sync.Mutex // guards packets
	packets []packet
}

// watch starts a watch on the named interface of n; it sees what arrives, not what leaves.
func (n *netns) watch(t *testing.T, link string) *watcher {
	t.Helper()
	return n.watchFor(t, link, nil)
}

// watchFor keeps only the packets that keep accepts, and watches every interface if link is "".
// Packets from or to one of the quiet addresses do not even reach it.
func (n *netns) watchFor(t *testing.T, link string, keep func(packet) bool, quiet ...netip.Addr) *watcher {
	t.Helper()
	w := &watcher{keep: keep, stop: make(chan struct{})}
	var err error
	n.do(func() { w.fd, err = openWatch(link, quiet) })
	if err != nil {
		t.Fatalf("watching %s in %s: %v", link, n, err)
	}
	var reader sync.WaitGroup
	reader.Go(w.read)
	t.Cleanup(func() {
		close(w.stop)
		reader.Wait()
		unix.Close(w.fd)
	})
	return w
}

func openWatch(link string, quiet []netip.Addr) (fd int, err error) {
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	var index int // 0 means all
	if link != "" {
		if index, err = linkIndex(link); err != nil {
			return -1, err
		}
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	// The reader checks for its end five times a second.
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000}); err != nil {
		return -1, err
	}
	if len(quiet) > 0 {
		code, err := bpf.Assemble(without(quiet))
		if err != nil {
			return -1, err
		}
		filter := make([]unix.SockFilter, len(code))
		for i, c := range code {
			filter[i] = unix.SockFilter{Code: c.Op, Jt: c.Jt, Jf: c.Jf, K: c.K}
		}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
			return -1, err
		}
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
}

// without returns a filter that drops packets from or to some addresses; of IPv6 addresses it
// compares the lower half.
func without(addrs []netip.Addr) []bpf.Instruction {
	const pass = 256
	four, six := []bpf.Instruction{}, []bpf.Instruction{}
	for _, a := range addrs {
		if a.Is4() {
			b := a.As4()
			for _, off := range []uint32{12, 16} {
				four = append(four, bpf.LoadAbsolute{Off: off, Size: 4},
					bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(b[:]), SkipFalse: 1}, bpf.RetConstant{})
			}
			continue
		}
		b := a.As16()
		for _, off := range []uint32{8, 24} {
			six = append(six, bpf.LoadAbsolute{Off: off + 8, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(b[8:]), SkipFalse: 3},
				bpf.LoadAbsolute{Off: off + 12, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(b[12:]), SkipFalse: 1}, bpf.RetConstant{})
		}
	}
	four, six = append(four, bpf.RetConstant{Val: pass}), append(six, bpf.RetConstant{Val: pass})
	head := []bpf.Instruction{
		bpf.LoadAbsolute{Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 4, SkipFalse: uint8(len(four))},
	}
	return append(append(head, four...), six...)
}

func linkIndex(link string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(link)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

func (w *watcher) read() {
	buf := make([]byte, 256)
	for {
		select {
		case <-w.stop:
			return
		default:
		}
		n, from, err := unix.Recvfrom(w.fd, buf, unix.MSG_TRUNC)
		if err != nil { // mostly the timeout
			continue
		}
		if ll, isLL := from.(*unix.SockaddrLinklayer); !isLL || ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if p, ok := dissect(buf[:min(n, len(buf))], n); ok && (w.keep == nil || w.keep(p)) {
			w.mu.Lock()
			w.packets = append(w.packets, p)
			w.mu.Unlock()
		}
	}
}

func dissect(b []byte, whole int) (p packet, ok bool) {
	var rest []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.src, p.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.proto, p.tos, p.ttl = int(b[9]), int(b[1]), int(b[8])
		rest = b[min(int(b[0]&15)*4, len(b)):]
		whole -= int(b[0]&15) * 4
	case len(b) >= 40 && b[0]>>4 == 6:
		p.src, p.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.proto, p.tos, p.ttl = int(b[6]), int(b[0]&15)<<4|int(b[1]>>4), int(b[7])
		rest = b[40:]
		whole -= 40
	default:
		return p, false
	}
	if (p.proto == 6 || p.proto == 17) && len(rest) >= 4 {
		p.sport, p.dport = int(binary.BigEndian.Uint16(rest)), int(binary.BigEndian.Uint16(rest[2:]))
	}
	if p.proto == 6 && len(rest) >= 20 {
		p.payload = whole - int(rest[12]>>4)*4
	}
	if p.proto == 17 {
		p.payload = whole - 8
	}
	if p.proto == 58 && len(rest) > 0 {
		p.neighbour = rest[0] >= 130 && rest[0] <= 137 || rest[0] == 143
	}
	return p, true
}

// lost returns how many packets the kernel had no room for: if there are any, a packet that was not
// seen may have been there.
func (w *watcher) lost(t *testing.T) uint32 {
	t.Helper()
	s, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		t.Fatalf("asking the watch what it lost: %v", err)
	}
	return s.Drops
}

func (w *watcher) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.packets)
}

func (w *watcher) since(n int) []packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]packet(nil), w.packets[n:]...)
}
