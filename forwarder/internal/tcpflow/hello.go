package tcpflow

// ClientHellos behind the first one, each judged before a byte of it is passed on.
//
// The gate stands in both pumps of a flow that began with a ClientHello. Going up it walks
// the records, and what could begin another hello waits until the server's answer is known:
//
//	answer              records of the handshake        other records
//	none yet            wait                            pass: early data, the change of ciphers
//	HelloRetryRequest   one hello, of the same name     pass
//	another ServerHello pass, if the first one is no hello, and nothing more is looked at
//	no TLS              end the flow                    end the flow, but for alerts
//
// Servers that ask for another hello take the name from it, so it must say what the first
// one said: a client's second hello does not differ in that (RFC 8446, section 4.1.2).
// Behind an answer that is no TLS nobody knows what the server makes of further bytes.

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// HelloGate is one flow's, of which nothing has passed yet.
type HelloGate struct {
	fl   *Flow
	seen policy.Seen // what the first hello said

	settled atomic.Bool // the server asks for no other hello

	// Guarded by the flow's up.mu.
	Open  bool // nothing more is to be judged
	ahead int  // bytes that may pass, from the front of what is queued; may be more than are queued
	need  int  // bytes that must be queued before another hello is looked at again
	heard int  // hellos that were let pass: the first one, and one for each that the server asked for

	mu     sync.Mutex
	answer sniff.HelloAnswer
}

func (h *HelloGate) Admit(g *Gather) (pass, drop int, abort nat.Reason) {
	if h.Open {
		return g.Bytes, 0, ""
	}
	at := place{g: g}
	at.skip(h.ahead)
	for h.ahead < g.Bytes {
		var look [sniff.RecordLook]byte
		r, need, err := sniff.NextRecord(look[:at.look(look[:])])
		switch {
		case err != nil:
			return h.malformed()
		case need > 0:
			if h.ahead == 0 && netstack.EndpointState(h.fl.Ep) != tcp.StateEstablished {
				return 0, 0, nat.ReasonIncompleteHello // its end came before the record's
			}
			return h.ahead, 0, ""
		case h.ahead > 0 && (r.Handshake || h.settled.Load()):
			return h.ahead, 0, ""
		case h.settled.Load():
			if r.Hello {
				return h.malformed()
			}
			h.Open = true
			return g.Bytes, 0, ""
		case r.Handshake:
			return h.further(g)
		case !r.Alert && h.foreign():
			return h.malformed()
		}
		h.ahead += r.Size
		at.skip(r.Size)
	}
	return g.Bytes, 0, ""
}

func (h *HelloGate) foreign() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answer.Foreign
}

func (h *HelloGate) malformed() (int, int, nat.Reason) {
	h.fl.T.firstMalformed.Add(1)
	return 0, 0, nat.ReasonMalformedHello
}

// further decides about a record of the handshake at the front of what is queued.
func (h *HelloGate) further(g *Gather) (pass, drop int, abort nat.Reason) {
	h.mu.Lock()
	answer := h.answer
	h.mu.Unlock()
	switch {
	case answer.Foreign:
		return h.malformed()
	case h.heard > answer.Retries:
		return 0, 0, "" // answered has it looked at again
	}
	fl := h.fl
	queued, terr := fl.Ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return 0, 0, lostSandbox(fl.Ep)
	}
	ended := netstack.EndpointState(fl.Ep) != tcp.StateEstablished
	if queued < h.need && !ended {
		return 0, 0, ""
	}
	buf := firstBytes.Get().(*FirstRoom)
	defer firstBytes.Put(buf)
	look := PeekInto{To: buf[:]}
	if _, terr := fl.Ep.Read(&look, tcpip.ReadOptions{Peek: true}); terr != nil && look.N == 0 {
		return 0, 0, lostSandbox(fl.Ep)
	}
	said, size, need, err := sniff.Hello(buf[:look.N])
	switch {
	case err != nil:
		return h.malformed()
	case need > 0 && ended:
		return 0, 0, nat.ReasonIncompleteHello
	case need > 0:
		h.need = need
		return 0, 0, ""
	}
	if seen := firstbytes.SeenOf(said); seen != h.seen {
		return 0, 0, h.refuse(seen)
	}
	h.heard++
	h.need, h.ahead = 0, size
	return min(size, g.Bytes), 0, ""
}

// refuse ends the flow, whatever the rules say of the other name: the server was dialled for
// the first one.
func (h *HelloGate) refuse(seen policy.Seen) (abort nat.Reason) {
	fl := h.fl
	fl.T.refusedHello.Add(1)
	q := fl.Question()
	q.Seen, q.Held = seen, ""
	v := fl.T.Gate.Judge(fl.T.Gate.Rules.Load(), q)
	fl.noteRequest(v, seen, q.Src, q.Dst, policy.ReasonAnotherHello)
	return nat.ReasonRefusedByPolicy
}

func (h *HelloGate) Passed(_ *Gather, n int) { h.ahead = max(h.ahead-n, 0) }

func (h *HelloGate) Room() int { return DownChunk }

// Answered has what waits looked at when the answer is known.
func (h *HelloGate) Answered(p []byte) {
	if h.settled.Load() {
		return
	}
	h.mu.Lock()
	before := h.answer.Retries
	h.answer.Feed(p)
	known := h.answer.Settled || h.answer.Foreign || h.answer.Retries != before
	h.settled.Store(h.answer.Settled)
	h.mu.Unlock()
	if known {
		h.fl.T.Engine.Put(&h.fl.UpTask)
	}
}

// underWay is nothing beside what the flow itself was judged by.
func (h *HelloGate) underWay() []policy.Seen { return nil }
