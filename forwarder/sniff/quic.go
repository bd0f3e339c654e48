package sniff

import "errors"

// QUIC packets that a client sends before the handshake (RFC 9000, sections 12.2 and 17.2; RFC
// 9369).
//
// A datagram is taken apart as a server does it (Split): one or more packets with long headers,
// then perhaps one with a short header, which goes to the datagram's end. The server finds the
// connection by the first packet's destination connection ID. The keys of the Initial packets
// depend on the connection, so the caller must know what ID it is: the client's first one, from
// which the keys follow, or one that the server has chosen since (SourceIDs).
//
// Initial is one connection. Its ClientHello comes in CRYPTO frames of any size and order, in
// several packets and datagrams, some of which may never reach the server. So every byte that was
// sent is kept, and must be the same whenever it is sent again. The server then always assembles a
// part of the stream that was read here.

const (
	maxConnID = 20
	// maxPackets bounds the long-header packets in one datagram.
	maxPackets = 16
	// numberWindow is how far the packet numbers of a connection's Initial packets may be from the
	// first one's. It bounds the number of Initial packets of a connection, and the numbers for
	// which a server may take a shortened one.
	numberWindow = 128
)

// errUnreadable is returned for datagrams in which a server might find a connection that cannot be
// read here: cut ones, and those of an unknown version, for several connections at once, or of
// types that only servers send.
var errUnreadable = errors.New("long-header packets that cannot be read")

// LongHeader reports whether a datagram begins with a long header. No other can begin a connection.
// Nearly all datagrams of an established connection have a short one.
func LongHeader(p []byte) bool { return len(p) > 0 && p[0]&0x80 != 0 }

// Datagram is a datagram that begins with a long header. It refers to the bytes passed to Split.
type Datagram struct {
	ID    []byte // the destination connection ID of all its packets
	Early bool   // some carry 0-RTT data

	version  uint32
	initials []longPacket
}

// Initial reports whether the datagram has Initial packets.
func (d *Datagram) Initial() bool { return len(d.initials) > 0 }

type longPacket struct {
	bytes []byte
	at    int // offset of the packet number
}

// longHeader reads the part that all versions share (RFC 8999, section 5.1).
func (c *cursor) longHeader() (first byte, version uint32, id, source []byte) {
	first, version = byte(c.uint(1)), uint32(c.uint(4))
	return first, version, c.vector(1), c.vector(1)
}

// Split takes a datagram apart. All its long-header packets must be of one version and for
// one connection ID (RFC 9000, section 12.2), and of a type that a client sends.
func Split(p []byte) (d Datagram, err error) {
	for n := 0; LongHeader(p); n++ {
		c := cursor{b: p}
		first, version, id, source := c.longHeader()
		v, known := quicVersions[version]
		if c.bad || !known || n == maxPackets || len(id) > maxConnID || len(source) > maxConnID {
			return d, errUnreadable
		}
		if n == 0 {
			d.ID, d.version = id, version
		}
		if string(id) != string(d.ID) || version != d.version {
			return d, errUnreadable
		}
		kind := (first>>4 - v.initial) & 3
		if kind == 0 {
			c.take(c.varint()) // token
		}
		length := c.varint()
		at := len(p) - len(c.b)
		packet := longPacket{p[:at+len(c.take(length))], at}
		switch {
		case c.bad:
			return d, errUnreadable
		case kind == 0 && length < 4+sampleLen:
			return d, errUnreadable
		case kind == 0:
			d.initials = append(d.initials, packet)
		case kind == 1:
			d.Early = true
		case kind == 3: // Retry
			return d, errUnreadable
		}
		p = p[len(packet.bytes):]
	}
	return d, nil
}

// SourceIDs yields the connection IDs that a server has chosen in a datagram of its own. A Retry's
// is left out: the client starts over with it, and with new keys.
func SourceIDs(p []byte, yield func(id []byte)) {
	for n := 0; LongHeader(p) && n < maxPackets; n++ {
		c := cursor{b: p}
		first, version, _, source := c.longHeader()
		v, known := quicVersions[version]
		kind := (first>>4 - v.initial) & 3
		if c.bad || !known || kind == 3 {
			return
		}
		yield(source)
		if kind == 0 {
			c.take(c.varint())
		}
		c.take(c.varint())
		p = c.b
	}
}

// Initial is a QUIC connection as far as its Initial packets go.
type Initial struct {
	id    []byte
	keys  map[uint32]*initialKeys // by version: it may change under way (RFC 9368)
	first int64                   // the first packet number; -1 before there is one
	said  Seen                    // from the first ClientHello
	whole int                     // bytes of whole ClientHellos at the stream's front
	err   error                   // the error that broke it; permanent

	crypto []byte // the handshake stream, up to the last byte received
	front  int    // how many of its bytes came without a gap
	have   []bool // which bytes after front have come
}

// NewInitial returns the connection that a client begins with a connection ID.
func NewInitial(id []byte) *Initial {
	return &Initial{id: append([]byte(nil), id...), keys: make(map[uint32]*initialKeys, 1), first: -1}
}

// Size is how many bytes of the handshake stream are kept, at most MaxFirst.
func (q *Initial) Size() int { return len(q.crypto) }

// Opened holds the contents of a datagram's Initial packets.
type Opened struct {
	first  int64
	frames [][]byte
	far    bool // some packet number is outside the window
	closed int  // packets that these keys do not open
}

