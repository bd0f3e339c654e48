package datagram

// A host socket of the datagram path: received datagrams go to the sandbox here; send.go is the
// other direction.
//
// The poller reports readiness, edge-triggered, so reading goes on until EAGAIN; a socket that
// still has datagrams after rxRounds batches is armed again and waits behind the others. A batch is
// received into a scratch area, from which datagrams are copied into views of their own size: small
// datagrams never hold large buffers.

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

const (
	rxBatchLen = 16
	RxBufLen   = 1 << 16 // the largest datagram, and the largest train that UDP_GRO joins
	rxCtlLen   = 256
	rxRounds   = 16
	// errRounds bounds one reading of the error queue, in batches of rxBatchLen.
	errRounds = 4
)

type hostSocket struct {
	d      *dgramTable
	proto  uint8
	shared bool // outlives its flows: a published port's listener, a raw socket
	close1 func(fd int)
	// port is the published port for datagrams from an address that is no peer. It is nil for
	// sockets of sandbox endpoints.
	port *publishedUDP

	// raw is set on a raw socket and on the identifiers that share its descriptor. The latter have
	// a rawID, which requests carry instead of the sandbox's identifier.
	raw   *rawEcho
	rawID uint16

	tombs *admit.Tombs // of a UDP socket that holds a port of a pod, which rests when the socket closes; else nil

	dead  bool // closed or about to be; guarded by d.mu
	poll  *engine.Poller
	token engine.PollToken

	mu    sync.Mutex
	guest netip.AddrPort           // the endpoint; invalid for a shared socket
	peers map[peerKey]*Flow        // written with d.mu held too
	known map[netip.Addr]knownPeer // the addresses of peers, whatever the port; likewise

	// txMu is held while sending, rxMu while receiving, and both while closing, so that no system
	// call ever uses a descriptor that has been reused. Order: txMu, rxMu. fd is -1 once closed.
	txMu  sync.Mutex
	rxMu  sync.Mutex
	fd    int
	noGSO bool // UDP_SEGMENT does not work on this path; guarded by txMu

	lastDiscover discover // as last set; guarded by txMu

	localMTU atomic.Uint32 // path MTU that the kernel reported when it refused to send
	own      atomic.Uint32 // own port, once known
}

// newHostSocket takes over fd and registers it with the poller. closer closes it.
func (d *dgramTable) newHostSocket(fd int, proto uint8, closer func(int)) *hostSocket {
	return &hostSocket{
		d: d, fd: fd, proto: proto, close1: closer, poll: d.Engine.Poll,
		peers: make(map[peerKey]*Flow, 1), known: make(map[netip.Addr]knownPeer, 1), lastDiscover: discover{mode: -1},
	}
}

// start begins receiving. Nothing is received before the token is known.
func (s *hostSocket) start() error {
	s.rxMu.Lock()
	defer s.rxMu.Unlock()
	t, err := s.poll.Add(s.fd, unix.EPOLLIN, s)
	if err != nil {
		return err
	}
	s.token = t
	return nil
}

// close closes the descriptor after system calls in progress. It may be called again.
func (s *hostSocket) close() {
	s.txMu.Lock()
	defer s.txMu.Unlock()
	s.rxMu.Lock()
	defer s.rxMu.Unlock()
	if s.fd < 0 {
		return
	}
	s.poll.Remove(s.token, s.fd)
	s.close1(s.fd)
	s.fd = -1
	if s.tombs != nil {
		s.tombs.Closed(uint16(s.own.Load()))
	}
}

// RxBatch is the scratch area of one receiving goroutine.
type RxBatch struct {
	Msgs [rxBatchLen]hostsock.Mmsghdr
	iovs [rxBatchLen]unix.Iovec
	From [rxBatchLen]hostsock.RawAddr
	ctl  [rxBatchLen][rxCtlLen / 8]uint64 // control messages need a long's alignment
	Data []byte
}

var RxPool = sync.Pool{New: func() any {
	b := &RxBatch{Data: make([]byte, rxBatchLen*RxBufLen)}
	for i := range b.Msgs {
		b.iovs[i].Base = &b.Data[i*RxBufLen]
		b.iovs[i].SetLen(RxBufLen)
		h := &b.Msgs[i].Hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Name = &b.From[i][0]
		h.Control = (*byte)(unsafe.Pointer(&b.ctl[i][0]))
	}
	return b
}}

