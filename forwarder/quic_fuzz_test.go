package forwarder

// Two judges side by side: the gate, and real servers behind it. A script makes datagrams of
// frames, packets and connection IDs. What the gate passes goes on to quic-go and x/net, unless the
// script loses it on the way. No server may hear a name that is not allowed.

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	quicgo "github.com/quic-go/quic-go"
	"golang.org/x/net/quic"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/forwarder/internal/datagram"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

const probeName = "probe.a.example"

// pipeConn is a server's socket in memory.
type pipeConn struct {
	in     chan pipeDatagram
	closed chan struct{}
	once   sync.Once
	answer func(p []byte, to net.Addr)
}

type pipeDatagram struct {
	b    []byte
	from net.Addr
}

func newPipeConn(answer func([]byte, net.Addr)) *pipeConn {
	return &pipeConn{in: make(chan pipeDatagram, 256), closed: make(chan struct{}), answer: answer}
}

func (c *pipeConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case d := <-c.in:
		return copy(b, d.b), d.from, nil
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

func (c *pipeConn) WriteTo(b []byte, to net.Addr) (int, error) {
	c.answer(b, to)
	return len(b), nil
}

func (c *pipeConn) Close() error { c.once.Do(func() { close(c.closed) }); return nil }

func (c *pipeConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(at(addrA, 443)) }

func (c *pipeConn) SetDeadline(time.Time) error { return nil }

func (c *pipeConn) SetReadDeadline(time.Time) error { return nil }

func (c *pipeConn) SetWriteDeadline(time.Time) error { return nil }

// bench holds the servers, with what they heard and which connection IDs they chose.
type bench struct {
	conns []*pipeConn
	stop  func()

	mu     sync.Mutex
	probes int
	heard  []string // names that are not allowed
	chosen map[string][]byte
	learn  func(port int, p []byte)
}

var allowedNames = []string{"a.example", "www.a.example", probeName}

func newBench(t testing.TB) *bench {
	b := &bench{chosen: make(map[string][]byte)}
	answer := func(p []byte, to net.Addr) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.learn != nil {
			b.learn(to.(*net.UDPAddr).Port, p)
		}
	}
	record := func(name string) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if name == probeName {
			b.probes++
		}
		if !slices.Contains(allowedNames, name) {
			b.heard = append(b.heard, name)
		}
	}
	for range 2 {
		b.conns = append(b.conns, newPipeConn(answer))
	}
	tr := &quicgo.Transport{Conn: b.conns[0]}
	l := listenQUICGo(t, tr, recordingTLS(t, record))
	e, err := quic.NewEndpoint(b.conns[1], &quic.Config{TLSConfig: recordingTLS(t, record)})
	testutil.Must(t, err)
	b.stop = func() {
		for _, c := range b.conns { // unblocks the readers
			c.Close()
		}
		l.Close()
		tr.Close()
		closed, cancel := context.WithCancel(context.Background())
		cancel()
		e.Close(closed)
	}
	return b
}

// deliver gives a datagram to both servers.
func (b *bench) deliver(p []byte, port int) {
	for _, c := range b.conns {
		select {
		case c.in <- pipeDatagram{bytes.Clone(p), net.UDPAddrFromAddrPort(at(guest4, uint16(port)))}:
		case <-c.closed:
		}
	}
}

// settle makes the servers read everything delivered, by sending a hello after it.
func (b *bench) settle(probe []byte) {
	b.mu.Lock()
	want := b.probes + len(b.conns)
	b.mu.Unlock()
	b.deliver(crafted{id: craftID(), frames: craftCrypto(0, probe), size: 1200}.seal(), 9)
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Microsecond) {
		b.mu.Lock()
		done := b.probes >= want
		b.mu.Unlock()
		if done {
			return
		}
	}
}

// script makes datagrams.
type script struct {
	t      testing.TB
	b      []byte
	bench  *bench
	gate   *datagram.QUICGate
	hellos [][]byte
	nonce  uint64
	tuples [2]*datagram.QUICTuple
	flow   *datagram.Flow

	datagram, frames []byte
	log              []string
}

