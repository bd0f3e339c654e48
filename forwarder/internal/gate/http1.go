package gate

// Requests of clear-text HTTP/1, each judged before any of its bytes is passed on.
//
// The gate stands in the up pump and says how many of the queued bytes may pass: the judged head,
// its body, and then nothing until the next head is whole and the far side has answered. So at most
// one request is under way, which to the client looks like a server that takes one at a time, and a
// refusal comes where an answer is expected.
//
// A server that accepts an offer of h2c switches to HTTP/2 (RFC 7540, section 3.2), and so does the
// gate: after the request's end the client may send only the preface. From there on the HTTP/2 gate
// judges, with the request under way as its stream 1:
//
//	client                 server                        who judges
//	request with h2c                                     this gate, as any
//	                       101, then its frames          answered in HTTP/2 from here on
//	preface, frames                                      http2.go

import (
	"sync"
	"sync/atomic"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// requestGate is the gate of an HTTP/1 connection.
type requestGate struct {
	of

	// Guarded by the flow's up.mu.
	head   int // bytes of a judged head that have not passed
	body   sniff.Body
	shut   bool // a refusal is on its way
	tunnel bool // CONNECT, or a protocol that was offered, was allowed and accepted
	waits  bool // the client waits for a 100 before it sends the body, of which nothing has passed
	framed bool // the client has switched to HTTP/2

	broken atomic.Bool                // the body cannot be read
	h2     atomic.Pointer[streamGate] // judges the bytes after the switch to HTTP/2
	told   bool                       // a broken body was answered; guarded by the flow's down.mu

	mu      sync.Mutex
	answers sniff.Responses
	seen    policy.Seen // of the last request
}

func (r *requestGate) Admit(g *Gather) Step {
	switch {
	case r.shut:
		return Step{}
	case r.broken.Load():
		return Step{Refusing: nat.ReasonMalformedRequest}
	case r.tunnel:
		return Step{Pass: g.Bytes}
	case r.head > 0:
		return Step{Pass: min(r.head, g.Bytes)}
	case r.waits && r.answeredAll():
		// The 100 never came: some clients, curl 7 among them, now send the next request, others
		// the body. They try again on another connection.
		return r.end("", nat.ReasonUnreadableAnswer)
	case !r.body.Done():
		body := r.body // a copy: Passed advances it
		n, err := scan(&body, g, g.Bytes)
		if err != nil {
			r.shared.malformed.Add(1)
			r.broken.Store(true)
			return Step{Refusing: nat.ReasonMalformedRequest}
		}
		return Step{Pass: n}
	}
	if h2 := r.h2.Load(); h2 != nil {
		return r.goOn(h2, g)
	}
	r.mu.Lock()
	idle, tunnel, lost := r.answers.Idle(), r.answers.Tunnel(), r.answers.Lost()
	r.mu.Unlock()
	switch {
	case tunnel:
		r.tunnel = true
		return Step{Pass: g.Bytes}
	case lost:
		return r.end("", nat.ReasonUnreadableAnswer) // it would wait for an answer that cannot be told from the one before
	case !idle:
		return Step{}
	}
	return r.judge(g)
}

// goOn has the bytes after the switch to HTTP/2 judged.
func (r *requestGate) goOn(h2 *streamGate, g *Gather) Step {
	if !r.framed {
		var preface [sniff.Preface]byte
		at := place{g: g}
		n := at.look(preface[:])
		switch {
		case !sniff.IsPreface(preface[:n]):
			return h2.malformed(sniff.ErrMalformed)
		case n < len(preface):
			return h2.unfinished()
		}
		r.framed = true
	}
	return h2.Admit(g)
}

// judge judges the next request.
func (r *requestGate) judge(g *Gather) Step {
	buf := looks.Get().(*look)
	defer looks.Put(buf)
	n, gone := r.flow.Peek(buf[:])
	if gone != "" {
		return Step{Abort: gone}
	}
	req, head, err := sniff.ParseHead(buf[:n])
	switch {
	case err != nil:
		r.shared.malformed.Add(1)
		why := nat.ReasonMalformedRequest
		if flawOf(err) == policy.ReasonTooLong {
			why = nat.ReasonRequestTooLong
		}
		return r.end(firstbytes.BadRequest(err), why)
	case head == 0 && r.flow.Ended():
		return Step{Abort: nat.ReasonIncompleteRequest} // its end came before the head's
	case head == 0:
		return Step{}
	}
	a := r.shared.ask(r.flow, sniff.Seen{Kind: sniff.HTTP, Name: req.Name, Method: req.Method, Path: req.Path, Override: req.Override}, false)
	if a.refused {
		return r.end(firstbytes.Forbidden(a.Verdict, r.shared.policyName()), nat.ReasonRefusedByPolicy)
	}
	r.head, r.body, r.waits = head, req.Body, req.Continue && !req.Body.Done()
	r.mu.Lock()
	r.answers.Expect(&req)
	r.seen = a.Seen
	r.mu.Unlock()
	return Step{Pass: min(head, g.Bytes), Abort: r.shared.stillInForce(&a)}
}

// end ends the connection with an answer of ours or, if that is empty, by closing it.
func (r *requestGate) end(answer string, why nat.Reason) Step {
	r.shut = true
	return Step{End: &Ending{Answer: answer, Why: why}}
}

func (r *requestGate) Passed(g *Gather, n int) {
	switch {
	case r.tunnel:
	case r.head > 0:
		r.head -= n
	case r.framed:
		r.h2.Load().Passed(g, n)
	default:
		r.waits = r.waits && n == 0
		_, _ = scan(&r.body, g, n) // Admit has checked them
	}
}

// answeredAll reports whether no answer is due.
func (r *requestGate) answeredAll() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.answers.Idle()
}

