package inbound

// What a worker remembers for its successor.
//
// Both ends of an inbound flow are elsewhere, so it can outlive a worker that is killed or replaced
// by another binary. Its next packets do not identify it: a segment from the sandbox looks like one
// of a connection that the old worker terminated, and one from outside looks late for one of the
// old worker's sockets. So the tuples are recorded in memory that the workers' parent keeps
// (Config.Memory), and read back when the first rules arrive. Until then all packets are dropped:
// TCP sends them again.
//
// The content is trusted no more than a packet, because a compromised worker may have written it.
// Each flow is judged anew.
//
//	0   magic, high-water mark (slots that were ever used)
//	64  slot 0: used, protocol, state, family, ports, addresses
//	128 slot 1 …
//	…   the last TombMemory bytes: the ports of the worker's own sockets (tombs.go)
//
// A slot is written before it is marked as used, and unmarked before it is written
// again, so that a worker may die at any time.

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"unsafe"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

const (
	MemorySlot  = 64
	memorySlots = nat.DefaultMax
	memoryMagic = 0x31464c53 // "SLF1", little endian
	// MemorySize is the intended size of Config.Memory, in bytes. Only the part in use is ever
	// touched. Memory of another size, from another binary, holds another number of flows.
	MemorySize = MemorySlot*(1+memorySlots) + admit.TombMemory
)

// SplitMemory returns the parts of Config.Memory: for the flows, and for our own sockets' ports.
// Both are nil if it is too small.
func SplitMemory(memory []byte) (flows, ports []byte) {
	n := len(memory) - admit.TombMemory
	if n < 2*MemorySlot {
		return nil, nil
	}
	return memory[:n:n], memory[n:]
}

// FlowMemory records flows. Guarded by outside.mu.
type FlowMemory struct {
	Data []byte // nil: nothing is remembered
	free []int
	Next int // first slot never used by this process
}

// noSlot is the slot of an unrecorded flow.
const noSlot = -1

// remembered is a flow as the previous worker left it.
type remembered struct {
	tuple nat.Tuple
	state nat.State
}

func (m *FlowMemory) slot(i int) []byte { return m.Data[MemorySlot*(1+i):][:MemorySlot:MemorySlot] }

func (m *FlowMemory) capacity() int { return len(m.Data)/MemorySlot - 1 }

// word is a word of b that others may read at any moment after our death.
func word(b []byte) *uint32 { return (*uint32)(unsafe.Pointer(&b[0])) }

// Recall returns the recorded flows and empties the memory.
func (m *FlowMemory) Recall() []remembered {
	if m.Data == nil {
		return nil
	}
	var all []remembered
	if atomic.LoadUint32(word(m.Data)) == memoryMagic {
		used := min(int(atomic.LoadUint32(word(m.Data[4:]))), m.capacity())
		for i := range used {
			if b := m.slot(i); atomic.SwapUint32(word(b), 0) == 1 {
				if r, ok := readSlot(b); ok {
					all = append(all, r)
				}
			}
		}
	}
	atomic.StoreUint32(word(m.Data[4:]), 0)
	atomic.StoreUint32(word(m.Data), memoryMagic)
	return all
}

func readSlot(b []byte) (remembered, bool) {
	src, dst := netip.AddrFrom16([16]byte(b[16:32])), netip.AddrFrom16([16]byte(b[32:48]))
	if b[6] == 4 {
		src, dst = src.Unmap(), dst.Unmap()
	}
	r := remembered{
		tuple: nat.NewTuple(b[4], netip.AddrPortFrom(src, binary.LittleEndian.Uint16(b[8:])), netip.AddrPortFrom(dst, binary.LittleEndian.Uint16(b[10:]))),
		state: nat.State(b[5]),
	}
	return r, src.Is4() == dst.Is4() && !src.Is4In6() && (b[4] != packet.ProtoTCP || nat.SynSent <= r.state && r.state <= nat.Close)
}

// Note finds a place for a flow.
func (m *FlowMemory) Note(tuple nat.Tuple, s nat.State) int {
	i := m.Next
	switch n := len(m.free); {
	case n > 0:
		i, m.free = m.free[n-1], m.free[:n-1]
	case m.Data == nil || i >= m.capacity():
		return noSlot
	default:
		m.Next++
		atomic.StoreUint32(word(m.Data[4:]), uint32(m.Next))
	}
	b := m.slot(i)
	src, dst := tuple.Src(), tuple.Dst()
	b[4], b[5], b[6] = tuple.Proto(), uint8(s), 6
	if src.Addr().Is4() {
		b[6] = 4
	}
	binary.LittleEndian.PutUint16(b[8:], src.Port())
	binary.LittleEndian.PutUint16(b[10:], dst.Port())
	a, c := src.Addr().As16(), dst.Addr().As16()
	copy(b[16:], a[:])
	copy(b[32:], c[:])
	atomic.StoreUint32(word(b), 1)
	return i
}

func (m *FlowMemory) forget(i int) {
	if i == noSlot {
		return
	}
	atomic.StoreUint32(word(m.slot(i)), 0)
	m.free = append(m.free, i)
}

// remember records a flow's state.
func (fl *inboundFlow) remember(s nat.State) {
	o := fl.o
	o.mu.RLock()
	if !fl.gone && fl.slot != noSlot {
		o.Memory.slot(fl.slot)[5] = uint8(s)
	}
	o.mu.RUnlock()
}

// Restore takes over the previous worker's flows, as far as the rules allow them. It does so once.
func (o *Path) Restore() {
	if !o.Waiting.Load() {
		return
	}
	o.mu.Lock()
	all := o.Memory.Recall()
	o.mu.Unlock()
	for _, was := range all {
		o.restoreFlow(was)
	}
	o.Waiting.Store(false)
}

func (o *Path) restoreFlow(was remembered) {
	t := was.tuple
	if !o.isPod(t.Dst().Addr()) || o.isPod(t.Src().Addr()) || o.Onlink.IsOwn(t.Src().Addr()) || t.Proto() == packet.ProtoTCP && was.state == nat.Close {
		return
	}
	j := o.Gate.Decide(queryOf(t))
	if !j.MayBegin() {
		o.n.refused.Add(1)
		return
	}
	fl := o.newFlow(t)
	fl.tcp.state = was.state
	if was.state == nat.SynSent {
		fl.tcp.state = nat.None // its sender may repeat it, or may be further on by now
	}
	if o.admit(fl, j, false) != nil {
		return
	}
	if t.Proto() == packet.ProtoTCP {
		fl.Lease.SetState(fl.tcp.leaseState())
		fl.remember(fl.tcp.leaseState())
	}
	o.n.restored.Add(1)
}
