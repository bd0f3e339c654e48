package forwarder

// ICMP errors to the sandbox.
//
// Whatever goes wrong beyond the link is told to the sandbox the way a router
// would tell it: an ICMP error that quotes the packet it is about. The rules of
// RFC 1812 section 4.3.2 and RFC 4443 section 2.4 hold for every one of them, so
// they stand here once: never about an ICMP error, about a fragment other than the
// first, about a packet to or from a group or a broadcast address; and at a bounded
// rate, except for path MTU, which the sandbox cannot do without (net.ipv4.icmp_ratemask
// leaves it out likewise).

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// icmpKind is a cause, told in each family's own type and code.
type icmpKind uint8

const (
	icmpNetUnreachable icmpKind = iota
	icmpHostUnreachable
	icmpPortUnreachable
	icmpProtocolUnreachable
	icmpAdminProhibited
	icmpTimeExceeded
	icmpPacketTooBig // info is the MTU
)

// icmpForm is one family's type and code. info goes into the header's last four bytes.
type icmpForm struct{ typ, code uint8 }

// icmpForms is indexed by icmpKind and family. ICMPv6 has no network unreachable
// but "no route", and says "unrecognized next header" for a protocol.
var icmpForms = [...][2]icmpForm{
	icmpNetUnreachable:      {{3, 0}, {1, 0}},
	icmpHostUnreachable:     {{3, 1}, {1, 3}},
	icmpPortUnreachable:     {{3, 3}, {1, 4}},
	icmpProtocolUnreachable: {{3, 2}, {4, 1}},
	icmpAdminProhibited:     {{3, 13}, {1, 1}},
	icmpTimeExceeded:        {{11, 0}, {3, 0}},
	icmpPacketTooBig:        {{3, 4}, {2, 0}},
}

// Bounds of what an error quotes: RFC 1812 wants no more than 576 bytes in all,
// RFC 4443 no more than the minimum MTU. An error is also limited in rate, by
// Linux's net.ipv4.icmp_msgs_per_sec and a burst that covers traceroute's probes.
const (
	icmpQuoteIPv4    = 576 - header.IPv4MinimumSize - header.ICMPv4MinimumSize
	icmpQuoteIPv6    = 1280 - header.IPv6MinimumSize - header.ICMPv6MinimumSize
	icmpErrorsPerSec = 1000
	icmpErrorsBurst  = 256
)

// tokenBucket allows rate events per second after a burst. The zero value with
// rate and burst set starts full.
type tokenBucket struct {
	rate, burst float64

	mu   sync.Mutex
	have float64
	last time.Time
}

func (b *tokenBucket) take(now time.Time) bool { return b.takeN(1, now) }

// takeN takes what n events take, or nothing.
func (b *tokenBucket) takeN(n float64, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last.IsZero() {
		b.have = b.burst
	} else if d := now.Sub(b.last); d > 0 {
		b.have = min(b.burst, b.have+b.rate*d.Seconds())
	}
	b.last = now
	if b.have < n {
		return false
	}
	b.have -= n
	return true
}

// icmpErrors sends ICMP errors within the bounds above.
type icmpErrors struct {
	emit                     *emitter
	onlink                   *addrs
	now                      func() time.Time
	bucket                   tokenBucket
	protocol                 reason
	sent, forbidden, limited *atomic.Uint64
}

func newICMPErrors(emit *emitter, on *addrs, d *drops, now func() time.Time) *icmpErrors {
	return &icmpErrors{
		emit: emit, onlink: on, now: now,
		bucket:    tokenBucket{rate: icmpErrorsPerSec, burst: icmpErrorsBurst},
		protocol:  d.reason("ip_protocol"),
		sent:      d.stats.counter("icmp_errors_sent"),
		forbidden: d.stats.counter("icmp_errors_forbidden"), // RFC 1812 forbids an error about such a packet
		limited:   d.stats.counter("icmp_errors_limited"),
	}
}

// tell sends an error about pkt, which has been through the stack, from the gateway.
func (i *icmpErrors) tell(kind icmpKind, info uint32, pkt *stack.PacketBuffer) {
	var buf [icmpQuoteIPv6]byte
	i.send(kind, info, quote(pkt, buf[:]), netip.Addr{})
}

// rejectProtocol answers a packet of an IP protocol that nothing here speaks. The
// packet has not been through the stack: its data begin with the IP header.
func (i *icmpErrors) rejectProtocol(pkt *stack.PacketBuffer) {
	orig, ok := pkt.Data().PullUp(min(pkt.Data().Size(), header.IPv4MaximumHeaderSize+icmpQuoteIPv4))
	if !ok {
		return
	}
	i.protocol.note(orig)
	info := uint32(0)
	if orig[0]>>4 == 6 {
		info = header.IPv6NextHeaderOffset // the pointer of a parameter problem
	}
	i.send(icmpProtocolUnreachable, info, orig, netip.Addr{})
}

