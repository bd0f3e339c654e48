package sniff

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

// seal makes an Initial packet of frames, padded to size.
func seal(t testing.TB, version uint32, connID []byte, number uint32, frames []byte, size int) []byte {
	return sealHead(t, version, connID, number, frames, size, 0xc3|quicVersions[version].initial<<4)
}

func sealHead(t testing.TB, version uint32, connID []byte, number uint32, frames []byte, size int, first byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{first}, version)
	b = append(append(b, byte(len(connID))), connID...)
	b = append(b, 0, 0) // source connection ID, token
	if pad := size - len(b) - 2 - 4 - len(frames) - tagLen; pad > 0 {
		frames = append(append([]byte(nil), frames...), make([]byte, pad)...)
	}
	return protect(t, version, connID, b, int64(number), 4, frames)
}

// sealNumber makes a packet that carries only n bytes of its number.
func sealNumber(t testing.TB, connID []byte, number int64, n int, frames []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0xc0 | byte(n-1)}, version1)
	b = append(append(b, byte(len(connID))), connID...)
	return protect(t, version1, connID, append(b, 0, 0), number, n, append(bytes.Clone(frames), make([]byte, 4)...))
}

func protect(t testing.TB, version uint32, connID, b []byte, number int64, n int, frames []byte) []byte {
	t.Helper()
	k, err := newInitialKeys(quicVersions[version], connID)
	if err != nil {
		t.Fatal(err)
	}
	b = binary.BigEndian.AppendUint16(b, 0x4000|uint16(n+len(frames)+tagLen))
	at := len(b)
	nonce := append([]byte(nil), k.iv...)
	for i := range 8 {
		nonce[11-i] ^= byte(number >> (8 * i))
	}
	for i := n - 1; i >= 0; i-- {
		b = append(b, byte(number>>(8*i)))
	}
	b = k.aead.Seal(b, nonce, frames, b)
	var mask [16]byte
	k.hp.Encrypt(mask[:], b[at+4:at+4+sampleLen])
	b[0] ^= mask[0] & 0x0f
	for i := range n {
		b[at+i] ^= mask[1+i]
	}
	return b
}

func cryptoFrame(offset int, data []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{6}, 0x4000|uint16(offset))
	return append(binary.BigEndian.AppendUint16(b, 0x4000|uint16(len(data))), data...)
}

// quicHello returns the first bytes of Go's QUIC client.
func quicHello(t testing.TB, name string) []byte {
	t.Helper()
	c := tls.QUICClient(&tls.QUICConfig{TLSConfig: &tls.Config{ServerName: name, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}})
	c.SetTransportParameters([]byte{})
	if err := c.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for {
		switch e := c.NextEvent(); e.Kind {
		case tls.QUICWriteData:
			return bytes.Clone(e.Data)
		case tls.QUICNoEvent:
			t.Fatal("no ClientHello")
		}
	}
}

// reader reads one connection as a caller does: by the ID of its first datagram.
type reader struct{ q *Initial }

var errClosed = errors.New("its Initial packets do not open")

// add returns what is known so far, of Kind None as long as p must wait.
func (r *reader) add(p []byte) (Seen, error) {
	d, err := Split(p)
	if err != nil {
		return Seen{}, err
	}
	if !d.Initial() {
		return Seen{Kind: Opaque}, nil
	}
	if r.q == nil {
		r.q = NewInitial(d.ID)
	}
	o := r.q.Open(&d)
	if !o.Whole() {
		return Seen{}, errClosed
	}
	end, err := r.q.Add(o)
	if err != nil || r.q.Whole() < end {
		return Seen{}, err
	}
	return r.q.Said(), nil
}

var rfcConnID = []byte{0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08}

