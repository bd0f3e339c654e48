package sniff

// Body finds the end of a message's body. It is a value: who passes on less than Scan
// allowed goes on with a copy that was made before. The zero Body is empty.
//
// Chunked coding (RFC 9112, section 7.1) of a request is read as strictly as heads are; chunk
// extensions are refused, as nothing legitimate sends them and servers differ. That of an
// answer is read as clients do (lax): with extensions, padded sizes, and lines that end in LF alone.
type Body struct {
	state bodyState
	lax   bool
	left  int64                // of the content, the chunk, or the trailer
	digit int                  // of the chunk's size
	name  [maxTrailerName]byte // of the trailer's field, so far
	named int                  // its length
	trail int                  // of a chunk's line behind its size
}

type bodyState uint8

const (
	bodyDone       bodyState = iota
	bodyFixed                // left bytes
	bodyOpen                 // until the stream ends
	chunkSize                // in the digits of a size
	chunkSizeLF              // before its LF
	chunkData                // left bytes
	chunkDataCR              // before the CR behind them
	chunkDataLF              // before its LF
	chunkTrailer             // at the start of a line behind the last chunk
	chunkTrailName           // within the name that such a line begins with
	chunkInTrail             // within its value
	chunkTrailLF             // before the LF of such a line
	chunkEndingLF            // before the LF of the empty line
	chunkExtension           // behind a size, in a line that is not looked at further
	bodyBad
)

// maxTrailer bounds what follows the last chunk, and maxTrailerName the name of a field there.
const (
	maxTrailer     = 4 << 10
	maxTrailerName = 64
)

// Done tells that the body has ended.
func (b *Body) Done() bool { return b.state == bodyDone }

// Scan takes in the bytes at the front of p that belong to the body and returns how many
// they are. Fewer than len(p) means that the body has ended. What breaks the coding's
// rules is ErrMalformed.
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

// step takes in one byte of the coding.
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

// stepLax takes in a byte where an answer may break the coding's rules, and reports whether it
// did.
func (b *Body) stepLax(c byte) bool {
	was := b.state
	switch {
	case was == chunkSize && c == '0' && b.left == 0 && b.digit > 0:
		// A size may be padded with zeros in front,
	case was == chunkSize && b.digit > 0 && (c == ';' || c == ' ' || c == '\t'):
		b.state, b.trail = chunkExtension, maxTrailer // and with blanks behind.
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
