package sniff

import "bytes"

// Responses finds the end of each answer in what an HTTP/1 server sends, to know when
// the client's next request may be judged. It holds no more than the start of a line.
//
// A server that cannot be understood is treated as one whose answer goes on until it
// closes: the answer reaches the client, and no further request the server.
type Responses struct {
	waiting bool // an answer to a request is due or under way
	head    bool // of it, the method was HEAD
	connect bool // likewise, CONNECT

	inBody bool
	body   Body

	line    [64]byte // the start of the current line of the head
	n       int      // its length so far, all of it
	started bool     // the status line was read
	status  int
	length  int64 // -1: none
	chunked bool
	broken  bool
	size    int // of the head
}

// maxAnswerHead is how long a head is read before it counts as not understood.
const maxAnswerHead = 256 << 10

// Expect notes that a request was passed on.
func (r *Responses) Expect(method string) {
	*r = Responses{waiting: true, head: method == "HEAD", connect: method == "CONNECT", length: -1}
}

// Idle tells that every request was answered.
func (r *Responses) Idle() bool { return !r.waiting }

// Tunnel tells that the connection is no longer HTTP: CONNECT was accepted. A 101 makes none,
// as no request that asks for another protocol is passed on: whoever sends it is not understood.
func (r *Responses) Tunnel() bool {
	return r.waiting && r.inBody && r.connect && r.status/100 == 2
}

// Feed takes in what the server sent.
func (r *Responses) Feed(p []byte) {
	for len(p) > 0 && r.waiting {
		if r.inBody {
			n, err := r.body.Scan(p)
			p = p[n:]
			if err != nil {
				r.giveUp()
				return
			}
			if r.body.Done() {
				r.waiting = false
			}
			continue
		}
		i := bytes.IndexByte(p, '\n')
		part := p
		if i >= 0 {
			part = p[:i]
		}
		if r.n < len(r.line) {
			copy(r.line[r.n:], part)
		}
		r.n += len(part)
		if r.size += len(part) + 1; r.size > maxAnswerHead {
			r.giveUp()
			return
		}
		if i < 0 {
			return
		}
		p = p[i+1:]
		r.endLine()
	}
}

func (r *Responses) giveUp() { r.inBody, r.body = true, Body{state: bodyOpen} }

// endLine looks at a line of the head that is whole.
func (r *Responses) endLine() {
	whole := r.n <= len(r.line)
	line := bytes.TrimRight(r.line[:min(r.n, len(r.line))], "\r")
	r.n = 0
	switch {
	case !r.started:
		r.started = true
		if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' {
			r.broken = true
			return
		}
		status, ok := decimal(string(line[9:12]))
		r.status, r.broken = int(status), !ok
	case whole && len(line) == 0:
		r.endHead()
	default:
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.Trim(value, " \t")
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			n, ok := decimal(string(value))
			r.broken = r.broken || !ok || !whole || r.length >= 0 && r.length != n
			r.length = n
		case bytes.EqualFold(name, []byte("transfer-encoding")):
			r.broken = r.broken || !whole || r.chunked || !bytes.EqualFold(value, []byte("chunked"))
			r.chunked = true
		}
	}
}

// endHead chooses the body (RFC 9112, section 6.3).
func (r *Responses) endHead() {
	switch {
	case r.broken, r.status == 101, r.connect && r.status/100 == 2:
		r.giveUp()
	case r.status/100 == 1:
		// Another head follows.
		*r = Responses{waiting: true, head: r.head, connect: r.connect, length: -1}
	case r.head || r.status == 204 || r.status == 304:
		r.waiting = false
	case r.chunked && r.length >= 0:
		r.giveUp()
	case r.chunked:
		r.inBody, r.body = true, Body{state: chunkSize}
	case r.length == 0:
		r.waiting = false
	case r.length > 0:
		r.inBody, r.body = true, Body{state: bodyFixed, left: r.length}
	default:
		r.giveUp()
	}
}