// TestTheRFCsPackets seals the packets of RFC 9001, appendix A.2, and RFC 9369, appendix
// A.2, so that the tests' own packets are known to be right.
func TestTheRFCsPackets(t *testing.T) {
	frames, err := hex.DecodeString("060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868" +
		"04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578" +
		"616d706c652e636f6dff01000100000a00080006001d00170018001000070005" +
		"04616c706e000500050100000000003300260024001d00209370b2c9caa47fba" +
		"baf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b000302030400" +
		"0d0010000e0403050306030203080408050806002d00020101001c0002400100" +
		"3900320408ffffffffffffffff05048000ffff07048000ffff08011001048000" +
		"75300901100f088394c8f03e51570806048000ffff")
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[uint32]string{
		version1: "c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11",
		version2: "d76b3343cf088394c8f03e5157080000449ea0c95e82ffe67b6abcdb4298b485",
	} {
		p := seal(t, version, rfcConnID, 2, frames, 1200)
		if got := hex.EncodeToString(p); got[:len(want)] != want || len(p) != 1200 {
			t.Errorf("version %#x: %d bytes, %s…, want %s…", version, len(p), got[:len(want)], want)
		}
		var q reader
		if s, err := q.add(p); err != nil || s != (Seen{Kind: QUIC, Name: "example.com"}) {
			t.Errorf("version %#x: %+v, %v", version, s, err)
		}
	}
}

