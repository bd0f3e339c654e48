package tcpflow

// Requests of clear-text HTTP/1, each judged before a byte of it is passed on.
//
// The gate stands in the up pump and says how much of what is queued may pass: the head
// that was judged, its body, and then nothing until the next head is whole and the far
// side has answered. So at most one request is under way, which the client cannot tell
// from a server that takes one at a time, and a refusal comes at a place where an
// answer is expected.

import (
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// Gate judges the requests of one flow.
type Gate interface {
	// Admit tells how many of the gathered bytes may pass now, or how many are to be
	// thrown away instead. It may be asked again about bytes that it let through and
	// that did not pass. up.mu is held.
	Admit(g *Gather) (pass, drop int, abort nat.Reason)
	// Passed notes that the first n of the gathered bytes were Passed on. up.mu is held.
	Passed(g *Gather, n int)
	// Room is how much of what the far side sends may pass now, and answered takes it in.
	// down.mu is held.
	Room() int
	Answered(p []byte)
	// UnderWay is what the requests have said that are not answered yet.
	underWay() []policy.Seen
}

// requestGate is the one of HTTP/1.
type requestGate struct {
	fl *Flow

	// Guarded by the flow's up.mu.
	head   int // bytes of a judged head that have not passed
	body   sniff.Body
	shut   bool // a refusal is on its way
	tunnel bool // CONNECT was allowed and accepted, or a protocol that was offered
	waits  bool // the client waits for a 100 before it sends the body, of which nothing has passed

	mu      sync.Mutex
	answers sniff.Responses
	seen    policy.Seen // of the last request
}

func (r *requestGate) Admit(g *Gather) (n, drop int, abort nat.Reason) {
	switch {
	case r.shut:
		return 0, 0, ""
	case r.tunnel:
		return g.Bytes, 0, ""
	case r.head > 0:
		return min(r.head, g.Bytes), 0, ""
	case r.waits && r.answeredAll():
		// Without the 100: some clients, curl 7 among them, send the next request now, others
		// the body. They come again on another connection.
		r.tell("", nat.ReasonUnreadableAnswer)
		return 0, 0, ""
	case !r.body.Done():
		body := r.body // which passed takes further
		n, err := scan(&body, g, g.Bytes)
		if err != nil {
			r.fl.T.firstMalformed.Add(1)
			return 0, 0, nat.ReasonMalformedRequest
		}
		return n, 0, ""
	}
	r.mu.Lock()
	idle, tunnel, lost := r.answers.Idle(), r.answers.Tunnel(), r.answers.Lost()
	r.mu.Unlock()
	switch {
	case tunnel:
		r.tunnel = true
		return g.Bytes, 0, ""
	case lost:
		r.tell("", nat.ReasonUnreadableAnswer) // it would wait for an answer that cannot be told from the one before
		return 0, 0, ""
	case !idle:
		return 0, 0, ""
	}
	n, abort = r.judge(g)
	return n, 0, abort
}

// judge looks at the next request.
func (r *requestGate) judge(g *Gather) (n int, abort nat.Reason) {
	fl := r.fl
	buf := firstBytes.Get().(*FirstRoom)
	defer firstBytes.Put(buf)
	look := PeekInto{To: buf[:]}
	if _, terr := fl.Ep.Read(&look, tcpip.ReadOptions{Peek: true}); terr != nil {
		return 0, lostSandbox(fl.Ep)
	}
	req, head, err := sniff.ParseHead(buf[:look.N])
	switch {
	case err != nil:
		fl.T.firstMalformed.Add(1)
		why := nat.ReasonMalformedRequest
		if flawOf(err) == policy.ReasonTooLong {
			why = nat.ReasonRequestTooLong
		}
		r.tell(firstbytes.BadRequest(err), why)
		return 0, ""
	case head == 0 && netstack.EndpointState(fl.Ep) != tcp.StateEstablished:
		return 0, nat.ReasonIncompleteRequest // its end came before the head's
	case head == 0:
		return 0, ""
	}
	q := fl.Question()
	q.Seen = firstbytes.SeenOf(sniff.Seen{Kind: sniff.HTTP, Name: req.Name, Method: req.Method, Path: req.Path, Override: req.Override})
	rules := fl.T.Gate.Rules.Load()
	v := fl.T.Gate.Judge(rules, q)
	if !v.Allowed() || v.Target() != fl.Verdict().Target() {
		fl.T.refusedRequest.Add(1)
		fl.noteRequest(v, q.Seen, q.Src, q.Dst, beside(v, false))
		r.tell(firstbytes.Forbidden(v, fl.T.Gate.Rules.Load().Name()), nat.ReasonRefusedByPolicy)
		return 0, ""
	}
	r.head, r.body, r.waits = head, req.Body, req.Continue && !req.Body.Done()
	r.mu.Lock()
	r.answers.Expect(&req)
	r.seen = q.Seen
	r.mu.Unlock()
	return min(head, g.Bytes), fl.stillInForce(rules, q)
}

// beside is why a request of which v is the verdict is refused, if v is not why.
func beside(v policy.Verdict, upgrade bool) policy.Reason {
	switch {
	case !v.Allowed():
		return ""
	case upgrade:
		return policy.ReasonUpgrade
	}
	return policy.ReasonAnotherTarget
}

// tell ends the connection by an answer of ours, or, if that is empty, by its end alone.
func (r *requestGate) tell(answer string, why nat.Reason) {
	r.shut = true
	r.fl.Check.answer, r.fl.Check.why = answer, why
	r.fl.T.Engine.Put(&r.fl.Check.Telling)
}

// stillInForce refuses a request by rules that came while it was judged, when nobody who
// looks at the requests under way saw it.
func (fl *Flow) stillInForce(rules *policy.Rules, q policy.Query) (abort nat.Reason) {
	if now := fl.T.Gate.Rules.Load(); now != rules && !fl.T.Gate.Judge(now, q).Allowed() {
		return nat.ReasonPolicy
	}
	return ""
}

func (r *requestGate) Passed(g *Gather, n int) {
	switch {
	case r.tunnel:
	case r.head > 0:
		r.head -= n
	default:
		r.waits = r.waits && n == 0
		_, _ = scan(&r.body, g, n) // admit has looked at them
	}
}

// answeredAll reports whether no answer is due.
func (r *requestGate) answeredAll() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.answers.Idle()
}

// scan has body take in the first n of the gathered bytes.
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

func (r *requestGate) Room() int { return DownChunk }

func (r *requestGate) underWay() []policy.Seen {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.answers.Idle() {
		return nil
	}
	return []policy.Seen{r.seen}
}

// Answered has the next request looked at when an answer has ended.
func (r *requestGate) Answered(p []byte) {
	r.mu.Lock()
	waited := !r.answers.Idle()
	r.answers.Feed(p)
	ended := waited && (r.answers.Idle() || r.answers.Tunnel() || r.answers.Lost())
	r.mu.Unlock()
	if ended {
		r.fl.T.Engine.Put(&r.fl.UpTask)
	}
}
