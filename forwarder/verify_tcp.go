package forwarder

// Verification of TCP flows.
//
// What a client wants is only in its first bytes, which it sends when its handshake is
// complete. So the flow is set up as any other is (tcp.go): the far side's handshake first,
// then the sandbox's. A closed port looks closed, and clients that try one address after the
// other get to the one that answers. Nothing but the handshake passes, in either direction,
// until the first bytes are allowed:
//
//	phase       stack side       host side       who acts
//	verifying   an endpoint      connected       readFirst, as the up pump
//	open        an endpoint      connected       the pumps
//	refused     told by 403      closed          drain, as the up pump
//
// The bytes are peeked at and stay in the endpoint's receive queue, and what the far side says
// stays in the kernel's, so that nothing has to be replayed: when the flow is open its pumps
// find them there. The flow counts as half-open until then.

import (
	"errors"
	"io"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice/forwarder/sniff"
	"sluice/nat"
	"sluice/policy"
)

// check is what a TCP flow keeps of its verification. It stays with the flow, which is
// judged again when rules change.
type check struct {
	entry   checkEntry
	over    atomic.Bool // no more bytes are waited for
	evicted atomic.Bool
	need    int // bytes that readFirst wants to see; guarded by up.mu

	greeting sniff.Greeting // what an HTTP/2 client has heard; likewise
	idle     checkEntry     // of one that was greeted, and has asked for nothing yet

	telling task // the refusal
	// Written before telling is queued: what the client is answered, empty for one that asked
	// for nothing, and why the flow ends, empty if by the client's will.
	answer string
	why    nat.Reason

	refused nat.Reason // why, once told; guarded by the flow's mu
}

// firstBytes is room for a look at a stream.
var firstBytes = sync.Pool{New: func() any { return new(firstRoom) }}

type firstRoom [sniff.MaxHead]byte

// verify begins to wait for the first bytes, now that the handshake is complete.
func (fl *tcpFlow) verify(ep tcpip.Endpoint) {
	fl.prepare()
	fl.check.telling.run = fl.tellRefusal
	fl.check.need = 1
	fl.mu.Lock()
	if fl.phase != phaseHandshake {
		fl.mu.Unlock()
		ep.Abort()
		ep.Close()
		return
	}
	fl.ep, fl.counts = ep, ep.Stats().(*tcp.Stats)
	fl.phase = phaseVerifying
	err := fl.watchLocked()
	fl.mu.Unlock()
	switch {
	case err != nil:
		fl.abort(nat.ReasonOutOfDescriptors)
		return
	case fl.hostEvents.Load()&unix.EPOLLHUP != 0: // before there was a phase that looks at it
		fl.abort(fl.lostUnread())
		return
	}
	fl.t.checks.enter(&fl.check.entry, fl, checkTimeout)
	fl.wq.EventRegister(&fl.entry)
	fl.t.engine.put(&fl.upTask)
}

// lostUnread is why the far side of a flow that waits has gone.
func (fl *tcpFlow) lostUnread() nat.Reason {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	return fl.lostPeer(0)
}

// checkExpired has the flow decided with what there is.
func (fl *tcpFlow) checkExpired(evicted bool) {
	fl.check.evicted.Store(evicted)
	fl.check.over.Store(true)
	fl.t.engine.put(&fl.upTask)
}

// beforeOpen is the up pump of a flow that is not open: it looks at the first bytes, or
// throws away what comes after a refusal.
func (fl *tcpFlow) beforeOpen() (abort nat.Reason) {
	if fl.check == nil {
		return ""
	}
	fl.mu.Lock()
	ph := fl.phase
	fl.mu.Unlock()
	switch ph {
	case phaseVerifying:
		return fl.readFirst()
	case phaseRefused:
		return fl.drain()
	}
	return ""
}

// readFirst decides once enough is queued, or nothing more is to be waited for.
func (fl *tcpFlow) readFirst() (abort nat.Reason) {
	c := fl.check
	last := c.over.Load() // nothing more is waited for
	greeted := c.greeting.Settings() > 0
	if last && c.evicted.Load() && !greeted {
		return nat.ReasonFirstBytesEvicted
	}
	queued, terr := fl.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return lostSandbox(fl.ep)
	}
	switch {
	case endpointState(fl.ep) == tcp.StateEstablished:
	case over(fl.ep):
		return lostSandbox(fl.ep)
	default:
		last = true // its end of stream came
	}
	if queued < c.need && !last && !fl.abandoned() {
		fl.awaitFirst()
		return ""
	}
	buf := firstBytes.Get().(*firstRoom)
	defer firstBytes.Put(buf)
	look := peekInto{to: buf[:]}
	if _, terr := fl.ep.Read(&look, tcpip.ReadOptions{Peek: true}); terr != nil && look.n == 0 {
		switch terr.(type) {
		case *tcpip.ErrWouldBlock:
		case *tcpip.ErrClosedForReceive:
			fl.t.engine.put(&fl.check.telling) // nothing: it closed without having said anything
			return ""
		default:
			return lostSandbox(fl.ep)
		}
	}
	said, need, err := sniff.Stream(buf[:look.n])
	cut := err == nil && need > 0
	if cut && (!last || greeted) {
		c.need = need
		fl.awaitFirst()
		return fl.greet(buf[:look.n], last)
	}
	if err != nil {
		fl.t.firstMalformed.Add(1)
	}
	return fl.decide(firstSeen(said, look.n, cut, err), &said, err)
}

