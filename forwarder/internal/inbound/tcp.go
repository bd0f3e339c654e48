package inbound

// TCP flows of the inbound path, tracked by flags as nf_conntrack does
// (net/netfilter/nf_conntrack_proto_tcp.c, the table tcp_conntracks), with
// nf_conntrack_tcp_be_liberal on and nf_conntrack_tcp_loose off: out-of-window segments pass, since
// the two ends check that themselves, but only a SYN begins a flow.
//
// A flow of the previous worker whose handshake was under way continues in mid-stream. It is not
// ESTABLISHED before the sandbox has answered. LAST_ACK lasts until both ends of stream are
// acknowledged, not until the next acknowledgement of anything: TIME_WAIT is short here, and the
// last bytes may have to be sent again. SYNs from both sides are two flows: the sandbox's own is
// judged as what it is (outside.answer).

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/nat"
)

// tcpTrack is the state of one connection. Guarded by its flow's mu.
type tcpTrack struct {
	state nat.State // None: in mid-stream and not answered yet
	// ack is the highest acknowledgement of each side; acked reports whether there is one.
	ack   [2]uint32
	acked [2]bool
	// fin is where each side's stream ends, its FIN included; finned reports whether it has ended.
	fin    [2]uint32
	finned [2]bool
	// The last segment other than a reset: its sender, and where its data ended.
	lastDir nat.Dir
	lastEnd uint32
	last    bool
}

const tcpFlagsMask = header.TCPFlagFin | header.TCPFlagSyn | header.TCPFlagRst | header.TCPFlagAck

// sane reports whether an honest sender can send a segment with these flags: the combinations that
// nf_conntrack accepts.
func sane(flags header.TCPFlags) bool {
	switch flags & tcpFlagsMask {
	case header.TCPFlagSyn, header.TCPFlagSyn | header.TCPFlagAck,
		header.TCPFlagRst, header.TCPFlagRst | header.TCPFlagAck,
		header.TCPFlagFin | header.TCPFlagAck, header.TCPFlagAck:
		return true
	}
	return false
}

// see moves the connection by one segment from a side. reopened means that the
// segment begins another connection with the same tuple; nothing has changed then. A
// SYN without ACK comes from the client alone.
func (t *tcpTrack) see(d nat.Dir, flags header.TCPFlags, seq, ack, end uint32) (reopened bool) {
	if flags&(header.TCPFlagAck|header.TCPFlagRst) == header.TCPFlagAck && (!t.acked[d] || int32(ack-t.ack[d]) > 0) {
		t.ack[d], t.acked[d] = ack, true
	}
	switch flags & tcpFlagsMask {
	case header.TCPFlagSyn:
		if t.syn() {
			return true
		}
	case header.TCPFlagSyn | header.TCPFlagAck:
		if d == nat.Reply && t.state == nat.SynSent {
			t.state = nat.SynRecv
		}
	case header.TCPFlagFin | header.TCPFlagAck:
		t.fin[d], t.finned[d] = end, true
		t.finish(d)
	case header.TCPFlagAck:
		t.acknowledge(d)
	default:
		if t.believes(d, seq) {
			t.state = nat.Close
		}
		return false
	}
	t.lastDir, t.lastEnd, t.last = d, end, true
	return false
}

// syn handles the client's SYN.
func (t *tcpTrack) syn() (reopened bool) {
	if t.state == nat.None {
		t.state = nat.SynSent
	}
	return t.isOver()
}

// isOver reports whether a SYN of the same two ports begins another connection.
func (t *tcpTrack) isOver() bool { return t.state == nat.TimeWait || t.state == nat.Close }

func (fl *inboundFlow) over() bool {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	return fl.tcp.isOver()
}

func (t *tcpTrack) finish(d nat.Dir) {
	switch t.state {
	case nat.None:
		if d == nat.Reply {
			t.state = nat.FinWait
		}
	case nat.SynRecv, nat.Established:
		t.state = nat.FinWait
	case nat.FinWait, nat.CloseWait:
		t.state = nat.LastAck
	}
}

func (t *tcpTrack) acknowledge(d nat.Dir) {
	switch t.state {
	case nat.None:
		if d == nat.Reply {
			t.state = nat.Established
		}
	case nat.SynRecv:
		if d == nat.Original {
			t.state = nat.Established
		}
	case nat.FinWait:
		t.state = nat.CloseWait
	case nat.LastAck:
		if t.ended(nat.Original) && t.ended(nat.Reply) {
			t.state = nat.TimeWait
		}
	}
}

// ended reports whether the other side has all of d's stream, as far as its end is known: the
// previous worker may have seen it.
func (t *tcpTrack) ended(d nat.Dir) bool {
	return !t.finned[d] || t.acked[d^1] && int32(t.ack[d^1]-t.fin[d]) >= 0
}

// believes reports whether a reset ends the connection. One from the past does not. In an
// established connection only a reset whose number is exactly the one that the other side expects,
// or that follows its sender's last data, does: the other side answers any other with a challenge
// (RFC 5961), and the connection continues.
func (t *tcpTrack) believes(d nat.Dir, seq uint32) bool {
	other := d ^ 1
	if !t.acked[other] {
		return true
	}
	established := t.state != nat.SynSent && t.state != nat.SynRecv && t.state != nat.None
	switch {
	case seq == 0 && !established:
		return true // the answer to a SYN
	case int32(seq-t.ack[other]) < 0:
		return false
	}
	return !established || seq == t.ack[other] || t.last && t.lastDir == d && t.lastEnd == seq
}

// leaseState is what the flow table calls the state.
func (t *tcpTrack) leaseState() nat.State {
	if t.state == nat.None {
		return nat.SynSent
	}
	return t.state
}

// track moves a TCP flow by a segment.
func (fl *inboundFlow) track(d nat.Dir, p *datum) (reopened bool) {
	t := p.tcp
	flags := t.Flags()
	end := t.SequenceNumber() + uint32(p.size-p.l4-len(t))
	if flags&(header.TCPFlagSyn|header.TCPFlagFin) != 0 {
		end++
	}
	fl.mu.Lock() // before the table's locks, so that its state and ours stay the same
	defer fl.mu.Unlock()
	before := fl.tcp.leaseState()
	reopened = fl.tcp.see(d, flags, t.SequenceNumber(), t.AckNumber(), end)
	after := fl.tcp.leaseState()
	if before != after {
		fl.Lease.SetState(after)
		fl.remember(after)
	}
	return reopened
}