// receive fills the batch from s and returns how many messages came.
func (b *RxBatch) receive(s *hostSocket, flags int) (int, unix.Errno) {
	for i := range b.Msgs {
		h := &b.Msgs[i].Hdr
		h.Namelen = uint32(len(b.From[i]))
		h.SetControllen(rxCtlLen)
		h.Flags = 0
	}
	s.rxMu.Lock()
	defer s.rxMu.Unlock()
	if s.fd < 0 {
		return 0, unix.EBADF
	}
	return hostsock.Recvmmsg(s.fd, b.Msgs[:], flags)
}

func (b *RxBatch) message(i int) (from netip.AddrPort, data []byte, c hostsock.Control) {
	m := &b.Msgs[i]
	from = hostsock.AddrPortOf(b.From[i][:m.Hdr.Namelen])
	data = b.Data[i*RxBufLen:][:m.N:RxBufLen]
	ctl := unsafe.Slice((*byte)(unsafe.Pointer(&b.ctl[i][0])), rxCtlLen)
	return from, data, hostsock.ParseControl(ctl[:min(int(m.Hdr.Controllen), rxCtlLen)])
}

// PollReady implements pollHandler.
func (s *hostSocket) PollReady(events uint32) {
	if events&unix.EPOLLERR != 0 {
		s.drainErrors()
	}
	b := RxPool.Get().(*RxBatch)
	defer RxPool.Put(b)
	for range rxRounds {
		n, errno := b.receive(s, 0)
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.EBADF:
			return
		default:
			// An ICMP error that came meanwhile is reported here first.
			s.drainErrors()
			continue
		}
		s.DeliverAll(b, n)
		if n < rxBatchLen {
			// The queue was empty a moment ago; a new datagram makes a new edge.
			return
		}
	}
	s.rearm()
}

// DeliverAll passes on the n messages of b. Consecutive datagrams from one sender, all of one size,
// go as the train that UDP_GRO would have made of them had they come together: the device then
// takes them in one write.
func (s *hostSocket) DeliverAll(b *RxBatch, n int) {
	mayGlue := s.proto == packet.ProtoUDP && s.d.Emit.Uso
	for i := 0; i < n; {
		first := i
		from, data, c := b.message(i)
		size, room := len(data), min(RxBufLen, packet.MaxIPv4Len-header.IPv6MinimumSize-packet.UDPHeaderLen)
		for i++; mayGlue && i < n && size > 0 && c.Gro == 0 && len(data)%size == 0; i++ {
			nextFrom, next, nextC := b.message(i)
			if nextFrom != from || nextC != c || len(next) > size || len(next) == 0 || len(data)+len(next) > room {
				break
			}
			data = append(data, next...) // its own area of the batch has the room
		}
		if i > first+1 {
			c.Gro = size
		}
		s.Deliver(from, data, &c)
	}
}