// greet answers what a client of HTTP/2 says before it asks for anything. Such a connection is
// set up, to the client, and may be idle for as long as its two sides let it: it is told by
// GOAWAY when the far side leaves, or when there is no room for it any more.
func (fl *tcpFlow) greet(first []byte, last bool) (abort nat.Reason) {
	c := fl.check
	before := c.greeting.Settings()
	say, err := c.greeting.Hear(first)
	if len(say) > 0 {
		if abort := fl.tell(string(say)); abort != "" {
			return abort
		}
	}
	if err != nil {
		fl.t.firstMalformed.Add(1)
		return fl.decide(policy.Seen{Kind: policy.SeenOpaque}, &sniff.Seen{Kind: sniff.HTTP2}, err)
	}
	now := c.greeting.Settings()
	switch {
	case before == 0 && now > 0:
		fl.lease.SetState(nat.Established)
		fl.t.checks.leave(&c.entry)
		fl.t.idle.enter(&c.idle, fl, 0)
	case last && endpointState(fl.ep) != tcp.StateEstablished:
		fl.t.engine.put(&c.telling) // nothing: it closed without having asked for anything
		return ""
	}
	if now > 0 && (last || fl.abandoned()) {
		c.answer = string(goAway(0, noErrorCode, ""))
		fl.t.engine.put(&c.telling)
	}
	return ""
}

// abandoned reports whether the far side has closed while a client that was greeted has yet to
// ask for anything.
func (fl *tcpFlow) abandoned() bool {
	return fl.check.greeting.Settings() > 0 && fl.hostEvents.Load()&unix.EPOLLRDHUP != 0
}

// awaitFirst sees to it that there is room for the bytes that readFirst waits for.
func (fl *tcpFlow) awaitFirst() {
	if ep, ok := fl.ep.(*tcp.Endpoint); ok {
		fl.mem.fitJudged(ep)
	}
}

// firstSeen puts into policy's words what sniff.Stream made of the first n bytes, when no more
// are waited for. cut: it would have liked more.
func firstSeen(said sniff.Seen, n int, cut bool, err error) policy.Seen {
	seen := seenOf(said)
	switch {
	case n == 0:
		seen = policy.Seen{Kind: policy.SeenServerFirst}
	case cut:
		seen.Flaw = policy.ReasonIncomplete
	case err != nil:
		// It may have said a name, and another one besides.
		if seen = (policy.Seen{Kind: seen.Kind}); seen.Kind == policy.SeenHTTP || seen.Kind == policy.SeenHTTP2 {
			seen.Kind = policy.SeenOpaque
		}
		seen.Flaw = flawOf(err)
	}
	return seen
}

// flawOf is why the first bytes could not be read.
func flawOf(err error) policy.Reason {
	if errors.Is(err, sniff.ErrTooLong) {
		return policy.ReasonTooLong
	}
	return policy.ReasonMalformed
}

// newGate judges what follows the first bytes of a flow that was let in by v; nil if nothing
// that follows matters.
func newGate(fl *tcpFlow, v policy.Verdict, seen policy.Seen) gate {
	switch {
	case v.EachRequest() && seen.Kind == policy.SeenHTTP:
		return &requestGate{fl: fl}
	case seen.Kind == policy.SeenTLS && (seen.Name != "" || seen.Nameless):
		return &helloGate{fl: fl, seen: seen}
	case v.EachRequest(), fl.check.greeting.Settings() > 0:
		return newStreamGate(fl, &fl.check.greeting, v.EachRequest())
	}
	return nil
}

// tell sends the sandbox something in the far side's place.
func (fl *tcpFlow) tell(what string) (abort nat.Reason) {
	if n, terr := fl.ep.Write(strings.NewReader(what), tcpip.WriteOptions{}); terr != nil || int(n) != len(what) {
		return nat.ReasonRefusedByPolicy
	}
	return ""
}

