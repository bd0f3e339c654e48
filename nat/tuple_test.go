package nat

import (
	"net/netip"
	"reflect"
	"testing"
	"unsafe"
)

func TestTupleIsSmallAndHoldsNoPointer(t *testing.T) {
	if size := unsafe.Sizeof(Tuple{}); size > 40 {
		t.Errorf("a Tuple has %d bytes, more than 40", size)
	}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Struct:
			for i := range typ.NumField() {
				walk(typ.Field(i).Type)
			}
		case reflect.Array:
			walk(typ.Elem())
		case reflect.Uint8, reflect.Uint16:
		default:
			t.Errorf("a Tuple holds a %v", typ)
		}
	}
	walk(reflect.TypeOf(Tuple{}))
	if !reflect.TypeOf(Tuple{}).Comparable() {
		t.Error("a Tuple is not comparable")
	}
}

func TestTuple(t *testing.T) {
	for _, tt := range []struct {
		name          string
		proto         uint8
		src, dst      string
		want, reverse string
	}{
		{"an IPv4 flow has its ends swapped in reverse", 6, "10.0.2.100:4000", "192.0.2.1:80",
			"tcp 10.0.2.100:4000 > 192.0.2.1:80", "tcp 192.0.2.1:80 > 10.0.2.100:4000"},
		{"a mapped address is the IPv4 address", 17, "[::ffff:10.0.2.100]:4000", "[::ffff:192.0.2.1]:53",
			"udp 10.0.2.100:4000 > 192.0.2.1:53", "udp 192.0.2.1:53 > 10.0.2.100:4000"},
		{"an IPv6 address loses its zone", 6, "[fe80::1%eth0]:1", "[2001:db8::1]:2",
			"tcp [fe80::1]:1 > [2001:db8::1]:2", "tcp [2001:db8::1]:2 > [fe80::1]:1"},
		{"an echo request is answered by an echo reply of the same id", 1, "10.0.2.100:77", "192.0.2.1:2048",
			"icmp 10.0.2.100 > 192.0.2.1 type 8 code 0 id 77", "icmp 192.0.2.1 > 10.0.2.100 type 0 code 0 id 77"},
		{"an ICMPv6 echo request likewise", 58, "[fd00::1]:77", "[2001:db8::1]:32768",
			"icmpv6 fd00::1 > 2001:db8::1 type 128 code 0 id 77", "icmpv6 2001:db8::1 > fd00::1 type 129 code 0 id 77"},
		{"an ICMP message that has no answer keeps its type", 1, "10.0.2.100:0", "192.0.2.1:769",
			"icmp 10.0.2.100 > 192.0.2.1 type 3 code 1 id 0", "icmp 192.0.2.1 > 10.0.2.100 type 3 code 1 id 0"},
		{"a protocol without a name here is unknown", 47, "10.0.2.100:0", "192.0.2.1:0",
			"unknown 10.0.2.100:0 > 192.0.2.1:0", "unknown 192.0.2.1:0 > 10.0.2.100:0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tup := tuple(tt.proto, tt.src, tt.dst)
			if got := tup.String(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			if got := tup.Reverse().String(); got != tt.reverse {
				t.Errorf("reverse is %s, want %s", got, tt.reverse)
			}
			if tup.Reverse().Reverse() != tup {
				t.Error("reversing twice is not the same")
			}
		})
	}
	if got := (Tuple{}).String(); got != "none" {
		t.Errorf("the zero Tuple is %q", got)
	}
	if (Tuple{}).Src().IsValid() || (Tuple{}).Dst().IsValid() {
		t.Error("the zero Tuple has an address")
	}
}

func FuzzTuple(f *testing.F) {
	f.Add(uint8(6), []byte{10, 0, 2, 100}, uint16(4000), []byte{192, 0, 2, 1}, uint16(80))
	f.Add(uint8(1), []byte{10, 0, 2, 100}, uint16(7), []byte{192, 0, 2, 1}, uint16(8<<8))
	f.Add(uint8(58), make([]byte, 16), uint16(7), make([]byte, 16), uint16(128<<8))
	f.Fuzz(func(t *testing.T, proto uint8, src []byte, sport uint16, dst []byte, dport uint16) {
		s, ok1 := netip.AddrFromSlice(src)
		d, ok2 := netip.AddrFromSlice(dst)
		if !ok1 || !ok2 || s.Unmap().Is4() != d.Unmap().Is4() {
			return
		}
		tup := NewTuple(proto, netip.AddrPortFrom(s, sport), netip.AddrPortFrom(d, dport))
		if tup.Src() != netip.AddrPortFrom(s.Unmap(), sport) || tup.Dst() != netip.AddrPortFrom(d.Unmap(), dport) {
			t.Errorf("%v > %v became %v > %v", s, d, tup.Src(), tup.Dst())
		}
		if tup.Reverse().Reverse() != tup {
			t.Errorf("%v: reversing twice gives %v", tup, tup.Reverse().Reverse())
		}
		if again := NewTuple(proto, tup.Src(), tup.Dst()); again != tup {
			t.Errorf("%v is not made from its own ends: %v", tup, again)
		}
	})
}
