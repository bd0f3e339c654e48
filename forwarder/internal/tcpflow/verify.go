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
//
// Package gate judges: here are its senses and its hands. It is asked by the pumps, and what it
// returns is done here and in splice.go.

import (
	"io"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gate"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// check is what a TCP flow keeps of its verification. It stays with the flow, which is
// judged again when rules change.
type check struct {
	fl      *Flow
	entry   firstbytes.Entry
	idle    firstbytes.Entry // of a client that was greeted, and has asked for nothing yet
	over    atomic.Bool      // no more bytes are waited for, or no longer for a refusal to be read
	evicted atomic.Bool

	// Guarded by the up pump's lock.
	first    gate.First
	refusing bool // the down pump is to tell a refusal

	telling engine.Task // ends the flow by ending, which was written before
	ending  *gate.Ending

	refused nat.Reason // why, once told; guarded by the flow's mu
}

var _ gate.Flow = (*check)(nil)

// newCheck has the first bytes of fl, which has begun nothing yet, judged.
func newCheck(fl *Flow) *check {
	c := &check{fl: fl, first: fl.T.gates.NewFirst()}
	c.telling.Run = c.tellEnding
	return c
}

// verify begins to wait for the first bytes, now that the handshake is complete.
func (c *check) verify(ep tcpip.Endpoint) {
	fl := c.fl
	fl.prepare()
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
	fl.T.Checks.Enter(&c.entry, c, firstbytes.CheckTimeout)
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
func (c *check) CheckExpired(evicted bool) {
	c.evicted.Store(evicted)
	c.over.Store(true)
	c.fl.T.Engine.Put(&c.fl.UpTask)
}

// leave ends all waiting.
func (c *check) leave() {
	c.fl.T.Checks.Leave(&c.entry)
	c.fl.T.Idle.Leave(&c.idle)
}

// beforeOpen is the up pump of a flow that is not open: it looks at the first bytes, or
// throws away what comes after a refusal.
func (c *check) beforeOpen() (abort nat.Reason) {
	if c == nil {
		return ""
	}
	c.fl.Mu.Lock()
	ph := c.fl.Phase
	c.fl.Mu.Unlock()
	switch ph {
	case PhaseVerifying:
		return c.readFirst()
	case phaseRefused:
		return c.drain()
	}
	return ""
}

// readFirst decides once enough is queued, or nothing more is to be waited for.
func (c *check) readFirst() (abort nat.Reason) {
	fl := c.fl
	last := c.over.Load() // nothing more is waited for
	if last && c.evicted.Load() && !c.first.Greeted() {
		return nat.ReasonFirstBytesEvicted
	}
	ended := c.Ended()
	if over(fl.Ep) { // asked behind Ended, for which a reset that comes in between is an end too
		return lostSandbox(fl.Ep)
	}
	at, gone := c.first.Read(c, last, ended, fl.hostEvents.Load()&unix.EPOLLRDHUP != 0)
	if gone != "" {
		return gone
	}
	if len(at.Say) > 0 {
		if abort := fl.tell(string(at.Say)); abort != "" {
			return abort
		}
	}
	if at.SetUp {
		fl.Lease.SetState(nat.Established)
		fl.T.Checks.Leave(&c.entry)
		fl.T.Idle.Enter(&c.idle, c, 0)
	}
	switch {
	case at.Decide:
		return c.decide(&at)
	case at.End != nil:
		c.end(at.End)
	default:
		if ep, ok := fl.Ep.(*tcp.Endpoint); ok {
			fl.mem.FitJudged(ep) // there is room for what is waited for
		}
	}
	return ""
}

// tell sends the sandbox something in the far side's place.
func (fl *Flow) tell(what string) (abort nat.Reason) {
	if n, terr := fl.Ep.Write(strings.NewReader(what), tcpip.WriteOptions{}); terr != nil || int(n) != len(what) {
		return nat.ReasonRefusedByPolicy
	}
	return ""
}

// decide judges the flow with what it said, and opens or refuses it.
func (c *check) decide(at *gate.Look) (abort nat.Reason) {
	fl := c.fl
	c.leave()
	j, err := fl.Hear(at.Seen)
	switch {
	case err == admit.ErrFlowEnded:
		return nat.ReasonPolicy
	case err != nil:
		fl.T.Limited.Add(1)
		return admit.LimitOf(err)
	case !j.Verdict.Allowed():
		e := c.first.Refuse(c, j.Verdict, at)
		if e == nil {
			return nat.ReasonRefusedByPolicy
		}
		c.end(e)
		return ""
	}
	fl.Mu.Lock()
	if fl.Phase != PhaseVerifying || fl.Revoked.Load() {
		fl.Mu.Unlock()
		return ""
	}
	fl.gate = c.first.Gate(c, j.Verdict, at.Seen)
	err = fl.openLocked()
	fl.Mu.Unlock()
	if err != nil {
		return nat.ReasonOutOfDescriptors
	}
	fl.Lease.SetState(nat.Established)
	fl.T.Engine.Put(&fl.UpTask)
	fl.T.Engine.Put(&fl.DownTask)
	return ""
}

// end ends the flow as e says.
func (c *check) end(e *gate.Ending) {
	c.ending = e
	c.fl.T.Engine.Put(&c.telling)
}

// awaitRefusal has the down pump end the flow, for why, as soon as its gate lets it.
func (c *check) awaitRefusal(why nat.Reason) (abort nat.Reason) {
	fl := c.fl
	switch {
	case c.refusing && !c.over.Load():
		return ""
	case c.refusing, fl.Down.Done.Load(): // an answer would come behind the server's end
		return why
	}
	c.refusing = true
	c.over.Store(false)
	fl.T.Checks.Enter(&c.entry, c, firstbytes.RefusalTimeout)
	fl.T.Engine.Put(&fl.DownTask)
	return ""
}

// tellEnding answers a request with its refusal, or a client that closed without a word with
// the same. It is a task, as it must not hold the pumps' locks. What the sandbox still sends is
// thrown away until it closes: a reset, which closing with data unread would be, could overtake
// the answer.
func (c *check) tellEnding() {
	fl := c.fl
	fl.Mu.Lock()
	if fl.Phase != PhaseVerifying && fl.Phase != PhaseOpen {
		fl.Mu.Unlock()
		return
	}
	fl.Phase = phaseRefused
	fl.Live.Store(false)
	c.refused = c.ending.Why
	fl.Mu.Unlock()
	fl.closeHost(false)
	if abort := fl.tell(c.ending.Answer); abort != "" {
		fl.Abort(abort)
		return
	}
	_ = fl.Ep.Shutdown(tcpip.ShutdownWrite) // an endpoint that is gone says so to drain
	c.over.Store(false)
	fl.T.Checks.Enter(&c.entry, c, firstbytes.RefusalTimeout)
	fl.T.Engine.Put(&fl.UpTask)
}

// drain throws away what comes after the refusal, until the sandbox closes.
func (c *check) drain() (abort nat.Reason) {
	fl := c.fl
	if c.over.Load() {
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
	fl.T.Checks.Leave(&c.entry)
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

// The rest is what a gate asks of its flow.

func (c *check) Question() policy.Query  { return c.fl.Question() }
func (c *check) Verdict() policy.Verdict { return c.fl.Verdict() }
func (c *check) LookAgain()              { c.fl.T.Engine.Put(&c.fl.UpTask) }
func (c *check) Ended() bool             { return netstack.EndpointState(c.fl.Ep) != tcp.StateEstablished }
func (c *check) FarEnded() bool          { return c.fl.hostEvents.Load() != 0 }

func (c *check) Queued() (n int, gone nat.Reason) {
	n, terr := c.fl.Ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return 0, lostSandbox(c.fl.Ep)
	}
	return n, ""
}

func (c *check) Peek(to []byte) (n int, gone nat.Reason) {
	into := peekInto{to: to}
	if _, terr := c.fl.Ep.Read(&into, tcpip.ReadOptions{Peek: true}); terr != nil && into.n == 0 {
		switch terr.(type) {
		case *tcpip.ErrWouldBlock, *tcpip.ErrClosedForReceive:
		default:
			return 0, lostSandbox(c.fl.Ep)
		}
	}
	return into.n, ""
}

func (c *check) PeekFar(to []byte) int {
	n, _ := recvPeek(c.fl.FD, to) // an error is for the pump to find
	return n
}

func (c *check) SkipFar(p []byte) bool {
	n, err := unix.Read(c.fl.FD, p)
	return err == nil && n == len(p)
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
