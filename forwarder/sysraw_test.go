package forwarder

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

func FuzzParseControl(f *testing.F) {
	var room datagram.TxCtl
	it := &datagram.TxItem{Flow: &datagram.Flow{Target: at(far4, 1)}, Meta: packet.Meta{TTL: 3, Tos: 4}}
	f.Add(bytes.Clone(datagram.TxControl(&room, it, 1200)))
	it.Flow.Target = at(far6, 1)
	f.Add(bytes.Clone(datagram.TxControl(&room, it, 1200)))
	e := make([]byte, 16+unix.SizeofSockaddrInet6)
	var a hostsock.RawAddr
	a.Put(at(router6, 0))
	copy(e[16:], a[:])
	f.Add(bytes.Clone(hostsock.AppendCmsg(make([]byte, 0, 128), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, e)))
	f.Fuzz(func(t *testing.T, b []byte) {
		aligned := make([]uint64, len(b)/8+1) // as the kernel's are
		buf := unsafeBytes(aligned)[:len(b)]
		copy(buf, b)
		c := hostsock.ParseControl(buf)
		if c.Local.Is4In6() || c.Err.Offender.Is4In6() {
			t.Errorf("an address came out mapped: %+v", c)
		}
	})
}

// FuzzRequote checks that, whatever an error quotes, the sandbox is shown a packet of its own to
// the peer.
func FuzzRequote(f *testing.F) {
	f.Add([]byte("payload"), uint64(1)<<40, true, true)
	f.Add([]byte{8, 0, 1, 2, 3, 4, 0, 1}, ^uint64(0), false, true)
	f.Add([]byte(nil), uint64(0), false, false)
	f.Fuzz(func(t *testing.T, quoted []byte, sent uint64, udp, v4 bool) {
		me, peer, proto := guest6, far6, uint8(58)
		if v4 {
			me, peer, proto = guest4, far4, 1
		}
		if udp {
			proto = 17
		}
		fl := &datagram.Flow{Guest: at(me, 4000), Peer: at(peer, 53)}
		fl.Tuple = nat.NewTuple(proto, fl.Guest, fl.Peer)
		fl.Sent.Store(sent)
		var buf [packet.ICMPQuoteIPv6]byte
		var b []byte
		if udp {
			b = fl.Requote(buf[:], quoted)
		} else {
			b = (&datagram.EchoSent{Key: datagram.EchoKey{Flow: fl}, A: fl.LastSent(), Msg: append(make([]byte, packet.EchoHeaderLen), quoted...)}).Quote(buf[:])
		}
		to, ok := packet.ErrorRecipient(b)
		if len(b) < 28 || to != me {
			t.Fatalf("recipient %s, %v of %x", to, ok, b)
		}
		hl := packet.IPHeaderLen(peer)
		if udp && (binary.BigEndian.Uint16(b[hl:]) != 4000 || binary.BigEndian.Uint16(b[hl+2:]) != 53) {
			t.Errorf("ports of %x", b)
		}
	})
}

func FuzzErrorRecipient(f *testing.F) {
	f.Add(udpPacket(at(guest4, 1), at(far4, 2), nil).bytes())
	f.Add(echoPacket(guest6, far6, 1, 1, nil).bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if to, ok := packet.ErrorRecipient(b); ok && (!to.IsValid() || to.IsMulticast() || to.IsUnspecified()) {
			t.Errorf("an error would go to %s", to)
		}
	})
}

func TestSocketAddressesSurviveTheKernelsForm(t *testing.T) {
	for _, a := range []netip.AddrPort{at(far4, 1), at(far6, 65535), at(netip.IPv4Unspecified(), 0)} {
		var r hostsock.RawAddr
		if got := hostsock.AddrPortOf(r[:r.Put(a)]); got != a {
			t.Errorf("%s became %s", a, got)
		}
	}
	mapped := hostsock.RawAddr{}
	mapped.Put(at(netip.MustParseAddr("::ffff:10.0.0.1"), 9))
	if got := hostsock.AddrPortOf(mapped[:]); got != at(netip.MustParseAddr("10.0.0.1"), 9) {
		t.Errorf("a 4-in-6 address became %s, expected it unmapped", got)
	}
	for _, b := range [][]byte{nil, {2}, {2, 0, 0, 1, 1, 2, 3}, {10, 0, 0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 9, 9, 9, 9, 9, 9}} {
		if got := hostsock.AddrPortOf(b); got.IsValid() {
			t.Errorf("%x became %s", b, got)
		}
	}
}

func unsafeBytes(w []uint64) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), len(w)*8) }
