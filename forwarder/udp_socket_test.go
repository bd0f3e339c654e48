package forwarder

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// heardInto puts a sample into the batch as recvmmsg(2) does, without control messages.
func heardInto(b *datagram.RxBatch, i int, from netip.AddrPort, p []byte) {
	b.Msgs[i].Hdr.Namelen = b.From[i].Put(from)
	b.Msgs[i].Hdr.SetControllen(0)
	b.Msgs[i].N = uint32(copy(b.Data[i*datagram.RxBufLen:][:datagram.RxBufLen], p))
}

// Whatever is joined for the device, the sandbox gets the datagrams that came.
func TestUDPGluesEqualDatagrams(t *testing.T) {
	for _, side := range sides {
		t.Run(side.name, func(t *testing.T) {
			w := newWire(t, allowAll, nil)
			// A device that segments would set these; the wire does not, and the test looks.
			w.f.dgram.Emit.GSO, w.f.dgram.Emit.Uso, w.f.dgram.Emit.MTU = true, true, 65520
			a, b := udpServer(t, side.listen), udpServer(t, side.listen)
			me := at(side.guest, 4000)
			for _, srv := range []uint16{portOf(a), portOf(b)} {
				w.send(udpPacket(me, at(side.gateway, srv), []byte("hello")))
			}
			read(t, a)
			read(t, b)
			s := w.f.dgram.UDP.Lookup(nat.NewTuple(17, me, at(side.gateway, portOf(a)))).Sock
			fromA, fromB := a.LocalAddr().(*net.UDPAddr).AddrPort(), b.LocalAddr().(*net.UDPAddr).AddrPort()

			type sample struct {
				from netip.AddrPort
				size int
			}
			for _, row := range []struct {
				name    string
				sent    []sample
				packets int
			}{
				{"equal", []sample{{fromA, 100}, {fromA, 100}, {fromA, 100}}, 1},
				{"the last one shorter", []sample{{fromA, 100}, {fromA, 100}, {fromA, 7}, {fromA, 100}}, 2},
				{"longer", []sample{{fromA, 100}, {fromA, 101}, {fromA, 101}}, 2},
				{"empty", []sample{{fromA, 0}, {fromA, 0}, {fromA, 9}, {fromA, 0}}, 4},
				{"two senders", []sample{{fromA, 50}, {fromB, 50}, {fromB, 50}, {fromA, 50}}, 3},
				{"more than a packet holds", []sample{{fromA, 30000}, {fromA, 30000}, {fromA, 30000}}, 2},
				{"as much as one holds", []sample{
					{fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400},
					{fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400}, {fromA, 1400},
				}, 1},
			} {
				t.Run(row.name, func(t *testing.T) {
					batch := datagram.RxPool.Get().(*datagram.RxBatch)
					defer datagram.RxPool.Put(batch)
					var want []sample
					for i, d := range row.sent {
						p := pattern(d.size)
						if d.size > 0 {
							p[0] = byte(i)
						}
						heardInto(batch, i, d.from, p)
						want = append(want, d)
					}
					s.DeliverAll(batch, len(row.sent))
					packets, next := 0, 0
					for next < len(want) {
						pkt := w.ep.Read()
						if pkt == nil {
							t.Fatalf("%d of %d datagrams arrived", next, len(want))
						}
						packets++
						v := pkt.ToView()
						frame, segment := v.ToSlice(), int(pkt.GSOOptions.MSS)
						pkt.DecRef()
						l4 := frame[packet.IPHeaderLen(side.guest):]
						port, payload := header.UDP(l4).SourcePort(), l4[packet.UDPHeaderLen:]
						for first := true; first || len(payload) > 0; first = false {
							size := len(payload)
							if segment > 0 {
								size = min(size, segment)
							}
							d := want[next]
							expected := pattern(d.size)
							if d.size > 0 {
								expected[0] = byte(next)
							}
							if port != d.from.Port() || !bytes.Equal(payload[:size], expected) {
								t.Fatalf("sample %d: %d bytes from port %d, want %d from %d", next, size, port, d.size, d.from.Port())
							}
							payload = payload[size:]
							next++
						}
					}
					if packets != row.packets {
						t.Errorf("%d packets, want %d", packets, row.packets)
					}
					w.silent("all that came")
				})
			}
		})
	}
}
