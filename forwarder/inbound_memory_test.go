package forwarder

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/nat"
)

// generation starts a forwarder with the memory of the previous one.
func generation(t *testing.T, memory []byte, policy string) *podWire {
	return newPodWire(t, policy, func(c *Config) { c.Memory = memory })
}

func TestInboundFlowsOutliveTheirForwarder(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		memory := make([]byte, inbound.MemorySize)
		client, server := at(far, 40000), at(pod, 80)
		t.Run("the first", func(t *testing.T) {
			w := generation(t, memory, allowAll)
			w.connect(client, server)
			w.connect(client, at(pod, 8080))
			w.connect(client, at(pod, 9090))
			arrives(t, w.out, w.wire, segment(client, at(pod, 9090), header.TCPFlagRst, 1001, 0))
			arrives(t, w.wire, w.out, segment(server, client, header.TCPFlagFin|header.TCPFlagAck, 5001, 1001))
			arrives(t, w.out, w.wire, udpPacket(client, server, []byte("x")))
			arrives(t, w.out, w.wire, echoPacket(far, pod, 3, 1, nil))
		})
		t.Run("the second, of which the pod hears first", func(t *testing.T) {
			w := generation(t, memory, allowAll)
			states := make(map[string]nat.State)
			for _, f := range w.table.List() {
				states[f.Orig.String()] = f.State
			}
			want := map[string]nat.State{
				nat.NewTuple(packet.ProtoTCP, client, server).String():        nat.FinWait,
				nat.NewTuple(packet.ProtoTCP, client, at(pod, 8080)).String(): nat.Established,
				nat.NewTuple(packet.ProtoUDP, client, server).String():        nat.Unreplied,
			}
			echo := echoPacket(far, pod, 3, 1, nil)
			want[nat.NewTuple(echo.proto, at(far, 3), at(pod, uint16(echo.l4[0])<<8)).String()] = nat.Unreplied
			if !maps.Equal(states, want) {
				t.Errorf("it knows\n%v, want\n%v", states, want)
			}
			arrives(t, w.wire, w.out, dataSegment(at(pod, 8080), client, header.TCPFlagAck, 5001, 1001, pattern(100)))
			arrives(t, w.wire, w.out, udpPacket(server, client, []byte("answer")))
			arrives(t, w.wire, w.out, answerOf(echoPacket(pod, far, 3, 1, nil)))
			arrives(t, w.out, w.wire, segment(client, server, header.TCPFlagAck, 1001, 5002))
		})
		t.Run("the third, under another policy", func(t *testing.T) {
			w := generation(t, memory, strings.Replace(onlyHTTP, "%s", "drop", 1))
			w.wantFlows(2) // TCP and UDP of port 80
			if s := w.f.Stats(); s["inbound_flows_restored"] != 2 || s["inbound_refused"] != 2 {
				t.Errorf("counters: %v", w.counters())
			}
		})
		t.Run("the fourth, which would allow all again", func(t *testing.T) {
			generation(t, memory, allowAll).wantFlows(2)
		})
	})
}

// Before the first rules nothing passes, and nothing is reported as over.
func TestThePodWaitsForRules(t *testing.T) {
	memory := make([]byte, inbound.MemorySize)
	client, server := at(client4, 40000), at(guest4, 80)
	t.Run("before", func(t *testing.T) { generation(t, memory, allowAll).connect(client, server) })
	w := generation(t, memory, allowAll)
	w.f.outside.Waiting.Store(true) // as before SetRules, which a wire has called
	w.stays(w.wire, dataSegment(server, client, header.TCPFlagAck, 5001, 1001, pattern(100)), "inbound_not_ready")
	w.f.SetRules(compile(t, allowAll))
	arrives(t, w.wire, w.out, dataSegment(server, client, header.TCPFlagAck, 5001, 1001, pattern(100)))
}

func TestMemoryIsUsedAgain(t *testing.T) {
	memory := make([]byte, inbound.MemorySlot*(1+8)+admit.TombMemory) // room for 8
	w := generation(t, memory, allowAll)
	for i := range uint16(100) {
		arrives(t, w.out, w.wire, udpPacket(at(client4, 1000+i), at(guest4, 80), nil))
		if i >= 4 {
			w.table.Lookup(nat.NewTuple(packet.ProtoUDP, at(client4, 1000+i-4), at(guest4, 80))).Kill("test")
		}
	}
	if used := len(w.f.outside.Memory.Recall()); used != 4 {
		t.Errorf("%d flows are noted, want the 4 that live", used)
	}
	if m := &w.f.outside.Memory; m.Next > 5 {
		t.Errorf("%d places were used for 5 flows at a time", m.Next)
	}
}

func TestMoreFlowsThanMemory(t *testing.T) {
	memory := make([]byte, inbound.MemorySlot*(1+8)+admit.TombMemory)
	t.Run("before", func(t *testing.T) {
		w := generation(t, memory, allowAll)
		for i := range uint16(20) {
			arrives(t, w.out, w.wire, udpPacket(at(client4, 1000+i), at(guest4, 80), nil))
		}
		w.wantFlows(20)
	})
	generation(t, memory, allowAll).wantFlows(8)
}

// Whatever the previous worker has written, only flows that policy allows come of it, and the
// forwarder works.
func TestHostileMemory(t *testing.T) {
	client, server := at(client4, 40000), at(guest4, 80)
	good := make([]byte, inbound.MemorySlot*(1+64)+admit.TombMemory)
	m := inbound.FlowMemory{Data: good[:len(good)-admit.TombMemory]}
	m.Recall()
	for i := range uint16(60) {
		m.Note(nat.NewTuple(packet.ProtoTCP, at(client4, i+1), server), nat.Established)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for name, spoil := range map[string]func(b []byte){
		"noise": func(b []byte) {
			for i := range b[8:] {
				b[8+i] = byte(random.Uint32())
			}
		},
		"noise here and there": func(b []byte) {
			for range 500 {
				b[8+random.IntN(len(b)-8)] = byte(random.Uint32())
			}
		},
		"a mark beyond the end": func(b []byte) { copy(b[4:], "\xff\xff\xff\xff") },
		"another format":        func(b []byte) { copy(b, "what") },
		"flows of others": func(b []byte) {
			for i := range 60 {
				copy(b[inbound.MemorySlot*(1+i)+32:], client4.AsSlice())
			}
		},
		"the sandbox's own addresses as clients": func(b []byte) {
			a := guest4.As16()
			for i := range 60 {
				copy(b[inbound.MemorySlot*(1+i)+16:], a[:])
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range 20 {
				b := slices.Clone(good)
				spoil(b)
				t.Run("", func(t *testing.T) {
					w := generation(t, b, fmt.Sprintf(onlyHTTP, "drop"))
					for _, l := range w.table.Leases() {
						if o := l.Orig(); o.Dst().Port() != 80 || !w.f.onlink.IsGuest(o.Dst().Addr()) || o.Src().Addr() != client4 && o.Src().Addr() != client6 {
							t.Errorf("there is a flow %v", o)
						}
					}
					w.connect(client, server)
				})
			}
		})
	}
}
