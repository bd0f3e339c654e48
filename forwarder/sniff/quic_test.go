package sniff

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"testing"
)

// seal makes an Initial packet of frames, padded to size.
func seal(t testing.TB, version uint32, connID []byte, number uint32, frames []byte, size int) []byte {
	t.Helper()
	v := quicVersions[version]
	k, err := newInitialKeys(v, connID)
	if err != nil {
		t.Fatal(err)
	}
	b := binary.BigEndian.AppendUint32([]byte{0xc3 | v.initial<<4}, version)
	b = append(append(b, byte(len(connID))), connID...)
	b = append(b, 0, 0) // source connection ID, token
	at := len(b) + 2
	if pad := size - at - 4 - len(frames) - tagLen; pad > 0 {
		frames = append(append([]byte(nil), frames...), make([]byte, pad)...)
	}
	b = binary.BigEndian.AppendUint16(b, 0x4000|uint16(4+len(frames)+tagLen))
	b = binary.BigEndian.AppendUint32(b, number)
	nonce := append([]byte(nil), k.iv...)
	for i := range 4 {
		nonce[11-i] ^= byte(number >> (8 * i))
	}
	b = k.aead.Seal(b, nonce, frames, b)
	var mask [16]byte
	k.hp.Encrypt(mask[:], b[at+4:at+4+sampleLen])
	b[0] ^= mask[0] & 0x0f
	for i := range 4 {
		b[at+i] ^= mask[1+i]
	}
	return b
}

func cryptoFrame(offset int, data []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{6}, 0x4000|uint16(offset))
	return append(binary.BigEndian.AppendUint16(b, 0x4000|uint16(len(data))), data...)
}

// quicHello is what Go's QUIC client says first.
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
		var q Initial
		if s, err := q.Add(p); err != nil || s != (Seen{Kind: QUIC, Name: "example.com"}) {
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
	handshake := append([]byte{0xe0, 0, 0, 0, 1, 0, 0, 0x40, 20}, make([]byte, 20)...)
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
		{"with something behind it", [][]byte{packet(0, cut(len(msg))[0], cryptoFrame(len(msg), []byte{1}))}, Seen{}, ErrMalformed},
		{"with a frame that does not belong there", [][]byte{packet(0, []byte{0x08, 0}, cut(len(msg))[0])}, Seen{}, ErrMalformed},
		{"beyond what is read", [][]byte{packet(0, cryptoFrame(0x3fff, []byte{1, 2}))}, Seen{}, ErrTooLong},
		{"and then another connection", [][]byte{packet(0, thirds[0]), seal(t, version1, []byte("12345678"), 1, thirds[1], 0)}, Seen{}, ErrMalformed},
		{"and then noise", [][]byte{packet(0, thirds[0]), []byte("noise")}, Seen{}, ErrMalformed},
		{"with a bit turned", [][]byte{turned(packet(0, cut(len(msg))[0]))}, Seen{Kind: Opaque}, nil},
		{"of a version nobody knows", [][]byte{append([]byte{0xc3, 0xa, 0xa, 0xa, 0xa}, packet(0, thirds[0])[5:]...)}, Seen{Kind: Opaque}, nil},
		{"not at all", [][]byte{[]byte("hello")}, Seen{Kind: Opaque}, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			var q Initial
			var got Seen
			var err error
			for i, d := range row.datagrams {
				before := bytes.Clone(d)
				if got, err = q.Add(d); err != nil || got.Kind != None && i < len(row.datagrams)-1 {
					break
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

func TestAQUICHelloIsNotWaitedForForEver(t *testing.T) {
	var q Initial
	ping := seal(t, version1, rfcConnID, 0, []byte{1}, 100)
	for range maxDatagrams {
		if s, err := q.Add(ping); s.Kind != None || err != nil {
			t.Fatalf("%+v, %v", s, err)
		}
	}
	if _, err := q.Add(ping); !errors.Is(err, ErrTooLong) {
		t.Errorf("datagram %d: %v", maxDatagrams+1, err)
	}
}

func TestWhatMayBeginAConnection(t *testing.T) {
	handshake := append([]byte{0xe0, 0, 0, 0, 1, 0, 0, 0x40, 20}, make([]byte, 20)...)
	for _, row := range []struct {
		what string
		p    []byte
		want bool
	}{
		{"an Initial packet", seal(t, version1, rfcConnID, 0, []byte{1}, 100), true},
		{"of version 2", seal(t, version2, rfcConnID, 0, []byte{1}, 100), true},
		{"behind another one", append(bytes.Clone(handshake), seal(t, version1, rfcConnID, 0, []byte{1}, 100)...), true},
		{"a version nobody knows", []byte{0xc0, 0, 0, 0, 9, 0, 0}, true},
		{"a header that is cut", []byte{0xe0, 0, 0, 0, 1}, true},
		{"a packet of a handshake", handshake, false},
		{"a short header", []byte{0x40, 0, 0, 0, 1}, false},
		{"nothing", nil, false},
	} {
		if got := MayBegin(row.p); got != row.want {
			t.Errorf("%s: %v", row.what, got)
		}
	}
}

func TestWhatContinuesAConnection(t *testing.T) {
	var q Initial
	if q.Continues(seal(t, version1, rfcConnID, 0, []byte{1}, 100)) {
		t.Error("nothing was read yet")
	}
	if _, err := q.Add(seal(t, version1, rfcConnID, 0, cryptoFrame(0, quicHello(t, "quic.example")), 1200)); err != nil {
		t.Fatal(err)
	}
	ack := seal(t, version1, rfcConnID, 1, []byte{2, 0, 0, 0, 0}, 100)
	other := seal(t, version1, []byte("12345678"), 1, []byte{1}, 100)
	for _, row := range []struct {
		what string
		p    []byte
		want bool
	}{
		{"its next packet", ack, true},
		{"with a packet of its handshake", append(bytes.Clone(ack), 0xe0, 0, 0, 0, 1, 0, 0, 0), true},
		{"another connection's", other, false},
		{"another one's behind its own", append(bytes.Clone(ack), other...), false},
		{"no Initial at all", []byte{0x40, 1, 2}, false},
	} {
		if got := q.Continues(row.p); got != row.want {
			t.Errorf("%s: %v", row.what, got)
		}
	}
	if !q.SameID(ack) || q.SameID(other) || q.SameID(nil) {
		t.Error("connection IDs are mixed up")
	}
}
