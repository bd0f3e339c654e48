package sniff

import (
	"strings"

	"golang.org/x/net/http2/hpack"
)

// The fields of an HTTP/2 request (RFC 9113, sections 8.2 and 8.3). A server may pass them on as
// HTTP/1, so anything that would change its meaning there is refused here: connection fields, line
// ends, and a length that the content does not have.

const (
	// hpackTable is how large the client's table is before the server says otherwise.
	hpackTable = 4096
	// maxHpackTable bounds the table size that the server may allow. The client says on the stream
	// how much of it it uses. The smaller of two tables holds the newest entries of the larger, so
	// the meaning of an index does not depend on what the server allowed.
	maxHpackTable = 64 << 10
	// maxFieldLen bounds a name and a value, and maxFieldList all of them together, each counted
	// with 32 bytes more (RFC 9113, section 6.5.2).
	maxFieldLen  = 8 << 10
	maxFieldList = 64 << 10
)

// StreamRequest is a header block from an HTTP/2 client.
type StreamRequest struct {
	Size     int // of its frames
	Stream   uint32
	End      bool // nothing follows it
	Trailers bool // it ends a request and begins none

	Method string
	// Name is the host of :authority, or else of Host, without its port. It is empty if there is
	// neither.
	Name string
	// Path is the path as sent, without its query: "*" for an OPTIONS of the server, empty for
	// CONNECT.
	Path    string
	Upgrade bool // it asks for another protocol on its stream (RFC 8441)
	// Override reports that a field asks for another method, path or host.
	Override bool
	GRPC     bool  // the answer is read as gRPC's
	Length   int64 // of the content; -1: not given
}

// fieldList collects the fields of one block.
type fieldList struct {
	values   map[string]string // those of interest
	size     int
	regular  bool // a field that is not a pseudo-header has come
	pseudo   bool
	override bool
	bad      bool
}

func (l *fieldList) reset() {
	if l.values == nil {
		l.values = make(map[string]string, 8)
	}
	clear(l.values)
	*l = fieldList{values: l.values}
}

// add collects one field.
func (l *fieldList) add(f hpack.HeaderField) {
	if l.size += int(f.Size()); l.size > maxFieldList {
		l.bad = true
	}
	if l.bad {
		return
	}
	for _, c := range []byte(f.Value) {
		if !lineByte(c) {
			l.bad = true
			return
		}
	}
	if strings.HasPrefix(f.Name, ":") {
		l.pseudo = true
		switch f.Name {
		case ":method", ":scheme", ":authority", ":path", ":protocol":
			l.once(f)
		default:
			l.bad = true
		}
		l.bad = l.bad || l.regular
		return
	}
	l.regular = true
	if f.Name == "" {
		l.bad = true
	}
	for _, c := range []byte(f.Name) {
		l.bad = l.bad || !tokenByte(c) || 'A' <= c && c <= 'Z'
	}
	name := fold(f.Name)
	l.override = l.override || overrides(name)
	switch name {
	case "host", "content-length":
		l.bad = l.bad || name != f.Name
		l.once(f)
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		l.bad = true
	case "te":
		l.bad = l.bad || !strings.EqualFold(f.Value, "trailers")
	case "content-type":
		if _, twice := l.values[name]; !twice {
			l.values[name] = f.Value
		}
	}
}

// once keeps a field that may occur only once.
func (l *fieldList) once(f hpack.HeaderField) {
	_, twice := l.values[f.Name]
	l.bad = l.bad || twice
	l.values[f.Name] = f.Value
}

// finish fills in r. A block on a stream that has begun before ends its request.
func (l *fieldList) finish(r *StreamRequest, again bool) bool {
	if l.bad {
		return false
	}
	host, hosted := l.values["host"]
	length, sized := l.values["content-length"]
	if again {
		r.Trailers = true
		return r.End && !l.pseudo && !hosted && !sized && !l.override
	}
	authority, named := l.values[":authority"]
	if !named {
		authority, named = host, hosted
	} else if hosted && !strings.EqualFold(host, authority) {
		return false
	}
	if named {
		name, ok := hostOf(authority)
		if !ok {
			return false
		}
		r.Name = name
	}
	r.Length, r.Override = -1, l.override
	if sized {
		n, ok := decimal(length)
		if !ok {
			return false
		}
		r.Length = n
	}
	r.Method = l.values[":method"]
	r.GRPC = strings.HasPrefix(l.values["content-type"], "application/grpc")
	scheme, hasScheme := l.values[":scheme"]
	target, hasTarget := l.values[":path"]
	_, r.Upgrade = l.values[":protocol"]
	if len(r.Method) > maxMethodLen || !isMethod(r.Method) {
		return false
	}
	if r.Method == "CONNECT" && !r.Upgrade {
		return named && !hasScheme && !hasTarget
	}
	if scheme != "http" && scheme != "https" || !isTarget(target) || r.Upgrade && r.Method != "CONNECT" {
		return false
	}
	if target[0] != '/' && (target != "*" || r.Method != "OPTIONS") {
		return false
	}
	if !r.Upgrade {
		r.Path, _, _ = strings.Cut(target, "?")
	}
	return true
}
