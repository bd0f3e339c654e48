package datagram

// Echo requests from the sandbox.
//
// Each echo identifier of the sandbox gets a ping socket (icmp(7)), to which the kernel assigns an
// identifier of its own. UDP treats ports the same way, so the same flows and sockets are used,
// with the identifier in place of the port. The kernel passes only replies to a ping socket, and
// fills in identifier and checksum.
//
// A request's payload stays here: it leaves as zeroes, and the reply brings the sandbox's own bytes
// back (echo_book.go).
//
// Where ping sockets are not permitted (net.ipv4.ping_group_range) and a raw socket was handed
// over, all identifiers share that (echo_raw.go). With neither, every request is refused, counted
// and answered with an ICMP error, and the operator is told once.

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

var errNoPingSocket = errors.New("no ping socket is permitted")

type echoForwarder struct {
	dgramTable
	checksum, other, noPing packet.Reason
	raw                     [2]*rawEcho // by family; nil where there is none
	warn                    sync.Once
	Book                    echoBook
	zeroes                  []byte // the payload of every request; read-only
}

func newEchoForwarder(p Config, all *Forwarder, raw4, raw6 int) *echoForwarder {
	e := &echoForwarder{
		checksum: p.Drops.Reason("icmp_checksum"),
		other:    p.Drops.Reason("icmp_not_echo"),
		noPing:   p.Drops.Reason("icmp_no_ping_socket"),
	}
	e.init(p, all, "icmp")
	e.Book.init(p.Gate, p.Drops, e.n.flow)
	e.zeroes = make([]byte, packet.MaxIPv4Len)
	e.raw[0] = newRawEcho(e, raw4, packet.ProtoICMP)
	e.raw[1] = newRawEcho(e, raw6, packet.ProtoICMPv6)
	return e
}

func (e *echoForwarder) close() {
	e.dgramTable.close()
	for _, r := range e.raw {
		r.close()
	}
}

// HandleICMPv4 is the stack's handler for the ICMP that is left to it: echo requests and replies.
// It returns true so that the stack does not answer by itself.
func (d *Forwarder) HandleICMPv4(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	d.Echo.arrive(pkt, packet.ProtoICMP, packet.EchoRequest4)
	return true
}

// HandleICMPv6 is the same for ICMPv6.
func (d *Forwarder) HandleICMPv6(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	d.Echo.arrive(pkt, packet.ProtoICMPv6, packet.EchoRequest6)
	return true
}

func (e *echoForwarder) arrive(pkt *stack.PacketBuffer, proto, request uint8) {
	a, ok := packet.ArrivalOf(pkt)
	h := pkt.TransportHeader().Slice()
	if !ok || len(h) != packet.EchoHeaderLen || h[0] != request || h[1] != 0 {
		e.other.Drop(pkt)
		return
	}
	// The stack has verified ICMPv6, but passes on an echo request with a bad ICMPv4 checksum.
	if proto == packet.ProtoICMP && checksum.Checksum(h, pkt.Data().Checksum()) != 0xffff {
		e.checksum.Drop(pkt)
		return
	}
	if e.Onlink.IsOwn(a.Dst) {
		e.answer(a, pkt)
		return
	}
	if e.lastHop(a, pkt) {
		return
	}
	guest := netip.AddrPortFrom(a.Src, binary.BigEndian.Uint16(h[4:]))
	tuple := nat.NewTuple(proto, guest, netip.AddrPortFrom(a.Dst, uint16(request)<<8))
	fl := e.Lookup(tuple)
	if fl == nil {
		if fl = e.begin(tuple, guest, a.Dst, request, pkt); fl == nil {
			return
		}
	}
	if fl.Revoked.Load() {
		e.n.refused.Drop(pkt)
		return
	}
	var refusal packet.Reason
	if a.Wire, refusal = e.Book.enter(fl, pkt, a); refusal.Uint64 != nil {
		refusal.Drop(pkt)
		return
	}
	e.enqueue(fl, pkt, a)
}

// answer replies to an echo request to one of our addresses on the link.
func (e *echoForwarder) answer(a packet.Arrival, pkt *stack.PacketBuffer) {
	h := [packet.EchoHeaderLen]byte(pkt.TransportHeader().Slice())
	h[0] = packet.EchoReply4
	if !a.Dst.Is4() {
		h[0] = packet.EchoReply6
	}
	var data []byte
	if v := pkt.Data().AsRange().ToView(); v != nil {
		defer v.Release()
		data = v.AsSlice()
	}
	e.Emit.ICMP(a.Dst, a.Src, packet.Meta{TTL: packet.DefaultTTL, Tos: a.Meta.Tos}, h[:], data)
}

