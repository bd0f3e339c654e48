package tun

import (
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"golang.org/x/sys/unix"
)

// The buffer that frames are read into. One readv scatters a frame over a chain of pooled views,
// and the views that it reaches become the packet: nothing is copied, and only they must be
// replaced (and cleared by the pool) before the next read. By their sizes a bare acknowledgement
// costs 128 bytes, a 1500-byte frame 2 KiB more and a 64 KiB segment the whole chain, so a small
// packet that waits long in a queue never pins a large chunk.
//
// The chain is larger than the largest frame that the kernel can deliver. So a frame that fills it
// was truncated, and is refused.

// viewSizes are powers of two, as the pool's chunks are. Their sum is at least
// maxFrame+1.
var viewSizes = [...]int{headroom, 2048, 8192, 8192, 16384, 32768}

const (
	// headroom holds every header that inspect needs: Ethernet (14), IPv4 with options (60), and
	// the ports. It is one view, so they are contiguous.
	headroom = 128
	// maxFrame is an IP packet of 65535 bytes with an Ethernet header and a VLAN tag.
	maxFrame = 65535 + ethernetHeaderLen + 4
)

type rxbuf struct {
	vnet  [vnetHeaderLen]byte
	views [len(viewSizes)]*buffer.View
	iov   [1 + len(viewSizes)]unix.Iovec
}

// refill replaces the views that were taken. It must run before each read.
func (b *rxbuf) refill() {
	if b.iov[0].Base == nil {
		b.iov[0].Base = &b.vnet[0]
		b.iov[0].SetLen(vnetHeaderLen)
	}
	for i := range b.views {
		if b.views[i] != nil {
			return // views are taken from the front
		}
		b.views[i] = buffer.NewViewSize(viewSizes[i])
		b.iov[1+i].Base = &b.views[i].AsSlice()[0]
		b.iov[1+i].SetLen(viewSizes[i])
	}
}

// head returns the contiguous first bytes of a frame of length n.
func (b *rxbuf) head(n int) []byte {
	return b.views[0].AsSlice()[:min(n, headroom)]
}

// take moves the first n bytes out as a buffer.
func (b *rxbuf) take(n int) buffer.Buffer {
	var out buffer.Buffer
	for i := 0; n > 0; i++ {
		v := b.views[i]
		b.views[i] = nil
		v.CapLength(min(n, viewSizes[i]))
		n -= v.Size()
		// Every view but the last is full, so Append links it without copying.
		if i == 0 {
			out = buffer.MakeWithView(v)
		} else if err := out.Append(v); err != nil {
			panic("tun: appending to a buffer of one's own: " + err.Error())
		}
	}
	return out
}

// fillChecksum completes the sum over frame bytes start..n and stores it at at,
// as skb_checksum_help does. The field already holds the pseudo-header's part.
func (b *rxbuf) fillChecksum(n, start, at int) {
	var sum checksum.Checksumer
	b.each(n, start, func(_ int, part []byte) { sum.Add(part) })
	value := ^sum.Checksum()
	if value == 0 {
		value = 0xffff // zero would mean "no checksum" in UDP; elsewhere the two are equal
	}
	bytes := [2]byte{byte(value >> 8), byte(value)}
	b.each(n, at, func(off int, part []byte) {
		for i := 0; i < len(part) && off+i < at+2; i++ {
			part[i] = bytes[off+i-at]
		}
	})
}

// each calls f with the parts of the frame from byte from up to n.
func (b *rxbuf) each(n, from int, f func(off int, part []byte)) {
	off := 0
	for i, size := range viewSizes {
		part := b.views[i].AsSlice()[:min(size, n-off)]
		if skip := from - off; skip < len(part) {
			skip = max(skip, 0)
			f(off+skip, part[skip:])
		}
		off += len(part)
		if off >= n {
			return
		}
	}
}

// copyTo appends up to limit bytes of a frame of n bytes to dst.
func (b *rxbuf) copyTo(dst []byte, n, limit int) []byte {
	b.each(min(n, limit), 0, func(_ int, part []byte) { dst = append(dst, part...) })
	return dst
}

// release returns the views to the pool.
func (b *rxbuf) release() {
	for i, v := range b.views {
		if v != nil {
			v.Release()
			b.views[i] = nil
			b.iov[1+i].Base = nil
		}
	}
}
