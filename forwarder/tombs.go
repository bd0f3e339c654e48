package forwarder

// What of the wire belongs, or has lately belonged, to the worker's own sockets.
//
// A pod has one set of addresses and two users of it: the worker's sockets, by which
// the pod's judged flows go out, and in0, by which others speak to the pod. A packet for
// a socket that is gone finds in0: a late answer, the next datagram of a server that
// streams, a segment that crossed a reset. Were it taken for the beginning of a flow, the
// pod could go on by that flow's tuple to a peer that no egress rule allows any more, or
// ever did. So the tuple of a socket rests for tombTime after its last use, and nothing
// from outside begins a flow by it.
//
//	UDP         by the socket's port, whatever the peer: one socket has many, and a peer
//	            that was cut off may send on while the socket lives for others
//	TCP, echo   by the whole tuple as it arrives: the kernel gives one port to many peers
//	refused     by the whole tuple too, with the pod's own port: UDP that policy refused or cut off
//
// A datagram that comes to rest here makes its port rest anew, so that a stream whose
// flow was revoked never begins one, however long it lasts.
//
// Both kinds are kept in two generations, the young one and the old one, which change
// every tombTime: what is noted rests for between one and two of them. A generation holds
// maxTombs whole tuples. When it is full only the pod's port is noted, which is then closed
// to every new flow from outside: it errs on the closed side, in bounded memory.
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

	"sluice/nat"
)

const (
	// tombTime is how long a tuple rests at least, and half of how long at most:
	// nf_conntrack_tcp_timeout_time_wait, the longest that the kernel waits for strays.
	tombTime = 120 * time.Second
	// maxTombs bounds the whole tuples of one generation, about 1 MiB.
	maxTombs = 1 << 16

	portSetSize = 1 << 16 / 8
	// tombMemory is what tombs need of Config.Memory: open, young and old ports.
	tombMemory = 3 * portSetSize
)

// portSet is a set of ports, a bit each.
type portSet []byte

func (s portSet) has(port uint16) bool { return s[port/8]&(1<<(port%8)) != 0 }
func (s portSet) add(port uint16)      { s[port/8] |= 1 << (port % 8) }
func (s portSet) drop(port uint16)     { s[port/8] &^= 1 << (port % 8) }

// tombs is safe for concurrent use. A nil *tombs, of a forwarder without a second
// link, remembers nothing: nothing can begin there.
type tombs struct {
	now  func() time.Time
	seed maphash.Seed

	mu     sync.Mutex
	turned time.Time              // when the generations last changed
	tuples [2]map[uint64]struct{} // young, old: hashes of tuples as they arrive
	full   [2]portSet             // the pod's ports that stand for what found no room; nil: none
	users  map[uint16]int         // open UDP sockets by port
	open   portSet                // the keys of users
	ports  [2]portSet             // young, old
}

// newTombs takes over what the worker before left in memory, which is tombMemory
// bytes, or nil when nothing outlives this one.
func newTombs(now func() time.Time, memory []byte) *tombs {
	if memory == nil {
		memory = make([]byte, tombMemory)
	}
	t := &tombs{now: now, seed: maphash.MakeSeed(), turned: now(), users: make(map[uint16]int)}
	t.open = memory[:portSetSize:portSetSize]
	t.ports = [2]portSet{memory[portSetSize:][:portSetSize:portSetSize], memory[2*portSetSize:][:portSetSize:portSetSize]}
	t.tuples[0] = make(map[uint64]struct{})
	for i := range t.open {
		t.ports[0][i] |= t.open[i] | t.ports[1][i]
	}
	// In this order: a worker that dies here forgets nothing.
	clear(t.open)
	clear(t.ports[1])
	return t
}

// turn makes the young generation the old one when its time is over. mu is held.
func (t *tombs) turn() {
	passed := t.now().Sub(t.turned)
	if passed < tombTime {
		return
	}
	t.turned = t.turned.Add(passed)
	copy(t.ports[1], t.ports[0])
	clear(t.ports[0])
	t.tuples[1], t.full[1] = t.tuples[0], t.full[0]
	t.tuples[0], t.full[0] = make(map[uint64]struct{}), nil
	if passed >= 2*tombTime {
		clear(t.ports[1])
		t.tuples[1], t.full[1] = nil, nil
	}
}

// opened notes a UDP socket that was bound to port, before it sends anything.
func (t *tombs) opened(port uint16) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.users[port]++
	t.open.add(port)
}

// closed ends what opened began: the port rests from now on.
func (t *tombs) closed(port uint16) {
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

// bury has the tuple of a packet from outside rest.
func (t *tombs) bury(arriving nat.Tuple) {
	if t == nil {
		return
	}
	key := maphash.Comparable(t.seed, arriving)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn()
	if len(t.tuples[0]) < maxTombs {
		t.tuples[0][key] = struct{}{}
		return
	}
	if _, known := t.tuples[0][key]; known {
		return
	}
	if t.full[0] == nil {
		t.full[0] = make(portSet, portSetSize)
	}
	t.full[0].add(podPort(arriving))
}

// rests reports whether nothing may begin by the tuple of a packet from outside.
func (t *tombs) rests(arriving nat.Tuple) bool {
	key, port := maphash.Comparable(t.seed, arriving), podPort(arriving)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn()
	if arriving.Proto() == protoUDP {
		if t.open.has(port) {
			return true
		}
		if t.ports[0].has(port) || t.ports[1].has(port) {
			t.ports[0].add(port)
			return true
		}
	}
	for i := range t.tuples {
		if _, known := t.tuples[i][key]; known || t.full[i] != nil && t.full[i].has(port) {
			return true
		}
	}
	return false
}

// podPort is the pod's port, or echo identifier, in the tuple of a packet from outside.
func podPort(arriving nat.Tuple) uint16 {
	if p := arriving.Proto(); p == protoICMP || p == protoICMPv6 {
		return arriving.Src().Port()
	}
	return arriving.Dst().Port()
}

// burySocket has the tuple of a TCP socket rest that is about to be closed. It does nothing
// where there is no pod.
func (a *admission) burySocket(fd int, peer netip.AddrPort) {
	if a.tombs == nil {
		return
	}
	if sa, err := unix.Getsockname(fd); err == nil && addrPort(sa).Port() != 0 {
		a.tombs.bury(nat.NewTuple(protoTCP, peer, addrPort(sa)))
	}
}
