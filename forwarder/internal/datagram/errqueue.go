package datagram

// ICMP errors that came back to the host.
//
// The kernel matches an ICMP error with the socket that sent the packet and puts it on the socket's
// error queue with its type, code, origin, and what it quoted of the packet (ip(7), IP_RECVERR).
// From there it is passed to the sandbox as it would have arrived had the sandbox sent the packet
// itself: from the same router, quoting the sandbox's addresses and ports instead of the host's.
// Errors about packets to an address that is not, or no longer, a peer are dropped: they could be
// forged, and the sandbox has no use for them.

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
)

// drainErrors reads the error queue of s.
func (s *hostSocket) drainErrors() {
	b := RxPool.Get().(*RxBatch)
	defer RxPool.Put(b)
	for range errRounds {
		n, errno := b.receive(s, unix.MSG_ERRQUEUE)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return
		}
		for i := range n {
			to, quoted, c := b.message(i)
			if c.HasErr {
				s.translate(to, quoted, &c)
			}
		}
	}
}

// translate passes on to the sandbox one error, c.err, about a packet that was sent to to.
func (s *hostSocket) translate(to netip.AddrPort, quoted []byte, c *hostsock.Control) {
	e := &c.Err
	switch e.Origin {
	case unix.SO_EE_ORIGIN_LOCAL:
		// The sender, which has the packet, handles a refusal to send.
		if e.Errno == unix.EMSGSIZE {
			s.localMTU.Store(e.Info)
		}
		return
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
	default:
		return
	}
	var fl *Flow
	if s.proto == packet.ProtoUDP {
		fl = s.Peer(to, c.Local)
	} else {
		fl = s.echoPeer(to.Addr(), quoted)
	}
	if fl == nil {
		s.d.n.strayErrors.Add(1)
		return
	}
	info, ok := packet.ErrorInfo(e)
	if !ok {
		s.d.n.strayErrors.Add(1)
		return
	}
	src := e.Offender
	if src == fl.Target.Addr() || src.IsLoopback() {
		src = fl.Peer.Addr() // the gateway, where that stands for the host
	}
	var buf [packet.ICMPQuoteIPv6]byte
	var orig []byte
	if s.proto == packet.ProtoUDP {
		orig = fl.Requote(buf[:], quoted)
	} else if sent := s.d.all.Echo.Book.answered(fl, quoted); sent != nil {
		orig = sent.Quote(buf[:])
	} else {
		return
	}
	s.d.n.errors.Add(1)
	s.d.Errs.SendForm(packet.ErrorForm{Typ: e.Typ, Code: e.Cod}, info, orig, src)
}

// Requote writes the datagram that the sandbox sent, as far as it is known: the IP header of the
// flow's last packet, the UDP header with the sandbox's own ports, and then the payload that the
// error quoted.
func (fl *Flow) Requote(buf, quoted []byte) []byte {
	a := fl.LastSent()
	hl := packet.IPHeaderLen(fl.Peer.Addr())
	a.Size = max(a.Size, hl+packet.UDPHeaderLen)
	l4 := fl.quoteHeader(buf, a)
	packet.PutUDPHeader(l4, fl.Guest.Port(), fl.Peer.Port(), a.Size-hl)
	n := packet.UDPHeaderLen + copy(l4[packet.UDPHeaderLen:], quoted)
	if n == a.Size-hl { // all of it is there to be summed
		packet.FinishUDP(fl.Guest.Addr(), fl.Peer.Addr(), l4[:n])
	}
	return buf[:hl+n]
}

// Quote writes the request as the sandbox sent it, as far as buf has room, whatever the error
// quoted.
func (s *EchoSent) Quote(buf []byte) []byte {
	l4 := s.Key.Flow.quoteHeader(buf, s.A)
	n := copy(l4, s.Msg)
	return buf[:len(buf)-len(l4)+n]
}

// quoteHeader writes the IP header of a packet from the sandbox, and returns the rest of buf.
func (fl *Flow) quoteHeader(buf []byte, a packet.Arrival) []byte {
	hl := packet.IPHeaderLen(fl.Peer.Addr())
	packet.PutIPHeader(buf, fl.Guest.Addr(), fl.Peer.Addr(), fl.Tuple.Proto(), a.Meta, a.Size, a.ID, a.Df)
	if fl.Peer.Addr().Is4() {
		binary.BigEndian.PutUint16(buf[10:], ^checksum.Checksum(buf[:hl], 0))
	}
	return buf[hl:]
}
