package forwarder

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/internal/testutil"
)

// bottomless is a link that swallows what is sent to the sandbox.
type bottomless struct{ *channel.Endpoint }

func (bottomless) WritePackets(l stack.PacketBufferList) (int, tcpip.Error) { return l.Len(), nil }

// steady returns a wire with one existing flow, a function that sends a batch of n datagrams
// through it, and one that delivers a datagram from its peer.
func steady(t testing.TB, size int) (out func(n int), in func()) {
	w := newWire(t, allowAll, func(c *Config) { c.Link = bottomless{c.Link.(*channel.Endpoint)} })
	w.f.dgram.UDP.Batched = true
	srv := udpServer(t, "127.0.0.1:0")
	me, peer := at(guest4, 4000), at(gateway4, portOf(srv))
	b := udpPacket(me, peer, pattern(size)).bytes()
	send := func(n int) {
		for range n {
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(buffer.NewViewWithData(b))})
			w.ep.InjectInbound(header.IPv4ProtocolNumber, pkt)
			pkt.DecRef()
		}
		w.f.dgram.Flush()
	}
	send(1)
	_, mapped := read(t, srv)
	_, _ = srv.WriteToUDPAddrPort([]byte("answer"), mapped)
	w.f.dgram.UDP.Mu.RLock()
	s := w.f.dgram.UDP.Socks[me]
	w.f.dgram.UDP.Mu.RUnlock()
	testutil.Eventually(t, "an answer arrived", s.Peer(srvAddr(srv), netip.Addr{}).Replied.Load)
	c := hostsock.Control{TTL: 64, HasTTL: true, Local: netip.IPv6LinkLocalAllNodes()}
	data := pattern(size)
	return send, func() { s.Deliver(srvAddr(srv), data, &c) }
}

func TestUDPAllocatesNothingPerDatagram(t *testing.T) {
	if testutil.Race {
		t.Skip("SKIP: pools forget on purpose under the race detector")
	}
	out, in := steady(t, 64)
	const batch = 32
	for range 100 {
		out(batch)
		in()
	}
	if n := testing.AllocsPerRun(200, func() { out(batch) }); n >= 1 {
		t.Errorf("%v allocations for %d datagrams from the sandbox", n, batch)
	}
	// netstack puts a packet on a list for a link that has no queueing discipline of its own.
	if n := testing.AllocsPerRun(200, in); n > 1 {
		t.Errorf("%v allocations for a datagram to the sandbox", n)
	}
}

func BenchmarkUDP(b *testing.B) {
	for _, size := range []int{64, 1400} {
		out, in := steady(b, size)
		name := map[int]string{64: "64", 1400: "1400"}[size]
		b.Run("out/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; i < b.N; i += 32 {
				out(32)
			}
		})
		b.Run("in/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				in()
			}
		})
	}
}
