package forwarder

import (
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
)

func packed(t *testing.T, m dnsmessage.Message) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func dnsQuery(t *testing.T, name string) []byte {
	t.Helper()
	q := dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	return packed(t, dnsmessage.Message{Header: dnsmessage.Header{ID: 1, RecursionDesired: true}, Questions: []dnsmessage.Question{q}})
}

func TestPort53IsJudgedByWhatItIs(t *testing.T) {
	pack := func(m dnsmessage.Message) []byte { return packed(t, m) }
	question := dnsmessage.Question{Name: dnsmessage.MustNewName("a.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	opt := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("."), Type: dnsmessage.TypeOPT, Class: 1232}, Body: &dnsmessage.OPTResource{}}
	query := dnsQuery(t, "a.test.")
	wireguard := make([]byte, 148) // a handshake's first message: its type, then the sender's index
	copy(wireguard, []byte{1, 0, 0, 0, 0x5a, 0x11, 0x22, 0x33})
	for _, row := range []struct {
		name          string
		b             []byte
		query, answer bool
	}{
		{"a question", query, true, false},
		{"with EDNS", pack(dnsmessage.Message{Questions: []dnsmessage.Question{question}, Additionals: []dnsmessage.Resource{opt}}), true, false},
		{"an answer", pack(dnsmessage.Message{Header: dnsmessage.Header{Response: true}, Questions: []dnsmessage.Question{question}}), false, true},
		{"an error without its question", pack(dnsmessage.Message{Header: dnsmessage.Header{Response: true, RCode: dnsmessage.RCodeFormatError}}), false, true},
		{"an answer without its question", pack(dnsmessage.Message{Header: dnsmessage.Header{Response: true}}), false, false},
		{"two questions", pack(dnsmessage.Message{Questions: []dnsmessage.Question{question, question}}), false, false},
		{"no question", pack(dnsmessage.Message{}), false, false},
		{"an update", pack(dnsmessage.Message{Header: dnsmessage.Header{OpCode: 5}, Questions: []dnsmessage.Question{question}}), false, false},
		{"a cut question", query[:len(query)-3], false, false},
		{"a name that is a pointer to itself", append(append([]byte{}, query[:12]...), 0xc0, 12, 0, 1, 0, 1), false, false},
		{"nothing", nil, false, false},
		{"a byte", []byte{0}, false, false},
		{"text", []byte("200 datagrams, if you please"), false, false},
		{"zeros", make([]byte, 64), false, false},
		{"DTLS", append([]byte{22, 254, 253, 0, 0, 0, 0, 0, 0, 0, 0, 0, 40}, make([]byte, 40)...), false, false},
		{"WireGuard", wireguard, false, false},
		{"QUIC", append([]byte{0xc3, 0, 0, 0, 1, 8}, make([]byte, 1194)...), false, false},
	} {
		if q, a := packet.IsQuery(row.b), packet.IsAnswer(row.b); q != row.query || a != row.answer {
			t.Errorf("%s: a question: %v, an answer: %v", row.name, q, a)
		}
	}
	if n := testing.AllocsPerRun(100, func() { packet.IsQuery(query) }); n != 0 && !testutil.Race {
		t.Errorf("%v allocations for each datagram", n)
	}
}
