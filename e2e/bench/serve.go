package main

// The far side: one process in the namespace "host", on all addresses of both families.
//
//	bulkPort TCP   a header (mode, window, identifier), then bytes one way, or one-byte echoes;
//	               a thread per connection
//	echoPort… TCP  echoes what it reads, and answers a greeting (greeting.go) by one byte:
//	               many short or idle connections on one epoll thread.
//	               Several ports, because each of a client's connections leaves its
//	               port in TIME_WAIT towards one of them
//	bulkPort UDP   echoes datagrams in batches
//
// The bytes that arrived in a window are asked for afterwards on standard input
// ({"op":"take","id":N,"flows":N}), so that a flow counts even if it ends badly.

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	bulkPort  = 5201
	echoPort  = 5210
	echoPorts = 16
	bufferLen = 128 << 10
	batch     = 64 // datagrams a call; also the window of the windowed echo
	headerLen = 1 + 8 + 8 + 8
	mostFlows = 1024 // bulk connections that serve has threads for at a time
)

type header struct {
	mode       byte // 'U'p, 'D'own, 'R'ound trips
	start, end int64
	id         uint64
}

func (h header) bytes() []byte {
	b := make([]byte, 0, headerLen)
	b = append(b, h.mode)
	b = binary.BigEndian.AppendUint64(b, uint64(h.start))
	b = binary.BigEndian.AppendUint64(b, uint64(h.end))
	return binary.BigEndian.AppendUint64(b, h.id)
}

func parseHeader(b []byte) header {
	return header{
		mode:  b[0],
		start: int64(binary.BigEndian.Uint64(b[1:])),
		end:   int64(binary.BigEndian.Uint64(b[9:])),
		id:    binary.BigEndian.Uint64(b[17:]),
	}
}

// tally holds, by identifier, what each ended upward flow delivered within its window.
type tally struct {
	mu    sync.Mutex
	ended map[uint64][]int64
}

func (t *tally) add(id uint64, n int64) {
	t.mu.Lock()
	t.ended[id] = append(t.ended[id], n)
	t.mu.Unlock()
}

// take waits a while for the given number of flows to end, then forgets them.
func (t *tally) take(id uint64, flows int) []int64 {
	for limit := time.Now().Add(3 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		t.mu.Lock()
		got := t.ended[id]
		if len(got) >= flows || time.Now().After(limit) {
			delete(t.ended, id)
			t.mu.Unlock()
			return got
		}
		t.mu.Unlock()
	}
}

// bufferPool is a free list: without a collector, buffers must be reused.
var bufferPool = make(chan []byte, mostFlows)

func getBuffer() []byte {
	select {
	case b := <-bufferPool:
		return b
	default:
		return make([]byte, bufferLen)
	}
}

func putBuffer(b []byte) {
	select {
	case bufferPool <- b:
	default:
	}
}

func listen(typ, port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Port: port}); err != nil {
		return -1, fmt.Errorf("binding port %d: %w", port, err)
	}
	if typ&unix.SOCK_STREAM != 0 {
		_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestion)
		return fd, unix.Listen(fd, 4096)
	}
	return fd, nil
}

