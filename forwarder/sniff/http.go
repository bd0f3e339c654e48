package sniff

import (
	"bytes"
	"net/netip"
	"strings"
)

// HTTP/1 request heads (RFC 9112). Where the grammar lets an implementation be lenient, this one is
// not. Request smuggling is made of such things: mixed CRLF and bare LF line ends, folded lines,
// blanks before a colon, several Host or Content-Length fields, a Transfer-Encoding other than
// chunked, or both at once.
//
// A head whose every line ends in bare LF, as people type it into nc, is accepted if no content
// follows. A server that takes the first line for a line must take the others for lines too, and a
// server that waits for a CRLF finds nothing in between that was not judged. Empty lines in front
// of a request line are skipped (section 2.2): some clients end their content with one.

const (
	preface      = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	maxMethodLen = 32
	maxFields    = 1024
)

// Request is one HTTP/1 request head.
type Request struct {
	Method string
	// Name is the authority's host, without its port: from the request target if that is in
	// absolute or authority form, else from Host. It is empty if an HTTP/1.0 client sent none.
	Name string
	// Path is the target's path as sent, without its query: "*" for an OPTIONS of the server, empty
	// for CONNECT.
	Path string
	// Upgrade lists the protocols that the client offers to switch to on this connection, each
	// between commas, in lower case (RFC 9110, section 7.8). It is empty if there are none.
	Upgrade string
	// Override reports that a field asks for another method, path or host.
	Override bool
	// Continue reports that the client waits for a 100 before it sends the body (RFC 9110, section
	// 10.1.1), and sends no body if another answer comes first.
	Continue bool
	Body     Body // what follows the head
}

// firstRequest is ParseHead for bytes that may not be HTTP at all.
func firstRequest(p []byte) (Seen, int, error) {
	if !mayBeRequest(p) {
		return Seen{Kind: Opaque}, 0, nil
	}
	r, n, err := ParseHead(p)
	seen := Seen{Kind: HTTP, Name: r.Name, Method: r.Method, Path: r.Path, Override: r.Override}
	if err == nil && n == 0 {
		return seen, len(p) + untilEnd(p), nil
	}
	return seen, 0, err
}

// untilEnd is the least number of bytes missing from the end of the head.
func untilEnd(p []byte) int {
	end := "\r\n\r\n"
	if bytes.IndexByte(p, '\r') < 0 {
		end = "\n\n"
	}
	for n := len(end) - 1; n > 0; n-- {
		if bytes.HasSuffix(p, []byte(end[:n])) {
			return len(end) - n
		}
	}
	return len(end)
}

// emptyLines is the length of the empty lines at the front of p.
func emptyLines(p []byte) (n int) {
	for bytes.HasPrefix(p[n:], []byte("\r\n")) {
		n += 2
	}
	return n
}

// mayBeRequest reports whether p can become a request line.
func mayBeRequest(p []byte) bool {
	p = p[emptyLines(p):]
	line, _, whole := bytes.Cut(p, []byte("\n"))
	if len(line) == 0 || len(line) == 1 && line[0] == '\r' {
		return !whole // nothing yet after empty lines, or half of one
	}
	method, rest, ok := bytes.Cut(line, []byte(" "))
	if len(method) == 0 || len(method) > maxMethodLen || !isToken(method) {
		return false
	}
	if !whole {
		return true
	}
	return ok && bytes.Contains(rest, []byte(" HTTP/"))
}

// ParseHead reads a request head at the front of p and returns its length, or 0 if the head does
// not end in p. A head longer than MaxHead is refused.
func ParseHead(p []byte) (r Request, n int, err error) {
	p = p[:min(len(p), MaxHead)]
	n = emptyLines(p)
	end := lineEnd(p[n:])
	line, m := nextLine(p[n:], end)
	if m <= 0 {
		return r, 0, incomplete(p, m)
	}
	n += m
	target, minor, ok := r.requestLine(line)
	if !ok {
		return r, 0, ErrMalformed
	}
	var f fields
	for count := 0; ; count++ {
		line, m := nextLine(p[n:], end)
		if m <= 0 {
			return r, 0, incomplete(p, m)
		}
		n += m
		if len(line) == 0 {
			break
		}
		if count == maxFields || !f.add(line) {
			return r, 0, ErrMalformed
		}
	}
	if !r.finish(target, minor, &f) || end == "\n" && !r.Body.Done() {
		return r, 0, ErrMalformed
	}
	return r, n, nil
}

// incomplete returns the error, if any, for p, whose last line does not end in it.
func incomplete(p []byte, line int) error {
	switch {
	case line < 0:
		return ErrMalformed
	case len(p) >= MaxHead:
		return ErrTooLong
	}
	return nil
}

// lineEnd returns the line end used by the head at the front of p.
func lineEnd(p []byte) string {
	if i := bytes.IndexByte(p, '\n'); i > 0 && p[i-1] != '\r' {
		return "\n"
	}
	return "\r\n"
}

// nextLine returns the line at the front of p without its end, and its length with it: 0 if it does
// not end in p, -1 if it ends, or goes on, with anything else.
func nextLine(p []byte, end string) ([]byte, int) {
	line, _, whole := bytes.Cut(p, []byte("\n"))
	n := 0
	switch {
	case !whole:
		line = line[:max(len(line)-1, 0)] // the last byte may begin the end
	case end == "\n":
		n = len(line) + 1
	case !bytes.HasSuffix(line, []byte("\r")):
		return nil, -1
	default:
		n = len(line) + 1
		line = line[:len(line)-1]
	}
	for _, c := range line {
		if !lineByte(c) {
			return nil, -1
		}
	}
	if !whole {
		return nil, 0
	}
	return line, n
}

func lineByte(c byte) bool { return c >= ' ' && c != 0x7f || c == '\t' }

