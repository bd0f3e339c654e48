package datagram

// The information in an echo request.
//
// An echo request and its reply carry a message each way: the far side may return the bytes that it
// was sent, or others. So the sandbox's bytes stay here. A request leaves with as many zeroes in
// their place, so that ping -s and path MTU discovery stay correct, and with a sequence number of
// the flow's own. The book keeps the sandbox's message under that number. A reply, or an error
// about the request, brings the message back: ping's timestamps and patterns and traceroute's
// numbers are unchanged, and no byte that the far side wrote reaches the sandbox. The far side
// chooses only a reply's hop limit, its length up to the request's, and whether there is one.
//
//	sandbox                     book                      far side
//	id, seq, payload  ────►  flow, wire seq  ────►  kernel's id, wire seq, 00 00 00 …
//	id, seq, payload  ◄────  flow, wire seq  ◄────  kernel's id, wire seq, anything
//
// The sandbox still chooses the shape (size, hop limit, traffic class, don't-fragment), the flow
// and the moment. The rate of requests is bounded, and a request whose shape differs from the
// flow's last counts for EchoShapeCost: traceroute and mtr change the hop limit a few times a
// second, while a sender of messages would change the shape with every request.
// docs/threat-model.md states the resulting bound.

import (
	"container/list"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
)

const (
	// EchoBookLen and EchoBookBytes bound the requests of a sandbox that are remembered; the oldest
	// make room. A reply that comes after its request has left the book is dropped.
	EchoBookLen   = 1024
	EchoBookBytes = 1 << 20
	// EchoSentOverhead is roughly what an entry takes beside the message.
	EchoSentOverhead = 256
	// echoAnswers is how many replies to one request, or errors about it, are delivered: enough to
	// show a duplicate, too few for a far side to send messages.
	echoAnswers = 2
	// EchoPerSec and EchoBurst bound the requests of a sandbox. They fit ping -i 0.01 and the
	// probes that traceroute -I has in flight; ping -f is held to that rate.
	EchoPerSec = 100
	EchoBurst  = 256
	// EchoShapeCost is how many requests one counts for if its shape differs from the one before on
	// its flow, or if it is the flow's first.
	EchoShapeCost = 4
)

// echoShape is the part of a request that the sandbox chooses and the far side sees.
type echoShape struct {
	size int
	meta packet.Meta
	df   bool
}

// echoFlow is the book's state for a flow. It is guarded by the book's mu.
type echoFlow struct {
	first, next uint16 // wire sequence numbers: of the oldest request that may be in the book, and of the next one
	shape       echoShape
	ended       bool
}

// EchoSent is a request from the sandbox. It does not change, except for answers.
type EchoSent struct {
	Key     EchoKey
	A       packet.Arrival
	Msg     []byte // ICMP header and payload, as the sandbox sent them
	answers int    // guarded by the book's mu
}

type EchoKey struct {
	Flow *Flow
	seq  uint16
}

func (s *EchoSent) size() int64 { return int64(len(s.Msg)) + EchoSentOverhead }

// echoBook remembers echo requests within the bounds above.
type echoBook struct {
	now    func() time.Time
	bucket packet.TokenBucket

	rate, memory, late, extra, gone packet.Reason
	kept                            *atomic.Uint64

	mu     sync.Mutex
	ByKey  map[EchoKey]*list.Element
	Order  list.List // of *EchoSent, the oldest first
	Bytes  int64
	Charge admit.Charge
}

// init prepares the book. gone counts requests whose flow has ended meanwhile.
func (b *echoBook) init(gate *admit.Gate, d *packet.Drops, gone packet.Reason) {
	b.now, b.gone = gate.Now, gone
	b.bucket = packet.TokenBucket{Rate: EchoPerSec, Burst: EchoBurst}
	b.rate = d.Reason("icmp_rate")     // over the bound
	b.memory = d.Reason("icmp_memory") // no room in the memory budget
	b.late = d.Reason("icmp_late")     // an answer to a request that is no longer in the book, or never was
	b.extra = d.Reason("icmp_answers") // an answer beyond the last that is delivered
	b.kept = d.Stats.Counter("icmp_payload_kept")
	b.ByKey = make(map[EchoKey]*list.Element)
	b.Charge.M = gate.Memory
}

// enter adds a request of fl to the book and returns the sequence number that it leaves with, or
// the reason to drop it.
func (b *echoBook) enter(fl *Flow, pkt *stack.PacketBuffer, a packet.Arrival) (seq uint16, refusal packet.Reason) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := fl.echo
	if e.ended {
		return 0, b.gone
	}
	cost := 1.0
	shape := echoShape{a.Size, a.Meta, a.Df}
	if e.shape != shape {
		cost = EchoShapeCost
	}
	if !b.bucket.TakeN(cost, b.now()) {
		return 0, b.rate
	}
	e.shape = shape
	whole := make([]byte, a.Size)
	s := &EchoSent{Key: EchoKey{fl, e.next}, A: a, Msg: packet.Quote(pkt, whole)[len(pkt.NetworkHeader().Slice()):]}
	for len(b.ByKey) > 0 && (len(b.ByKey) >= EchoBookLen || b.Bytes+s.size() > EchoBookBytes) {
		b.remove(b.Order.Front())
	}
	if !b.Charge.Try(s.size()) {
		return 0, b.memory
	}
	b.Bytes += s.size()
	b.ByKey[s.Key] = b.Order.PushBack(s)
	e.next++
	if len(s.Msg) > packet.EchoHeaderLen {
		b.kept.Add(1)
	}
	return s.Key.seq, packet.Reason{}
}

// remove is called with mu held. Entries of one flow leave in order.
func (b *echoBook) remove(el *list.Element) {
	s := b.Order.Remove(el).(*EchoSent)
	delete(b.ByKey, s.Key)
	b.Bytes -= s.size()
	b.Charge.Give(s.size())
	s.Key.Flow.echo.first = s.Key.seq + 1
}

// answered returns the request of fl whose number msg carries: msg is an ICMP message from outside,
// or the start of one that an error quotes. If it returns nil, msg has been counted and is not for
// the sandbox.
func (b *echoBook) answered(fl *Flow, msg []byte) *EchoSent {
	if len(msg) < packet.EchoHeaderLen {
		b.late.Add(1)
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	el := b.ByKey[EchoKey{fl, binary.BigEndian.Uint16(msg[6:])}]
	if el == nil {
		b.late.Add(1)
		return nil
	}
	s := el.Value.(*EchoSent)
	if s.answers == echoAnswers {
		b.extra.Add(1)
		return nil
	}
	s.answers++
	return s
}

// forget removes the requests of a flow that has ended, and accepts no more of them.
func (b *echoBook) forget(fl *Flow) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fl.echo.ended = true
	for seq := fl.echo.first; seq != fl.echo.next; seq++ {
		if el := b.ByKey[EchoKey{fl, seq}]; el != nil {
			b.remove(el)
		}
	}
}
