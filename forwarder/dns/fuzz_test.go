package dns

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"

	"sluice.dev/sluice/policy"
)

func seeds(f *testing.F) [][]byte {
	signed := new(dns.Msg)
	signed.SetQuestion("s.example.", dns.TypeA)
	signed.Answer = []dns.RR{rr("s.example. A 192.0.2.1"), rr("s.example. RRSIG A 13 2 300 20300101000000 20200101000000 1 example. AAAA")}
	signed.SetEdns0(1232, true)
	signed.Compress = true
	s, err := signed.Pack()
	if err != nil {
		f.Fatal(err)
	}
	return [][]byte{
		nil, make([]byte, 12), s,
		ask(f, "a.example", dns.TypeA), ask(f, "localhost", dns.TypeANY, edns(512, true)),
		ask(f, "x", dns.TypeAXFR), ask(f, "1.0.0.127.in-addr.arpa", dns.TypePTR),
	}
}

// Whatever comes from the sandbox, nothing panics, and there is at most one answer, which is well
// formed, within the client's size, and bears its ID. A query that miekg/dns cannot read is never
// forwarded as a good one with another question.
func FuzzServePacket(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	echo := func(q []byte) [][]byte { // an upstream that echoes the query as a response
		a := bytes.Clone(q)
		a[2] |= 0x80
		return [][]byte{a}
	}
	r := newResolver(f, Config{
		Dialer:    &fakeNet{servers: map[netip.AddrPort]*fakeServer{server(1): {udp: echo, tcp: echo}}},
		Upstreams: upstreams(1),
		Hosts:     map[string][]netip.Addr{"h": addrs("10.0.0.1", "fd00::1")},
	})
	f.Fuzz(func(t *testing.T, query []byte) {
		b := packet(r, query)
		if b == nil {
			return
		}
		if !bytes.Equal(b[:2], query[:2]) || b[2]&0x80 == 0 {
			t.Fatalf("not an answer to it: %x", b)
		}
		qy, _ := parseQuery(query)
		if len(b) > qy.limit {
			t.Fatalf("%d bytes for a client that takes %d", len(b), qy.limit)
		}
		if end, ok := walk(b, headerLen+len(b[headerLen:max(headerLen, qy.q.end)]), func(record) bool { return true }); !ok || end != len(b) {
			t.Fatalf("malformed answer %x", b)
		}
	})
}

// Whatever bytes a stream carries, however cut: it ends, and the bytes that come back are a
// sequence of whole answers.
func FuzzServeStream(f *testing.F) {
	var all []byte
	for _, s := range seeds(f) {
		f.Add(prefixed(s), uint16(3))
		all = append(all, prefixed(s)...)
	}
	f.Add(all, uint16(1))
	r := newResolver(f, Config{Hosts: map[string][]netip.Addr{"h": addrs("10.0.0.1")}})
	f.Fuzz(func(t *testing.T, data []byte, cut uint16) {
		near, far := net.Pipe()
		done := make(chan struct{})
		go func() { defer close(done); r.ServeStream(context.Background(), halfOpen{far}, func(policy.Outcome) {}) }()
		go func() {
			for i := 0; i < len(data); {
				n := min(int(cut)+1, len(data)-i)
				if _, err := near.Write(data[i : i+n]); err != nil {
					return
				}
				i += n
			}
			near.Write(eofMark)
		}()
		for {
			b, err := readPrefixed(near)
			if err != nil {
				if err != io.EOF {
					t.Fatalf("an answer cut short: %v", err)
				}
				break
			}
			if len(b) < headerLen || b[2]&0x80 == 0 {
				t.Fatalf("not an answer: %x", b)
			}
		}
		near.Close()
		<-done
	})
}

// halfOpen lets a pipe signal end of file in one direction, by a write of eofMark.
type halfOpen struct{ net.Conn }

var eofMark = []byte("\xff\xffthat was all\xff\xff")

func (h halfOpen) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if bytes.Equal(b[:n], eofMark) {
		return 0, io.EOF
	}
	return n, err
}

// Whatever an upstream sends, an accepted answer is well formed and matches the question. If
// miekg/dns, which follows every pointer, can read it, it can also read it truncated.
func FuzzUpstreamAnswer(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s, uint16(512))
	}
	f.Fuzz(func(t *testing.T, msg []byte, limit uint16) {
		if len(msg) < headerLen {
			return
		}
		sent := bytes.Clone(msg)
		sent[2] = 0
		clear(sent[6:12])
		q, ok := readQuestion(sent)
		if !ok {
			return
		}
		put16(sent, 4, 1)
		qy := &query{msg: sent[:q.end], q: q, limit: int(limit)}
		if !answers(msg, qy) {
			return
		}
		before := new(dns.Msg)
		// miekg/dns lets a message end before its counts do; we do not.
		readable := before.Unpack(msg) == nil && len(before.Answer) == int(be16(msg, 6)) &&
			len(before.Ns) == int(be16(msg, 8)) && len(before.Extra) == int(be16(msg, 10))
		out, ok := tidy(bytes.Clone(msg), qy, false)
		if !ok {
			if readable && be16(msg, 4) == 1 && countOPT(before) <= 1 {
				t.Fatalf("refused a good answer %x", msg)
			}
			return
		}
		if end, ok := walk(out, q.end, func(record) bool { return true }); !ok || end != len(out) {
			t.Fatalf("took a malformed answer %x", out)
		}
		size := max(int(limit), minUDPSize)
		if len(out) <= size {
			return
		}
		cut := truncate(out, q.end, size)
		if len(cut) > size || be16(cut, 2)&bitTC == 0 {
			t.Fatalf("%d bytes of %d, flags %x", len(cut), size, be16(cut, 2))
		}
		if end, ok := walk(cut, q.end, func(record) bool { return true }); !ok || end != len(cut) {
			t.Fatalf("cut to a malformed message %x", cut)
		}
		if readable {
			if err := new(dns.Msg).Unpack(cut); err != nil {
				t.Fatalf("cut to an unreadable message: %v", err)
			}
		}
	})
}

func countOPT(m *dns.Msg) int {
	n := 0
	for _, s := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, r := range s {
			if r.Header().Rrtype == dns.TypeOPT {
				n++
			}
		}
	}
	return n
}
