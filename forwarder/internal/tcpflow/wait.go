package tcpflow

// TCP flows that wait: dials for the far side, handshakes for the sandbox. Both are bounded in
// number and time; the forwarder's timer looks after them while there are any.

import (
	"errors"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// errNoAnswer is the result of a dial that the sandbox has stopped asking for.
var errNoAnswer = errors.New("no answer until the sandbox gave up")

// enterDial puts fl under the timer until leaveDialLocked. It is called while nothing else can end
// the dial or learn of its success.
func (t *Forwarder) enterDial(fl *Flow) {
	t.Mu.Lock()
	fl.Dialing = t.Dials.PushBack(fl)
	t.Mu.Unlock()
	t.Timer.Raise()
}

// leaveDialLocked is called with mu held.
func (t *Forwarder) leaveDialLocked(fl *Flow) {
	if fl.Dialing != nil {
		t.Dials.Remove(fl.Dialing)
		fl.Dialing = nil
	}
}

// ExpireDials ends the dials whose sandbox has stopped asking, and reports whether there are
// others. The Forwarder's timer calls it.
//
// Retransmissions of a SYN come at intervals that double at most (RFC 6298
// section 5.5), so the next is due before as much time again has passed as since
// the first.
func (t *Forwarder) ExpireDials(now time.Time) (pending bool) {
	var over []*Flow
	t.Mu.Lock()
	for e := t.Dials.Front(); e != nil; e = e.Next() {
		fl := e.Value.(*Flow)
		if now.Sub(fl.lastSYN) > fl.lastSYN.Sub(fl.firstSYN)+SynSlack {
			over = append(over, fl)
		}
	}
	pending = t.Dials.Len() > len(over)
	t.Mu.Unlock()
	for _, fl := range over {
		if fl.abortDial(nat.ReasonGivenUp) {
			t.cancelled.Add(1)
			t.tellFailed(fl.Verdict().Contact(), errNoAnswer)
		}
	}
	return pending
}

// cancelDial ends the dial of a tuple whose sandbox sent RST.
func (t *Forwarder) cancelDial(id stack.TransportEndpointID) {
	t.Mu.Lock()
	fl := t.Flows[id]
	t.Mu.Unlock()
	if fl != nil && fl.abortDial(nat.ReasonCancelled) {
		t.cancelled.Add(1)
	}
}

// enterHandshake counts fl among the half-open, at the cost of the oldest.
func (t *Forwarder) enterHandshake(fl *Flow) {
	fl.deadline = t.Gate.Now().Add(HandshakeTimeout)
	t.Mu.Lock()
	t.leaveDialLocked(fl)
	var evict *Flow
	if t.handshakes.Len() >= MaxHandshakes {
		evict = t.handshakes.Front().Value.(*Flow)
	}
	fl.halfOpen = t.handshakes.PushBack(fl)
	t.Mu.Unlock()
	t.Timer.Raise()
	if evict != nil {
		t.handshakeEvicted.Add(1)
		evict.Abort(nat.ReasonHandshakeEvicted)
	}
}

func (t *Forwarder) leaveHandshake(fl *Flow) {
	t.Mu.Lock()
	if fl.halfOpen != nil {
		t.handshakes.Remove(fl.halfOpen)
		fl.halfOpen = nil
	}
	t.Mu.Unlock()
}

// endHandshake makes the stack drop the handshake by delivering the reset that the sandbox did not
// send. The stack offers no other way.
func (t *Forwarder) endHandshake(fl *Flow) {
	t.leaveHandshake(fl)
	t.inject(fl.id, header.TCPFlagRst, fl.Irs+1)
}

// ExpireHandshakes ends those whose time is over, and those that the stack has given
// up, as it tells nobody. It tells whether there are others. Called by Forwarder's timer.
func (t *Forwarder) ExpireHandshakes(now time.Time) (pending bool) {
	var over, rest []*Flow
	t.Mu.Lock()
	for e := t.handshakes.Front(); e != nil; e = e.Next() {
		if fl := e.Value.(*Flow); now.After(fl.deadline) {
			over = append(over, fl)
		} else if now.After(fl.deadline.Add(synRead - HandshakeTimeout)) {
			rest = append(rest, fl) // the stack has the SYN for long
		}
	}
	pending = t.handshakes.Len() > len(over)
	t.Mu.Unlock()
	for _, fl := range over {
		t.handshakeExpired.Add(1)
		fl.Abort(nat.ReasonHandshakeFailed)
	}
	for _, fl := range rest {
		proto := packet.NetProto(packet.NetipAddr(fl.id.RemoteAddress))
		if t.Stack.FindTransportEndpoint(proto, header.TCPProtocolNumber, fl.id, packet.NICID) == nil && fl.inHandshake() {
			fl.Abort(nat.ReasonHandshakeFailed)
		}
	}
	return pending
}
