package admit

// Tuples that belong, or belonged until recently, to the worker's own sockets.
//
// A pod has one set of addresses and two users of it: the worker's sockets, by which the pod's
// judged flows go out, and in0, by which others speak to the pod. A packet for a socket that is
// gone finds in0: a late answer, the next datagram of a server that streams, a segment that crossed
// a reset. If it could begin a flow, the pod could use that flow's tuple to speak to a peer that no
// egress rule allows any more, or ever did. So the tuple of a socket rests for TombTime after its
// last use, and no packet from outside begins a flow with it.
//
//	UDP         by the socket's port, whatever the peer: one socket has many, and a peer
//	            that was cut off may send on while the socket lives for others
//	TCP, echo   by the whole tuple as it arrives: the kernel gives one port to many peers
//	refused     by the whole tuple too, with the pod's own port: UDP that policy refused or cut off
//
// A datagram that comes to rest here makes its port rest anew, so that a stream whose
// flow was revoked never begins one, however long it lasts.
//
// Both kinds are kept in two generations, the young one and the old one, which change every
// TombTime: what is noted rests for between one and two of them. A generation holds MaxTombs whole
// tuples. When it is full only the pod's port is noted, which is then closed to every new flow from
// outside: it fails closed, in bounded memory.
//
// UDP's ports are bits in the memory that outlives a worker (Config.Memory), those of
// the sockets that are open apart from the two generations: when a worker dies, its
// successor takes all of them for young. TCP needs no memory: only a SYN begins a flow.

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

const (
	// TombTime is how long a tuple rests at least, and half of how long at most:
	// nf_conntrack_tcp_timeout_time_wait, the longest that the kernel waits for strays.
	TombTime = 120 * time.Second
	// MaxTombs bounds the whole tuples of one generation, about 1 MiB.
	MaxTombs = 1 << 16

	portSetSize = 1 << 16 / 8
	// TombMemory is what tombs need of Config.Memory: open, young and old ports.
	TombMemory = 3 * portSetSize
)

// portSet is a set of ports, a bit each.
type portSet []byte

func (s portSet) has(port uint16) bool { return s[port/8]&(1<<(port%8)) != 0 }

func (s portSet) add(port uint16) { s[port/8] |= 1 << (port % 8) }

func (s portSet) drop(port uint16) { s[port/8] &^= 1 << (port % 8) }

// Tombs is safe for concurrent use. A nil *Tombs, of a forwarder without a second
// link, remembers nothing: nothing can begin there.
type Tombs struct {
	now  func() time.Time
	seed maphash.Seed

	mu     sync.Mutex
	turned time.Time              // when the generations last changed
	Tuples [2]map[uint64]struct{} // young, old: hashes of tuples as they arrive
	Full   [2]portSet             // the pod's ports that stand for what found no room; nil: none
	users  map[uint16]int         // open UDP sockets by port
	open   portSet                // the keys of users
	ports  [2]portSet             // young, old
}

// NewTombs takes over what the worker before left in memory, which is TombMemory
// bytes, or nil when nothing outlives this one.
func NewTombs(now func() time.Time, memory []byte) *Tombs {
	if memory == nil {
		memory = make([]byte, TombMemory)
	}
	t := &Tombs{now: now, seed: maphash.MakeSeed(), turned: now(), users: make(map[uint16]int)}
	t.open = memory[:portSetSize:portSetSize]
	t.ports = [2]portSet{memory[portSetSize:][:portSetSize:portSetSize], memory[2*portSetSize:][:portSetSize:portSetSize]}
	t.Tuples[0] = make(map[uint64]struct{})
	for i := range t.open {
		t.ports[0][i] |= t.open[i] | t.ports[1][i]
	}
	// In this order: a worker that dies here forgets nothing.
	clear(t.open)
	clear(t.ports[1])
	return t
}

// turn makes the young generation the old one when its time is over. mu is held.
func (t *Tombs) turn() {
	passed := t.now().Sub(t.turned)
	if passed < TombTime {
		return
	}
	t.turned = t.turned.Add(passed)
	copy(t.ports[1], t.ports[0])
	clear(t.ports[0])
	t.Tuples[1], t.Full[1] = t.Tuples[0], t.Full[0]
	t.Tuples[0], t.Full[0] = make(map[uint64]struct{}), nil
	if passed >= 2*TombTime {
		clear(t.ports[1])
		t.Tuples[1], t.Full[1] = nil, nil
	}
}

// Opened notes a UDP socket that was bound to port, before it sends anything.
func (t *Tombs) Opened(port uint16) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.users[port]++
	t.open.add(port)
}

// Closed ends what opened began: the port rests from now on.
func (t *Tombs) Closed(port uint16) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn()
	t.ports[0].add(port)
	if t.users[port]--; t.users[port] <= 0 {
		delete(t.users, port)
		t.open.drop(port)
	}
}

// Bury has the tuple of a packet from outside rest.
func (t *Tombs) Bury(arriving nat.Tuple) {
	if t == nil {
		return
	}
	key := maphash.Comparable(t.seed, arriving)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn()
	if len(t.Tuples[0]) < MaxTombs {
		t.Tuples[0][key] = struct{}{}
		return
	}
	if _, known := t.Tuples[0][key]; known {
		return
	}
	if t.Full[0] == nil {
		t.Full[0] = make(portSet, portSetSize)
	}
	t.Full[0].add(podPort(arriving))
}

// Rests reports whether nothing may begin by the tuple of a packet from outside.
func (t *Tombs) Rests(arriving nat.Tuple) bool {
	key, port := maphash.Comparable(t.seed, arriving), podPort(arriving)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn()
	if arriving.Proto() == packet.ProtoUDP {
		if t.open.has(port) {
			return true
		}
		if t.ports[0].has(port) || t.ports[1].has(port) {
			t.ports[0].add(port)
			return true
		}
	}
	for i := range t.Tuples {
		if _, known := t.Tuples[i][key]; known || t.Full[i] != nil && t.Full[i].has(port) {
			return true
		}
	}
	return false
}

// podPort is the pod's port, or echo identifier, in the tuple of a packet from outside.
func podPort(arriving nat.Tuple) uint16 {
	if p := arriving.Proto(); p == packet.ProtoICMP || p == packet.ProtoICMPv6 {
		return arriving.Src().Port()
	}
	return arriving.Dst().Port()
}

// BurySocket has the tuple of a TCP socket rest that is about to be closed. It does nothing
// where there is no pod.
func (a *Gate) BurySocket(fd int, peer netip.AddrPort) {
	if a.Tombs == nil {
		return
	}
	if sa, err := unix.Getsockname(fd); err == nil && hostsock.AddrPort(sa).Port() != 0 {
		a.Tombs.Bury(nat.NewTuple(packet.ProtoTCP, peer, hostsock.AddrPort(sa)))
	}
}
