package gate

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIovecs is how many pieces one writev takes (the kernel's UIO_MAXIOV is 1024).
const maxIovecs = 256

// Gather collects the slices of a peeked receive queue as iovecs.
type Gather struct {
	Iov   [maxIovecs]unix.Iovec
	N     int
	Bytes int
}

var errFull = errors.New("no room for more pieces")

func (g *Gather) Write(p []byte) (int, error) {
	if g.N == len(g.Iov) {
		return 0, errFull
	}
	if len(p) == 0 {
		return 0, nil
	}
	g.Iov[g.N].Base = &p[0]
	g.Iov[g.N].SetLen(len(p))
	g.N++
	g.Bytes += len(p)
	return len(p), nil
}

// Trim drops the bytes after the first n, n > 0.
func (g *Gather) Trim(n int) {
	if n >= g.Bytes {
		return
	}
	g.Bytes = n
	for i := range g.Iov[:g.N] {
		l := int(g.Iov[i].Len)
		if l < n {
			n -= l
			continue
		}
		g.Iov[i].SetLen(n)
		clear(g.Iov[i+1 : g.N])
		g.N = i + 1
		return
	}
}

// Reset forgets the slices, so that they are not kept alive.
func (g *Gather) Reset() {
	clear(g.Iov[:g.N])
	g.N, g.Bytes = 0, 0
}

// piece returns one of the gathered slices.
func (g *Gather) piece(i int) []byte { return unsafe.Slice(g.Iov[i].Base, int(g.Iov[i].Len)) }

// place is a position in the gathered bytes.
type place struct {
	g   *Gather
	i   int // the piece
	off int // within it
}

// skip moves n bytes on, and stops at the end.
func (p *place) skip(n int) {
	for p.i < p.g.N {
		rest := int(p.g.Iov[p.i].Len) - p.off
		if n < rest {
			p.off += n
			return
		}
		n -= rest
		p.i, p.off = p.i+1, 0
	}
}

// look copies the bytes at p without moving.
func (p *place) look(to []byte) (n int) {
	off := p.off
	for i := p.i; i < p.g.N && n < len(to); i++ {
		n += copy(to[n:], p.g.piece(i)[off:])
		off = 0
	}
	return n
}
