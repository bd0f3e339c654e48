package e2e

// A watch over an interface, as tcpdump would: every packet that arrives there, so that
// a test can say what did not.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

type packet struct {
	src, dst     netip.Addr
	proto        int
	sport, dport int
	tos, ttl     int
	payload      int // bytes after TCP's header, for TCP
}

func (p packet) String() string {
	return fmt.Sprintf("%v:%d>%v:%d proto %d tos %#x", p.src, p.sport, p.dst, p.dport, p.proto, p.tos)
}

type watcher struct {
	fd   int
	stop chan struct{} // closed by the test's end

	mu      sync.Mutex // guards packets
	packets []packet
}

// watch starts one on the named interface of n; it sees what arrives, not what leaves.
func (n *netns) watch(t *testing.T, link string) *watcher {
	t.Helper()
	w := &watcher{stop: make(chan struct{})}
	var err error
	n.do(func() { w.fd, err = openWatch(link) })
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

func openWatch(link string) (fd int, err error) {
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
	var index int
	if index, err = linkIndex(link); err != nil {
		return -1, err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	// The reader looks for its end five times a second.
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000}); err != nil {
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
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
		if p, ok := dissect(buf[:min(n, len(buf))], n); ok {
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
	return p, true
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
