package packet

// Packets that end here: each is counted by its reason, and shown with it in a capture.

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/count"
)

// QuoteMax is how much of a packet is kept for an ICMP error to quote, or for a capture to show
// beside the reason for the drop.
const QuoteMax = 1280

// Drops counts and reports dropped packets.
type Drops struct {
	Stats *count.Set
	// Tell is called with each packet, which begins with its IP header; nil while nothing listens.
	Tell func(reason string, pkt []byte)
}

// Reason returns the counted Reason of that name.
func (d *Drops) Reason(name string) Reason { return Reason{d.Stats.Counter(name), name, d} }

// Refused reports a packet that was counted elsewhere and has been through the stack.
func (d *Drops) Refused(why string, pkt *stack.PacketBuffer) {
	if d.Tell != nil {
		var buf [QuoteMax]byte
		d.Tell(why, Quote(pkt, buf[:]))
	}
}

// Reason is a counted cause of a drop.
type Reason struct {
	*atomic.Uint64
	Name string
	to   *Drops
}

// note counts a drop of pkt, which begins with its IP header.
func (r Reason) note(pkt []byte) {
	r.Add(1)
	if r.to.Tell != nil {
		r.to.Tell(r.Name, pkt)
	}
}

// DropArrived counts a drop of a packet whose data begin with the IP header.
func (r Reason) DropArrived(pkt *stack.PacketBuffer) {
	r.Add(1)
	if r.to.Tell == nil {
		return
	}
	if b, ok := pkt.Data().PullUp(min(pkt.Data().Size(), QuoteMax)); ok {
		r.to.Tell(r.Name, b)
	}
}

// Drop counts a drop of a packet that has been through the stack.
func (r Reason) Drop(pkt *stack.PacketBuffer) {
	r.Add(1)
	if r.to.Tell != nil {
		var buf [128]byte
		r.to.Tell(r.Name, Quote(pkt, buf[:]))
	}
}

// Quote copies the start of a packet that has been through the stack into buf, as much as fits, and
// returns the part written.
func Quote(pkt *stack.PacketBuffer, buf []byte) []byte {
	n := copy(buf, pkt.NetworkHeader().Slice())
	n += copy(buf[n:], pkt.TransportHeader().Slice())
	if rest := min(len(buf)-n, pkt.Data().Size()); rest > 0 {
		r := pkt.Data().AsRange().Capped(rest)
		v := r.ToView()
		n += copy(buf[n:], v.AsSlice())
		v.Release()
	}
	return buf[:n]
}

// OriginalPacket returns a copy of the part of pkt that an ICMP error about it quotes.
func OriginalPacket(pkt *stack.PacketBuffer) []byte {
	n := len(pkt.NetworkHeader().Slice()) + len(pkt.TransportHeader().Slice())
	return Quote(pkt, make([]byte, min(n, QuoteMax)))
}
