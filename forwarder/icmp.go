package forwarder

// Echo requests of the sandbox.
//
// Each echo identifier of the sandbox gets a ping socket (icmp(7)), which the kernel
// gives an identifier of its own: what UDP does with ports, and so the same flows
// and sockets are used, the identifier standing for the port. The kernel lets only
// replies through to a ping socket and fills in identifier and checksum.
//
// What a request says stays here: it leaves with zeroes for a payload, and its reply
// brings the sandbox's own bytes back (icmp_book.go).
//
// Where ping sockets are not permitted (net.ipv4.ping_group_range) and a raw socket was
// handed over, all identifiers share that (icmp_raw.go). With neither, every request
// is refused, counted, answered with an ICMP error, and the operator told once.

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice/nat"
	"sluice/policy"
)

const (
	echoRequest4, echoReply4 = uint8(header.ICMPv4Echo), uint8(header.ICMPv4EchoReply)
	echoRequest6, echoReply6 = uint8(header.ICMPv6EchoRequest), uint8(header.ICMPv6EchoReply)
)

var errNoPingSocket = errors.New("no ping socket is permitted")

type echoForwarder struct {
	dgramTable
	checksum, other, noPing reason
	raw                     [2]*rawEcho // by family; nil where there is none
	warn                    sync.Once
	book                    echoBook
	zeroes                  []byte // the payload of every request, never written
}

func newEchoForwarder(p dgramParts, all *datagrams, raw4, raw6 int) *echoForwarder {
	e := &echoForwarder{
		checksum: p.drops.reason("icmp_checksum"),
		other:    p.drops.reason("icmp_not_echo"),
		noPing:   p.drops.reason("icmp_no_ping_socket"),
	}
	e.init(p, all, "icmp")
	e.book.init(p.gate, p.drops, e.n.flow)
	e.zeroes = make([]byte, maxIPv4Len)
	e.raw[0] = newRawEcho(e, raw4, protoICMP)
	e.raw[1] = newRawEcho(e, raw6, protoICMPv6)
	return e
}

func (e *echoForwarder) close() {
	e.dgramTable.close()
	for _, r := range e.raw {
		r.close()
	}
}

// handleICMPv4 is the stack's handler for what is left of ICMP: echo requests and
// replies. It returns true so that the stack does not answer itself.
func (d *datagrams) handleICMPv4(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	d.echo.arrive(pkt, protoICMP, echoRequest4)
	return true
}

// handleICMPv6 is the same for ICMPv6.
func (d *datagrams) handleICMPv6(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	d.echo.arrive(pkt, protoICMPv6, echoRequest6)
	return true
}

func (e *echoForwarder) arrive(pkt *stack.PacketBuffer, proto, request uint8) {
	a, ok := arrivalOf(pkt)
	h := pkt.TransportHeader().Slice()
	if !ok || len(h) != echoHeaderLen || h[0] != request || h[1] != 0 {
		e.other.drop(pkt)
		return
	}
	// The stack has verified ICMPv6; an echo request with a bad ICMPv4 checksum it passes on.
	if proto == protoICMP && checksum.Checksum(h, pkt.Data().Checksum()) != 0xffff {
		e.checksum.drop(pkt)
		return
	}
	if e.onlink.isOwn(a.dst) {
		e.answer(a, pkt)
		return
	}
	if e.lastHop(a, pkt) {
		return
	}
	guest := netip.AddrPortFrom(a.src, binary.BigEndian.Uint16(h[4:]))
	tuple := nat.NewTuple(proto, guest, netip.AddrPortFrom(a.dst, uint16(request)<<8))
	fl := e.lookup(tuple)
	if fl == nil {
		if fl = e.begin(tuple, guest, a.dst, request, pkt); fl == nil {
			return
		}
	}
	if fl.revoked.Load() {
		e.n.refused.drop(pkt)
		return
	}
	var refusal reason
	if a.wire, refusal = e.book.enter(fl, pkt, a); refusal.Uint64 != nil {
		refusal.drop(pkt)
		return
	}
	e.enqueue(fl, pkt, a)
}

// answer replies to an echo request to an address of ours on the link.
func (e *echoForwarder) answer(a arrival, pkt *stack.PacketBuffer) {
	h := [echoHeaderLen]byte(pkt.TransportHeader().Slice())
	h[0] = echoReply4
	if !a.dst.Is4() {
		h[0] = echoReply6
	}
	var data []byte
	if v := pkt.Data().AsRange().ToView(); v != nil {
		defer v.Release()
		data = v.AsSlice()
	}
	e.emit.icmp(a.dst, a.src, ipMeta{ttl: defaultTTL, tos: a.meta.tos}, h[:], data)
}

