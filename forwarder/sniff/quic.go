package sniff

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
)

// QUIC Initial packets (RFC 9000, section 17.2.2; RFC 9001, section 5; RFC 9369). They
// are encrypted with keys that follow from the connection ID in them, so that everyone on
// the way can read them. The ClientHello in them may be cut into CRYPTO frames of any
// size and order, in several packets of a datagram and in several datagrams.

const (
	version1 = 0x00000001
	version2 = 0x6b3343cf

	maxConnID = 20
	tagLen    = 16
	sampleLen = 16

	// maxDatagrams is how many datagrams are read before the ClientHello must be whole.
	maxDatagrams = 16
	// maxPackets bounds the Initial packets of one datagram.
	maxPackets = 16
)

type quicVersion struct {
	salt        []byte
	initial     byte // the packet type, in bits 4 and 5
	key, iv, hp string
}

var quicVersions = map[uint32]quicVersion{
	version1: {
		salt: []byte{0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17,
			0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a},
		initial: 0, key: "quic key", iv: "quic iv", hp: "quic hp",
	},
	version2: {
		salt: []byte{0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93,
			0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9},
		initial: 1, key: "quicv2 key", iv: "quicv2 iv", hp: "quicv2 hp",
	},
}

// Initial collects the ClientHello of one QUIC connection. The zero value is ready.
type Initial struct {
	version   uint32
	connID    string
	keys      *initialKeys
	datagrams int
	crypto    []byte // the handshake stream as far as anything of it came
	have      []bool // which of its bytes did
	front     int    // how many at its front
}

var errNotQUIC = errors.New("not a QUIC Initial packet")

// MayBegin tells whether a datagram may begin a connection, as those that carry an Initial
// packet do, and those whose packets cannot be told apart: of a version that is not known
// here, or broken. Of a connection that is set up no datagram may.
func MayBegin(p []byte) bool {
	begins := false
	walk(p, func(_ []byte, _ int, initial bool) bool {
		begins = initial
		return !initial
	})
	return begins
}

// walk yields the long-header packets of a datagram (RFC 9000, section 12.2), each with the
// place of its packet number, and whether it is, or may be, an Initial.
func walk(p []byte, yield func(packet []byte, at int, initial bool) bool) {
	for len(p) > 0 && p[0]&0x80 != 0 {
		c := cursor{b: p}
		first := c.uint(1)
		v, known := quicVersions[uint32(c.uint(4))]
		c.vector(1)
		c.vector(1)
		initial := byte(first)>>4&3 == v.initial
		if initial {
			c.take(c.varint()) // token
		}
		length := c.varint()
		at := len(p) - len(c.b)
		if c.bad || !known || length > len(c.b) {
			yield(p, 0, true)
			return
		}
		if !yield(p[:at+length], at, initial) {
			return
		}
		p = p[at+length:]
	}
}

// Continues tells whether all Initial packets of a datagram, of which there must be one, are
// of the connection that was read: its keys remain those of its first packet, while the
// server chooses another connection ID (RFC 9001, section 5.2).
func (q *Initial) Continues(p []byte) bool {
	ours := false
	walk(p, func(packet []byte, at int, initial bool) bool {
		if !initial {
			return true
		}
		ours = q.keys != nil && at > 0 && len(packet) >= at+4+sampleLen && binary.BigEndian.Uint32(packet[1:]) == q.version
		if ours {
			_, ours = q.keys.open(packet, at)
		}
		return ours
	})
	return ours
}

// SameID tells whether a datagram's first packet is to the connection ID that was read.
func (q *Initial) SameID(p []byte) bool {
	c := cursor{b: p}
	c.skip(5)
	return q.keys != nil && string(c.vector(1)) == q.connID && !c.bad
}

// Add reads a datagram. A Seen of Kind None asks for more. What is no QUIC is Opaque, if
// it came first; later datagrams that cannot be read are ErrMalformed.
func (q *Initial) Add(p []byte) (Seen, error) {
	seen := Seen{Kind: QUIC}
	if q.datagrams++; q.datagrams > maxDatagrams {
		return seen, ErrTooLong
	}
	read := false
	for range maxPackets {
		rest, err := q.packet(p)
		if errors.Is(err, errNotQUIC) {
			break // packets of other types, and padding, may follow
		}
		if err != nil {
			return seen, err
		}
		read = true
		if p = rest; len(p) == 0 {
			break
		}
	}
	if !read {
		if q.datagrams == 1 {
			return Seen{Kind: Opaque}, nil
		}
		return seen, ErrMalformed
	}
	if q.front < handshakeHeader {
		return Seen{}, nil
	}
	whole := handshakeHeader + int(q.crypto[1])<<16 + int(q.crypto[2])<<8 + int(q.crypto[3])
	switch {
	case q.crypto[0] != typeClientHello:
		return seen, ErrMalformed
	case whole > MaxFirst:
		return seen, ErrTooLong
	case q.front < whole:
		return Seen{}, nil
	case len(q.crypto) > whole:
		return seen, ErrMalformed
	}
	err := seen.readHello(q.crypto[handshakeHeader:whole])
	// What Continues needs stays; there is nothing more to add.
	*q = Initial{version: q.version, connID: q.connID, keys: q.keys, datagrams: maxDatagrams}
	return seen, err
}

