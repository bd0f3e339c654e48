package prefix

import (
	"net/netip"
	"testing"
)

func TestHalvesAreWhatTheyComeFrom(t *testing.T) {
	for _, row := range [][3]string{
		{"0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"},
		{"10.0.0.0/8", "10.0.0.0/9", "10.128.0.0/9"},
		{"10.0.0.254/31", "10.0.0.254/32", "10.0.0.255/32"},
		{"::/0", "::/1", "8000::/1"},
		{"fd00::/127", "fd00::/128", "fd00::1/128"},
	} {
		p := netip.MustParsePrefix(row[0])
		lower, upper := Halves(p)
		if lower.String() != row[1] || upper.String() != row[2] {
			t.Errorf("the halves of %v are %v and %v, want %s and %s", p, lower, upper, row[1], row[2])
		}
		for _, h := range []netip.Prefix{lower, upper} {
			if !Covers(p, h) || Covers(h, p) || !Covers(h, h) {
				t.Errorf("%v covers %v: %v, and the other way round: %v", p, h, Covers(p, h), Covers(h, p))
			}
		}
		if Covers(lower, upper) || Covers(upper, lower) {
			t.Errorf("%v and %v cover each other", lower, upper)
		}
	}
	if Covers(netip.MustParsePrefix("::/0"), netip.MustParsePrefix("10.0.0.0/8")) || Covers(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("fd00::/8")) {
		t.Error("a network covers one of the other family")
	}
}
