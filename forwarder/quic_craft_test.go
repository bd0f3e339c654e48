package forwarder

// Crafted QUIC: Initial packets sealed with keys that are derived here again, so that the gate does
// not make what it reads.

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"math/big"
	"slices"
	"testing"

	"sluice.dev/sluice/internal/testutil"
)

const (
	quic1 = 0x00000001
	quic2 = 0x6b3343cf
	// quicDraft2 is version 2 as in its drafts.
	quicDraft2 = 0x709a50c4
)

// craftKeys holds the client's Initial keys of a connection.
type craftKeys struct {
	block, hp cipher.Block
	aead      cipher.AEAD
	iv        []byte
}

func keysOf(version uint32, id []byte) (k craftKeys) {
	salt, prefix := "38762cf7f55934b34d179ae6a4c80cadccbb7f0a", "quic"
	switch version {
	case quic2:
		salt, prefix = "0dede3def700a6db819381be6e269dcbf9bd2ed9", "quicv2"
	case quicDraft2:
		salt, prefix = "a707c203a59b47184a1d62ca570406ea7ae3e5d3", "quicv2"
	}
	raw, err := hex.DecodeString(salt)
	noError(err)
	label := func(secret []byte, l string, n int) []byte {
		info := slices.Concat([]byte{0, byte(n), byte(6 + len(l))}, []byte("tls13 "+l), []byte{0})
		out, err := hkdf.Expand(sha256.New, secret, string(info), n)
		noError(err)
		return out
	}
	secret, err := hkdf.Extract(sha256.New, id, raw)
	noError(err)
	client := label(secret, "client in", 32)
	k.block, err = aes.NewCipher(label(client, prefix+" key", 16))
	noError(err)
	k.hp, err = aes.NewCipher(label(client, prefix+" hp", 16))
	noError(err)
	k.aead, err = cipher.NewGCM(k.block)
	noError(err)
	k.iv = label(client, prefix+" iv", 12)
	return k
}

// noError panics on an error: with keys of the right size nothing here fails.
func noError(err error) {
	if err != nil {
		panic(err)
	}
}

func (k *craftKeys) nonce(number uint64) []byte {
	n := bytes.Clone(k.iv)
	binary.BigEndian.PutUint64(n[4:], binary.BigEndian.Uint64(n[4:])^number)
	return n
}

// crafted is an Initial packet before it is sealed.
type crafted struct {
	version uint32
	id      []byte // the destination connection ID in the header
	keys    []byte // the ID from which its keys are derived, if a different one
	source  []byte
	number  uint32
	frames  []byte
	size    int // at least, by PADDING
}

// longHead returns a long header up to its length field.
func longHead(first byte, version uint32, id, source []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{first}, version)
	return slices.Concat(b, []byte{byte(len(id))}, id, []byte{byte(len(source))}, source)
}

func (c crafted) seal() []byte {
	if c.version == 0 {
		c.version = quic1
	}
	if c.keys == nil {
		c.keys = c.id
	}
	first := byte(0xc3)
	if c.version != quic1 {
		first = 0xd3
	}
	k := keysOf(c.version, c.keys)
	b := append(longHead(first, c.version, c.id, c.source), 0) // no token
	if pad := c.size - len(b) - 2 - 4 - len(c.frames) - 16; pad > 0 {
		c.frames = append(bytes.Clone(c.frames), make([]byte, pad)...)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(0x4000|4+len(c.frames)+16))
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, c.number)
	b = k.aead.Seal(b, k.nonce(uint64(c.number)), c.frames, b)
	k.mask(b, at, 4)
	return b
}

// mask applies the header protection to n bytes of packet number.
func (k *craftKeys) mask(b []byte, at, n int) {
	var mask [16]byte
	k.hp.Encrypt(mask[:], b[at+4:])
	b[0] ^= mask[0] & 0x0f
	for i := range n {
		b[at+i] ^= mask[1+i]
	}
}

