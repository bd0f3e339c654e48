package forwarder

// Packets that end here: each is counted by its reason, and shown in a capture with it.

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// quoteMax is how much of a packet is kept to be quoted in an ICMP error, or shown in a
// capture beside the reason it was dropped for.
const quoteMax = 1280

// drops are what is told of dropped packets.
type drops struct {
	stats *stats
	// tell is told of each packet, which begins with its IP header; nil while nobody looks.
	tell func(reason string, pkt []byte)
}

// reason returns the counted reason of that name.
func (d *drops) reason(name string) reason { return reason{d.stats.counter(name), name, d} }

// refused tells of a packet that was counted elsewhere and has been through the stack.
func (d *drops) refused(why string, pkt *stack.PacketBuffer) {
	if d.tell != nil {
		var buf [quoteMax]byte
		d.tell(why, quote(pkt, buf[:]))
	}
}

// reason is a counted cause of a drop.
type reason struct {
	*atomic.Uint64
	name string
	to   *drops
}

// note counts a drop of pkt, which begins with its IP header.
func (r reason) note(pkt []byte) {
	r.Add(1)
	if r.to.tell != nil {
		r.to.tell(r.name, pkt)
	}
}

// dropArrived counts a drop of a packet whose data begin with the IP header.
func (r reason) dropArrived(pkt *stack.PacketBuffer) {
	r.Add(1)
	if r.to.tell == nil {
		return
	}
	if b, ok := pkt.Data().PullUp(min(pkt.Data().Size(), quoteMax)); ok {
		r.to.tell(r.name, b)
	}
}

// drop counts a drop of a packet that has been through the stack.
func (r reason) drop(pkt *stack.PacketBuffer) {
	r.Add(1)
	if r.to.tell != nil {
		var buf [128]byte
		r.to.tell(r.name, quote(pkt, buf[:]))
	}
}

// quote copies the start of a packet that has been through the stack into buf, which
// is filled as far as it goes, and returns what was written.
func quote(pkt *stack.PacketBuffer, buf []byte) []byte {
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

// originalPacket copies what an ICMP error about pkt quotes.
func originalPacket(pkt *stack.PacketBuffer) []byte {
	n := len(pkt.NetworkHeader().Slice()) + len(pkt.TransportHeader().Slice())
	return quote(pkt, make([]byte, min(n, quoteMax)))
}
