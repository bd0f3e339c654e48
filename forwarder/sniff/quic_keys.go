package sniff

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
)

// The keys of Initial packets (RFC 9001, sections 5.2 to 5.4; RFC 9369, section 3.3). They are
// derived from a connection ID that everyone on the path can read.

const (
	version1 = 0x00000001
	version2 = 0x6b3343cf
	// versionDraft2 is version 2 as in its drafts, which Debian 12's ngtcp2 speaks. It has another
	// salt. Servers of the first drafts, which numbered the packet types as version 1 does, never
	// get a hello: their Initial packets are taken for a Retry, which is refused.
	versionDraft2 = 0x709a50c4

	tagLen    = 16
	sampleLen = 16
)

// quicVersion is a version whose Initial packets can be opened.
type quicVersion struct {
	salt []byte
	// initial is the type of an Initial packet, in bits 4 and 5. 0-RTT, Handshake and Retry follow
	// it, modulo 4.
	initial     byte
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
	versionDraft2: {
		salt: []byte{0xa7, 0x07, 0xc2, 0x03, 0xa5, 0x9b, 0x47, 0x18, 0x4a, 0x1d,
			0x62, 0xca, 0x57, 0x04, 0x06, 0xea, 0x7a, 0xe3, 0xe5, 0xd3},
		initial: 1, key: "quicv2 key", iv: "quicv2 iv", hp: "quicv2 hp",
	},
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

// sealedPacket is a packet without its header protection (RFC 9001, section 5.4).
type sealedPacket struct {
	head    []byte // a copy, which is also the additional data
	sealed  []byte
	number  int64 // the part of it that the packet carries
	numLen  int
	keys    *initialKeys
	opening []byte // room for the decrypted bytes
}

// unmask removes the header protection of a packet whose packet number is at offset at, with a
// sample and a tag after it. The packet itself is left unchanged.
func (k *initialKeys) unmask(p []byte, at int) sealedPacket {
	var mask [aes.BlockSize]byte
	k.hp.Encrypt(mask[:], p[at+4:at+4+sampleLen])
	first := p[0] ^ mask[0]&0x0f
	s := sealedPacket{numLen: int(first&3) + 1, keys: k}
	s.head = append(make([]byte, 0, at+s.numLen), p[:at+s.numLen]...)
	s.head[0], s.sealed = first, p[at+s.numLen:]
	for i := range s.numLen {
		s.head[at+i] ^= mask[1+i]
		s.number = s.number<<8 | int64(s.head[at+i])
	}
	return s
}

// numberAfter returns the full packet number, where largest is the one before it, or -1 (RFC 9000,
// appendix A.3).
func (s *sealedPacket) numberAfter(largest int64) int64 {
	expected, window := largest+1, int64(1)<<(8*s.numLen)
	n := expected&^(window-1) | s.number
	switch {
	case n <= expected-window/2 && n < 1<<62-window:
		return n + window
	case n > expected+window/2 && n >= window:
		return n - window
	}
	return n
}

// open decrypts the packet. Under one key no packet opens with two numbers: its tag is a sum to
// which each nonce adds another block.
func (s *sealedPacket) open(number int64) ([]byte, bool) {
	var nonce [12]byte
	copy(nonce[:], s.keys.iv)
	for i := range 8 {
		nonce[len(nonce)-1-i] ^= byte(number >> (8 * i))
	}
	if s.opening == nil {
		s.opening = make([]byte, 0, len(s.sealed))
	}
	frames, err := s.keys.aead.Open(s.opening, nonce[:], s.sealed, s.head)
	return frames, err == nil
}