func (s *script) next() byte {
	if len(s.b) == 0 {
		return 0
	}
	v := s.b[0]
	s.b = s.b[1:]
	return v
}

// id returns a connection ID of the script's or, in the upper half, one that a server chose for it.
func (s *script) id(n byte) []byte {
	own := binary.BigEndian.AppendUint64(nil, s.nonce<<8|uint64(n&3))
	if n&4 == 0 {
		return own
	}
	s.bench.mu.Lock()
	defer s.bench.mu.Unlock()
	if id := s.bench.chosen[string(own)]; id != nil {
		return id
	}
	return own
}

// run executes the script, which has at most 64 steps.
func (s *script) run() {
	for steps := 0; len(s.b) > 0 && steps < 64; steps++ {
		switch op := s.next(); op % 8 {
		case 0, 1: // part of a hello, in sixteenths
			h := s.hellos[int(s.next())%len(s.hellos)]
			span := s.next()
			from, to := int(span>>4)*len(h)/16, (int(span>>4)+int(span&15)+1)*len(h)/16
			to = min(to, len(h))
			s.frames = append(s.frames, craftCrypto(from+int(op>>3&1)*len(h), h[from:to])...)
		case 2:
			s.frames = append(s.frames, []byte{1, 0, 1}[op>>3%3])
		case 3: // the packet ends
			ids, number := s.next(), s.next()
			version := uint32(quic1)
			if op&0x80 != 0 {
				version = quic2
			}
			own := binary.BigEndian.AppendUint64(nil, s.nonce<<8|uint64(ids>>3&3))
			if len(s.frames) > 0 && len(s.datagram)+len(s.frames) < 1300 {
				c := crafted{version: version, id: s.id(ids & 7), keys: own, number: uint32(number), frames: s.frames, source: own}
				if op&0x40 == 0 {
					c.size = 1200 - len(s.datagram)
				}
				s.datagram = append(s.datagram, c.seal()...)
			}
			s.frames = nil
		case 4: // a packet of another type
			head := longHead([]byte{0xe0, 0xd0, 0xf0, 0xc0}[op>>3&3], quic1, s.id(s.next()&7), []byte("someone"))
			s.datagram = slices.Concat(s.datagram, head, []byte{0x40, 20}, make([]byte, 20))
		case 5:
			s.datagram = append(s.datagram, s.next(), s.next(), s.next())
		case 6, 7:
			s.send(int(op>>3&1), op>>4&3 == 3)
		}
	}
	s.send(0, false)
}

// send has the gate judge the datagram, and gives it to the servers if it passes.
func (s *script) send(port int, lost bool) {
	p := s.datagram
	s.datagram = nil
	if len(p) == 0 || len(p) > 1400 {
		return
	}
	g := s.gate
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(bytes.Clone(p))})
	defer pkt.DecRef()
	g.Mu.Lock()
	tuple := nat.NewTuple(packet.ProtoUDP, at(guest4, uint16(port)), at(addrA, 443))
	qt := g.TupleOf(tuple, policy.Query{Proto: packet.ProtoUDP, Src: tuple.Src(), Dst: tuple.Dst()})
	r := qt.Read(pkt, packet.Arrival{})
	if r.Passes {
		qt.Flow = s.flow
	}
	g.Mu.Unlock()
	s.bench.mu.Lock()
	s.tuples[port] = qt
	s.bench.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf("port %d, %d bytes, lost %v: passes %v, held %v, by %q", port, len(p), lost, r.Passes, r.Held, r.Said.Query.Seen.Name))
	for _, before := range r.Before {
		s.bench.deliver(before.Pkt.Data().AsRange().ToSlice(), port)
	}
	datagram.DropHeld(r.Before)
	if r.Passes && !lost {
		s.bench.deliver(p, port)
	}
}

