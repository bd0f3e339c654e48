package sniff

import (
	"bytes"
	"strings"
)

// Responses finds the end of each answer in what an HTTP/1 server sends, to know when
// the client's next request may be judged. It holds no more than the start of a line.
//
// Answers are read as clients read them. If one cannot be understood, it is taken to last until the
// server closes: it reaches the client, and no further request reaches the server.
type Responses struct {
	waiting bool   // an answer to a request is due or under way
	method  string // of that request
	offers  string // likewise, as in Request.Upgrade

	inBody bool
	body   Body

	line    [64]byte // the start of the current line of the head
	n       int      // the line's whole length so far
	started bool     // the status line was read
	status  int
	length  int64 // -1: none
	chunked bool
	taken   string // the protocol that the server switched to, in lower case
	broken  bool   // the head cannot be understood
	lost    bool   // nor can the end of the answer
	size    int    // of the head
}

// maxAnswerHead is the length beyond which a head counts as not understood.
const maxAnswerHead = 256 << 10

// Expect notes that a request was passed on.
func (r *Responses) Expect(req *Request) { r.expect(req.Method, req.Upgrade) }

func (r *Responses) expect(method, offers string) {
	*r = Responses{waiting: true, method: method, offers: offers, length: -1}
}

// Idle reports whether every request has been answered.
func (r *Responses) Idle() bool { return !r.waiting }

// Lost reports whether the current answer cannot be understood: the answer to a further request
// could not be told from it.
func (r *Responses) Lost() bool { return r.lost && !r.Tunnel() && !r.HTTP2() }

// Begun reports whether the answer to the last request has begun, or is over. An interim answer,
// after which another follows (RFC 9110, section 15.2), does not count.
func (r *Responses) Begun() bool { return !r.waiting || r.started || r.inBody || r.n > 0 }

// Tunnel reports whether the connection is no longer HTTP: the server accepted CONNECT, or a
// protocol that the request offered. A switch to any other protocol is not understood, nor is one
// to a protocol that can name other hosts than the judged one.
func (r *Responses) Tunnel() bool {
	if r.switched() {
		return !namesHosts(r.taken)
	}
	return r.waiting && r.inBody && !r.broken && r.method == "CONNECT" && r.status/100 == 2
}

// HTTP2 reports whether the server switched to HTTP/2 in clear text, which the request offered (RFC
// 7540, section 3.2). Its answer comes on stream 1.
func (r *Responses) HTTP2() bool { return r.switched() && r.taken == "h2c" }

// switched reports whether the server switched to a protocol that the request offered.
func (r *Responses) switched() bool {
	return r.waiting && r.inBody && !r.broken && r.status == 101 && r.method != "CONNECT" && strings.Contains(r.offers, ","+r.taken+",")
}

// namesHosts reports whether a protocol carries names of its own, by which a server may direct the
// following bytes to another host: HTTP again, in any version, or TLS.
func namesHosts(protocol string) bool {
	name, _, _ := strings.Cut(protocol, "/")
	switch name {
	case "", "h2c", "h2", "h3", "http", "https", "shttp", "tls", "ssl", "connect-udp", "connect-ip", "connect-tcp":
		return true
	}
	return strings.Contains(protocol, ",")
}

// Feed consumes bytes that the server sent. It returns those after a switch to HTTP/2, which are no
// longer HTTP/1.
func (r *Responses) Feed(p []byte) (rest []byte) {
	for len(p) > 0 && r.waiting {
		if r.inBody {
			n, err := r.body.Scan(p)
			p = p[n:]
			if err != nil {
				r.giveUp(true)
				return nil
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
			r.giveUp(true)
			return nil
		}
		if i < 0 {
			return nil
		}
		p = p[i+1:]
		if r.endLine(); r.HTTP2() {
			return p
		}
	}
	return nil
}

// giveUp takes all that follows for the answer's content.
func (r *Responses) giveUp(lost bool) {
	r.inBody, r.body, r.lost = true, Body{state: bodyOpen}, lost
}

// endLine handles a whole line of the head.
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
		name, value = bytes.TrimRight(name, " \t"), bytes.Trim(value, " \t")
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			n, ok := sameLength(string(value))
			r.broken = r.broken || !ok || !whole || r.length >= 0 && r.length != n
			r.length = n
		case bytes.EqualFold(name, []byte("transfer-encoding")):
			r.broken = r.broken || !whole || r.chunked || !lastChunked(value) && !bytes.EqualFold(value, []byte("identity"))
			r.chunked = r.chunked || lastChunked(value)
		case bytes.EqualFold(name, []byte("upgrade")):
			r.broken = r.broken || !whole && r.status == 101 || r.status == 101 && r.taken != ""
			r.taken = strings.ToLower(string(value))
		}
	}
}

// endHead chooses the body (RFC 9112, section 6.3).
func (r *Responses) endHead() {
	switch {
	case r.broken, r.status == 101, r.method == "CONNECT" && r.status/100 == 2:
		r.giveUp(true)
	case r.status/100 == 1:
		r.expect(r.method, r.offers) // another head follows
	case r.method == "HEAD" || r.status == 204 || r.status == 304:
		r.waiting = false
	case strings.EqualFold(r.method, "HEAD"):
		r.giveUp(true) // the server may or may not take that for HEAD
	case r.chunked:
		r.inBody, r.body = true, Body{state: chunkSize, lax: true}
	case r.length == 0:
		r.waiting = false
	case r.length > 0:
		r.inBody, r.body = true, Body{state: bodyFixed, left: r.length}
	default:
		r.giveUp(false)
	}
}

// sameLength parses a length that may be given more than once.
func sameLength(value string) (n int64, ok bool) {
	n = -1
	for _, part := range strings.Split(value, ",") {
		m, ok := decimal(strings.Trim(part, " \t"))
		if !ok || n >= 0 && n != m {
			return 0, false
		}
		n = m
	}
	return n, true
}

// lastChunked reports whether the last of the codings is chunked.
func lastChunked(codings []byte) bool {
	last := codings[bytes.LastIndexByte(codings, ',')+1:]
	return bytes.EqualFold(bytes.Trim(last, " \t"), []byte("chunked"))
}
