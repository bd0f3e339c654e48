package forwarder

// What an echo request may say.
//
// An echo request and its reply are a letter each way: the far side returns what it was
// sent, or something else. So the sandbox's bytes stay here. A request leaves with
// zeroes in their place, as many as there were, so that ping -s and path MTU are true,
// and with a sequence number of the flow's own. The book keeps the sandbox's message by
// that number. A reply, or an error about the request, brings the message back: ping's
// timestamps and patterns and traceroute's numbers are what they were, and nothing
// that the far side wrote reaches the sandbox. It chooses a reply's hop limit, a length
// up to the request's, and whether there is one.
//
//	sandbox                     book                      far side
//	id, seq, payload  ────►  flow, wire seq  ────►  kernel's id, wire seq, 00 00 00 …
//	id, seq, payload  ◄────  flow, wire seq  ◄────  kernel's id, wire seq, anything
//
// What is left is the choice of shape (size, hop limit, traffic class, don't-fragment), of
// flow and of moment. Requests are bounded in rate, and one of another shape than the
// flow's last costs echoShapeCost of them: traceroute and mtr change the hop limit a few
// times a second, a sender of messages would with every request. docs/threat-model.md
// has the bound that follows.

import (
	"container/list"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// echoBookLen and echoBookBytes bound the requests of a sandbox that are remembered;
	// the oldest make room. A reply that comes later than that is dropped.
	echoBookLen   = 1024
	echoBookBytes = 1 << 20
	// echoSentOverhead is what an entry takes beside the message, about.
	echoSentOverhead = 256
	// echoAnswers is how many replies to one request, or errors about it, are delivered: a
	// duplicate is seen as such, and a far side with much to say is not.
	echoAnswers = 2
	// echoPerSec and echoBurst bound the requests of a sandbox: ping -i 0.01 and the probes
	// that traceroute -I has under way. ping -f is as fast as that.
	echoPerSec = 100
	echoBurst  = 256
	// echoShapeCost is how many requests one counts for that has another shape than the one
	// before on its flow, or is the flow's first.
	echoShapeCost = 4
)

// echoShape is what the sandbox chooses of a request and the far side sees.
type echoShape struct {
	size int
	meta ipMeta
	df   bool
}

// echoFlow is what the book knows of a flow. It is guarded by the book's mu.
type echoFlow struct {
	first, next uint16 // wire sequence numbers: of the oldest request that may be in the book, and of the next one
	shape       echoShape
	ended       bool
}

// echoSent is a request of the sandbox. It does not change, except for answers.
type echoSent struct {
	key     echoKey
	a       arrival
	msg     []byte // ICMP header and payload, as the sandbox sent them
	answers int    // guarded by the book's mu
}

type echoKey struct {
	flow *dgramFlow
	seq  uint16
}

func (s *echoSent) size() int64 { return int64(len(s.msg)) + echoSentOverhead }

// echoBook remembers echo requests within the bounds above.
type echoBook struct {
	now    func() time.Time
	bucket tokenBucket

	rate, memory, late, extra, gone reason
	kept                            *atomic.Uint64

	mu     sync.Mutex
	byKey  map[echoKey]*list.Element
	order  list.List // of *echoSent, the oldest first
	bytes  int64
	charge charge
}

// init readies the book. gone counts requests whose flow has ended meanwhile.
func (b *echoBook) init(gate *admission, d *drops, gone reason) {
	b.now, b.gone = gate.now, gone
	b.bucket = tokenBucket{rate: echoPerSec, burst: echoBurst}
	b.rate = d.reason("icmp_rate")     // over the bound
	b.memory = d.reason("icmp_memory") // no room in the memory budget
	b.late = d.reason("icmp_late")     // an answer to a request that is not in the book any more, or was none
	b.extra = d.reason("icmp_answers") // an answer after the last that is delivered
	b.kept = d.stats.counter("icmp_payload_kept")
	b.byKey = make(map[echoKey]*list.Element)
	b.charge.m = gate.memory
}

// enter takes a request of fl into the book and returns the sequence number that it leaves
// with, or what forbids it.
func (b *echoBook) enter(fl *dgramFlow, pkt *stack.PacketBuffer, a arrival) (seq uint16, refusal reason) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := fl.echo
	if e.ended {
		return 0, b.gone
	}
	cost := 1.0
	shape := echoShape{a.size, a.meta, a.df}
	if e.shape != shape {
		cost = echoShapeCost
	}
	if !b.bucket.takeN(cost, b.now()) {
		return 0, b.rate
	}
	e.shape = shape
	whole := make([]byte, a.size)
	s := &echoSent{key: echoKey{fl, e.next}, a: a, msg: quote(pkt, whole)[len(pkt.NetworkHeader().Slice()):]}
	for len(b.byKey) > 0 && (len(b.byKey) >= echoBookLen || b.bytes+s.size() > echoBookBytes) {
		b.remove(b.order.Front())
	}
	if !b.charge.try(s.size()) {
		return 0, b.memory
	}
	b.bytes += s.size()
	b.byKey[s.key] = b.order.PushBack(s)
	e.next++
	if len(s.msg) > echoHeaderLen {
		b.kept.Add(1)
	}
	return s.key.seq, reason{}
}

// remove is called with mu held. Entries of one flow leave in order.
func (b *echoBook) remove(el *list.Element) {
	s := b.order.Remove(el).(*echoSent)
	delete(b.byKey, s.key)
	b.bytes -= s.size()
	b.charge.give(s.size())
	s.key.flow.echo.first = s.key.seq + 1
}

// answered returns the request of fl that msg, an ICMP message from outside or the start of one
// that an error quotes, has the number of. Nil: it is counted, and not for the sandbox.
func (b *echoBook) answered(fl *dgramFlow, msg []byte) *echoSent {
	if len(msg) < echoHeaderLen {
		b.late.Add(1)
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	el := b.byKey[echoKey{fl, binary.BigEndian.Uint16(msg[6:])}]
	if el == nil {
		b.late.Add(1)
		return nil
	}
	s := el.Value.(*echoSent)
	if s.answers == echoAnswers {
		b.extra.Add(1)
		return nil
	}
	s.answers++
	return s
}

// forget removes the requests of a flow that has ended, and takes none of it any more.
func (b *echoBook) forget(fl *dgramFlow) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fl.echo.ended = true
	for seq := fl.echo.first; seq != fl.echo.next; seq++ {
		if el := b.byKey[echoKey{fl, seq}]; el != nil {
			b.remove(el)
		}
	}
}
