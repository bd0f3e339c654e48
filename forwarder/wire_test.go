package forwarder

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// wire is a forwarder whose sandbox is the test itself. Packets go in and come out as bytes, so
// that the test can choose and examine every header field.
type wire struct {
	t     testing.TB
	f     *Forwarder
	table *nat.Table
	ep    *channel.Endpoint
}

func newWire(t testing.TB, text string, change func(*Config)) *wire {
	t.Helper()
	w := &wire{t: t, table: nat.NewTable(nat.Config{}), ep: channel.New(4096, 1500, "\x02\x00\x00\x00\x00\x02")}
	cfg := Config{
		Link: w.ep, MTU: 1500, Table: w.table,
		Guest: []netip.Addr{guest4, guest6}, Gateway: []netip.Addr{gateway4, gateway6}, DNS: []netip.Addr{dns4, dns6},
		Prefix4: netip.MustParsePrefix("10.0.2.0/24"),
	}
	if change != nil {
		change(&cfg)
	}
	w.table = cfg.Table
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.f = f
	f.SetRules(compile(t, text))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		w.ep.Close()
		if n := f.dialer.Sockets.Load(); n != 0 {
			t.Errorf("%d host sockets left open", n)
		}
		if n := w.table.Len(); n != 0 {
			t.Errorf("%d flows left in the table", n)
		}
		checkRepaid(t, f.gate.Memory)
	})
	return w
}

// ipPacket is an IP packet with what a test wants to say about it.
type ipPacket struct {
	src, dst netip.Addr
	proto    uint8
	ttl, tos uint8
	id       uint16
	df       bool
	l4       []byte
}

// bytes encodes the packet with gVisor's encoders, not with ours.
func (p ipPacket) bytes() []byte {
	if p.ttl == 0 {
		p.ttl = 64
	}
	if p.dst.Is4() {
		b := make([]byte, header.IPv4MinimumSize+len(p.l4))
		h := header.IPv4(b)
		f := header.IPv4Fields{
			TotalLength: uint16(len(b)), TTL: p.ttl, TOS: p.tos, Protocol: p.proto, ID: p.id,
			SrcAddr: packet.StackAddr(p.src), DstAddr: packet.StackAddr(p.dst),
		}
		if p.df {
			f.Flags = header.IPv4FlagDontFragment
		}
		h.Encode(&f)
		h.SetChecksum(^h.CalculateChecksum())
		copy(b[header.IPv4MinimumSize:], p.l4)
		return b
	}
	b := make([]byte, header.IPv6MinimumSize+len(p.l4))
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(p.l4)), TransportProtocol: tcpip.TransportProtocolNumber(p.proto),
		HopLimit: p.ttl, TrafficClass: p.tos, SrcAddr: packet.StackAddr(p.src), DstAddr: packet.StackAddr(p.dst),
	})
	copy(b[header.IPv6MinimumSize:], p.l4)
	return b
}

func udpPacket(src, dst netip.AddrPort, payload []byte) ipPacket {
	b := make([]byte, header.UDPMinimumSize+len(payload))
	copy(b[header.UDPMinimumSize:], payload)
	u := header.UDP(b)
	u.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(len(b))})
	x := header.PseudoHeaderChecksum(header.UDPProtocolNumber, packet.StackAddr(src.Addr()), packet.StackAddr(dst.Addr()), uint16(len(b)))
	u.SetChecksum(^u.CalculateChecksum(checksum.Checksum(payload, x)))
	return ipPacket{src: src.Addr(), dst: dst.Addr(), proto: 17, l4: b}
}

func echoPacket(src, dst netip.Addr, id, seq uint16, payload []byte) ipPacket {
	b := make([]byte, 8+len(payload))
	copy(b[8:], payload)
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	p := ipPacket{src: src, dst: dst, proto: 1, l4: b}
	if dst.Is4() {
		b[0] = 8
		header.ICMPv4(b).SetChecksum(header.ICMPv4Checksum(b, 0))
		return p
	}
	b[0], p.proto = 128, 58
	header.ICMPv6(b).SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
		Header: b, Src: packet.StackAddr(src), Dst: packet.StackAddr(dst),
	}))
	return p
}

// send puts an IP packet on the link, as the sandbox.
func (w *wire) send(p ipPacket) { w.sendBytes(p.bytes(), 0) }

func (w *wire) sendBytes(b []byte, mss uint16) {
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	if mss > 0 {
		pkt.GSOOptions.MSS = mss
		pkt.RXChecksumValidated = true
	}
	w.ep.InjectInbound(proto, pkt)
	pkt.DecRef()
}

