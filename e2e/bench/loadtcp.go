package main

// TCP load: bulk transfers, round trips, short connections and idle connections.

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// flowLimit bounds each blocking call of a flow.
const flowLimit = 3 * time.Second

func dialTCP(to netip.AddrPort) (int, error) {
	fd, err := tcpSocket(family(to.Addr()), flowLimit)
	if err != nil {
		return -1, err
	}
	if e := rawConnect(fd, newSockaddr(to)); e != 0 {
		rawClose(fd)
		return -1, fmt.Errorf("connect: %w", connectError(e))
	}
	setNoDelay(fd)
	return fd, nil
}

// connectError returns the error of a connect: a blocking one that timed out reports EINPROGRESS.
func connectError(e unix.Errno) error {
	if e == unix.EINPROGRESS {
		return unix.ETIMEDOUT
	}
	return e
}

// bulk moves bytes one way over q.Flows flows. Downwards the reply holds each flow's bytes within
// the window; upwards the far side has counted them.
func bulk(q request) (reply, error) {
	to, err := addrPort(q.Addr, bulkPort)
	if err != nil {
		return reply{}, err
	}
	reserve(q.Flows)
	mode, body := byte('D'), headerLen
	if q.Dir == "up" {
		mode, body = 'U', manyBytes
	}
	first, err := greeting(q.Speaks, body)
	if err != nil {
		return reply{}, err
	}
	h := header{mode: mode, id: q.ID}
	h.start, h.end = q.window()
	var fds []int
	for i := range q.Flows {
		fd, err := dialTCP(to)
		if err == nil {
			fds = append(fds, fd)
			err = greet(fd, q.Speaks, first, h)
		}
		if err != nil {
			for _, fd := range fds {
				abort(fd)
			}
			return reply{}, fmt.Errorf("flow %d of %d: %w", i+1, q.Flows, err)
		}
	}
	if monotonic() >= h.start {
		return reply{}, fmt.Errorf("opening %d flows took longer than the %d ms to warm up", q.Flows, q.WarmMS)
	}
	r := reply{Seconds: float64(q.MS) / 1000, Flows: make([]int64, q.Flows)}
	var all sync.WaitGroup
	for i, fd := range fds {
		b := getBuffer()
		all.Go(func() {
			if mode == 'U' {
				transmit(fd, b, h.end)
			} else {
				r.Flows[i] = receive(fd, b, h.start, h.end)
			}
			putBuffer(b)
		})
	}
	all.Wait()
	for _, fd := range fds {
		abort(fd)
	}
	return r, nil
}

// roundTrips sends one byte and waits for it, repeatedly.
func roundTrips(q request) (reply, error) {
	to, err := addrPort(q.Addr, bulkPort)
	if err != nil {
		return reply{}, err
	}
	reserve(1)
	fd, err := dialTCP(to)
	if err != nil {
		return reply{}, err
	}
	defer rawClose(fd)
	if err := greet(fd, "", nil, header{mode: 'R'}); err != nil {
		return reply{}, err
	}
	start, end := q.window()
	took := make([]int64, 0, 1<<20)
	b := []byte{1}
	for before := monotonic(); before < end && len(took) < cap(took); {
		if _, e := rawSend(fd, b); e != 0 {
			return reply{}, fmt.Errorf("send: %w", e)
		}
		if n, e := rawRecv(fd, b); e != 0 || n == 0 {
			return reply{}, fmt.Errorf("receive: %d bytes, %w", n, e)
		}
		now := monotonic()
		if before >= start {
			took = append(took, now-before)
		}
		before = now
	}
	return latencies(took, float64(q.MS)/1000)
}

func latencies(took []int64, seconds float64) (reply, error) {
	if len(took) == 0 {
		return reply{}, fmt.Errorf("no round trip in %v s", seconds)
	}
	slices.Sort(took)
	at := func(p float64) float64 { return float64(took[min(len(took)-1, int(p*float64(len(took))))]) / 1e3 }
	return reply{Count: int64(len(took)), Seconds: seconds, P50: at(0.5), P99: at(0.99), P999: at(0.999)}, nil
}

// shortConnections connects, sends a byte or a greeting, reads the answer and closes. It runs
// q.Parallel at once until the window ends or q.Count are done.
func shortConnections(q request) (reply, error) {
	a, err := addrPort(q.Addr, echoPort)
	if err != nil {
		return reply{}, err
	}
	first, err := greeting(q.Speaks, 0)
	if err != nil {
		return reply{}, err
	}
	if len(first) == 0 {
		first = []byte{1}
	}
	reserve(q.Parallel)
	targets := make([]*sockaddr, echoPorts)
	for i := range targets {
		targets[i] = newSockaddr(netip.AddrPortFrom(a.Addr(), uint16(echoPort+i)))
	}
	var (
		mu         sync.Mutex
		r          reply
		done       atomic.Int64 // begun in the window
		all        sync.WaitGroup
		begun      = monotonic()
		start, end = q.window()
		fam        = family(a.Addr())
	)
	for w := range q.Parallel {
		all.Go(func() {
			b := make([]byte, 256)
			for i := w; ; i++ {
				now := monotonic()
				counted := now >= start
				if now >= end || counted && done.Add(1) > int64(q.Count) && q.Count > 0 {
					return
				}
				what, e := shortOne(fam, targets[i%len(targets)], first, b)
				mu.Lock()
				if e != nil {
					r.fail(what, e)
				} else if counted {
					r.Count++
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	r.Seconds = float64(monotonic()-max(begun, start)) / 1e9
	return r, nil
}

func shortOne(fam int, to *sockaddr, first, b []byte) (string, error) {
	fd, err := tcpSocket(fam, flowLimit)
	if err != nil {
		return "socket", err
	}
	defer rawClose(fd)
	if e := rawConnect(fd, to); e != 0 {
		return "connect", connectError(e)
	}
	if _, e := rawSend(fd, first); e != 0 {
		return "send", e
	}
	n, e := rawRecv(fd, b)
	if e == unix.EAGAIN {
		e = unix.ETIMEDOUT
	}
	if e != 0 {
		return "receive", e
	}
	if n == 0 {
		return "receive", fmt.Errorf("closed by the peer")
	}
	return "", nil
}

// holder keeps idle connections.
type holder struct{ fds []int }

// hold opens q.Count connections, each of which has carried a byte both ways; it gives up
// when three have failed.
func (h *holder) hold(q request) (r reply, err error) {
	a, err := addrPort(q.Addr, echoPort)
	if err != nil {
		return r, err
	}
	reserve(1)
	b := []byte{1}
	_, end := q.window()
	for i := 0; i < q.Count && monotonic() < end && r.failures() < 3; i++ {
		fd, err := dialTCP(netip.AddrPortFrom(a.Addr(), uint16(echoPort+i%echoPorts)))
		if err != nil {
			r.fail("dial", err)
			continue
		}
		h.fds = append(h.fds, fd)
		if _, e := rawSend(fd, b); e != 0 {
			r.fail("send", e)
		} else if n, e := rawRecv(fd, b); e != 0 || n == 0 {
			r.fail("receive", fmt.Errorf("%d bytes, %w", n, e))
		} else {
			r.Count++
		}
	}
	return r, nil
}

func (h *holder) release() {
	for _, fd := range h.fds {
		rawClose(fd)
	}
	h.fds = nil
}
