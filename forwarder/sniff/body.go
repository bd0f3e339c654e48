package sniff

// Body finds the end of a message's body. It is a value: a caller that passes on less than Scan
// allowed continues from a copy made before. The zero Body is empty.
//
// A request's chunked coding (RFC 9112, section 7.1) is read as strictly as heads are; chunk
// extensions are refused, as nothing legitimate sends them and servers differ. An answer's is read
// as clients read it (lax): extensions, padded sizes and lines that end in a bare LF are allowed.
type Body struct {
	state bodyState
	lax   bool
	left  int64                // of the content, the chunk, or the trailer
	digit int                  // of the chunk's size
	name  [maxTrailerName]byte // of the trailer's field, so far
	named int                  // its length
	trail int                  // bytes of a chunk's line after its size
}

type bodyState uint8

const (
	bodyDone       bodyState = iota
	bodyFixed                // left bytes
	bodyOpen                 // until the stream ends
	chunkSize                // in the digits of a size
	chunkSizeLF              // before the LF of the size line
	chunkData                // left bytes
	chunkDataCR              // before the CR after them
	chunkDataLF              // before its LF
	chunkTrailer             // at the start of a line after the last chunk
	chunkTrailName           // within the name that begins such a line
	chunkInTrail             // within its value
	chunkTrailLF             // before the LF of such a line
	chunkEndingLF            // before the LF of the empty line
	chunkExtension           // after a size, in a line that is otherwise ignored
	bodyBad
)

// maxTrailer bounds the bytes after the last chunk, and maxTrailerName the name of a field there.
const (
	maxTrailer     = 4 << 10
	maxTrailerName = 64
)

// Done reports whether the body has ended.
func (b *Body) Done() bool { return b.state == bodyDone }

// Scan consumes the bytes at the front of p that belong to the body and returns their number. Fewer
// than len(p) means that the body has ended. It returns ErrMalformed if they break the coding's
// rules.
func (b *Body) Scan(p []byte) (n int, err error) {
	for n < len(p) && b.state != bodyDone {
		switch b.state {
		case bodyFixed, chunkData:
			take := int(min(int64(len(p)-n), b.left))
			n += take
			if b.left -= int64(take); b.left > 0 {
				return n, nil
			}
			if b.state == bodyFixed {
				b.state = bodyDone
			} else {
				b.state = chunkDataCR
			}
		case bodyOpen:
			return len(p), nil
		default:
			b.step(p[n])
			n++
		}
		if b.state == bodyBad {
			return n, ErrMalformed
		}
	}
	return n, nil
}

// step consumes one byte of the coding.
func (b *Body) step(c byte) {
	if b.lax && b.stepLax(c) {
		return
	}
	next := bodyBad
	switch b.state {
	case chunkSize:
		switch {
		case isHex(c) && b.digit < 15:
			b.left = b.left<<4 | int64(unhex(c))
			b.digit++
			next = chunkSize
		case c == '\r' && b.digit > 0:
			next = chunkSizeLF
		}
	case chunkSizeLF:
		if c == '\n' {
			b.digit = 0
			next = chunkData
			if b.left == 0 {
				next, b.left = chunkTrailer, maxTrailer
			}
		}
	case chunkDataCR:
		if c == '\r' {
			next = chunkDataLF
		}
	case chunkDataLF:
		if c == '\n' {
			next = chunkSize
		}
	case chunkTrailer:
		switch {
		case c == '\r':
			next = chunkEndingLF
		case tokenByte(c):
			b.name[0], b.named = c, 1
			next = chunkTrailName
		}
	case chunkTrailName:
		switch {
		case tokenByte(c) && b.named < len(b.name):
			b.name[b.named] = c
			b.named++
			next = chunkTrailName
		case c == ':' && mayTrail(string(b.name[:b.named])):
			next = chunkInTrail
		}
	case chunkInTrail:
		switch {
		case c == '\r':
			next = chunkTrailLF
		case lineByte(c):
			next = chunkInTrail
		}
	case chunkTrailLF:
		if c == '\n' {
			next = chunkTrailer
		}
	case chunkEndingLF:
		if c == '\n' {
			next = bodyDone
		}
	}
	if next == chunkTrailer || next == chunkTrailName || next == chunkInTrail {
		if b.left--; b.left < 0 {
			next = bodyBad
		}
	}
	b.state = next
}

// stepLax consumes a byte at a place where an answer may break the coding's rules, and reports
// whether it did.
func (b *Body) stepLax(c byte) bool {
	was := b.state
	switch {
	case was == chunkSize && c == '0' && b.left == 0 && b.digit > 0:
		// A size may have leading zeros,
	case was == chunkSize && b.digit > 0 && (c == ';' || c == ' ' || c == '\t'):
		b.state, b.trail = chunkExtension, maxTrailer // and trailing blanks.
	case was == chunkExtension && c != '\n':
		if b.trail--; b.trail < 0 {
			b.state = bodyBad
		}
	case was == chunkExtension, was == chunkSize && b.digit > 0 && c == '\n':
		b.state = chunkSizeLF
		b.step(c)
	case was == chunkDataCR && c == '\n':
		b.state = chunkSize
	case (was == chunkTrailer || was == chunkEndingLF) && c == '\n':
		b.state = bodyDone
	case was == chunkTrailer && c == '\r':
		b.state = chunkEndingLF
	case was == chunkTrailer, was == chunkInTrail && c != '\n':
		b.state = chunkInTrail
		if b.left--; b.left < 0 {
			b.state = bodyBad
		}
	case was == chunkInTrail:
		b.state = chunkTrailer
	default:
		return false
	}
	return true
}