// scan has body consume the first n of the gathered bytes.
func scan(body *sniff.Body, g *Gather, n int) (took int, err error) {
	for i := 0; i < g.N && took < n && !body.Done(); i++ {
		p := g.piece(i)
		k, err := body.Scan(p[:min(len(p), n-took)])
		took += k
		if err != nil {
			return took, err
		}
	}
	return took, nil
}

// Room tells a client that its body cannot be read, if nothing else was answered yet.
func (r *requestGate) Room() (int, *Ending) {
	h2 := r.h2.Load()
	switch {
	case r.broken.Load() && !r.told:
		r.told = true
		r.mu.Lock()
		begun := r.answers.Begun()
		r.mu.Unlock()
		if begun {
			return 0, &Ending{Reset: true, Why: nat.ReasonMalformedRequest}
		}
		return 0, &Ending{Answer: firstbytes.BadRequest(sniff.ErrMalformed), Why: nat.ReasonMalformedRequest}
	case r.told:
		return 0, nil
	case h2 != nil:
		return h2.Room()
	}
	return Chunk, nil
}

func (r *requestGate) UnderWay() []policy.Seen {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h2 := r.h2.Load(); h2 != nil {
		return h2.UnderWay()
	}
	if r.answers.Idle() {
		return nil
	}
	return []policy.Seen{r.seen}
}

// Answered has the next request looked at when an answer has ended.
func (r *requestGate) Answered(p []byte) {
	if h2 := r.h2.Load(); h2 != nil {
		h2.Answered(p)
		return
	}
	r.mu.Lock()
	waited := !r.answers.Idle()
	rest := r.answers.Feed(p)
	http2 := r.answers.HTTP2()
	if http2 {
		h2 := newUpgradedGate(r.of, r.seen)
		h2.Answered(rest)
		r.h2.Store(h2)
	}
	ended := waited && (r.answers.Idle() || r.answers.Tunnel() || r.answers.Lost() || http2)
	r.mu.Unlock()
	if ended {
		r.flow.LookAgain()
	}
}