// rearm makes epoll report s once more if it is still readable.
func (s *hostSocket) rearm() {
	s.rxMu.Lock()
	defer s.rxMu.Unlock()
	if s.fd < 0 {
		return
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
	*(*engine.PollToken)(unsafe.Pointer(&ev.Fd)) = s.token
	_ = unix.EpollCtl(s.poll.Epfd, unix.EPOLL_CTL_MOD, s.fd, &ev)
}

// peerKey is a flow's far side as the host sees it. A client of a published port that writes
// to two addresses of the host has two flows: each answers from its own.
type peerKey struct {
	addr  netip.AddrPort
	local netip.Addr // Flow.local
}

func (fl *Flow) peerKey() peerKey { return peerKey{fl.Target, fl.local} }

// knownPeer is an address that the sandbox has sent to.
type knownPeer struct {
	flows int        // to that address
	peer  netip.Addr // the address as the sandbox sees it
}

// addPeer and removePeer keep both maps. They are called with d.mu and mu held.
func (s *hostSocket) addPeer(fl *Flow) {
	s.peers[fl.peerKey()] = fl
	if !fl.unasked.Load() {
		s.addKnown(fl)
	}
}

func (s *hostSocket) addKnown(fl *Flow) {
	k := s.known[fl.Target.Addr()]
	k.flows, k.peer = k.flows+1, fl.Peer.Addr()
	s.known[fl.Target.Addr()] = k
}

func (s *hostSocket) removePeer(fl *Flow) {
	if s.peers[fl.peerKey()] != fl {
		return
	}
	delete(s.peers, fl.peerKey())
	if fl.unasked.Load() {
		return
	}
	k := s.known[fl.Target.Addr()]
	if k.flows--; k.flows > 0 {
		s.known[fl.Target.Addr()] = k
	} else {
		delete(s.known, fl.Target.Addr())
	}
}

// Peer finds the flow of a host-side address. For a published port's flows it also matches local,
// the host's own address.
func (s *hostSocket) Peer(a netip.AddrPort, local netip.Addr) *Flow {
	if s.port == nil {
		local = netip.Addr{}
	}
	s.mu.Lock()
	fl := s.peers[peerKey{a, local}]
	s.mu.Unlock()
	return fl
}

// Deliver passes one message, which may be a train of datagrams, on to the sandbox.
func (s *hostSocket) Deliver(from netip.AddrPort, data []byte, c *hostsock.Control) {
	if s.proto != packet.ProtoUDP {
		s.deliverEcho(from, data, c)
		return
	}
	fl := s.Peer(from, c.Local)
	if fl == nil && s.port != nil {
		if fl = s.port.client(from, c.Local); fl == nil {
			return // counted by client
		}
	}
	if fl == nil {
		fl = s.d.all.UDP.otherPort(s, from)
	}
	if fl == nil {
		s.d.n.unsolicited.Add(1)
		return
	}
	if fl.quic != nil && !fl.quic.Answered(data, c.Gro) {
		return // counted there
	}
	if !fl.ingress && !fl.Replied.Load() {
		s.noteReply(fl, c.Local)
	}
	packets := 1
	if c.Gro > 0 && c.Gro < len(data) {
		packets = (len(data) + c.Gro - 1) / c.Gro
	}
	head := packet.IPHeaderLen(fl.Guest.Addr()) + packet.UDPHeaderLen
	bytes := len(data) + packets*head
	if !fl.admitDown(bytes) {
		return
	}
	fl.Lease.Account(fl.inDir(), int64(packets), int64(bytes))
	s.d.Emit.UDPSegments(fl.Peer, fl.Guest, fl.arrivingMeta(c), data, c.Gro)
	if !fl.short.Load() {
		return
	}
	if !packet.IsAnswer(data) {
		fl.outlasts()
	} else if fl.queries.Add(-int32(packets)) <= 0 {
		fl.end(nat.ReasonAnswered)
	}
}

// admitDown reports whether n bytes may go to the sandbox: the policy still allows the flow, and
// both its bandwidth and the rule's leave room.
func (fl *Flow) admitDown(n int) bool {
	d := fl.d
	if fl.Revoked.Load() {
		d.n.refused.Add(1)
		return false
	}
	if down, rule := &d.Gate.Bandwidth.Down, fl.RuleDown(); (rule != nil || down.Limited()) && !admit.AdmitBoth(rule, down, n, d.Gate.Now()) {
		d.n.slowDown.Add(1)
		return false
	}
	return true
}

// arrivingMeta returns the header fields that the sandbox sees of a packet that the host received:
// one hop further, unless the host itself stands for the gateway.
func (fl *Flow) arrivingMeta(c *hostsock.Control) packet.Meta {
	m := packet.Meta{TTL: c.TTL, Tos: c.Tos}
	if !c.HasTTL {
		m.TTL = packet.DefaultTTL
	}
	if fl.Peer.Addr() == fl.Target.Addr() && m.TTL > 1 {
		m.TTL--
	}
	return m
}

// noteReply tells the flow table which address the host's kernel chose, which the first reply was
// sent to.
func (s *hostSocket) noteReply(fl *Flow, local netip.Addr) {
	if fl.Replied.Swap(true) || !local.IsValid() {
		return
	}
	if fl.Lease == nil {
		return
	}
	if port := s.ownPort(); port != 0 {
		fl.Lease.SetReply(nat.NewTuple(s.proto, fl.Target, netip.AddrPortFrom(local, port)))
	}
}

func (s *hostSocket) ownPort() uint16 {
	if p := s.own.Load(); p != 0 {
		return uint16(p)
	}
	s.rxMu.Lock()
	defer s.rxMu.Unlock()
	if s.fd < 0 {
		return 0
	}
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return 0
	}
	var p int
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		p = sa.Port
	case *unix.SockaddrInet6:
		p = sa.Port
	}
	s.own.Store(uint32(p))
	return uint16(p)
}