// Whole reports whether every Initial packet of the datagram is the connection's.
func (o *Opened) Whole() bool { return o.closed == 0 && !o.far }

// Any reports whether any Initial packet is the connection's.
func (o *Opened) Any() bool { return len(o.frames) > 0 }

// Open decrypts the Initial packets of a datagram with the connection's keys.
func (q *Initial) Open(d *Datagram) Opened {
	keys := q.keys[d.version]
	if keys == nil {
		var err error
		if keys, err = newInitialKeys(quicVersions[d.version], q.id); err != nil {
			return Opened{closed: len(d.initials)}
		}
		q.keys[d.version] = keys
	}
	o := Opened{first: q.first}
	for _, p := range d.initials {
		o.open(keys, p)
	}
	return o
}

// open tries every number that a server may take for the packet's, whichever of the numbers in the
// window it has seen.
func (o *Opened) open(keys *initialKeys, p longPacket) {
	s := keys.unmask(p.bytes, p.at)
	tried := [3]int64{s.numberAfter(-1), -1, -1}
	if o.first >= 0 {
		tried[1], tried[2] = s.numberAfter(max(o.first-numberWindow, -1)), s.numberAfter(o.first+numberWindow)
	}
	for i, n := range tried {
		if n < 0 || i > 0 && n == tried[i-1] {
			continue
		}
		frames, ok := s.open(n)
		if !ok {
			continue
		}
		if o.first < 0 {
			o.first = n
		}
		o.far = o.far || max(n-o.first, o.first-n) >= numberWindow
		o.frames = append(o.frames, frames)
		return
	}
	o.closed++
}

// Add reads the packets in o. The datagram may go on to the server once the ClientHellos are whole
// as far as its bytes reach: Whole() >= end. An error means that it never may; it is returned for
// all later datagrams too.
func (q *Initial) Add(o Opened) (end int, err error) {
	if q.first < 0 {
		q.first = o.first
	}
	for _, frames := range o.frames {
		if q.err == nil {
			end, q.err = q.frames(frames, end)
		}
	}
	if q.err == nil {
		q.err = q.hellos()
	}
	return end, q.err
}

// Whole is how many bytes of the handshake stream are whole ClientHellos.
func (q *Initial) Whole() int { return q.whole }

// Said returns what the first ClientHello reveals, of Kind None until it is whole. Later ones,
// which a HelloRetryRequest asks for, say the same.
func (q *Initial) Said() Seen { return q.said }

// Err returns the error that broke the connection.
func (q *Initial) Err() error { return q.err }

// hellos reads the ClientHellos that became whole.
func (q *Initial) hellos() error {
	for q.front >= q.whole+handshakeHeader {
		c := cursor{b: q.crypto[q.whole:q.front]}
		typ, length := c.uint(1), c.uint(3)
		switch {
		case typ != typeClientHello:
			return ErrMalformed
		case length > MaxFirst-q.whole-handshakeHeader:
			return ErrTooLong
		case length > len(c.b):
			return nil
		}
		seen := Seen{Kind: QUIC}
		if err := seen.readHello(c.take(length)); err != nil {
			return err
		}
		if q.whole > 0 && seen != q.said {
			return ErrMalformed
		}
		q.said = seen
		q.whole += handshakeHeader + length
	}
	return nil
}

// frames takes the handshake's bytes out of a packet's frames, of which it accepts those that a
// client may send there (RFC 9000, section 12.4). It returns where the bytes end, if that is beyond
// end.
func (q *Initial) frames(p []byte, end int) (int, error) {
	if len(p) == 0 {
		return end, ErrMalformed
	}
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
				return end, ErrMalformed
			}
			if err := q.put(offset, data); err != nil {
				return end, err
			}
			if len(data) > 0 {
				end = max(end, offset+len(data))
			}
		case 0x1c: // CONNECTION_CLOSE of the transport
			c.varint()
			c.varint()
			c.take(c.varint())
		default:
			return end, ErrMalformed
		}
		if c.bad {
			return end, ErrMalformed
		}
	}
	return end, nil
}

// put stores bytes of the handshake stream. A byte that came before must be the same.
func (q *Initial) put(offset int, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	if offset > MaxFirst || offset+len(data) > MaxFirst {
		return ErrTooLong
	}
	if more := offset + len(data) - len(q.crypto); more > 0 {
		q.crypto = append(q.crypto, make([]byte, more)...)
		q.have = append(q.have, make([]bool, more)...)
	}
	for i, b := range data {
		at := offset + i
		if (at < q.front || q.have[at-q.front]) && q.crypto[at] != b {
			return ErrMalformed
		}
		q.crypto[at] = b
		if at >= q.front {
			q.have[at-q.front] = true
		}
	}
	n := 0
	for n < len(q.have) && q.have[n] {
		n++
	}
	if q.front, q.have = q.front+n, q.have[n:]; len(q.have) == 0 {
		q.have = nil
	}
	return nil
}

// varint reads a number as in RFC 9000, section 16. A number that does not fit an int is an
// overrun.
func (c *cursor) varint() int {
	if len(c.b) == 0 {
		c.bad = true
		return 0
	}
	n := 1 << (c.b[0] >> 6)
	v := c.uint(n)
	return v &^ (3 << (8*n - 2))
}
