package policy

import (
	"strings"
	"testing"

	"golang.org/x/net/idna"
)

func TestANameHasOneSpelling(t *testing.T) {
	tests := []struct{ in, want string }{ // want "": refused
		{"example.com", "example.com"},
		{"EXAMPLE.Com", "example.com"},
		{"example.com.", "example.com"},
		{"_sip._tcp.example.com", "_sip._tcp.example.com"},
		{"localhost", "localhost"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example"},
		{"XN--BCHER-KVA.example", "xn--bcher-kva.example"},
		{"bücher.example", "xn--bcher-kva.example"},
		{"BÜCHER.example", "xn--bcher-kva.example"},
		{"bücher.example.", "xn--bcher-kva.example"},
		{"bücher。example", "xn--bcher-kva.example"},
		{"ｅｘａｍｐｌｅ．ｃｏｍ", "example.com"},
		{strings.Repeat("a", 63) + ".com", strings.Repeat("a", 63) + ".com"},
		{strings.Repeat("a.", 126) + "a", strings.Repeat("a.", 126) + "a"}, // 253

		// A letter of another alphabet is another name.
		{"ex\u0430mple.com", "xn--exmple-4nf.com"},

		{"", ""}, {".", ""}, {"..", ""}, {".com", ""}, {"a..com", ""}, {"example.com..", ""},
		{strings.Repeat("a", 64) + ".com", ""},
		{strings.Repeat("a.", 126) + "ab", ""},
		{strings.Repeat("ü", 2000), ""},
		{`ex\097mple.com`, ""}, {`example\.com`, ""}, {"ex%61mple.com", ""},
		{"example.com\x00.evil.io", ""}, {"example.com ", ""}, {" example.com", ""}, {"exam ple.com", ""},
		{"example.com/", ""}, {"user@example.com", ""}, {"example.com:443", ""}, {"*.example.com", ""},
		{"a\u200db.com", ""}, {"\u202eexample.com", ""}, {"\xff.com", ""},
		{"127.0.0.1", ""}, {"127.1", ""}, {"2130706433", ""}, {"0x7f000001", ""}, {"0x7f.0.0.0x1", ""}, {"0x", ""}, {"127.0.0.1.", ""},
		{"１２７.0.0.1", ""}, {"::1", ""}, {"[::1]", ""}, {"fe80::1%eth0", ""}, {"1.2.3.4.5", ""},
	}
	for _, tt := range tests {
		got, err := NormalizeName(tt.in)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%q: got %q, %v; want %q", tt.in, got, err, tt.want)
		}
	}
	for said, want := range map[string]string{
		"example.com": "example.com", "EXAMPLE.com.": "example.com", "xn--bcher-kva.example": "xn--bcher-kva.example", "a_b.test": "a_b.test",
		"ｅｘａｍｐｌｅ.com": "", "example。com": "", "example．com": "", "bücher.example": "", "\u212aelvin.test": "", "e\u00adxample.com": "", "\xff.com": "",
		"": "", "127.0.0.1": "", "example.com:443": "", strings.Repeat("a.", 126) + "ab": "",
	} {
		if got, err := NormalizeSaid(said); got != want || (err == nil) != (want != "") {
			t.Errorf("%q, said: got %q, %v; want %q", said, got, err, want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = NormalizeName("files.pythonhosted.org") }); n != 0 {
		t.Errorf("%v allocations for a name that is normal already", n)
	}
}

// wire gives labels in wire form.
func wire(labels ...string) []byte {
	var out []byte
	for _, l := range labels {
		out = append(append(out, byte(len(l))), l...)
	}
	return append(out, 0)
}

func TestANameOnTheWireHasTheSameSpelling(t *testing.T) {
	long := strings.Repeat("a", 63)
	tests := []struct {
		in   []byte
		want string
	}{
		{wire("example", "com"), "example.com"},
		{wire("EXAMPLE", "Com"), "example.com"},
		{wire("_dmarc", "example", "com"), "_dmarc.example.com"},
		{wire(long, long, long, strings.Repeat("a", 61)), strings.Join([]string{long, long, long, strings.Repeat("a", 61)}, ".")},

		{wire(long, long, long, strings.Repeat("a", 62)), ""},
		{wire(long, long, long, long, long), ""},
		{wire(), ""}, {nil, ""}, {[]byte{3, 'c', 'o'}, ""}, {[]byte{3, 'c', 'o', 'm'}, ""},
		{append(wire("com"), 0), ""},
		{[]byte{0xc0, 0x0c}, ""}, {append([]byte{64}, strings.Repeat("a", 65)...), ""},
		{wire("example.com"), ""}, {wire("a\x00", "com"), ""}, {wire("a b"), ""}, {wire(`a\`), ""}, {wire("bücher", "example"), ""}, {wire("*", "com"), ""},
		{wire("127", "0", "0", "1"), ""}, {wire("1"), ""},
	}
	for _, tt := range tests {
		got, err := NormalizeWire(tt.in)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%q: got %q, %v; want %q", tt.in, got, err, tt.want)
		}
	}
}

func TestAPatternHasOneSpelling(t *testing.T) {
	tests := []struct{ in, want string }{
		{"Example.COM.", "example.com"}, {"*.Example.com", "*.example.com"}, {"**.Bücher.example", "**.xn--bcher-kva.example"}, {"*.com", "*.com"},
		{"*", ""}, {"**", ""}, {"*.", ""}, {"***.example.com", ""}, {"*.*.example.com", ""}, {"**.*.example.com", ""}, {"*.**.example.com", ""},
		{"a*.example.com", ""}, {"www.*.com", ""}, {"example.*", ""}, {"*.127.0.0.1", ""}, {"", ""},
	}
	for _, tt := range tests {
		got, err := NormalizePattern(tt.in)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%q: got %q, %v; want %q", tt.in, got, err, tt.want)
		}
	}
}

// FuzzNormalizeName: what comes out is a fixed point, has no byte that a name
// does not have, stays itself on the wire, and is what a stricter library makes
// of it where that takes it at all.
func FuzzNormalizeName(f *testing.F) {
	for _, s := range []string{"example.com", "BÜCHER.example.", "a..b", "127.1", `a\.b`, "ß.de", "xn--a", "１.2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := NormalizeName(s)
		if err != nil {
			if n != "" {
				t.Fatalf("%q: %q beside %v", s, n, err)
			}
			return
		}
		if again, err := NormalizeName(n); again != n || err != nil {
			t.Fatalf("%q: %q becomes %q, %v", s, n, again, err)
		}
		if w, err := NormalizeWire(wire(strings.Split(n, ".")...)); w != n || err != nil {
			t.Fatalf("%q: %q is %q, %v on the wire", s, n, w, err)
		}
		if strict, err := idna.Lookup.ToASCII(s); err == nil && strings.TrimSuffix(strict, ".") != n {
			t.Fatalf("%q: %q, the library says %q", s, n, strict)
		}
	})
}

// FuzzNormalizeWire: a name from the wire is one that the rules could hold.
func FuzzNormalizeWire(f *testing.F) {
	f.Add(wire("example", "com"))
	f.Add([]byte{0xc0, 0x0c})
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := NormalizeWire(b)
		if err != nil {
			return
		}
		if again, err := NormalizeName(n); again != n || err != nil {
			t.Fatalf("%q: %q becomes %q, %v", b, n, again, err)
		}
		if back := wire(strings.Split(n, ".")...); !strings.EqualFold(string(back), string(b)) {
			t.Fatalf("%q: %q goes back to %q", b, n, back)
		}
	})
}