func TestAQUICHelloInAnyShape(t *testing.T) {
	msg := quicHello(t, "quic.example")
	cut := func(n int) (frames [][]byte) {
		for off := 0; off < len(msg); off += n {
			frames = append(frames, cryptoFrame(off, msg[off:min(len(msg), off+n)]))
		}
		return frames
	}
	packet := func(n int, frames ...[]byte) []byte {
		return seal(t, version1, rfcConnID, uint32(n), bytes.Join(frames, []byte{0, 1}), 0)
	}
	shuffled := cut(20)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	thirds := cut(len(msg)/3 + 1)
	other := bytes.Clone(thirds[0])
	other[len(other)-1] ^= 1
	pings := func(n int) (list [][]byte) {
		for i := range n {
			list = append(list, packet(i, []byte{1}))
		}
		return list
	}
	handshake := append([]byte{0xe0, 0, 0, 0, 1, 8}, append(bytes.Clone(rfcConnID), append([]byte{0, 0x40, 20}, make([]byte, 20)...)...)...)
	for _, row := range []struct {
		name      string
		datagrams [][]byte
		want      Seen
		err       error
	}{
		{"in one packet", [][]byte{packet(0, cut(len(msg))...)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"of version 2", [][]byte{seal(t, version2, rfcConnID, 0, cut(len(msg))[0], 1200)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"in frames of 20 bytes, out of order", [][]byte{packet(0, shuffled...)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"in datagrams, the last part first", [][]byte{packet(0, thirds[2]), packet(1, thirds[0]), packet(2, thirds[1])}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"in packets of one datagram", [][]byte{bytes.Join([][]byte{packet(0, thirds[0]), packet(1, thirds[1]), packet(2, thirds[2])}, nil)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"before a packet of another type", [][]byte{append(packet(0, cut(len(msg))...), handshake...)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"with an acknowledgement before it", [][]byte{packet(0, []byte{2, 0, 0, 1, 0, 0, 0}, cut(len(msg))[0])}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"said twice", [][]byte{packet(0, thirds[0]), packet(1, thirds[0], thirds[1], thirds[2])}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"not whole", [][]byte{packet(0, thirds[0]), packet(1, thirds[2])}, Seen{}, nil},
		{"said twice and differently", [][]byte{packet(0, thirds[0]), packet(1, other)}, Seen{}, ErrMalformed},
		{"with a part of another hello behind it", [][]byte{packet(0, cut(len(msg))[0], cryptoFrame(len(msg), []byte{1}))}, Seen{}, nil},
		{"with something behind it that is no hello", [][]byte{packet(0, cut(len(msg))[0], cryptoFrame(len(msg), []byte{2, 0, 0, 0}))}, Seen{}, ErrMalformed},
		{"and once more behind itself, as a server may ask", [][]byte{packet(0, cut(len(msg))[0]), packet(1, cryptoFrame(len(msg), msg))}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"and then another name behind it", [][]byte{packet(0, cut(len(msg))[0]), packet(1, cryptoFrame(len(msg), quicHello(t, "evil.example")))}, Seen{}, ErrMalformed},
		{"and then another name in its place", [][]byte{packet(0, cut(len(msg))[0]), packet(1, cryptoFrame(0, quicHello(t, "evil.example")))}, Seen{}, ErrMalformed},
		{"and then a close", [][]byte{packet(0, cut(len(msg))[0]), packet(1, []byte{0x1c, 0x0a, 0, 3, 'b', 'y', 'e'})}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"with a frame that does not belong there", [][]byte{packet(0, []byte{0x08, 0}, cut(len(msg))[0])}, Seen{}, ErrMalformed},
		{"without a frame", [][]byte{seal(t, version1, rfcConnID, 0, nil, 0)}, Seen{}, ErrMalformed},
		{"beyond what is read", [][]byte{packet(0, cryptoFrame(0x3fff, []byte{1, 2}))}, Seen{}, ErrTooLong},
		{"longer than what is read", [][]byte{packet(0, cryptoFrame(0, []byte{1, 0, 0x40, 0}))}, Seen{}, ErrTooLong},
		{"and then another connection", [][]byte{packet(0, thirds[0]), seal(t, version1, []byte("12345678"), 1, thirds[1], 0)}, Seen{}, errClosed},
		{"with another connection's packet behind it", [][]byte{append(packet(0, cut(len(msg))[0]), seal(t, version1, []byte("12345678"), 1, thirds[1], 0)...)}, Seen{}, errUnreadable},
		{"with one of another version behind it", [][]byte{append(packet(0, cut(len(msg))[0]), seal(t, version2, rfcConnID, 1, thirds[1], 0)...)}, Seen{}, errUnreadable},
		{"in version 1 and 2's draft", [][]byte{packet(0, thirds[0]), seal(t, versionDraft2, rfcConnID, 1, bytes.Join(thirds[1:], nil), 0)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"in two versions", [][]byte{packet(0, thirds[0]), seal(t, version2, rfcConnID, 1, bytes.Join(thirds[1:], nil), 0)}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"and then noise", [][]byte{packet(0, thirds[0]), []byte("noise")}, Seen{Kind: Opaque}, nil},
		{"with noise behind it", [][]byte{append(packet(0, cut(len(msg))[0]), 0xc0, 0, 0)}, Seen{}, errUnreadable},
		{"with a bit turned", [][]byte{turned(packet(0, cut(len(msg))[0]))}, Seen{}, errClosed},
		{"of a version nobody knows", [][]byte{append([]byte{0xc3, 0xa, 0xa, 0xa, 0xa}, packet(0, thirds[0])[5:]...)}, Seen{}, errUnreadable},
		{"without the fixed bit", [][]byte{greased(t, version1, rfcConnID, cut(len(msg))[0])}, Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"not at all", [][]byte{[]byte("hello")}, Seen{Kind: Opaque}, nil},
		{"after 17 packets of nothing", append(pings(17), packet(17, cut(len(msg))[0])), Seen{Kind: QUIC, Name: "quic.example"}, nil},
		{"after more packets than there may be", append(pings(numberWindow), packet(numberWindow, cut(len(msg))[0])), Seen{}, errClosed},
	} {
		t.Run(row.name, func(t *testing.T) {
			var q reader
			var got Seen
			var err error
			for i, d := range row.datagrams {
				before := bytes.Clone(d)
				if got, err = q.add(d); err != nil && i < len(row.datagrams)-1 {
					t.Fatalf("datagram %d: %v", i, err)
				}
				if !bytes.Equal(d, before) {
					t.Error("the datagram was written to")
				}
			}
			if !errors.Is(err, row.err) || err == nil && got != row.want {
				t.Errorf("got %+v, %v; want %+v, %v", got, err, row.want, row.err)
			}
		})
	}
}

func turned(p []byte) []byte {
	p[len(p)-1] ^= 1
	return p
}

// greased is an Initial packet whose fixed bit is clear (RFC 9287).
func greased(t *testing.T, version uint32, connID, frames []byte) []byte {
	return sealHead(t, version, connID, 0, frames, 1200, 0x83)
}

// TestShortPacketNumbersAreReadAsAServerDoes sends one-byte packet numbers far from zero, as a
// client does that began there. No number outside the window may open a packet.
func TestShortPacketNumbersAreReadAsAServerDoes(t *testing.T) {
	const start = 0x1234f0
	q := NewInitial(rfcConnID)
	open := func(p []byte) Opened {
		d, err := Split(p)
		if err != nil {
			t.Fatal(err)
		}
		return q.Open(&d)
	}
	first := open(seal(t, version1, rfcConnID, start, []byte{1}, 0))
	if _, err := q.Add(first); err != nil || !first.Whole() {
		t.Fatal(err)
	}
	for number := int64(start - 2*numberWindow); number < start+2*numberWindow; number++ {
		p := sealNumber(t, rfcConnID, number, 1, []byte{1})
		inside := number > start-numberWindow && number < start+numberWindow
		o := open(p)
		if o.Whole() != inside {
			t.Errorf("number %#x: whole %v, want %v", number, o.Whole(), inside)
		}
	}
}

func TestSplit(t *testing.T) {
	long := func(first byte, version uint32, id string, rest ...byte) []byte {
		b := binary.BigEndian.AppendUint32([]byte{first}, version)
		b = append(append(b, byte(len(id))), id...)
		return append(append(b, 0), rest...)
	}
	handshake := long(0xe0, version1, "server", append([]byte{0x40, 20}, make([]byte, 20)...)...)
	ping := seal(t, version1, rfcConnID, 0, []byte{1}, 100)
	for _, row := range []struct {
		what           string
		p              []byte
		initial, early bool
		err            error
	}{
		{"an Initial packet", ping, true, false, nil},
		{"of version 2", seal(t, version2, rfcConnID, 0, []byte{1}, 100), true, false, nil},
		{"behind a packet of a handshake", append(bytes.Clone(handshake), seal(t, version1, []byte("server"), 0, []byte{1}, 100)...), true, false, nil},
		{"behind another one's packet", append(bytes.Clone(handshake), ping...), false, false, errUnreadable},
		{"more packets than one datagram has", bytes.Repeat(handshake, maxPackets+1), false, false, errUnreadable},
		{"a packet of a handshake", handshake, false, false, nil},
		{"early data", long(0xd0, version1, "server", 0), false, true, nil},
		{"of version 2's draft", seal(t, versionDraft2, rfcConnID, 0, []byte{1}, 100), true, false, nil},
		{"of version 2's draft, typed as version 1 types it", long(0xc0, versionDraft2, "server", 0), false, false, errUnreadable},
		{"early data of version 2", long(0xe0, version2, "server", 0), false, true, nil},
		{"a Retry", long(0xf0, version1, "server", 0), false, false, errUnreadable},
		{"a Retry of version 2", long(0xc0, version2, "server", 0), false, false, errUnreadable},
		{"version negotiation", long(0x80, 0, "server", 0, 0, 0, 1), false, false, errUnreadable},
		{"a version nobody knows", long(0xc0, 9, "server", 0, 0), false, false, errUnreadable},
		{"a header that is cut", []byte{0xe0, 0, 0, 0, 1}, false, false, errUnreadable},
		{"a packet that is cut", ping[:len(ping)-1], false, false, errUnreadable},
		{"an ID that is too long", long(0xe0, version1, string(make([]byte, maxConnID+1)), 0), false, false, errUnreadable},
		{"an Initial packet without a sample", long(0xc0, version1, "server", 0, 4, 0, 0, 0, 0), false, false, errUnreadable},
		{"a short header behind it", append(bytes.Clone(ping), 0x40, 1, 2), true, false, nil},
	} {
		d, err := Split(row.p)
		if !errors.Is(err, row.err) || err == nil && (d.Initial() != row.initial || d.Early != row.early) {
			t.Errorf("%s: Initial %v, early %v, %v", row.what, d.Initial(), d.Early, err)
		}
	}
	if LongHeader(nil) || LongHeader([]byte{0x40, 0xc0}) || !LongHeader([]byte{0x80}) {
		t.Error("long headers are not told from short ones")
	}
}

func TestTheServersConnectionIDs(t *testing.T) {
	header := func(first byte, version uint32, source string, rest ...byte) []byte {
		b := append(binary.BigEndian.AppendUint32([]byte{first}, version), 0, byte(len(source)))
		return append(append(b, source...), rest...)
	}
	both := append(header(0xc0, version1, "one", 0, 2, 'x', 'y'), header(0xe0, version1, "two", 1, 'x')...)
	for _, row := range []struct {
		what string
		p    []byte
		want []string
	}{
		{"its first flight", both, []string{"one", "two"}},
		{"a Retry", header(0xf0, version1, "retry", 't'), nil},
		{"version negotiation", header(0xc0, 0, "echo", 0, 0, 0, 1), nil},
		{"a short header", []byte{0x40, 0, 0, 0, 1}, nil},
		{"a cut one", both[:6], nil},
	} {
		var got []string
		SourceIDs(row.p, func(id []byte) { got = append(got, string(id)) })
		if !slices.Equal(got, row.want) {
			t.Errorf("%s: %q, want %q", row.what, got, row.want)
		}
	}
}
