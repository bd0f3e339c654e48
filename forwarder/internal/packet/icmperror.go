package packet

// ICMP errors to the sandbox.
//
// Failures beyond the link are reported to the sandbox as a router would: by an ICMP error that
// quotes the packet. The rules of RFC 1812 section 4.3.2 and RFC 4443 section 2.4 apply to every
// error, so they stand here once. No error is sent about an ICMP error, a fragment other than the
// first, or a packet to or from a group or a broadcast address. The rate is bounded, except for
// path MTU, which the sandbox cannot do without (net.ipv4.icmp_ratemask exempts it too).

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/onlink"
)

// ErrorInfo returns the last word of the ICMP header, or false for a type that is no error.
func ErrorInfo(e *ExtendedErr) (uint32, bool) {
	if e.Origin == unix.SO_EE_ORIGIN_ICMP6 {
		switch header.ICMPv6Type(e.Typ) {
		case header.ICMPv6DstUnreachable, header.ICMPv6TimeExceeded:
			return 0, true
		case header.ICMPv6PacketTooBig, header.ICMPv6ParamProblem:
			return e.Info, true
		}
		return 0, false
	}
	switch header.ICMPv4Type(e.Typ) {
	case header.ICMPv4DstUnreachable:
		if header.ICMPv4Code(e.Cod) == header.ICMPv4FragmentationNeeded {
			return e.Info & 0xffff, true
		}
		return 0, true
	case header.ICMPv4TimeExceeded:
		return 0, true
	case header.ICMPv4ParamProblem:
		return e.Info << 24, true
	}
	return 0, false
}

// ErrorKind is a cause of an error, sent as each family's own type and code.
type ErrorKind uint8

const (
	ICMPNetUnreachable ErrorKind = iota
	ICMPHostUnreachable
	ICMPPortUnreachable
	icmpProtocolUnreachable
	ICMPAdminProhibited
	ICMPTimeExceeded
	ICMPPacketTooBig // info is the MTU
)

// ErrorForm is one family's type and code. info goes into the header's last four bytes.
type ErrorForm struct{ Typ, Code uint8 }

// ICMPForms is indexed by ErrorKind and family. The only ICMPv6 form of network unreachable is "no
// route", and that of a bad protocol is "unrecognized next header".
var ICMPForms = [...][2]ErrorForm{
	ICMPNetUnreachable:      {{3, 0}, {1, 0}},
	ICMPHostUnreachable:     {{3, 1}, {1, 3}},
	ICMPPortUnreachable:     {{3, 3}, {1, 4}},
	icmpProtocolUnreachable: {{3, 2}, {4, 1}},
	ICMPAdminProhibited:     {{3, 13}, {1, 1}},
	ICMPTimeExceeded:        {{11, 0}, {3, 0}},
	ICMPPacketTooBig:        {{3, 4}, {2, 0}},
}

// Bounds on an error's quote: RFC 1812 wants no more than 576 bytes in all, RFC 4443 no more than
// the minimum MTU. The rate of errors is limited too, by Linux's net.ipv4.icmp_msgs_per_sec and a
// burst that covers traceroute's probes.
const (
	ICMPQuoteIPv4    = 576 - header.IPv4MinimumSize - header.ICMPv4MinimumSize
	ICMPQuoteIPv6    = 1280 - header.IPv6MinimumSize - header.ICMPv6MinimumSize
	ICMPErrorsPerSec = 1000
	ICMPErrorsBurst  = 256
)

// TokenBucket allows rate events per second after a burst. The zero value with
// rate and burst set starts full.
type TokenBucket struct {
	Rate, Burst float64

	mu   sync.Mutex
	have float64
	last time.Time
}

func (b *TokenBucket) Take(now time.Time) bool { return b.TakeN(1, now) }

// TakeN takes tokens for n events, or none.
func (b *TokenBucket) TakeN(n float64, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last.IsZero() {
		b.have = b.Burst
	} else if d := now.Sub(b.last); d > 0 {
		b.have = min(b.Burst, b.have+b.Rate*d.Seconds())
	}
	b.last = now
	if b.have < n {
		return false
	}
	b.have -= n
	return true
}

// Errors sends ICMP errors within the bounds above.
type Errors struct {
	emit                     *Emitter
	onlink                   *onlink.Addrs
	now                      func() time.Time
	bucket                   TokenBucket
	protocol                 Reason
	sent, forbidden, limited *atomic.Uint64
}

func NewErrors(emit *Emitter, on *onlink.Addrs, d *Drops, now func() time.Time) *Errors {
	return &Errors{
		emit: emit, onlink: on, now: now,
		bucket:    TokenBucket{Rate: ICMPErrorsPerSec, Burst: ICMPErrorsBurst},
		protocol:  d.Reason("ip_protocol"),
		sent:      d.Stats.Counter("icmp_errors_sent"),
		forbidden: d.Stats.Counter("icmp_errors_forbidden"), // RFC 1812 forbids an error about such a packet
		limited:   d.Stats.Counter("icmp_errors_limited"),
	}
}