// decide judges the flow with what it said, and opens or refuses it. unread is why it could
// not be read.
func (fl *tcpFlow) decide(seen policy.Seen, said *sniff.Seen, unread error) (abort nat.Reason) {
	t := fl.t
	t.checks.leave(&fl.check.entry)
	t.idle.leave(&fl.check.idle)
	j, err := fl.hear(seen)
	switch {
	case err == errFlowEnded:
		return nat.ReasonPolicy
	case err != nil:
		t.limited.Add(1)
		return limitOf(err)
	case !j.verdict.Allowed():
		return fl.refuse(j.verdict, seen, said, unread)
	}
	fl.mu.Lock()
	if fl.phase != phaseVerifying || fl.revoked.Load() {
		fl.mu.Unlock()
		return ""
	}
	fl.gate = newGate(fl, j.verdict, seen)
	err = fl.openLocked()
	fl.mu.Unlock()
	if err != nil {
		return nat.ReasonOutOfDescriptors
	}
	fl.lease.SetState(nat.Established)
	t.engine.put(&fl.upTask)
	t.engine.put(&fl.downTask)
	return ""
}

// refuse ends the flow for policy's sake: with a reset, or, for a client that understands
// it, with an answer that names the rule. It returns a reason to abort.
func (fl *tcpFlow) refuse(v policy.Verdict, seen policy.Seen, said *sniff.Seen, unread error) (abort nat.Reason) {
	t := fl.t
	t.refusedFirst.Add(1)
	orig := fl.lease.Orig()
	fl.noteRequest(v, seen, orig.Src(), orig.Dst(), "")
	name := t.gate.rules.Load().Name()
	greeted := fl.check.greeting.Settings() > 0
	fl.check.why = nat.ReasonRefusedByPolicy
	switch {
	case unread != nil && said.Kind == sniff.HTTP2:
		r := refusedStream{broken: unread}
		fl.check.answer = r.answer(name, greeted)
	case unread != nil && said.Kind == sniff.HTTP:
		fl.check.answer = badRequest(unread)
	case seen.Kind == policy.SeenHTTP:
		fl.check.answer = forbidden(v, name)
	case seen.Kind == policy.SeenHTTP2:
		r := refusedStream{verdict: v, id: said.Stream, grpc: said.GRPC, head: said.Method == "HEAD"}
		fl.check.answer = r.answer(name, greeted)
	default:
		return nat.ReasonRefusedByPolicy
	}
	t.engine.put(&fl.check.telling)
	return ""
}

// noteRequest records that a request, or the flow for its first bytes, was refused. The sandbox
// is told, by an answer or a reset.
func (fl *tcpFlow) noteRequest(v policy.Verdict, seen policy.Seen, src, dst netip.AddrPort, because policy.Reason) {
	fl.t.gate.noteRefused(Refusal{
		Proto: unix.IPPROTO_TCP, Src: src, Dst: dst, Verdict: v, Seen: seen, Reason: nat.ReasonPolicy, Because: because, Told: true,
	})
}

// tellRefusal answers a request with its refusal, or a client that closed without a word with
// the same. It is a task, as it must not hold the pumps' locks. What the sandbox still sends is
// thrown away until it closes: a reset, which closing with data unread would be, could overtake
// the answer.
func (fl *tcpFlow) tellRefusal() {
	fl.mu.Lock()
	if fl.phase != phaseVerifying && fl.phase != phaseOpen {
		fl.mu.Unlock()
		return
	}
	fl.phase = phaseRefused
	fl.live.Store(false)
	fl.check.refused = fl.check.why
	fl.mu.Unlock()
	fl.closeHost(false)
	if abort := fl.tell(fl.check.answer); abort != "" {
		fl.abort(abort)
		return
	}
	_ = fl.ep.Shutdown(tcpip.ShutdownWrite) // an endpoint that is gone says so to drain
	fl.check.over.Store(false)
	fl.t.checks.enter(&fl.check.entry, fl, refusalTimeout)
	fl.t.engine.put(&fl.upTask)
}

// drain throws away what comes after the refusal, until the sandbox closes.
func (fl *tcpFlow) drain() (abort nat.Reason) {
	if fl.check.over.Load() {
		return nat.ReasonRefusedByPolicy
	}
	for {
		if _, terr := fl.ep.Read(io.Discard, tcpip.ReadOptions{}); terr != nil {
			if _, empty := terr.(*tcpip.ErrWouldBlock); empty {
				return ""
			}
			break
		}
	}
	fl.t.checks.leave(&fl.check.entry)
	fl.mu.Lock()
	over := fl.phase == phaseRefused
	if over {
		fl.phase = phaseClosing
	}
	fl.mu.Unlock()
	if over {
		fl.lease.SetState(nat.CloseWait)
		fl.ep.Close()
		fl.t.engine.put(&fl.settling)
	}
	return ""
}

// peekInto takes the first bytes of a receive queue.
type peekInto struct {
	to []byte
	n  int
}

func (p *peekInto) Write(b []byte) (int, error) {
	n := copy(p.to[p.n:], b)
	p.n += n
	if n < len(b) {
		return n, errFull
	}
	return n, nil
}

// piece is one slice of what was gathered.
func (g *gather) piece(i int) []byte { return unsafe.Slice(g.iov[i].Base, int(g.iov[i].Len)) }
