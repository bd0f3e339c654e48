package datagram

// Sending the sandbox's datagrams.
//
// Packets of one batch are sent socket by socket, in order. Each message carries its own hop limit
// and traffic class as control messages; the don't-fragment bit is an option of the socket and is
// set when it changes. Consecutive datagrams of one flow and one size leave as one UDP_SEGMENT
// message, and a train that the sandbox sent as one packet is passed on as one.
//
// A host socket with IP_RECVERR reports an ICMP error about any earlier datagram as the result of
// the next call, whatever its destination. So a failure is believed only if it repeats after the
// error queue was read.

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
)

const (
	txBatchLen = 64
	txIovLen   = 256
	txCtlLen   = 128
	// Bounds of a train: the kernel takes 64 segments (UDP_MAX_SEGMENTS before it
	// was raised to 128) in one datagram's length, and each must fit the path's MTU,
	// which is 1500 nearly everywhere.
	maxTrain        = 64
	maxTrainBytes   = 65000
	maxTrainSegment = 1500 - 40 - packet.UDPHeaderLen
)

// TxItem is a packet from the sandbox on its way to a host socket.
type TxItem struct {
	Flow *Flow
	pkt  *stack.PacketBuffer // a reference of its own
	Meta packet.Meta
	df   bool
	wire uint16 // an echo request's sequence number outside
}

// size is the number of bytes that are sent of the packet.
func (it *TxItem) size() int {
	n := it.pkt.Data().Size()
	if it.Flow.Tuple.Proto() != packet.ProtoUDP {
		n += packet.EchoHeaderLen
	}
	return n
}

// enqueue queues a packet of fl to be sent at the end of the batch.
func (d *dgramTable) enqueue(fl *Flow, pkt *stack.PacketBuffer, a packet.Arrival) {
	fl.noteSent(a)
	packets := 1
	bytes := a.Size
	if mss := int(pkt.GSOOptions.MSS); mss > 0 && pkt.Data().Size() > mss {
		packets = (pkt.Data().Size() + mss - 1) / mss
		bytes += (packets - 1) * (a.Size - pkt.Data().Size())
	}
	if up, rule := &d.Gate.Bandwidth.Up, fl.RuleUp(); (rule != nil || up.Limited()) && !admit.AdmitBoth(rule, up, bytes, d.Gate.Now()) {
		d.n.slowUp.Drop(pkt)
		return
	}
	fl.Lease.Account(fl.outDir(), int64(packets), int64(bytes))
	if fl.short.Load() {
		if packet.Asks(pkt) {
			fl.queries.Add(int32(packets))
		} else {
			fl.outlasts()
		}
	}
	meta := a.Meta
	if fl.Peer.Addr() == fl.Target.Addr() && meta.TTL > 1 {
		meta.TTL--
	}
	d.pendMu.Lock()
	d.pending = append(d.pending, TxItem{Flow: fl, pkt: pkt.IncRef(), Meta: meta, df: a.Df, wire: a.Wire})
	now := !d.Batched || len(d.pending) >= maxPending
	d.pendMu.Unlock()
	if now {
		d.flush()
	}
}

// flush sends the queued packets.
func (d *dgramTable) flush() {
	d.pendMu.Lock()
	idle := len(d.pending) == 0
	d.pendMu.Unlock()
	if idle {
		return // another flush took the batch
	}
	d.flushMu.Lock()
	defer d.flushMu.Unlock()
	d.pendMu.Lock()
	items := d.pending
	d.pending = d.spare[:0]
	d.pendMu.Unlock()
	for i := range items {
		if items[i].pkt == nil {
			continue
		}
		s := items[i].Flow.socket()
		run := d.tx.run[:0]
		for j := i; j < len(items) && len(run) < txBatchLen; j++ {
			if items[j].pkt != nil && items[j].Flow.socket() == s {
				run = append(run, items[j])
				items[j] = TxItem{}
			}
		}
		if s != nil {
			d.tx.send(s, run, true)
		}
		for j := range run {
			run[j].pkt.DecRef()
			run[j] = TxItem{}
		}
	}
	d.spare = items[:0]
}

// socket returns the flow's socket, which is set before the first packet is queued.
func (fl *Flow) socket() *hostSocket { return fl.Sock }