// begin sets up the flow of a first request, or handles the request and returns nil.
func (e *echoForwarder) begin(tuple nat.Tuple, guest netip.AddrPort, dst netip.Addr, request uint8, pkt *stack.PacketBuffer) *Flow {
	e.openMu.Lock()
	defer e.openMu.Unlock()
	if known := e.Lookup(tuple); known != nil {
		return known
	}
	peer := netip.AddrPortFrom(dst, 0)
	j := e.Gate.Decide(policy.Query{Proto: tuple.Proto(), Src: guest, Dst: peer, ICMPType: request})
	if !j.Verdict.Allowed() {
		e.refuse(j, packet.ICMPAdminProhibited, pkt)
		return nil
	}
	fl := &Flow{d: &e.dgramTable, Tuple: tuple, Guest: guest, Peer: peer, Target: j.Verdict.Target(), echo: new(echoFlow)}
	if err := e.Gate.Enter(&fl.Pass, fl, j, admit.Entry{Orig: tuple}); err != nil {
		e.n.flow.Drop(pkt)
		e.Gate.NoteLimit(nil, j, err)
		return nil
	}
	err := e.install(fl, func() (*hostSocket, error) { return e.open(j.Verdict, guest) })
	switch {
	case err == nil:
		return fl
	case errors.Is(err, errNoPingSocket):
		fl.end(nat.ReasonNoPingSocket)
		e.noPing.Drop(pkt)
		e.warn.Do(func() {
			e.Log.Warn("echo requests of the sandbox are refused: the host permits no ping sockets to this process's group "+
				"and no raw socket was handed over; widen net.ipv4.ping_group_range",
				"sysctl", "net.ipv4.ping_group_range", "error", err)
		})
		e.Errs.Tell(packet.ICMPAdminProhibited, 0, pkt)
	default:
		fl.end(noSocketReason(err))
		e.noSocket(err, pkt)
	}
	return nil
}

// open makes the socket for one echo identifier.
func (e *echoForwarder) open(v policy.Verdict, guest netip.AddrPort) (*hostSocket, error) {
	fd, err := e.Dialer.PodEchoSocket(v, guest.Addr())
	if err != nil {
		for _, refusal := range []error{unix.EACCES, unix.EPERM, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EINVAL} {
			if errors.Is(err, refusal) {
				if raw := e.raw[packet.FamilyIndex(guest.Addr())]; raw != nil {
					return raw.identifier()
				}
				return nil, errors.Join(errNoPingSocket, err)
			}
		}
		return nil, err
	}
	return e.startSocket(fd, v.Proto())
}

// identifier is the identifier of the socket's requests outside; the kernel treats it as a port.
func (s *hostSocket) identifier() uint16 {
	if s.raw != nil {
		return s.rawID
	}
	return s.ownPort()
}

// echoPeer finds the flow of a message from a, or of an error about a message to a.
func (s *hostSocket) echoPeer(a netip.Addr, msg []byte) *Flow {
	if s.raw != nil {
		if s = s.raw.socket(msg); s == nil {
			return nil
		}
	}
	return s.Peer(netip.AddrPortFrom(a, 0), netip.Addr{})
}

// echoMessage writes the request that leaves in place of it: its header, and as many zeroes as the
// sandbox sent bytes. The kernel fills in identifier and checksum on a ping socket, and the
// checksum on a raw ICMPv6 socket.
func (s *hostSocket) echoMessage(it *TxItem) (head, payload []byte) {
	head = make([]byte, packet.EchoHeaderLen)
	head[0] = it.pkt.TransportHeader().Slice()[0]
	binary.BigEndian.PutUint16(head[4:], s.rawID)
	binary.BigEndian.PutUint16(head[6:], it.wire)
	binary.BigEndian.PutUint16(head[2:], ^checksum.Checksum(head, 0)) // zeroes add nothing
	return head, s.d.all.Echo.zeroes[:it.pkt.Data().Size()]
}

// deliverEcho passes an echo reply on to the sandbox: only its arrival and length, with the bytes
// of the request.
func (s *hostSocket) deliverEcho(from netip.AddrPort, data []byte, c *hostsock.Control) {
	if s.raw != nil && s.proto == packet.ProtoICMP {
		data = StripIPv4(data)
	}
	fl := s.echoPeer(from.Addr(), data)
	if fl == nil {
		s.d.n.unsolicited.Add(1)
		return
	}
	reply := packet.EchoReply4
	if s.proto == packet.ProtoICMPv6 {
		reply = packet.EchoReply6
	}
	if len(data) < packet.EchoHeaderLen || data[0] != reply {
		s.d.n.unsolicited.Add(1)
		return
	}
	sent := s.d.all.Echo.Book.answered(fl, data)
	if sent == nil {
		return
	}
	head := [packet.EchoHeaderLen]byte(sent.Msg)
	head[0] = reply
	payload := sent.Msg[packet.EchoHeaderLen:min(len(sent.Msg), len(data))]
	meta := fl.arrivingMeta(c)
	meta.Tos = sent.A.Meta.Tos // as Linux answers
	size := packet.IPHeaderLen(fl.Guest.Addr()) + packet.EchoHeaderLen + len(payload)
	if !fl.admitDown(size) {
		return
	}
	fl.Lease.Account(nat.Reply, 1, int64(size))
	s.d.Emit.ICMP(fl.Peer.Addr(), fl.Guest.Addr(), meta, head[:], payload)
}