// Tell sends an error about pkt, which has been through the stack, from the gateway.
func (i *Errors) Tell(kind ErrorKind, info uint32, pkt *stack.PacketBuffer) {
	var buf [ICMPQuoteIPv6]byte
	i.Send(kind, info, Quote(pkt, buf[:]), netip.Addr{})
}

// RejectProtocol answers a packet of an IP protocol that nothing here handles. The packet has not
// been through the stack: its data begin with the IP header.
func (i *Errors) RejectProtocol(pkt *stack.PacketBuffer) {
	orig, ok := pkt.Data().PullUp(min(pkt.Data().Size(), header.IPv4MaximumHeaderSize+ICMPQuoteIPv4))
	if !ok {
		return
	}
	i.protocol.note(orig)
	info := uint32(0)
	if orig[0]>>4 == 6 {
		info = header.IPv6NextHeaderOffset // the pointer of a parameter problem
	}
	i.Send(icmpProtocolUnreachable, info, orig, netip.Addr{})
}

// Send tells the sandbox that orig, a packet that it sent, met with kind. orig begins with the IP
// header and may be cut anywhere after the transport header's first eight bytes. An invalid src
// stands for the gateway.
func (i *Errors) Send(kind ErrorKind, info uint32, orig []byte, src netip.Addr) {
	if len(orig) < 1 {
		return
	}
	form := ICMPForms[kind][0]
	if orig[0]>>4 == 6 {
		form = ICMPForms[kind][1]
	}
	i.SendForm(form, info, orig, src)
}

// SendForm is Send for a type and code that came from elsewhere.
func (i *Errors) SendForm(form ErrorForm, info uint32, orig []byte, src netip.Addr) {
	to, ok := ErrorRecipient(orig)
	if !ok {
		i.forbidden.Add(1)
		return
	}
	tooBig := form == ICMPForms[ICMPPacketTooBig][FamilyIndex(to)]
	if !tooBig && !i.bucket.Take(i.now()) {
		i.limited.Add(1)
		return
	}
	if !src.IsValid() || src.Is4() != to.Is4() {
		src = i.onlink.GatewayFor(to)
		if !src.IsValid() {
			return
		}
	}
	limit := ICMPQuoteIPv4
	if !to.Is4() {
		limit = ICMPQuoteIPv6
	}
	orig = orig[:min(len(orig), limit)]
	var h [8]byte
	h[0], h[1] = form.Typ, form.Code
	binary.BigEndian.PutUint32(h[4:], info)
	i.sent.Add(1)
	i.emit.ICMP(src, to, Meta{TTL: DefaultTTL}, h[:], orig)
}

// ErrorRecipient returns the source of the quoted packet, if an error about that
// packet may be sent at all.
func ErrorRecipient(orig []byte) (netip.Addr, bool) {
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
			return src, false // a fragment other than the first
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
	case ProtoICMP:
		if len(l4) < 1 || isICMPv4Error(l4[0]) {
			return src, false
		}
	case ProtoICMPv6:
		if len(l4) < 1 || l4[0] < 128 || l4[0] == uint8(header.ICMPv6RedirectMsg) {
			return src, false
		}
	}
	return src, true
}

// isICMPv4Error reports whether a type is one of the errors in RFC 1122 section 3.2.2.
func isICMPv4Error(typ uint8) bool {
	switch typ {
	case 3, 4, 5, 11, 12:
		return true
	}
	return false
}

// TellDialError answers the SYN, as far as it was kept. If the network sent an error, the sandbox
// gets that, from its original source; otherwise it gets the equivalent of the host's errno, from a
// gateway.
func (i *Errors) TellDialError(syn []byte, e ExtendedErr, fromNetwork bool, errno unix.Errno) {
	if len(syn) == 0 {
		return
	}
	if fromNetwork {
		if info, ok := ErrorInfo(&e); ok {
			i.SendForm(ErrorForm{Typ: e.Typ, Code: e.Cod}, info, syn, e.Offender)
			return
		}
	}
	kind := ICMPHostUnreachable
	switch errno {
	case unix.ENETUNREACH, unix.ENETDOWN, unix.EAFNOSUPPORT, unix.EINVAL:
		kind = ICMPNetUnreachable
	case unix.EACCES, unix.EPERM:
		kind = ICMPAdminProhibited
	}
	i.Send(kind, 0, syn, netip.Addr{})
}

// ExtendedErr is struct sock_extended_err of ip(7), with the offender's address.
type ExtendedErr struct {
	Errno            unix.Errno
	Origin, Typ, Cod uint8
	Info             uint32
	Offender         netip.Addr
}
