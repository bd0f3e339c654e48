package main

// The UDP load keeps a window of datagrams under way and echoed; a window of one is the round-trip
// cell. It sends and receives in batches where the window allows.
//
// Each datagram carries the number of its window's filling. When nothing arrives for lossLimit,
// everything under way counts as lost and the next filling begins. Late arrivals from an earlier
// filling are recognized by its number and not counted.

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const lossLimit = 50 * time.Millisecond

func datagrams(q request) (reply, error) {
	to, err := addrPort(q.Addr, cmp.Or(q.Port, bulkPort))
	if err != nil {
		return reply{}, err
	}
	var question []byte
	reads := q.Size
	if q.Speaks == "dns" {
		question = askedQuestion()
		q.Size, reads = len(question), answerLen
	}
	if q.Window < 1 || q.Window > batch || q.Size < 4 || q.Size > 2048 {
		return reply{}, fmt.Errorf("window %d or size %d out of range", q.Window, q.Size)
	}
	reserve(1)
	fd, err := unix.Socket(family(to.Addr()), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return reply{}, err
	}
	defer rawClose(fd)
	if e := rawConnect(fd, newSockaddr(to)); e != 0 {
		return reply{}, fmt.Errorf("connect: %w", e)
	}
	setTimeouts(fd, lossLimit)

	out, in := newMmsgs(q.Window, q.Size), newMmsgs(q.Window, reads)
	for _, d := range out.data {
		copy(d, question)
	}
	for i := range q.Window { // a connected socket needs no names
		out.msgs[i].hdr.Name, in.msgs[i].hdr.Name = nil, nil
	}
	var (
		r          = reply{Seconds: float64(q.MS) / 1000}
		start, end = q.window()
		took       []int64 // with a window of one
		filling    uint32
		underWay   = 0
	)
	if q.Window == 1 {
		took = make([]int64, 0, 1<<20)
	}
	mark := func() {
		filling++
		for _, d := range out.data {
			if question != nil {
				binary.BigEndian.PutUint16(d, uint16(filling))
			} else {
				binary.BigEndian.PutUint32(d, filling)
			}
		}
	}
	mark()
	for before := monotonic(); before < end; {
		counted := before >= start
		for underWay < q.Window {
			n, e := rawSendmmsg(fd, out.msgs[:q.Window-underWay])
			if e != 0 {
				return r, fmt.Errorf("send: %w", e)
			}
			underWay += n
			if counted {
				r.Sent += int64(n)
			}
		}
		n, e := rawRecvmmsg(fd, in.msgs)
		now := monotonic()
		switch {
		case e == unix.EAGAIN:
			if counted {
				r.Lost += int64(underWay)
			}
			underWay = 0
			mark()
		case e != 0:
			return r, fmt.Errorf("receive: %w", e)
		default:
			fresh := 0
			for i := range n {
				d := in.data[i][:in.msgs[i].n]
				switch {
				case question == nil && binary.BigEndian.Uint32(d) == filling:
					fresh++
				case question != nil && binary.BigEndian.Uint16(d) == uint16(filling):
					if fresh++; !isAnswer(d) {
						return r, fmt.Errorf("a question is answered %x", d)
					}
				}
			}
			underWay = max(0, underWay-fresh)
			if counted {
				r.Count += int64(fresh)
				if q.Window == 1 && fresh == 1 && len(took) < cap(took) {
					took = append(took, now-before)
				}
			}
		}
		before = now
	}
	if r.Count == 0 {
		return r, fmt.Errorf("no datagram of %d came back", r.Sent)
	}
	if q.Window == 1 {
		l, err := latencies(took, r.Seconds)
		r.P50, r.P99, r.P999 = l.P50, l.P99, l.P999
		return r, err
	}
	return r, nil
}
