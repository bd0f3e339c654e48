package tcpflow

// Verification of TCP flows.
//
// What a client wants is only in its first bytes, which it sends when its handshake is
// complete. So the flow is set up as any other is (handshake.go): the far side's handshake first,
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

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// Check is what a TCP flow keeps of its verification. It stays with the flow, which is
// judged again when rules change.
type Check struct {
	entry   firstbytes.Entry
	over    atomic.Bool // no more bytes are waited for
	evicted atomic.Bool
	need    int // bytes that readFirst wants to see; guarded by up.mu

	Greeting sniff.Greeting   // what an HTTP/2 client has heard; likewise
	idle     firstbytes.Entry // of one that was greeted, and has asked for nothing yet

	Telling engine.Task // the refusal
	// Written before telling is queued: what the client is answered, empty for one that asked
	// for nothing, and why the flow ends, empty if by the client's will.
	answer string
	why    nat.Reason

	refused nat.Reason // why, once told; guarded by the flow's mu
}

// firstBytes is room for a look at a stream.
var firstBytes = sync.Pool{New: func() any { return new(FirstRoom) }}

type FirstRoom [sniff.MaxHead]byte

// verify begins to wait for the first bytes, now that the handshake is complete.
func (fl *Flow) verify(ep tcpip.Endpoint) {
	fl.prepare()
	fl.Check.Telling.Run = fl.tellRefusal
	fl.Check.need = 1
	fl.Mu.Lock()
	if fl.Phase != phaseHandshake {
		fl.Mu.Unlock()
		ep.Abort()
		ep.Close()
		return
	}
	fl.Ep, fl.Counts = ep, ep.Stats().(*tcp.Stats)
	fl.Phase = PhaseVerifying
	err := fl.watchLocked()
	fl.Mu.Unlock()
	switch {
	case err != nil:
		fl.Abort(nat.ReasonOutOfDescriptors)
		return
	case fl.hostEvents.Load()&unix.EPOLLHUP != 0: // before there was a phase that looks at it
		fl.Abort(fl.lostUnread())
		return
	}
	fl.T.Checks.Enter(&fl.Check.entry, fl, firstbytes.CheckTimeout)
	fl.wq.EventRegister(&fl.entry)
	fl.T.Engine.Put(&fl.UpTask)
}

// lostUnread is why the far side of a flow that waits has gone.
func (fl *Flow) lostUnread() nat.Reason {
	fl.Mu.Lock()
	defer fl.Mu.Unlock()
	return fl.lostPeer(0)
}

// CheckExpired has the flow decided with what there is.
func (fl *Flow) CheckExpired(evicted bool) {
	fl.Check.evicted.Store(evicted)
	fl.Check.over.Store(true)
	fl.T.Engine.Put(&fl.UpTask)
}

// beforeOpen is the up pump of a flow that is not open: it looks at the first bytes, or
// throws away what comes after a refusal.
func (fl *Flow) beforeOpen() (abort nat.Reason) {
	if fl.Check == nil {
		return ""
	}
	fl.Mu.Lock()
	ph := fl.Phase
	fl.Mu.Unlock()
	switch ph {
	case PhaseVerifying:
		return fl.readFirst()
	case phaseRefused:
		return fl.drain()
	}
	return ""
}

// readFirst decides once enough is queued, or nothing more is to be waited for.
func (fl *Flow) readFirst() (abort nat.Reason) {
	c := fl.Check
	last := c.over.Load() // nothing more is waited for
	greeted := c.Greeting.Settings() > 0
	if last && c.evicted.Load() && !greeted {
		return nat.ReasonFirstBytesEvicted
	}
	queued, terr := fl.Ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return lostSandbox(fl.Ep)
	}
	switch {
	case netstack.EndpointState(fl.Ep) == tcp.StateEstablished:
	case over(fl.Ep):
		return lostSandbox(fl.Ep)
	default:
		last = true // its end of stream came
	}
	if queued < c.need && !last && !fl.abandoned() {
		fl.awaitFirst()
		return ""
	}
	buf := firstBytes.Get().(*FirstRoom)
	defer firstBytes.Put(buf)
	look := PeekInto{To: buf[:]}
	if _, terr := fl.Ep.Read(&look, tcpip.ReadOptions{Peek: true}); terr != nil && look.N == 0 {
		switch terr.(type) {
		case *tcpip.ErrWouldBlock:
		case *tcpip.ErrClosedForReceive:
			fl.T.Engine.Put(&fl.Check.Telling) // nothing: it closed without having said anything
			return ""
		default:
			return lostSandbox(fl.Ep)
		}
	}
	said, need, err := sniff.Stream(buf[:look.N])
	cut := err == nil && need > 0
	if cut && (!last || greeted) {
		c.need = need
		fl.awaitFirst()
		return fl.greet(buf[:look.N], last)
	}
	if err != nil {
		fl.T.firstMalformed.Add(1)
	}
	return fl.decide(FirstSeen(said, look.N, cut, err), &said, err)
}