// sendFragments cuts a packet as a sandbox with a small MTU would.
func (w *wire) sendFragments(p ipPacket, size int) {
	size &^= 7
	for off := 0; off < len(p.l4); off += size {
		part := p
		part.l4 = p.l4[off:min(len(p.l4), off+size)]
		more := off+size < len(p.l4)
		if p.dst.Is4() {
			b := part.bytes()
			h := header.IPv4(b)
			flags := uint8(0)
			if more {
				flags = header.IPv4FlagMoreFragments
			}
			h.SetFlagsFragmentOffset(flags, uint16(off))
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
			w.sendBytes(b, 0)
			continue
		}
		fh := make([]byte, 8)
		fh[0] = p.proto
		word := uint16(off)
		if more {
			word |= 1
		}
		binary.BigEndian.PutUint16(fh[2:], word)
		binary.BigEndian.PutUint32(fh[4:], 77)
		part.l4 = append(fh, part.l4...)
		part.proto = 44
		w.sendBytes(part.bytes(), 0)
	}
}

// recv returns the next packet to the sandbox. It reassembles fragments in order of arrival and
// verifies every checksum.
func (w *wire) recv() ipPacket {
	w.t.Helper()
	p, ok := w.tryRecv(5 * time.Second)
	if !ok {
		w.t.Fatalf("nothing arrived in the sandbox; counters: %v", w.counters())
	}
	return p
}

func (w *wire) counters() map[string]uint64 {
	m := w.f.Stats()
	for k, v := range m {
		if v == 0 {
			delete(m, k)
		}
	}
	return m
}

func (w *wire) tryRecv(wait time.Duration) (ipPacket, bool) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	var p ipPacket
	for {
		pkt := w.ep.ReadContext(ctx)
		if pkt == nil {
			return ipPacket{}, false
		}
		v := pkt.ToView()
		b := v.ToSlice()
		gso := pkt.GSOOptions
		pkt.DecRef()
		more := false
		if b[0]>>4 == 4 {
			h := header.IPv4(b)
			if !h.IsValid(len(b)) || !h.IsChecksumValid() {
				w.t.Fatalf("invalid IPv4 header %x", b[:20])
			}
			if int(h.FragmentOffset()) != len(p.l4) {
				w.t.Fatalf("fragment at %d, expected one at %d", h.FragmentOffset(), len(p.l4))
			}
			p.src, p.dst, p.proto = packet.NetipAddr(h.SourceAddress()), packet.NetipAddr(h.DestinationAddress()), h.Protocol()
			p.ttl, p.id, p.df = h.TTL(), h.ID(), h.Flags()&header.IPv4FlagDontFragment != 0
			p.tos, _ = h.TOS()
			p.l4 = append(p.l4, h.Payload()...)
			more = h.More()
		} else {
			h := header.IPv6(b)
			if !h.IsValid(len(b)) {
				w.t.Fatalf("invalid IPv6 header %x", b[:40])
			}
			p.src, p.dst, p.proto, p.ttl = packet.NetipAddr(h.SourceAddress()), packet.NetipAddr(h.DestinationAddress()), h.NextHeader(), h.HopLimit()
			p.tos, _ = h.TOS()
			l4 := h.Payload()
			if p.proto == 44 {
				p.proto = l4[0]
				more = l4[3]&1 != 0
				l4 = l4[8:]
			}
			p.l4 = append(p.l4, l4...)
		}
		if !more {
			if gso.Type == stack.GSONone {
				w.verify(p)
			}
			return p, true
		}
	}
}

// verify checks the transport checksum.
func (w *wire) verify(p ipPacket) {
	w.t.Helper()
	initial := uint16(0)
	if p.proto != 1 {
		initial = header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(p.proto), packet.StackAddr(p.src), packet.StackAddr(p.dst), uint16(len(p.l4)))
	}
	if checksum.Checksum(p.l4, initial) != 0xffff {
		w.t.Fatalf("bad checksum in protocol %d packet from %s", p.proto, p.src)
	}
}

// recvUDP returns the next datagram to the sandbox.
func (w *wire) recvUDP() (src, dst netip.AddrPort, payload []byte, p ipPacket) {
	w.t.Helper()
	p = w.recv()
	if p.proto != 17 {
		w.t.Fatalf("got protocol %d (%x), expected a datagram; counters: %v", p.proto, p.l4[:min(len(p.l4), 8)], w.counters())
	}
	u := header.UDP(p.l4)
	if int(u.Length()) != len(p.l4) {
		w.t.Fatalf("UDP length %d of %d bytes", u.Length(), len(p.l4))
	}
	return netip.AddrPortFrom(p.src, u.SourcePort()), netip.AddrPortFrom(p.dst, u.DestinationPort()), p.l4[8:], p
}

