package forwarder

// TCP flows that wait for somebody: dials for the far side, handshakes for the
// sandbox. Both are bounded in number and time; the forwarder's timer looks after
// them while there are any.

import (
	"errors"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/nat"
)

// errNoAnswer is what became of a dial that the sandbox has stopped asking for.
var errNoAnswer = errors.New("no answer until the sandbox gave up")

// enterDial has the timer look at fl until leaveDialLocked. It is called while
// nobody else can end the dial or learn of its success.
func (t *tcpForwarder) enterDial(fl *tcpFlow) {
	t.mu.Lock()
	fl.dialing = t.dials.PushBack(fl)
	t.mu.Unlock()
	t.timer.raise()
}

// leaveDialLocked is called with mu held.
func (t *tcpForwarder) leaveDialLocked(fl *tcpFlow) {
	if fl.dialing != nil {
		t.dials.Remove(fl.dialing)
		fl.dialing = nil
	}
}

// expireDials ends the dials whose sandbox has stopped asking, and tells whether
// there are others. Called by Forwarder's timer.
//
// Retransmissions of a SYN come at intervals that double at most (RFC 6298
// section 5.5), so the next is due before as much time again has passed as since
// the first.
func (t *tcpForwarder) expireDials(now time.Time) (pending bool) {
	var over []*tcpFlow
	t.mu.Lock()
	for e := t.dials.Front(); e != nil; e = e.Next() {
		fl := e.Value.(*tcpFlow)
		if now.Sub(fl.lastSYN) > fl.lastSYN.Sub(fl.firstSYN)+synSlack {
			over = append(over, fl)
		}
	}
	pending = t.dials.Len() > len(over)
	t.mu.Unlock()
	for _, fl := range over {
		if fl.abortDial(nat.ReasonGivenUp) {
			t.cancelled.Add(1)
			t.tellFailed(fl.verdict().Contact(), errNoAnswer)
		}
	}
	return pending
}

// cancelDial ends the dial of a tuple whose sandbox sent RST.
func (t *tcpForwarder) cancelDial(id stack.TransportEndpointID) {
	t.mu.Lock()
	fl := t.flows[id]
	t.mu.Unlock()
	if fl != nil && fl.abortDial(nat.ReasonCancelled) {
		t.cancelled.Add(1)
	}
}

// enterHandshake counts fl among the half-open, at the cost of the oldest.
func (t *tcpForwarder) enterHandshake(fl *tcpFlow) {
	fl.deadline = t.gate.now().Add(handshakeTimeout)
	t.mu.Lock()
	t.leaveDialLocked(fl)
	var evict *tcpFlow
	if t.handshakes.Len() >= maxHandshakes {
		evict = t.handshakes.Front().Value.(*tcpFlow)
	}
	fl.halfOpen = t.handshakes.PushBack(fl)
	t.mu.Unlock()
	t.timer.raise()
	if evict != nil {
		t.handshakeEvicted.Add(1)
		evict.abort(nat.ReasonHandshakeEvicted)
	}
}

func (t *tcpForwarder) leaveHandshake(fl *tcpFlow) {
	t.mu.Lock()
	if fl.halfOpen != nil {
		t.handshakes.Remove(fl.halfOpen)
		fl.halfOpen = nil
	}
	t.mu.Unlock()
}

// endHandshake has the stack forget the handshake, by delivering the reset that the
// sandbox did not send. The stack has no other way to end one from outside.
func (t *tcpForwarder) endHandshake(fl *tcpFlow) {
	t.leaveHandshake(fl)
	t.inject(fl.id, header.TCPFlagRst, fl.irs+1)
}

// expireHandshakes ends those whose time is over, and those that the stack has given
// up, as it tells nobody. It tells whether there are others. Called by Forwarder's timer.
func (t *tcpForwarder) expireHandshakes(now time.Time) (pending bool) {
	var over, rest []*tcpFlow
	t.mu.Lock()
	for e := t.handshakes.Front(); e != nil; e = e.Next() {
		if fl := e.Value.(*tcpFlow); now.After(fl.deadline) {
			over = append(over, fl)
		} else if now.After(fl.deadline.Add(synRead - handshakeTimeout)) {
			rest = append(rest, fl) // the stack has the SYN for long
		}
	}
	pending = t.handshakes.Len() > len(over)
	t.mu.Unlock()
	for _, fl := range over {
		t.handshakeExpired.Add(1)
		fl.abort(nat.ReasonHandshakeFailed)
	}
	for _, fl := range rest {
		proto := netProto(netipAddr(fl.id.RemoteAddress))
		if t.stack.FindTransportEndpoint(proto, header.TCPProtocolNumber, fl.id, nicID) == nil && fl.inHandshake() {
			fl.abort(nat.ReasonHandshakeFailed)
		}
	}
	return pending
}