// txMsg describes one message of a batch.
type txMsg struct {
	first, last int // items of the run
	train       bool
}

// txBatch is the scratch area of the sender.
type txBatch struct {
	run  [txBatchLen]TxItem
	msgs [txBatchLen]hostsock.Mmsghdr
	what [txBatchLen]txMsg
	to   [txBatchLen]hostsock.RawAddr
	ctl  [txBatchLen]TxCtl
	iovs [txIovLen]unix.Iovec
}

// send sends run on s. Without trains every datagram is a message of its own.
func (b *txBatch) send(s *hostSocket, run []TxItem, trains bool) {
	s.txMu.Lock()
	defer s.txMu.Unlock()
	for len(run) > 0 {
		if s.fd < 0 {
			s.d.n.failed.Add(uint64(len(run)))
			return
		}
		mode := run[0].discover()
		s.setDiscover(mode)
		msgs, taken, iovs := b.build(s, run, mode, trains && !s.noGSO)
		b.push(s, run, msgs)
		clear(b.iovs[:iovs])
		run = run[taken:]
	}
}

// build lays out messages for the items at the front of run that share a fragmentation
// mode, and returns how many messages, items and iovecs it made.
func (b *txBatch) build(s *hostSocket, run []TxItem, mode discover, trains bool) (msgs, taken, iovs int) {
	for taken < len(run) && msgs < txBatchLen {
		it := &run[taken]
		if it.discover() != mode {
			break
		}
		last := taken + 1
		if trains {
			last = taken + trainLen(run[taken:])
		}
		first := iovs
		for i := taken; i < last; i++ {
			n, ok := s.appendIovs(b.iovs[iovs:], &run[i])
			if !ok {
				if i == taken {
					if taken > 0 {
						return msgs, taken, iovs // the next batch has room
					}
					// More pieces than a batch has room for: join them into one.
					n = s.flatten(b.iovs[:], it)
				} else {
					last = i
					break
				}
			}
			iovs += n
		}
		m := &b.msgs[msgs]
		*m = hostsock.Mmsghdr{}
		target := it.Flow.Target
		m.Hdr.Name = &b.to[msgs][0]
		m.Hdr.Namelen = b.to[msgs].Put(target)
		m.Hdr.Iov = &b.iovs[first]
		m.Hdr.SetIovlen(iovs - first)
		segment := int(it.pkt.GSOOptions.MSS)
		if segment >= it.size() {
			segment = 0
		}
		if last > taken+1 {
			segment = it.size()
		}
		c := TxControl(&b.ctl[msgs], it, segment)
		m.Hdr.Control = &c[0]
		m.Hdr.SetControllen(len(c))
		b.what[msgs] = txMsg{first: taken, last: last, train: segment > 0}
		msgs++
		taken = last
	}
	return msgs, taken, iovs
}

// TxCtl has room for the control messages of one message, with their alignment.
type TxCtl [txCtlLen / 8]uint64

func TxControl(room *TxCtl, it *TxItem, segment int) []byte {
	c := unsafe.Slice((*byte)(unsafe.Pointer(&room[0])), txCtlLen)[:0]
	if it.Flow.Target.Addr().Is6() {
		c = hostsock.AppendCmsgInt(c, unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT, int(it.Meta.TTL))
		c = hostsock.AppendCmsgInt(c, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, int(it.Meta.Tos))
	} else {
		c = hostsock.AppendCmsgInt(c, unix.IPPROTO_IP, unix.IP_TTL, int(it.Meta.TTL))
		c = hostsock.AppendCmsgInt(c, unix.IPPROTO_IP, unix.IP_TOS, int(it.Meta.Tos))
	}
	if it.Flow.local.IsValid() {
		c = hostsock.AppendPktinfo(c, it.Flow.local)
	}
	if segment > 0 {
		var d [2]byte
		binary.NativeEndian.PutUint16(d[:], uint16(segment))
		c = hostsock.AppendCmsg(c, unix.SOL_UDP, unix.UDP_SEGMENT, d[:])
	}
	return c
}

