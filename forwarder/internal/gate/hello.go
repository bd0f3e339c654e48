package gate

// ClientHellos after the first one, each judged before any of its bytes is passed on.
//
// The gate stands in both pumps of a flow that began with a ClientHello. Going up it walks the
// records, and a record that could begin another hello waits until the server's answer is known:
//
//	answer              records of the handshake        other records
//	none yet            wait                            pass: early data, the change of ciphers
//	HelloRetryRequest   one hello, of the same name     pass
//	another ServerHello pass, if the first one is no hello, and nothing more is looked at
//	no TLS              end the flow                    end the flow, except for alerts
//
// Servers that ask for another hello take the name from it, so it must carry the same name as the
// first: a client's second hello does not differ in that (RFC 8446, section 4.1.2). After an answer
// that is not TLS, there is no telling what the server makes of further bytes.

import (
	"sync"
	"sync/atomic"

	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// helloGate is the gate of one flow on which nothing has passed yet.
type helloGate struct {
	of
	seen policy.Seen // from the first hello

	settled atomic.Bool // the server asks for no further hello

	// Guarded by the flow's up.mu.
	open  bool // nothing more is to be judged
	ahead int  // bytes that may pass, from the front of the queue; may exceed those queued
	need  int  // bytes that must be queued before another hello is looked at again
	heard int  // hellos let pass: the first one, and one for each that the server asked for

	mu     sync.Mutex
	answer sniff.HelloAnswer
}

func (h *helloGate) Admit(g *Gather) Step {
	if h.open {
		return Step{Pass: g.Bytes}
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
			if h.ahead == 0 && h.flow.Ended() {
				return Step{Abort: nat.ReasonIncompleteHello} // its end came before the record's
			}
			return Step{Pass: h.ahead}
		case h.ahead > 0 && (r.Handshake || h.settled.Load()):
			return Step{Pass: h.ahead}
		case h.settled.Load():
			if r.Hello {
				return h.malformed()
			}
			h.open = true
			return Step{Pass: g.Bytes}
		case r.Handshake:
			return h.further(g)
		case !r.Alert && h.foreign():
			return h.malformed()
		}
		h.ahead += r.Size
		at.skip(r.Size)
	}
	return Step{Pass: g.Bytes}
}

func (h *helloGate) foreign() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answer.Foreign
}

func (h *helloGate) malformed() Step {
	h.shared.malformed.Add(1)
	return Step{Abort: nat.ReasonMalformedHello}
}

// further decides about a handshake record at the front of the queue.
func (h *helloGate) further(g *Gather) Step {
	h.mu.Lock()
	answer := h.answer
	h.mu.Unlock()
	switch {
	case answer.Foreign:
		return h.malformed()
	case h.heard > answer.Retries:
		return Step{} // Answered has it looked at again
	}
	queued, gone := h.flow.Queued()
	if gone != "" {
		return Step{Abort: gone}
	}
	ended := h.flow.Ended()
	if queued < h.need && !ended {
		return Step{}
	}
	buf := looks.Get().(*look)
	defer looks.Put(buf)
	n, gone := h.flow.Peek(buf[:])
	if gone != "" {
		return Step{Abort: gone}
	}
	said, size, need, err := sniff.Hello(buf[:n])
	switch {
	case err != nil:
		return h.malformed()
	case need > 0 && ended:
		return Step{Abort: nat.ReasonIncompleteHello}
	case need > 0:
		h.need = need
		return Step{}
	}
	if seen := seenOf(said); seen != h.seen {
		h.refuse(seen)
		return Step{Abort: nat.ReasonRefusedByPolicy}
	}
	h.heard++
	h.need, h.ahead = 0, size
	return Step{Pass: min(size, g.Bytes)}
}

// refuse records that another name ends the connection, whatever the rules say of that name: the
// server was dialled for the first one.
func (h *helloGate) refuse(seen policy.Seen) {
	s := h.shared
	s.refusedHello.Add(1)
	q := h.flow.Question()
	q.Seen, q.Held = seen, ""
	s.noteRefused(&q, s.admit.Judge(s.admit.Rules.Load(), q), policy.ReasonAnotherHello)
}

func (h *helloGate) Passed(_ *Gather, n int) { h.ahead = max(h.ahead-n, 0) }

func (h *helloGate) Room() (int, *Ending) { return Chunk, nil }

// Answered has waiting bytes looked at once the answer is known.
func (h *helloGate) Answered(p []byte) {
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
		h.flow.LookAgain()
	}
}

// UnderWay returns nothing beyond what the flow itself was judged by.
func (h *helloGate) UnderWay() []policy.Seen { return nil }
