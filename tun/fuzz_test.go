package tun

import (
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzInbound puts hostile bytes, header included, through the read path into a real
// stack: nothing may panic, and every frame is either delivered or counted once.
func FuzzInbound(f *testing.F) {
	for _, m := range malformed() {
		f.Add(m.frame, false)
	}
	for _, frame := range [][]byte{udpFrame, tcpFrame, tcp6Frame} {
		f.Add(withVnet(vnetHeader{}, frame), false)
		f.Add(withVnet(vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 40}, frame), false)
		f.Add(withVnet(vnetHeader{flags: vnetNeedsChecksum, csumStart: 34, csumOffset: 16, gsoType: gsoTCPv4, gsoSize: 500}, frame), false)
		f.Add(withVnet(vnetHeader{flags: vnetDataValid}, frame[ethernetHeaderLen:]), true)
	}
	endpoint := func(kind Kind) *Endpoint {
		e, peer := newTwinEndpoint(f, Config{Kind: kind}, allOffloads)
		newStack(f, e, true)
		to := e.dispatcher.Load()
		e.Attach(nil) // this goroutine delivers
		e.Wait()
		e.queues[0].to = to
		go func() { // takes the stack's answers until the endpoint is closed
			buf := make([]byte, vnetHeaderLen+maxFrame)
			for n, err := 1, error(nil); n > 0 || err == unix.EAGAIN; {
				n, err = unix.Read(peer, buf)
			}
		}()
		// A capture walks the same bytes.
		if _, err := e.StartCapture(io.Discard, CaptureOptions{}); err != nil {
			f.Fatal(err)
		}
		return e
	}
	tap, tun := endpoint(TAP), endpoint(TUN)
	f.Fuzz(func(t *testing.T, b []byte, bare bool) {
		e := tap
		if bare {
			e = tun
		}
		q := e.queues[0]
		before := seen(e)
		q.rx.refill()
		n := scatter(&q.rx, b)
		q.frame(n)
		if after := seen(e); after != before+1 {
			t.Errorf("%d frames were seen of one", after-before)
		}
	})
}

// seen is the number of frames delivered or dropped.
func seen(e *Endpoint) uint64 {
	s := e.Stats()
	n := s.RxFrames
	for r := shortVnetHeader; r < queueFull; r++ {
		n += s.Dropped[r.String()]
	}
	return n
}

// scatter does what readv does.
func scatter(b *rxbuf, frame []byte) (n int) {
	n = copy(b.vnet[:], frame)
	for i, v := range b.views {
		at := vnetHeaderLen
		for _, size := range viewSizes[:i] {
			at += size
		}
		if at < len(frame) {
			n += copy(v.AsSlice(), frame[at:])
		}
	}
	return n
}

func FuzzInspectAgreesOnRanges(f *testing.F) {
	for _, m := range malformed() {
		f.Add(m.frame, true)
	}
	f.Fuzz(func(t *testing.T, b []byte, tap bool) {
		if len(b) < vnetHeaderLen {
			return
		}
		filter := filter{kind: TUN, gateway: mac(gatewayMAC), features: allOffloads}
		if tap {
			filter.kind = TAP
		}
		frame := b[vnetHeaderLen:]
		v, why := filter.inspect(frame[:min(len(frame), headroom)], len(frame), decodeVnet((*[vnetHeaderLen]byte)(b)))
		switch {
		case why != reasonNone:
		case v.fill && (v.fillStart <= v.linkLen || v.fillStart >= len(frame) || v.fillAt < v.fillStart || v.fillAt+2 > len(frame)):
			t.Errorf("a sum from %d at %d in %d bytes", v.fillStart, v.fillAt, len(frame))
		case v.gso && !v.validated:
			t.Error("a segment with a checksum that nobody vouches for")
		case v.validated && v.fill:
			t.Error("a checksum both open and verified")
		}
	})
}
