package nat

import "time"

// Timeouts are how long a flow may be silent in each state before the table ends it. A flow whose
// bytes wait for a reader is not silent (Spec.Pending). A zero field means the default. Names and
// defaults are nf_conntrack's, except where a field says why not.
type Timeouts struct {
	TCPSynSent     time.Duration // nf_conntrack_tcp_timeout_syn_sent, 120 s
	TCPSynRecv     time.Duration // nf_conntrack_tcp_timeout_syn_recv, 60 s
	TCPEstablished time.Duration // nf_conntrack_tcp_timeout_established, 432000 s (RFC 5382 REQ-5 asks for 2 h 4 min or more)
	TCPFinWait     time.Duration // nf_conntrack_tcp_timeout_fin_wait, 120 s
	TCPLastAck     time.Duration // nf_conntrack_tcp_timeout_last_ack, 30 s
	TCPClose       time.Duration // nf_conntrack_tcp_timeout_close, 10 s

	// TCPCloseWait is nf_conntrack_tcp_timeout_close_wait: 7440 s, not the kernel's 60. After one
	// side has closed its stream, the flow may be silent for as long as the other works on its
	// answer. The kernel merely forgets such a flow; here it ends in a reset, so it gets the 2 h 4
	// min of RFC 5382 REQ-5.
	TCPCloseWait time.Duration

	// TCPTimeWait is nf_conntrack_tcp_timeout_time_wait: 1 s, not the kernel's 120. The kernel's
	// conntrack outlives sockets that it does not own, and must recognize their late segments. Here
	// both ends are ours: the host's socket has its own TIME_WAIT in the host's kernel, and the
	// sandbox's half is an endpoint of our stack, which swallows a SYN that reuses the tuple for as
	// long as it lives. So the entry lives exactly as long as that endpoint. In a Spec.Forwarded
	// flow both ends have been acknowledged by then.
	TCPTimeWait time.Duration

	// UDP is nf_conntrack_udp_timeout: 120 s, not the kernel's 30. When its last flow ends, a
	// sandbox endpoint loses its host socket and so its outside port, which RFC 4787 REQ-5 keeps
	// for two minutes: a client may wait for a late answer, or may have told others the address
	// that a server saw. Flows that were never answered make room for new ones when the table is
	// full.
	UDP time.Duration

	UDPStream time.Duration // nf_conntrack_udp_timeout_stream, 120 s

	// UDPShort is nf_conntrack_udp_timeout_dns, 10 s, which the kernel does not
	// have: for flows of one question and one answer (Spec.Short). RFC 4787 REQ-5
	// allows it for well-known ports. A resolver's retry comes within 5 s.
	UDPShort time.Duration

	// UDPInbound is nf_conntrack_udp_timeout_inbound, 300 s, which the kernel does not have: how
	// long after the sandbox's last datagram incoming ones keep a flow alive that the sandbox
	// started. Without it a remote host that the sandbox once wrote to could keep the way in open
	// for ever (RFC 4787 section 4.3, REQ-6).
	UDPInbound time.Duration

	ICMP    time.Duration // nf_conntrack_icmp_timeout, 30 s
	ICMPv6  time.Duration // nf_conntrack_icmpv6_timeout, 30 s
	Generic time.Duration // nf_conntrack_generic_timeout, 600 s
}

// DefaultTimeouts returns the timeouts that a zero Timeouts means.
func DefaultTimeouts() Timeouts {
	return Timeouts{
		TCPSynSent: 120 * time.Second, TCPSynRecv: 60 * time.Second, TCPEstablished: 432000 * time.Second,
		TCPFinWait: 120 * time.Second, TCPCloseWait: 7440 * time.Second, TCPLastAck: 30 * time.Second,
		TCPTimeWait: 1 * time.Second, TCPClose: 10 * time.Second,
		UDP: 120 * time.Second, UDPStream: 120 * time.Second, UDPShort: 10 * time.Second, UDPInbound: 300 * time.Second,
		ICMP: 30 * time.Second, ICMPv6: 30 * time.Second, Generic: 600 * time.Second,
	}
}

func (t Timeouts) orDefault() *Timeouts {
	def := DefaultTimeouts()
	for i, field := range t.fields() {
		if *field <= 0 {
			*field = *def.fields()[i]
		}
	}
	return &t
}

// fields lists the settings in the order of timeoutNames.
func (t *Timeouts) fields() [15]*time.Duration {
	return [...]*time.Duration{
		&t.TCPSynSent, &t.TCPSynRecv, &t.TCPEstablished, &t.TCPFinWait, &t.TCPCloseWait, &t.TCPLastAck, &t.TCPTimeWait,
		&t.TCPClose, &t.UDP, &t.UDPStream, &t.UDPShort, &t.UDPInbound, &t.ICMP, &t.ICMPv6, &t.Generic,
	}
}

// of returns the timeout of a flow of that protocol in that state.
func (t *Timeouts) of(proto uint8, s State, short bool) time.Duration {
	switch proto {
	case protoTCP:
		switch s {
		case SynRecv:
			return t.TCPSynRecv
		case Established:
			return t.TCPEstablished
		case FinWait:
			return t.TCPFinWait
		case CloseWait:
			return t.TCPCloseWait
		case LastAck:
			return t.TCPLastAck
		case TimeWait:
			return t.TCPTimeWait
		case Close:
			return t.TCPClose
		}
		return t.TCPSynSent
	case protoUDP:
		switch {
		case short:
			return t.UDPShort
		case s == Assured:
			return t.UDPStream
		}
		return t.UDP
	case protoICMP:
		return t.ICMP
	case protoICMPv6:
		return t.ICMPv6
	}
	return t.Generic
}