// packet reads the packet at the front of p and returns what follows it.
func (q *Initial) packet(p []byte) (rest []byte, err error) {
	c := cursor{b: p}
	first := c.uint(1)
	version := uint32(c.uint(4))
	connID := c.vector(1)
	source := c.vector(1)
	v, known := quicVersions[version]
	if c.bad || first&0xc0 != 0xc0 || !known || len(connID) > maxConnID || len(source) > maxConnID {
		return nil, errNotQUIC
	}
	if byte(first)>>4&3 != v.initial {
		return nil, errNotQUIC
	}
	c.take(c.varint()) // token
	length := c.varint()
	at := len(p) - len(c.b) // of the packet number
	if c.bad || length > len(c.b) || length < 4+sampleLen {
		return nil, errNotQUIC
	}
	if q.keys == nil {
		keys, err := newInitialKeys(v, connID)
		if err != nil {
			return nil, errNotQUIC
		}
		q.keys, q.version, q.connID = keys, version, string(connID)
	}
	if q.version != version || q.connID != string(connID) {
		return nil, ErrMalformed
	}
	frames, ok := q.keys.open(p[:at+length], at)
	if !ok {
		if q.front == 0 && len(q.crypto) == 0 {
			q.keys = nil
			return nil, errNotQUIC
		}
		return nil, ErrMalformed
	}
	return p[at+length:], q.frames(frames)
}

// frames takes the handshake's bytes out of a packet's frames (RFC 9000, section 12.4).
func (q *Initial) frames(p []byte) error {
	c := cursor{b: p}
	for len(c.b) > 0 {
		switch typ := c.varint(); typ {
		case 0x00, 0x01: // PADDING, PING
		case 0x02, 0x03: // ACK
			c.varint()
			c.varint()
			ranges := c.varint()
			c.varint()
			for ; ranges > 0 && !c.bad; ranges-- {
				c.varint()
				c.varint()
			}
			if typ == 0x03 {
				c.varint()
				c.varint()
				c.varint()
			}
		case 0x06: // CRYPTO
			offset := c.varint()
			data := c.take(c.varint())
			if c.bad {
				return ErrMalformed
			}
			if err := q.put(offset, data); err != nil {
				return err
			}
		default:
			return ErrMalformed
		}
		if c.bad {
			return ErrMalformed
		}
	}
	return nil
}

// put notes bytes of the handshake stream. A byte that came before must be the same.
func (q *Initial) put(offset int, data []byte) error {
	end := offset + len(data)
	if offset > MaxFirst || end > MaxFirst {
		return ErrTooLong
	}
	if end > len(q.crypto) {
		q.crypto = append(q.crypto, make([]byte, end-len(q.crypto))...)
		q.have = append(q.have, make([]bool, end-len(q.have))...)
	}
	for i, b := range data {
		if q.have[offset+i] && q.crypto[offset+i] != b {
			return ErrMalformed
		}
		q.crypto[offset+i], q.have[offset+i] = b, true
	}
	for q.front < len(q.have) && q.have[q.front] {
		q.front++
	}
	return nil
}

// varint is a number as in RFC 9000, section 16. What does not fit an int is an overrun.
func (c *cursor) varint() int {
	if len(c.b) == 0 {
		c.bad = true
		return 0
	}
	n := 1 << (c.b[0] >> 6)
	v := c.uint(n)
	return v &^ (3 << (8*n - 2))
}

// initialKeys are the client's.
type initialKeys struct {
	aead cipher.AEAD
	iv   []byte
	hp   cipher.Block
}

func newInitialKeys(v quicVersion, connID []byte) (*initialKeys, error) {
	initial, err := hkdf.Extract(sha256.New, connID, v.salt)
	if err != nil {
		return nil, err
	}
	client, err := expandLabel(initial, "client in", sha256.Size)
	if err != nil {
		return nil, err
	}
	k := new(initialKeys)
	var blocks [2]cipher.Block
	for i, label := range []string{v.key, v.hp} {
		key, err := expandLabel(client, label, 16)
		if err != nil {
			return nil, err
		}
		if blocks[i], err = aes.NewCipher(key); err != nil {
			return nil, err
		}
	}
	k.hp = blocks[1]
	if k.aead, err = cipher.NewGCM(blocks[0]); err != nil {
		return nil, err
	}
	k.iv, err = expandLabel(client, v.iv, 12)
	return k, err
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446, section 7.1).
func expandLabel(secret []byte, label string, n int) ([]byte, error) {
	info := append([]byte{byte(n >> 8), byte(n), byte(len("tls13 ") + len(label))}, "tls13 "...)
	info = append(append(info, label...), 0)
	return hkdf.Expand(sha256.New, secret, string(info), n)
}

// open removes the protection of a packet whose packet number is at at (RFC 9001, section
// 5.4). The packet itself is left as it is.
func (k *initialKeys) open(p []byte, at int) ([]byte, bool) {
	var mask [aes.BlockSize]byte
	k.hp.Encrypt(mask[:], p[at+4:at+4+sampleLen])
	first := p[0] ^ mask[0]&0x0f
	n := int(first&3) + 1
	head := append([]byte(nil), p[:at+n]...)
	head[0] = first
	var number uint64 // counts from 0, so that what was cut off is 0 too
	for i := range n {
		head[at+i] ^= mask[1+i]
		number = number<<8 | uint64(head[at+i])
	}
	nonce := append([]byte(nil), k.iv...)
	for i := range 8 {
		nonce[len(nonce)-1-i] ^= byte(number >> (8 * i))
	}
	frames, err := k.aead.Open(nil, nonce, p[at+n:], head)
	return frames, err == nil
}