// greet answers what a client of HTTP/2 says before it asks for anything. Such a connection is
// set up, to the client, and may be idle for as long as its two sides let it: it is told by
// GOAWAY when the far side leaves, or when there is no room for it any more.
func (fl *Flow) greet(first []byte, last bool) (abort nat.Reason) {
	c := fl.Check
	before := c.Greeting.Settings()
	say, err := c.Greeting.Hear(first)
	if len(say) > 0 {
		if abort := fl.tell(string(say)); abort != "" {
			return abort
		}
	}
	if err != nil {
		fl.T.firstMalformed.Add(1)
		return fl.decide(policy.Seen{Kind: policy.SeenOpaque}, &sniff.Seen{Kind: sniff.HTTP2}, err)
	}
	now := c.Greeting.Settings()
	switch {
	case before == 0 && now > 0:
		fl.Lease.SetState(nat.Established)
		fl.T.Checks.Leave(&c.entry)
		fl.T.Idle.Enter(&c.idle, fl, 0)
	case last && netstack.EndpointState(fl.Ep) != tcp.StateEstablished:
		fl.T.Engine.Put(&c.Telling) // nothing: it closed without having asked for anything
		return ""
	}
	if now > 0 && (last || fl.abandoned()) {
		c.answer = string(firstbytes.GoAway(0, firstbytes.NoErrorCode, ""))
		fl.T.Engine.Put(&c.Telling)
	}
	return ""
}

// abandoned reports whether the far side has closed while a client that was greeted has yet to
// ask for anything.
func (fl *Flow) abandoned() bool {
	return fl.Check.Greeting.Settings() > 0 && fl.hostEvents.Load()&unix.EPOLLRDHUP != 0
}

// awaitFirst sees to it that there is room for the bytes that readFirst waits for.
func (fl *Flow) awaitFirst() {
	if ep, ok := fl.Ep.(*tcp.Endpoint); ok {
		fl.mem.FitJudged(ep)
	}
}