// trainLen is how many items at the front of run can leave as one train: datagrams of
// one flow with one header, of one size except for a shorter last one.
func trainLen(run []TxItem) int {
	it := &run[0]
	size := it.size()
	if size == 0 || size > maxTrainSegment || it.pkt.GSOOptions.MSS > 0 || it.Flow.Tuple.Proto() != packet.ProtoUDP {
		return 1
	}
	total := size
	for n := 1; n < len(run); n++ {
		o := &run[n]
		next := o.size()
		if n == maxTrain || o.Flow != it.Flow || o.Meta != it.Meta || o.df != it.df ||
			o.pkt.GSOOptions.MSS > 0 || next == 0 || next > size || total+next > maxTrainBytes {
			return n
		}
		total += next
		if next < size {
			return n + 1
		}
	}
	return len(run)
}

// appendIovs points iovs at the bytes of the packet that are sent. It fails if there are too few
// iovs.
func (s *hostSocket) appendIovs(iovs []unix.Iovec, it *TxItem) (int, bool) {
	if it.Flow.echo != nil {
		if len(iovs) < 2 {
			return 0, false
		}
		head, payload := s.echoMessage(it)
		iovs[0].Base = &head[0]
		iovs[0].SetLen(len(head))
		if len(payload) == 0 {
			return 1, true
		}
		iovs[1].Base = &payload[0]
		iovs[1].SetLen(len(payload))
		return 2, true
	}
	skip := it.pkt.HeaderSize()
	views, off := it.pkt.AsViewList()
	skip += off
	n := 0
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		if n == len(iovs) {
			return 0, false
		}
		iovs[n].Base = &b[skip]
		iovs[n].SetLen(len(b) - skip)
		skip = 0
		n++
	}
	if n == 0 { // an empty datagram is a datagram
		if len(iovs) == 0 {
			return 0, false
		}
		iovs[0] = unix.Iovec{}
		n = 1
	}
	return n, true
}

// flatten copies a datagram into one piece.
func (s *hostSocket) flatten(iovs []unix.Iovec, it *TxItem) int {
	flat := it.bytes()
	iovs[0].Base = &flat[0]
	iovs[0].SetLen(len(flat))
	return 1
}

// bytes copies the bytes of a datagram's packet that are sent.
func (it *TxItem) bytes() []byte {
	skip := it.pkt.HeaderSize()
	flat := make([]byte, 0, it.size())
	views, off := it.pkt.AsViewList()
	skip += off
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		n := min(skip, len(b))
		skip -= n
		flat = append(flat, b[n:]...)
	}
	return flat
}

// push hands the messages to the kernel.
func (b *txBatch) push(s *hostSocket, run []TxItem, msgs int) {
	retried := false
	for k := 0; k < msgs; {
		w := &b.what[k]
		it := &run[w.first]
		if !b.checked(s, it) {
			k++
			continue
		}
		end := k + 1
		for end < msgs && b.checked(s, &run[b.what[end].first]) {
			end++
		}
		n, errno := hostsock.Sendmmsg(s.fd, b.msgs[k:end])
		switch {
		case errno == 0 && n > 0:
			k += n
			retried = false
			continue
		case errno == unix.EINTR:
			continue
		case !retried && mayBePending(errno):
			s.drainErrors()
			retried = true
			continue
		case w.train && (errno == unix.EMSGSIZE || errno == unix.EINVAL || errno == unix.EIO || errno == unix.EOPNOTSUPP):
			if errno != unix.EMSGSIZE {
				s.noGSO = true
			}
			for i := w.first; i < w.last; i++ {
				s.sendSingly(&run[i])
			}
		default:
			for i := w.first; i < w.last; i++ {
				s.sendFailed(&run[i], errno)
			}
		}
		k++
		retried = false
	}
}

// checked is the last check of a flow and, by the dialer, of its address. A published port's client
// was judged when its flow began, and its address is where the datagrams came from.
func (b *txBatch) checked(s *hostSocket, it *TxItem) bool {
	if it.Flow.Revoked.Load() {
		return false
	}
	return it.Flow.ingress || s.d.Dialer.Check(it.Flow.Verdict(), it.Flow.Target) == nil
}