// requestLine reads method, target and version.
func (r *Request) requestLine(line []byte) (target string, minor byte, ok bool) {
	parts := strings.Split(string(line), " ")
	if len(parts) != 3 || len(parts[0]) > maxMethodLen || !isMethod(parts[0]) || !isTarget(parts[1]) {
		return "", 0, false
	}
	r.Method = parts[0]
	switch parts[2] {
	case "HTTP/1.1":
		return parts[1], 1, true
	case "HTTP/1.0":
		return parts[1], 0, true
	}
	return "", 0, false
}

// isMethod reports whether s is a method. Methods are case-sensitive, but not to every server:
// CONNECT, which is read differently from all others, must be in capitals.
func isMethod(s string) bool {
	return s != "" && isToken([]byte(s)) && (s == "CONNECT" || !strings.EqualFold(s, "CONNECT"))
}

// isTarget reports whether s consists of bytes that servers accept in a request's target: those of
// a URI, and those that clients leave unencoded, UTF-8 among them.
func isTarget(s string) bool {
	for _, c := range []byte(s) {
		if c <= ' ' || c == 0x7f || c == '#' {
			return false
		}
	}
	return s != ""
}

// fields holds the fields of a head that decide where the message goes and ends.
type fields struct {
	host, length, coding string
	hosts, lengths       int
	codings              int
	offers               string // as in Request.Upgrade
	upgrade, override    bool   // upgrade: an option of the connection
	waits                bool   // as in Request.Continue
}

// add reads one field line. It reports whether the line can be read in only one way.
func (f *fields) add(line []byte) bool {
	name, value, ok := bytes.Cut(line, []byte(":"))
	if !ok || len(name) == 0 || !isToken(name) { // a folded line begins with a blank
		return false
	}
	v := strings.Trim(string(value), " \t")
	folded := fold(string(name))
	switch folded {
	case "host":
		f.hosts++
		f.host = v
	case "content-length":
		f.lengths++
		f.length = v
	case "transfer-encoding":
		f.codings++
		f.coding = strings.ToLower(v)
	case "upgrade":
		f.offers += protocols(v)
	case "expect":
		f.waits = f.waits || strings.EqualFold(v, "100-continue")
	case "connection":
		for _, option := range strings.Split(strings.ToLower(v), ",") {
			f.upgrade = f.upgrade || strings.Trim(option, " \t") == "upgrade"
		}
	default:
		f.override = f.override || overrides(folded)
		return true
	}
	return strings.EqualFold(folded, string(name))
}

// protocols returns the members of an Upgrade field, each between commas.
func protocols(value string) (list string) {
	for _, p := range strings.Split(strings.ToLower(value), ",") {
		if p = strings.Trim(p, " \t"); p != "" {
			list += "," + p + ","
		}
	}
	return list
}

// finish fills in r from the target, the version and the fields.
func (r *Request) finish(target string, minor byte, f *fields) bool {
	if f.hosts > 1 || f.hosts == 0 && minor > 0 || f.lengths > 1 || f.codings > 1 {
		return false
	}
	r.Override, r.Continue = f.override, f.waits
	if f.upgrade && minor > 0 {
		r.Upgrade = f.offers
	}
	host, ok := hostOf(f.host)
	if !ok && f.host != "" {
		return false
	}
	r.Name = host
	path := target
	switch {
	case r.Method == "CONNECT":
		if r.Name, ok = hostOf(target); !ok {
			return false
		}
		path = ""
	case target == "*" && r.Method == "OPTIONS":
	case target[0] == '/':
	default:
		rest, ok := cutPrefixFold(target, "http://")
		if !ok {
			return false
		}
		authority := rest
		path = "/"
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			authority, path = rest[:i], rest[i:]
		}
		if r.Name, ok = hostOf(authority); !ok || f.hosts > 0 && !strings.EqualFold(r.Name, host) {
			return false
		}
	}
	r.Path, _, _ = strings.Cut(path, "?")
	switch {
	case f.codings > 0:
		if f.coding != "chunked" || f.lengths > 0 || minor == 0 {
			return false
		}
		r.Body = Body{state: chunkSize}
	case f.lengths > 0:
		n, ok := decimal(f.length)
		if !ok {
			return false
		}
		if n > 0 {
			r.Body = Body{state: bodyFixed, left: n}
		}
	}
	return true
}

// hostOf cuts the port off an authority and checks the rest.
func hostOf(authority string) (string, bool) {
	host := authority
	if strings.HasPrefix(host, "[") {
		inside, rest, ok := strings.Cut(host[1:], "]")
		if !ok || rest != "" && !isPort(rest) {
			return "", false
		}
		a, err := netip.ParseAddr(inside)
		if err != nil || !a.Is6() {
			return "", false
		}
		return inside, true
	}
	if i := strings.IndexByte(host, ':'); i >= 0 {
		if !isPort(host[i:]) {
			return "", false
		}
		host = host[:i]
	}
	if host == "" || len(host) > maxNameLen {
		return "", false
	}
	for _, c := range []byte(host) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("@/\\?#[]<>\"'`{}|^,;%", c) >= 0 {
			return "", false
		}
	}
	return host, true
}

func isPort(s string) bool {
	if s == ":" {
		return true // RFC 3986, section 3.2.3: the scheme's default
	}
	n, ok := decimal(s[1:])
	return s[0] == ':' && ok && n <= 0xffff
}

// decimal reads a number of at most 18 digits.
func decimal(s string) (int64, bool) {
	if len(s) == 0 || len(s) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func unhex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c&0xf + 9
}

func isToken(p []byte) bool {
	for _, c := range p {
		if !tokenByte(c) {
			return false
		}
	}
	return true
}

func tokenByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

func cutPrefixFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}
