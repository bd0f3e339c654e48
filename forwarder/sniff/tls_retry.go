package sniff

import "encoding/binary"

// The handshake after the first ClientHello.
//
// A server may answer it with HelloRetryRequest, and then reads another ClientHello, in the clear
// and with a server name of its own (RFC 8446, sections 4.1.2 and 4.1.4). nginx and OpenSSL serve
// that name. With any other ServerHello the keys are settled, and nothing that the client sends in
// the clear names a server any more.
//
//	client  ──NextRecord──► the records, and whether one may begin a ClientHello; Hello reads it
//	server  ──HelloAnswer──► whether it asked for another one, is settled, or speaks no TLS

const (
	recordChangeCipher = 20
	recordAlert        = 21
	recordData         = 23
	// recordCipherMax is the most bytes that an encrypted record may have (RFC 5246, section
	// 6.2.3).
	recordCipherMax = recordMax + 2048

	typeServerHello = 2
	randomAt        = handshakeHeader + 2
	randomLen       = 32
)

// retryRandom is the random of a ServerHello that is a HelloRetryRequest (RFC 8446, section 4.1.3).
const retryRandom = "\xcf\x21\xad\x74\xe5\x9a\x61\x11\xbe\x1d\x8c\x02\x1e\x65\xb8\x91" +
	"\xc2\xa2\x11\x16\x7a\xbb\x8c\x5e\x07\x9e\x09\xe2\xc8\xa8\x33\x9c"

// RecordLook is the most bytes that NextRecord needs to see.
const RecordLook = recordHeader + 1

// Record is one record from a TLS client.
type Record struct {
	Size      int // the whole record
	Handshake bool
	Hello     bool // it begins as a ClientHello does, if a message begins here
	Alert     bool
}

// NextRecord looks at the record at the front of p. If p holds too little of it, need says how many
// bytes there must be.
func NextRecord(p []byte) (r Record, need int, err error) {
	if len(p) < recordHeader {
		return r, recordHeader, nil
	}
	n := int(binary.BigEndian.Uint16(p[3:]))
	if p[0] < recordChangeCipher || p[0] > recordData || p[1] != 3 || n == 0 && p[0] != recordData || n > recordCipherMax {
		return r, 0, ErrMalformed
	}
	r = Record{Size: recordHeader + n, Handshake: p[0] == recordHandshake, Alert: p[0] == recordAlert}
	if r.Handshake {
		if len(p) < RecordLook {
			return r, RecordLook, nil
		}
		r.Hello = p[recordHeader] == typeClientHello
	}
	return r, 0, nil
}

// HelloAnswer reads a server's answers to ClientHellos. It holds no more than the start of a record
// and of a message. The zero value stands before the first answer.
type HelloAnswer struct {
	// Retries is how often the server asked for another ClientHello.
	Retries int
	// Settled reports that the server asks for no further ClientHello. Foreign reports that it does
	// not speak TLS, after which nothing more is read.
	Settled, Foreign bool

	record [recordHeader]byte
	n      int // of record, so far
	left   int // of its content
	msg    [randomAt + randomLen]byte
	got    int // of msg, so far
	skip   int // bytes of a message whose start was read
}

// Feed consumes bytes that the server sent.
func (a *HelloAnswer) Feed(p []byte) {
	for len(p) > 0 && !a.Settled && !a.Foreign {
		if a.left == 0 {
			n := copy(a.record[a.n:], p)
			a.n += n
			p = p[n:]
			if a.n == len(a.record) {
				a.n = 0
				a.begin()
			}
			continue
		}
		n := min(a.left, len(p))
		if a.record[0] == recordHandshake {
			n = a.handshake(p[:n])
		}
		a.left -= n
		p = p[n:]
	}
}

// begin handles a record's header.
func (a *HelloAnswer) begin() {
	a.left = int(binary.BigEndian.Uint16(a.record[3:]))
	switch a.record[0] {
	case recordHandshake, recordAlert, recordChangeCipher:
		a.Foreign = a.record[1] != 3 || a.left == 0 || a.left > recordMax
	default:
		a.Foreign = true // nothing is encrypted yet
	}
}

// handshake consumes bytes of one record, and returns how many.
func (a *HelloAnswer) handshake(p []byte) int {
	if a.skip > 0 {
		n := min(a.skip, len(p))
		a.skip -= n
		return n
	}
	n := copy(a.msg[a.got:], p)
	a.got += n
	switch {
	case a.msg[0] != typeServerHello:
		a.Foreign = true
	case a.got < len(a.msg):
	case string(a.msg[randomAt:]) != retryRandom:
		a.Settled = true
	default:
		a.Retries++
		a.skip = handshakeHeader + (int(a.msg[1])<<16 | int(a.msg[2])<<8 | int(a.msg[3])) - len(a.msg)
		a.Foreign = a.skip < 0
		a.got = 0
	}
	return n
}