// wantError receives an ICMP error and returns the packet it quotes.
func (w *wire) wantError(what string, typ, code uint8, from netip.Addr) (p ipPacket, quoted []byte) {
	w.t.Helper()
	p = w.recv()
	if p.proto != 1 && p.proto != 58 {
		w.t.Fatalf("%s: got protocol %d, expected an ICMP error; counters: %v", what, p.proto, w.counters())
	}
	if p.l4[0] != typ || p.l4[1] != code || p.src != from {
		w.t.Fatalf("%s: got type %d code %d from %s, expected type %d code %d from %s", what, p.l4[0], p.l4[1], p.src, typ, code, from)
	}
	return p, p.l4[8:]
}

// silent asserts that nothing was sent to the sandbox. Everything that refuses a packet
// does so before send returns, so there is nothing to wait for.
func (w *wire) silent(what string) {
	w.t.Helper()
	if p, ok := w.tryRecv(time.Millisecond); ok {
		w.t.Fatalf("%s: got protocol %d from %s, expected silence", what, p.proto, p.src)
	}
}

// udpServer returns a socket on the host.
func udpServer(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

func portOf(c *net.UDPConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// read returns the next datagram at a host socket.
func read(t testing.TB, c *net.UDPConn) ([]byte, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 1<<16)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatalf("reading at the host: %v", err)
	}
	return b[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// netns is a test's own network namespace, with loopback up.
type netns struct{ fd int }

// inNetns makes a namespace and moves the test's thread into it. The thread never goes back: it
// ends with the test's goroutine.
func inNetns(t testing.TB) netns {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("SKIP: needs the right to make a network namespace: %v", err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	ip(t, "link", "set", "lo", "up")
	return netns{fd}
}

// run is t.Run inside the namespace: a subtest has its own goroutine, and so its own thread.
func (n netns) run(t *testing.T, name string, f func(*testing.T)) {
	t.Run(name, func(t *testing.T) {
		runtime.LockOSThread()
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
		f(t)
	})
}

func ip(t testing.TB, args ...string) {
	t.Helper()
	testutil.Run(t, "ip", args...)
}

func sysctl(t testing.TB, path, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// routerNetns makes a namespace with a router beside the test's:
//
//	test (192.0.2.1) ── veth, MTU 1400 ── router (192.0.2.2, also far4) ── MTU 1300 ── 198.51.100.128/25
func routerNetns(t testing.TB) {
	t.Helper()
	cmd := exec.Command("unshare", "-n", "sh", "-c", "echo; exec cat")
	stdin, _ := cmd.StdinPipe()
	stdout, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); _ = cmd.Wait() })
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	pid := itoa(cmd.Process.Pid)
	inRouter := func(args ...string) {
		t.Helper()
		testutil.Run(t, "nsenter", append([]string{"-t", pid, "-n"}, args...)...)
	}
	ip(t, "link", "add", "up0", "mtu", "1400", "type", "veth", "peer", "name", "down0", "mtu", "1400", "netns", pid)
	ip(t, "addr", "add", "192.0.2.1/24", "dev", "up0")
	ip(t, "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad")
	ip(t, "link", "set", "up0", "up")
	inRouter("ip", "link", "set", "lo", "up")
	inRouter("ip", "addr", "add", "192.0.2.2/24", "dev", "down0")
	inRouter("ip", "addr", "add", "2001:db8::2/64", "dev", "down0", "nodad")
	inRouter("ip", "link", "set", "down0", "up")
	inRouter("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.icmp_ratemask=0", "net.ipv6.icmp.ratelimit=0")
	inRouter("ip", "addr", "add", "198.51.100.1/32", "dev", "lo")
	inRouter("ip", "addr", "add", "2001:db8:1::1/128", "dev", "lo", "nodad")
	inRouter("ip", "route", "add", "unreachable", "198.51.100.7/32")
	inRouter("ip", "link", "add", "n0", "mtu", "1300", "type", "veth", "peer", "name", "n1", "mtu", "1300")
	inRouter("ip", "link", "set", "n0", "up")
	inRouter("ip", "link", "set", "n1", "up")
	inRouter("ip", "route", "add", "198.51.100.128/25", "dev", "n0")
	inRouter("ip", "-6", "route", "add", "2001:db8:1:0:8000::/65", "dev", "n0")
	ip(t, "route", "add", "198.51.100.0/24", "via", "192.0.2.2")
	ip(t, "-6", "route", "add", "2001:db8:1::/64", "via", "2001:db8::2")
}

func itoa(n int) string {
	if n >= 10 {
		return itoa(n/10) + string(rune('0'+n%10))
	}
	return string(rune('0' + n))
}