// sealTwice makes an Initial packet to id whose tag is valid under two sets of keys: its own, under
// which it says frames, and those of another connection, under which it says nothing in particular.
// It solves for one ciphertext block: both tags are linear in it.
func sealTwice(t testing.TB, id, other, frames []byte) []byte {
	t.Helper()
	a, b := keysOf(quic1, id), keysOf(quic1, other)
	for try := 0; ; try++ {
		head := append(longHead(0xc0, quic1, id, nil), 0)
		text := make([]byte, 1200-len(head)-3-16)
		for i := range 16 { // PADDING or PING, which make the sample of the header protection
			text[i] = byte(try >> i & 1)
		}
		copy(text[16:], frames)
		head = binary.BigEndian.AppendUint16(head, uint16(0x4000|1+len(text)+16))
		at := len(head)
		plain := append(bytes.Clone(head), 0) // packet number 0, in one byte
		wire := a.aead.Seal(bytes.Clone(plain), a.nonce(0), text, plain)
		a.mask(wire, at, 1)
		// The header as the other keys read it.
		theirs := bytes.Clone(wire[:at+1])
		var mask [16]byte
		b.hp.Encrypt(mask[:], wire[at+4:])
		theirs[0] ^= mask[0] & 0x0f
		if theirs[0]&0x0f != 0 {
			continue
		}
		theirs[at] ^= mask[1]
		sealed := wire[at+1:]
		body := sealed[:len(sealed)-16]
		// The free block is the last whole one. Under the first keys it is in the reason of a
		// CONNECTION_CLOSE, after everything that they should read.
		free := len(body)/16*16 - 16
		tail := slices.Concat([]byte{0x1c, 0, 0, 0x40, byte(len(body) - free)})
		start := free - len(tail)
		for i, x := range tail {
			body[start+i] ^= text[start+i] ^ x
		}
		solve(&a, &b, plain, theirs, uint64(theirs[at]), sealed, free)
		if _, err := a.aead.Open(nil, a.nonce(0), sealed, plain); err != nil {
			t.Fatal("the packet does not open by its own keys")
		}
		if _, err := b.aead.Open(nil, b.nonce(uint64(theirs[at])), sealed, theirs); err != nil {
			t.Fatal("the packet does not open by the other keys")
		}
		return wire
	}
}

// element is one of GF(2^128) in the form that GCM uses (NIST SP 800-38D, section 6.3).
type element struct{ hi, lo uint64 }

func elementOf(b []byte) element {
	return element{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func (x element) add(y element) element { return element{x.hi ^ y.hi, x.lo ^ y.lo} }

func (x element) mul(y element) (z element) {
	for i := range 128 {
		word := x.hi
		if i >= 64 {
			word = x.lo
		}
		if word>>(63-i%64)&1 == 1 {
			z = z.add(y)
		}
		carry := y.lo & 1
		y.lo = y.lo>>1 | y.hi<<63
		y.hi = y.hi>>1 ^ carry*0xe1<<56
	}
	return z
}

func (x element) inverse() element {
	z, p := element{hi: 1 << 63}, x
	e := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 128), big.NewInt(2))
	for i := range e.BitLen() {
		if e.Bit(i) == 1 {
			z = z.mul(p)
		}
		p = p.mul(p)
	}
	return z
}

// tag computes the sum that GCM makes, and the factor of the block at free.
func (k *craftKeys) tag(head []byte, number uint64, body []byte, free int) (sum, factor element) {
	var h, j [16]byte
	k.block.Encrypt(h[:], h[:])
	copy(j[:], k.nonce(number))
	j[15] = 1
	k.block.Encrypt(j[:], j[:])
	key := elementOf(h[:])
	blocks := func(b []byte, note int) {
		for at := 0; at < len(b); at += 16 {
			var block [16]byte
			copy(block[:], b[at:])
			sum = sum.add(elementOf(block[:])).mul(key)
			factor = factor.mul(key)
			if at == note {
				factor = key
			}
		}
	}
	blocks(head, -1)
	blocks(body, free)
	sum = sum.add(element{uint64(len(head)) * 8, uint64(len(body)) * 8}).mul(key)
	return sum.add(elementOf(j[:])), factor.mul(key)
}

// solve sets the block at free and the tag, so that both sets of keys agree.
func solve(a, b *craftKeys, headA, headB []byte, numberB uint64, sealed []byte, free int) {
	body := sealed[:len(sealed)-16]
	clear(body[free : free+16])
	sumA, byA := a.tag(headA, 0, body, free)
	sumB, byB := b.tag(headB, numberB, body, free)
	x := sumA.add(sumB).mul(byA.add(byB).inverse())
	binary.BigEndian.PutUint64(body[free:], x.hi)
	binary.BigEndian.PutUint64(body[free+8:], x.lo)
	tag := sumA.add(x.mul(byA))
	binary.BigEndian.PutUint64(sealed[len(body):], tag.hi)
	binary.BigEndian.PutUint64(sealed[len(body)+8:], tag.lo)
}

// craftCrypto returns a CRYPTO frame.
func craftCrypto(offset int, data []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{6}, 0x4000|uint16(offset))
	return append(binary.BigEndian.AppendUint16(b, 0x4000|uint16(len(data))), data...)
}

// craftHello returns a ClientHello that a QUIC server accepts.
func craftHello(t testing.TB, name string) []byte {
	t.Helper()
	c := tls.QUICClient(&tls.QUICConfig{TLSConfig: &tls.Config{ServerName: name, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"echo"}, CurvePreferences: []tls.CurveID{tls.X25519}}})
	c.SetTransportParameters([]byte{0x0f, 0}) // an empty initial_source_connection_id
	testutil.Must(t, c.Start(context.Background()))
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

func craftID() []byte {
	id := make([]byte, 8)
	_, _ = rand.Read(id)
	return id
}
