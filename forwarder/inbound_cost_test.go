package forwarder

import (
	"sync/atomic"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/internal/testutil"
)

// sink is a link that swallows what is written, as directly as the device does.
type sink struct {
	*channel.Endpoint
	written atomic.Int64
}

func (s *sink) QDisc() stack.QueueingDiscipline { return s }

func (s *sink) Close() {}

func (s *sink) WritePacket(*stack.PacketBuffer) tcpip.Error {
	s.written.Add(1)
	return nil
}

// steadyInbound returns functions that carry a segment each way through a connection.
func steadyInbound(t testing.TB, size int) (in, out func(), inside, outside *sink) {
	w := newPodWire(t, allowAll, nil)
	client, server := at(client4, 40000), at(guest4, 80)
	w.connect(client, server)
	inside, outside = &sink{Endpoint: w.ep}, &sink{Endpoint: w.out.ep}
	w.f.outside.Sandbox, w.f.outside.In0 = inbound.NewOutlet(inside), inbound.NewOutlet(outside)
	inject := func(w *wire, p ipPacket) func() {
		b := p.bytes()
		return func() {
			v := buffer.NewViewWithData(b)
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(v)})
			w.ep.InjectInbound(header.IPv4ProtocolNumber, pkt)
			pkt.DecRef()
		}
	}
	data := pattern(size)
	return inject(w.out, dataSegment(client, server, header.TCPFlagAck, 1001, 5001, data)),
		inject(w.wire, dataSegment(server, client, header.TCPFlagAck, 5001, 1001, data)), inside, outside
}

func TestInboundAllocatesNothingPerPacket(t *testing.T) {
	if testutil.Race {
		t.Skip("SKIP: pools forget on purpose under the race detector")
	}
	for _, size := range []int{0, 1400, 60000} {
		in, out, inside, outside := steadyInbound(t, size)
		for range 100 {
			in()
			out()
		}
		if n := testing.AllocsPerRun(500, in); n > 0 {
			t.Errorf("%v allocations for a segment of %d bytes from outside", n, size)
		}
		if n := testing.AllocsPerRun(500, out); n > 0 {
			t.Errorf("%v allocations for a segment of %d bytes from the sandbox", n, size)
		}
		if in, out := inside.written.Load(), outside.written.Load(); in != 601 || out != 601 {
			t.Errorf("%d segments reached the sandbox, %d the outside", in, out)
		}
	}
}

func BenchmarkInbound(b *testing.B) {
	for _, size := range []int{64, 1400, 60000} {
		in, out, _, _ := steadyInbound(b, size)
		b.Run("in/"+itoa(size), func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				in()
			}
		})
		b.Run("out/"+itoa(size), func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				out()
			}
		})
	}
}
