package forwarder

import (
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// podWire is a forwarder whose two links the test holds: it is the pod on one and the world on the
// other.
type podWire struct {
	*wire
	out *wire // the world's side
}

var (
	client4 = netip.MustParseAddr("192.0.2.77")
	client6 = netip.MustParseAddr("2001:db8::77")
	also4   = netip.MustParseAddr("10.0.2.101") // a second address of the pod
)

func newPodWire(t testing.TB, text string, change func(*Config)) *podWire {
	t.Helper()
	in0 := channel.New(4096, 65535, "")
	w := newWire(t, text, func(c *Config) {
		c.Guest = append(c.Guest, also4)
		c.Inbound, c.OnlyHost, c.DNS = in0, true, nil
		if change != nil {
			change(c)
		}
	})
	out := *w
	out.ep = in0
	t.Cleanup(in0.Close)
	return &podWire{wire: w, out: &out}
}

// onlyHTTP lets in TCP and UDP to port 80, and echo, from one client, and lets nothing out.
const onlyHTTP = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: test}
spec:
  defaultAction: %s
  ingress:
  - name: web
    action: allow
    from: [{cidr: 192.0.2.77/32}, {cidr: "2001:db8::77/128"}]
    ports: [{protocol: TCP, port: 80}, {protocol: UDP, port: 80}]
`

const closed = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: closed}
spec: {defaultAction: drop}
`

// dataSegment returns a TCP segment with data.
func dataSegment(src, dst netip.AddrPort, flags header.TCPFlags, seq, ack uint32, data []byte) ipPacket {
	p := segment(src, dst, flags, seq, ack)
	p.l4 = append(p.l4, data...)
	h := header.TCP(p.l4)
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(p.l4, packet.PseudoSum(src.Addr(), dst.Addr(), packet.ProtoTCP, len(p.l4))))
	return p
}

// arrives sends a packet on one link and expects it unchanged on the other, except for its hop
// limit, which is one more.
func arrives(t testing.TB, from, to *wire, p ipPacket) {
	t.Helper()
	p.ttl = 61
	from.send(p)
	got, ok := to.tryRecv(time.Second)
	if !ok {
		t.Fatalf("protocol %d from %s to %s did not arrive; counters: %v", p.proto, p.src, p.dst, from.counters())
	}
	if got.src != p.src || got.dst != p.dst || got.proto != p.proto || got.ttl != 62 || string(got.l4) != string(p.l4) {
		t.Fatalf("protocol %d from %s to %s arrived as protocol %d from %s to %s with hop limit %d",
			p.proto, p.src, p.dst, got.proto, got.src, got.dst, got.ttl)
	}
}

// stays sends a packet and expects silence on both links and the reason counted.
func (w *podWire) stays(from *wire, p ipPacket, reason string) {
	w.t.Helper()
	before := w.f.Stats()[reason]
	from.send(p)
	w.out.silent("outside, of a packet that must stay")
	w.silent("inside, of a packet that must stay")
	if n := w.f.Stats()[reason] - before; n != 1 {
		w.t.Errorf("%s was counted %d times, want once; counters: %v", reason, n, w.counters())
	}
}

// flow returns the only inbound flow.
func (w *podWire) flow() nat.Flow {
	w.t.Helper()
	all := w.table.List()
	if len(all) != 1 {
		w.t.Fatalf("%d flows, want one: %v", len(all), all)
	}
	return all[0]
}

func (w *podWire) wantFlows(n int) {
	w.t.Helper()
	if got := w.table.Len(); got != n {
		w.t.Fatalf("%d flows, want %d; counters: %v", got, n, w.counters())
	}
	if got := int(w.f.outside.Count.Load()); got > n {
		w.t.Fatalf("%d inbound flows, want at most %d", got, n)
	}
}

// connect makes a connection from outside to the pod.
func (w *podWire) connect(client, pod netip.AddrPort) {
	w.t.Helper()
	arrives(w.t, w.out, w.wire, segment(client, pod, header.TCPFlagSyn, 1000, 0))
	arrives(w.t, w.wire, w.out, segment(pod, client, header.TCPFlagSyn|header.TCPFlagAck, 5000, 1001))
	arrives(w.t, w.out, w.wire, segment(client, pod, header.TCPFlagAck, 1001, 5001))
}

// injectGSO puts a packet with an open checksum on a link.
func injectGSO(ep *channel.Endpoint, b []byte, gso stack.GSO) {
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	pkt.GSOOptions, pkt.RXChecksumValidated = gso, true
	ep.InjectInbound(proto, pkt)
	pkt.DecRef()
}

// injectARP puts an ARP packet on the pod's link.
func (w *podWire) injectARP(b []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	w.ep.InjectInbound(header.ARPProtocolNumber, pkt)
	pkt.DecRef()
}