// FirstSeen puts into policy's words what sniff.Stream made of the first n bytes, when no more
// are waited for. cut: it would have liked more.
func FirstSeen(said sniff.Seen, n int, cut bool, err error) policy.Seen {
	seen := firstbytes.SeenOf(said)
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

// NewGate judges what follows the first bytes of a flow that was let in by v; nil if nothing
// that follows matters.
func NewGate(fl *Flow, v policy.Verdict, seen policy.Seen) Gate {
	switch {
	case v.EachRequest() && seen.Kind == policy.SeenHTTP:
		return &requestGate{fl: fl}
	case seen.Kind == policy.SeenTLS && (seen.Name != "" || seen.Nameless):
		return &HelloGate{fl: fl, seen: seen}
	case v.EachRequest(), fl.Check.Greeting.Settings() > 0:
		return newStreamGate(fl, &fl.Check.Greeting, v.EachRequest())
	}
	return nil
}

// tell sends the sandbox something in the far side's place.
func (fl *Flow) tell(what string) (abort nat.Reason) {
	if n, terr := fl.Ep.Write(strings.NewReader(what), tcpip.WriteOptions{}); terr != nil || int(n) != len(what) {
		return nat.ReasonRefusedByPolicy
	}
	return ""
}

// decide judges the flow with what it said, and opens or refuses it. unread is why it could
// not be read.
func (fl *Flow) decide(seen policy.Seen, said *sniff.Seen, unread error) (abort nat.Reason) {
	t := fl.T
	t.Checks.Leave(&fl.Check.entry)
	t.Idle.Leave(&fl.Check.idle)
	j, err := fl.Hear(seen)
	switch {
	case err == admit.ErrFlowEnded:
		return nat.ReasonPolicy
	case err != nil:
		t.Limited.Add(1)
		return admit.LimitOf(err)
	case !j.Verdict.Allowed():
		return fl.refuse(j.Verdict, seen, said, unread)
	}
	fl.Mu.Lock()
	if fl.Phase != PhaseVerifying || fl.Revoked.Load() {
		fl.Mu.Unlock()
		return ""
	}
	fl.gate = NewGate(fl, j.Verdict, seen)
	err = fl.openLocked()
	fl.Mu.Unlock()
	if err != nil {
		return nat.ReasonOutOfDescriptors
	}
	fl.Lease.SetState(nat.Established)
	t.Engine.Put(&fl.UpTask)
	t.Engine.Put(&fl.DownTask)
	return ""
}

// refuse ends the flow for policy's sake: with a reset, or, for a client that understands
// it, with an answer that names the rule. It returns a reason to abort.
func (fl *Flow) refuse(v policy.Verdict, seen policy.Seen, said *sniff.Seen, unread error) (abort nat.Reason) {
	t := fl.T
	t.refusedFirst.Add(1)
	orig := fl.Lease.Orig()
	fl.noteRequest(v, seen, orig.Src(), orig.Dst(), "")
	name := t.Gate.Rules.Load().Name()
	greeted := fl.Check.Greeting.Settings() > 0
	fl.Check.why = nat.ReasonRefusedByPolicy
	switch {
	case unread != nil && said.Kind == sniff.HTTP2:
		r := firstbytes.RefusedStream{Broken: unread}
		fl.Check.answer = r.Answer(name, greeted)
	case unread != nil && said.Kind == sniff.HTTP:
		fl.Check.answer = firstbytes.BadRequest(unread)
	case seen.Kind == policy.SeenHTTP:
		fl.Check.answer = firstbytes.Forbidden(v, name)
	case seen.Kind == policy.SeenHTTP2:
		r := firstbytes.RefusedStream{Verdict: v, ID: said.Stream, Grpc: said.GRPC, Head: said.Method == "HEAD"}
		fl.Check.answer = r.Answer(name, greeted)
	default:
		return nat.ReasonRefusedByPolicy
	}
	t.Engine.Put(&fl.Check.Telling)
	return ""
}

// noteRequest records that a request, or the flow for its first bytes, was refused. The sandbox
// is told, by an answer or a reset.
func (fl *Flow) noteRequest(v policy.Verdict, seen policy.Seen, src, dst netip.AddrPort, because policy.Reason) {
	fl.T.Gate.NoteRefused(admit.Refusal{
		Proto: unix.IPPROTO_TCP, Src: src, Dst: dst, Verdict: v, Seen: seen, Reason: nat.ReasonPolicy, Because: because, Told: true,
	})
}

// tellRefusal answers a request with its refusal, or a client that closed without a word with
// the same. It is a task, as it must not hold the pumps' locks. What the sandbox still sends is
// thrown away until it closes: a reset, which closing with data unread would be, could overtake
// the answer.
func (fl *Flow) tellRefusal() {
	fl.Mu.Lock()
	if fl.Phase != PhaseVerifying && fl.Phase != PhaseOpen {
		fl.Mu.Unlock()
		return
	}
	fl.Phase = phaseRefused
	fl.Live.Store(false)
	fl.Check.refused = fl.Check.why
	fl.Mu.Unlock()
	fl.closeHost(false)
	if abort := fl.tell(fl.Check.answer); abort != "" {
		fl.Abort(abort)
		return
	}
	_ = fl.Ep.Shutdown(tcpip.ShutdownWrite) // an endpoint that is gone says so to drain
	fl.Check.over.Store(false)
	fl.T.Checks.Enter(&fl.Check.entry, fl, firstbytes.RefusalTimeout)
	fl.T.Engine.Put(&fl.UpTask)
}

// drain throws away what comes after the refusal, until the sandbox closes.
func (fl *Flow) drain() (abort nat.Reason) {
	if fl.Check.over.Load() {
		return nat.ReasonRefusedByPolicy
	}
	for {
		if _, terr := fl.Ep.Read(io.Discard, tcpip.ReadOptions{}); terr != nil {
			if _, empty := terr.(*tcpip.ErrWouldBlock); empty {
				return ""
			}
			break
		}
	}
	fl.T.Checks.Leave(&fl.Check.entry)
	fl.Mu.Lock()
	over := fl.Phase == phaseRefused
	if over {
		fl.Phase = PhaseClosing
	}
	fl.Mu.Unlock()
	if over {
		fl.Lease.SetState(nat.CloseWait)
		fl.Ep.Close()
		fl.T.Engine.Put(&fl.settling)
	}
	return ""
}

// PeekInto takes the first bytes of a receive queue.
type PeekInto struct {
	To []byte
	N  int
}

func (p *PeekInto) Write(b []byte) (int, error) {
	n := copy(p.To[p.N:], b)
	p.N += n
	if n < len(b) {
		return n, errFull
	}
	return n, nil
}

// piece is one slice of what was gathered.
func (g *Gather) piece(i int) []byte { return unsafe.Slice(g.Iov[i].Base, int(g.Iov[i].Len)) }