// mayBePending reports whether an ICMP error about an earlier datagram can cause e.
func mayBePending(e unix.Errno) bool {
	switch e {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EMSGSIZE, unix.EACCES,
		unix.EPROTO, unix.ENOPROTOOPT, unix.EHOSTDOWN, unix.ENONET, unix.EOPNOTSUPP, unix.ETIMEDOUT:
		return true
	}
	return false
}

// sendSingly sends the datagrams of a train one by one.
func (s *hostSocket) sendSingly(it *TxItem) {
	flat := it.bytes()
	segment := int(it.pkt.GSOOptions.MSS)
	if segment <= 0 {
		segment = max(len(flat), 1)
	}
	for first := true; first || len(flat) > 0; first = false {
		n := min(segment, len(flat))
		errno := s.sendOne(it, flat[:n])
		if mayBePending(errno) {
			s.drainErrors()
			errno = s.sendOne(it, flat[:n])
		}
		if errno != 0 {
			s.sendFailed(it, errno)
			return // the rest of the train would fail the same way
		}
		flat = flat[n:]
	}
}

// sendOne sends one datagram that nothing was prepared for. txMu is held.
func (s *hostSocket) sendOne(it *TxItem, data []byte) unix.Errno {
	var to hostsock.RawAddr
	var room TxCtl
	var iov unix.Iovec
	if len(data) > 0 {
		iov.Base = &data[0]
		iov.SetLen(len(data))
	}
	var m [1]hostsock.Mmsghdr
	h := &m[0].Hdr
	h.Name = &to[0]
	h.Namelen = to.Put(it.Flow.Target)
	h.Iov = &iov
	h.SetIovlen(1)
	c := TxControl(&room, it, 0)
	h.Control = &c[0]
	h.SetControllen(len(c))
	_, errno := hostsock.Sendmmsg(s.fd, m[:])
	return errno
}

// sendFailed counts a datagram that the host would not send, and sends the sandbox the error that a
// router in the host's place would send.
func (s *hostSocket) sendFailed(it *TxItem, errno unix.Errno) {
	d := s.d
	kind, info := packet.ICMPHostUnreachable, uint32(0)
	switch errno {
	case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
		d.n.again.Drop(it.pkt) // silently, as a router with a full queue
		return
	case unix.EMSGSIZE:
		d.n.big.Add(1)
		mtu := s.localMTU.Load()
		if mtu == 0 {
			return
		}
		kind, info = packet.ICMPPacketTooBig, mtu
	case unix.ENETUNREACH, unix.ENETDOWN:
		d.n.unreachable.Drop(it.pkt)
		kind = packet.ICMPNetUnreachable
	case unix.EHOSTUNREACH, unix.EHOSTDOWN, unix.ENONET, unix.EADDRNOTAVAIL, unix.EINVAL:
		d.n.unreachable.Drop(it.pkt)
	case unix.EPERM, unix.EACCES:
		d.n.forbidden.Drop(it.pkt)
		kind = packet.ICMPAdminProhibited
	case unix.ECONNREFUSED:
		d.n.unreachable.Drop(it.pkt)
		kind = packet.ICMPPortUnreachable
	default:
		d.n.failed.Drop(it.pkt)
		return
	}
	d.Errs.Tell(kind, info, it.pkt)
}

// discover is an IP_MTU_DISCOVER mode of one family.
type discover struct {
	v6   bool
	mode int
}

// discover is the mode that sends a packet as the sandbox did: with don't-fragment, so that a
// packet that is too big is refused, or fragmented where needed. The family is the packet's: a
// dual-stack listener sends both.
func (it *TxItem) discover() discover {
	v6 := it.Flow.Target.Addr().Is6()
	switch {
	case it.df:
		return discover{v6, unix.IP_PMTUDISC_DO}
	case v6:
		return discover{v6, unix.IPV6_PMTUDISC_WANT}
	default:
		return discover{v6, unix.IP_PMTUDISC_DONT}
	}
}

// setDiscover is called with txMu held.
func (s *hostSocket) setDiscover(m discover) {
	if s.lastDiscover == m {
		return
	}
	level, name := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if m.v6 {
		level, name = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	if unix.SetsockoptInt(s.fd, level, name, m.mode) == nil {
		s.lastDiscover = m
	}
}