// serve runs until standard input ends.
func serve() error {
	quietRuntime()
	reserve(mostFlows)
	t := &tally{ended: map[uint64][]int64{}}
	bulk, err := listen(unix.SOCK_STREAM, bulkPort)
	if err != nil {
		return err
	}
	udp, err := listen(unix.SOCK_DGRAM, bulkPort)
	if err != nil {
		return err
	}
	var echoes []int
	for i := range echoPorts {
		fd, err := listen(unix.SOCK_STREAM|unix.SOCK_NONBLOCK, echoPort+i)
		if err != nil {
			return err
		}
		echoes = append(echoes, fd)
	}
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	// These three goroutines end with the process.
	go serveBulk(bulk, t)
	go serveDatagrams(udp)
	go serveEchoes(poll, echoes)

	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q request
		if err := in.Decode(&q); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		var r reply
		if q.Op == "take" {
			r.Flows = t.take(q.ID, q.Flows)
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
}

func serveBulk(l int, t *tally) {
	for {
		if fd, e := rawAccept(l, 0); e == 0 {
			go serveFlow(fd, t) // ends with its connection, or ten silent seconds
		}
	}
}

func serveFlow(fd int, t *tally) {
	defer rawClose(fd)
	setTimeouts(fd, 10*time.Second)
	setNoDelay(fd)
	b := getBuffer()
	defer putBuffer(b)
	h, speaks, ok := readHeader(fd, b)
	if !ok {
		return
	}
	switch h.mode {
	case 'U':
		t.add(h.id, receive(fd, b, h.start, h.end))
	case 'D':
		if speaks == speaksHTTP {
			if _, e := rawSend(fd, answer(manyBytes)); e != 0 {
				return
			}
		}
		transmit(fd, b, h.end)
	case 'R':
		for {
			n, e := rawRecv(fd, b)
			if e != 0 || n == 0 {
				return
			}
			if _, e := rawSend(fd, b[:n]); e != 0 {
				return
			}
		}
	}
}

// receive reads until the window's or the flow's end, or a timeout, and counts the bytes within the
// window.
func receive(fd int, b []byte, start, end int64) (count int64) {
	for {
		n, e := rawRecv(fd, b)
		if e == unix.EINTR {
			continue
		}
		now := monotonic()
		if e != 0 || n == 0 || now >= end {
			return count
		}
		if now >= start {
			count += int64(n)
		}
	}
}

func transmit(fd int, b []byte, end int64) {
	for monotonic() < end {
		if _, e := rawSend(fd, b); e != 0 && e != unix.EINTR {
			return
		}
	}
}

// greeted is a connection whose greeting has begun.
type greeted struct {
	left   int // bytes still to come
	answer []byte
}

func serveEchoes(poll int, listeners []int) {
	isListener := map[int32]bool{}
	add := func(fd int) bool {
		ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
		return unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &ev) == nil
	}
	for _, l := range listeners {
		isListener[int32(l)] = add(l)
	}
	events := make([]unix.EpollEvent, 256)
	b := make([]byte, 4096)
	owed := map[int32]greeted{} // what came in parts
	one := []byte{1}
	httpOne := append(answer(len(one)), one...)
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(poll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), ^uintptr(0), 0, 0)
		if e != 0 {
			continue
		}
		for _, ev := range events[:n] {
			fd := int(ev.Fd)
			if !isListener[ev.Fd] {
				got, e := rawRecv(fd, b)
				if e == unix.EAGAIN {
					continue
				}
				if e == 0 && got > 0 {
					back := b[:got]
					g, begun := owed[ev.Fd]
					if !begun {
						g.left = greetingLen(back)
						switch back[0] {
						case tlsHandshake:
							g.answer = serverHello
						case httpMethod:
							g.answer = httpOne
						}
					}
					if g.left -= got; g.left > 0 {
						owed[ev.Fd] = g
						continue
					}
					delete(owed, ev.Fd)
					if g.answer != nil {
						back = g.answer
					}
					_, e = rawSend(fd, back)
				}
				if e != 0 || got == 0 {
					delete(owed, ev.Fd)
					rawClose(fd)
				}
				continue
			}
			for range 64 {
				c, e := rawAccept(fd, unix.SOCK_NONBLOCK)
				if e != 0 {
					break
				}
				if !add(c) {
					rawClose(c)
				}
			}
		}
	}
}

func serveDatagrams(fd int) {
	m := newMmsgs(batch, 2048)
	for {
		for i := range m.msgs {
			m.msgs[i].hdr.Namelen = uint32(len(m.names[i]))
			m.iovs[i].SetLen(2048)
		}
		n, e := rawRecvmmsg(fd, m.msgs)
		if e != 0 {
			continue
		}
		for i := range n {
			m.iovs[i].SetLen(int(m.msgs[i].n))
		}
		for sent := 0; sent < n; {
			k, e := rawSendmmsg(fd, m.msgs[sent:n])
			if e != 0 {
				k = 1 // one that cannot be sent is lost
			}
			sent += k
		}
	}
}

// mmsgs is the memory of a batch of datagrams.
type mmsgs struct {
	msgs  []mmsg
	iovs  []unix.Iovec
	names [][unix.SizeofSockaddrInet6]byte
	data  [][]byte
}

func newMmsgs(n, size int) *mmsgs {
	m := &mmsgs{
		msgs:  make([]mmsg, n),
		iovs:  make([]unix.Iovec, n),
		names: make([][unix.SizeofSockaddrInet6]byte, n),
		data:  make([][]byte, n),
	}
	for i := range n {
		m.data[i] = make([]byte, size)
		m.iovs[i].Base = &m.data[i][0]
		m.iovs[i].SetLen(size)
		m.msgs[i].hdr.Iov = &m.iovs[i]
		m.msgs[i].hdr.SetIovlen(1)
		m.msgs[i].hdr.Name = &m.names[i][0]
	}
	return m
}

func addrPort(addr string, port int) (netip.AddrPort, error) {
	a, err := netip.ParseAddr(addr)
	return netip.AddrPortFrom(a, uint16(port)), err
}