// send tells the sandbox that the packet orig, which it sent, met with kind. orig begins
// with the IP header and may be cut anywhere after the transport header's first eight
// bytes. An invalid src stands for the gateway.
func (i *icmpErrors) send(kind icmpKind, info uint32, orig []byte, src netip.Addr) {
	if len(orig) < 1 {
		return
	}
	form := icmpForms[kind][0]
	if orig[0]>>4 == 6 {
		form = icmpForms[kind][1]
	}
	i.sendForm(form, info, orig, src)
}

// sendForm is send for a type and code that came from elsewhere.
func (i *icmpErrors) sendForm(form icmpForm, info uint32, orig []byte, src netip.Addr) {
	to, ok := errorRecipient(orig)
	if !ok {
		i.forbidden.Add(1)
		return
	}
	tooBig := form == icmpForms[icmpPacketTooBig][familyIndex(to)]
	if !tooBig && !i.bucket.take(i.now()) {
		i.limited.Add(1)
		return
	}
	if !src.IsValid() || src.Is4() != to.Is4() {
		src = i.onlink.gatewayFor(to)
		if !src.IsValid() {
			return
		}
	}
	limit := icmpQuoteIPv4
	if !to.Is4() {
		limit = icmpQuoteIPv6
	}
	orig = orig[:min(len(orig), limit)]
	var h [8]byte
	h[0], h[1] = form.typ, form.code
	binary.BigEndian.PutUint32(h[4:], info)
	i.sent.Add(1)
	i.emit.icmp(src, to, ipMeta{ttl: defaultTTL}, h[:], orig)
}

// errorRecipient returns the source of the quoted packet, if an error about that
// packet may be sent at all.
func errorRecipient(orig []byte) (netip.Addr, bool) {
	var src, dst netip.Addr
	var proto uint8
	var l4 []byte
	switch {
	case len(orig) >= header.IPv4MinimumSize && orig[0]>>4 == 4:
		src, dst = netip.AddrFrom4([4]byte(orig[12:16])), netip.AddrFrom4([4]byte(orig[16:20]))
		proto = orig[9]
		hl := int(orig[0]&15) * 4
		if hl < header.IPv4MinimumSize || hl > len(orig) {
			return src, false
		}
		if binary.BigEndian.Uint16(orig[6:])&0x1fff != 0 {
			return src, false // a fragment, not the first
		}
		if dst.As4() == [4]byte{255, 255, 255, 255} || src.As4()[0] >= 240 {
			return src, false
		}
		l4 = orig[hl:]
	case len(orig) >= header.IPv6MinimumSize && orig[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(orig[8:24])), netip.AddrFrom16([16]byte(orig[24:40]))
		proto, l4 = orig[6], orig[header.IPv6MinimumSize:]
	default:
		return src, false
	}
	if src.IsUnspecified() || src.IsMulticast() || src.IsLoopback() || dst.IsMulticast() {
		return src, false
	}
	switch proto {
	case protoICMP:
		if len(l4) < 1 || isICMPv4Error(l4[0]) {
			return src, false
		}
	case protoICMPv6:
		if len(l4) < 1 || l4[0] < 128 || l4[0] == uint8(header.ICMPv6RedirectMsg) {
			return src, false
		}
	}
	return src, true
}

// isICMPv4Error tells the types of RFC 1122 section 3.2.2 that are errors.
func isICMPv4Error(typ uint8) bool {
	switch typ {
	case 3, 4, 5, 11, 12:
		return true
	}
	return false
}

// tellDialError answers the SYN, as far as it was kept, with the error that the
// network sent if there was one, from where it came, and otherwise with what
// the host's errno means coming from a gateway.
func (i *icmpErrors) tellDialError(syn []byte, e extendedErr, fromNetwork bool, errno unix.Errno) {
	if len(syn) == 0 {
		return
	}
	if fromNetwork {
		if info, ok := errorInfo(&e); ok {
			i.sendForm(icmpForm{typ: e.typ, code: e.cod}, info, syn, e.offender)
			return
		}
	}
	kind := icmpHostUnreachable
	switch errno {
	case unix.ENETUNREACH, unix.ENETDOWN, unix.EAFNOSUPPORT, unix.EINVAL:
		kind = icmpNetUnreachable
	case unix.EACCES, unix.EPERM:
		kind = icmpAdminProhibited
	}
	i.send(kind, 0, syn, netip.Addr{})
}