// begin sets up the flow of a first request, or deals with the request and returns nil.
func (e *echoForwarder) begin(tuple nat.Tuple, guest netip.AddrPort, dst netip.Addr, request uint8, pkt *stack.PacketBuffer) *dgramFlow {
	e.openMu.Lock()
	defer e.openMu.Unlock()
	if known := e.lookup(tuple); known != nil {
		return known
	}
	peer := netip.AddrPortFrom(dst, 0)
	j := e.gate.decide(policy.Query{Proto: tuple.Proto(), Src: guest, Dst: peer, ICMPType: request})
	if !j.verdict.Allowed() {
		e.refuse(j, icmpAdminProhibited, pkt)
		return nil
	}
	fl := &dgramFlow{d: &e.dgramTable, tuple: tuple, guest: guest, peer: peer, target: j.verdict.Target(), echo: new(echoFlow)}
	if err := e.gate.enter(&fl.pass, fl, j, entry{orig: tuple}); err != nil {
		e.n.flow.drop(pkt)
		e.gate.noteLimit(nil, j, err)
		return nil
	}
	err := e.install(fl, func() (*hostSocket, error) { return e.open(j.verdict, guest) })
	switch {
	case err == nil:
		return fl
	case errors.Is(err, errNoPingSocket):
		fl.end(nat.ReasonNoPingSocket)
		e.noPing.drop(pkt)
		e.warn.Do(func() {
			e.log.Warn("echo requests of the sandbox are refused: the host permits no ping sockets to this process's group "+
				"and no raw socket was handed over; widen net.ipv4.ping_group_range",
				"sysctl", "net.ipv4.ping_group_range", "error", err)
		})
		e.errs.tell(icmpAdminProhibited, 0, pkt)
	default:
		fl.end(noSocketReason(err))
		e.noSocket(err, pkt)
	}
	return nil
}

// open makes the socket of one echo identifier.
func (e *echoForwarder) open(v policy.Verdict, guest netip.AddrPort) (*hostSocket, error) {
	fd, err := e.dialer.podEchoSocket(v, guest.Addr())
	if err != nil {
		for _, refusal := range []error{unix.EACCES, unix.EPERM, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EINVAL} {
			if errors.Is(err, refusal) {
				if raw := e.raw[familyIndex(guest.Addr())]; raw != nil {
					return raw.identifier()
				}
				return nil, errors.Join(errNoPingSocket, err)
			}
		}
		return nil, err
	}
	return e.startSocket(fd, v.Proto())
}

// identifier is what the socket's requests carry outside; the kernel has it for a port.
func (s *hostSocket) identifier() uint16 {
	if s.raw != nil {
		return s.rawID
	}
	return s.ownPort()
}

// echoPeer finds the flow that a message from a, or an error about a message to a, is of.
func (s *hostSocket) echoPeer(a netip.Addr, msg []byte) *dgramFlow {
	if s.raw != nil {
		if s = s.raw.socket(msg); s == nil {
			return nil
		}
	}
	return s.peer(netip.AddrPortFrom(a, 0), netip.Addr{})
}

// echoMessage writes the request that leaves for it: its header, and as many zeroes as the
// sandbox sent bytes. The kernel fills in identifier and checksum on a ping socket, and the
// checksum on a raw ICMPv6 socket.
func (s *hostSocket) echoMessage(it *txItem) (head, payload []byte) {
	head = make([]byte, echoHeaderLen)
	head[0] = it.pkt.TransportHeader().Slice()[0]
	binary.BigEndian.PutUint16(head[4:], s.rawID)
	binary.BigEndian.PutUint16(head[6:], it.wire)
	binary.BigEndian.PutUint16(head[2:], ^checksum.Checksum(head, 0)) // zeroes add nothing
	return head, s.d.all.echo.zeroes[:it.pkt.Data().Size()]
}

// deliverEcho carries an echo reply to the sandbox: that there is one and how long, with the
// bytes of the request.
func (s *hostSocket) deliverEcho(from netip.AddrPort, data []byte, c *control) {
	if s.raw != nil && s.proto == protoICMP {
		data = stripIPv4(data)
	}
	fl := s.echoPeer(from.Addr(), data)
	if fl == nil {
		s.d.n.unsolicited.Add(1)
		return
	}
	reply := echoReply4
	if s.proto == protoICMPv6 {
		reply = echoReply6
	}
	if len(data) < echoHeaderLen || data[0] != reply {
		s.d.n.unsolicited.Add(1)
		return
	}
	sent := s.d.all.echo.book.answered(fl, data)
	if sent == nil {
		return
	}
	head := [echoHeaderLen]byte(sent.msg)
	head[0] = reply
	payload := sent.msg[echoHeaderLen:min(len(sent.msg), len(data))]
	meta := fl.arrivingMeta(c)
	meta.tos = sent.a.meta.tos // as Linux answers
	size := ipHeaderLen(fl.guest.Addr()) + echoHeaderLen + len(payload)
	if !fl.admitDown(size) {
		return
	}
	fl.lease.Account(nat.Reply, 1, int64(size))
	s.d.emit.icmp(fl.peer.Addr(), fl.guest.Addr(), meta, head[:], payload)
}