// learned records a server's answer. The client's own connection ID is also the first one. bench.mu
// is held.
func (s *script) learned(port int, p []byte) {
	if port > 1 || s.tuples[port] == nil {
		return
	}
	s.tuples[port].Answered(p, 0)
	if len(p) > 6 && p[0]&0x80 != 0 {
		own, id := p[6:6+p[5]], p[6+p[5]:]
		s.bench.chosen[string(own)] = bytes.Clone(id[1 : 1+id[0]])
	}
}

// FuzzQUICNames runs scripts.
func FuzzQUICNames(f *testing.F) {
	for _, seed := range quicScripts {
		f.Add(seed)
	}
	names := policy.NewNames(policy.NamesConfig{})
	testutil.Must(f, names.Grant("a.example", []netip.Addr{addrA}, time.Hour, time.Now()))
	testutil.Must(f, names.Grant("www.a.example", []netip.Addr{addrA}, time.Hour, time.Now()))
	var hellos [][]byte
	for _, name := range []string{"a.example", "b.example", "www.a.example"} {
		hellos = append(hellos, craftHello(f, name))
	}
	one, two, _ := mixed(f)
	hellos = append(hellos, one, two)
	probe := craftHello(f, probeName)
	w := newWire(f, byName, func(c *Config) { c.Names = names })
	var servers *bench
	var nonce uint64
	f.Cleanup(func() {
		if servers != nil {
			servers.stop()
		}
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		if nonce++; servers == nil || nonce%500 == 0 {
			if servers != nil {
				servers.stop()
			}
			servers = newBench(t)
		}
		s := &script{t: t, b: b, bench: servers, gate: datagram.NewQUICGate(w.f.gate, &w.f.stats, &w.f.timer), hellos: hellos, nonce: uint64(time.Now().UnixNano())<<8 + nonce, flow: new(datagram.Flow)}
		servers.mu.Lock()
		servers.learn, servers.chosen = s.learned, make(map[string][]byte)
		servers.mu.Unlock()
		s.run()
		servers.settle(probe)
		s.gate.Close()
		servers.mu.Lock()
		defer servers.mu.Unlock()
		heard := servers.heard
		if servers.learn, servers.heard = nil, nil; len(heard) > 0 {
			t.Fatalf("a server heard %q, by this script or the one before it:\n%s", heard, s.log)
		}
	})
}

// quicScripts are the building blocks of the attacks in quicAttacks.
var quicScripts = [][]byte{
	{0, 0, 0x0f, 3, 0, 0, 6, 0, 1, 0x0f, 3, 0, 1, 6},                            // one ID, two names
	{0, 0, 0x0f, 3, 0, 0, 0x36, 0, 1, 0x0f, 3, 0, 1, 6},                         // and the first is lost
	{0, 0, 0x0f, 3, 8, 0, 6, 0, 1, 0x07, 3, 1, 0, 6, 0, 1, 0x87, 3, 1, 1, 6, 6}, // halves
	{0, 3, 0x07, 3, 0, 0, 6, 0, 3, 0x8f, 3, 0, 1, 0x36, 0, 4, 0x8f, 3, 0, 2, 6}, // mixed
	{0, 3, 0x07, 3, 0, 0, 6, 0, 4, 0x8f, 3, 0, 2, 14},                           // from two ports
	{0, 0, 0x0f, 3, 0, 0, 6, 4, 0, 0, 1, 0x0f, 3, 4, 1, 6},                      // after another packet
	{0, 0, 0x0f, 3, 0, 0, 6, 0, 1, 0x0f, 0x83, 0, 1, 6},                         // version 2
	{0, 0, 0x0f, 3, 0, 0, 6, 8, 1, 0x0f, 3, 0, 1, 6},                            // after the first hello
	{5, 1, 2, 3, 6, 0, 1, 0x0f, 3, 0, 0, 6},                                     // after something that is not QUIC
	{0, 0, 0x00, 3, 0, 0, 6, 0, 1, 0x1f, 3, 4, 1, 6},                            // with the server's ID
}
