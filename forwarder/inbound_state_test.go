package forwarder

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/inbound"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// Connections as conntrack sees them. A step names the sender (o: the client, r: the pod) and what
// it sends: S SYN, SA, A, a an ACK of all but the last, F FIN and ACK, R a reset that is believed,
// r one from the past. The text after = is the state that conntrack -L would show.
func TestInboundTCPStates(t *testing.T) {
	for _, test := range []struct{ name, steps string }{
		{"the client ends it", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED oA=ESTABLISHED rA=ESTABLISHED oF=FIN_WAIT rA=CLOSE_WAIT rF=LAST_ACK oA=TIME_WAIT"},
		{"the pod ends it", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED rF=FIN_WAIT oA=CLOSE_WAIT oA=CLOSE_WAIT oF=LAST_ACK rA=TIME_WAIT"},
		{"both at once", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED oF=FIN_WAIT rF=LAST_ACK oA=TIME_WAIT rA=TIME_WAIT"},
		{"bytes before the last FIN are acknowledged", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED oF=FIN_WAIT rA=CLOSE_WAIT rF=LAST_ACK oa=LAST_ACK oA=TIME_WAIT"},
		{"both at once, and an acknowledgement from before", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED oF=FIN_WAIT rF=LAST_ACK ra=LAST_ACK oA=TIME_WAIT"},
		{"the client gives up before the last ACK of the handshake", "oS=SYN_SENT rSA=SYN_RECV oF=FIN_WAIT"},
		{"a closed port", "oS=SYN_SENT rR=CLOSE"},
		{"a SYN sent again", "oS=SYN_SENT oS=SYN_SENT rSA=SYN_RECV oS=SYN_RECV rSA=SYN_RECV oA=ESTABLISHED"},
		{"an ACK is no answer to a SYN", "oS=SYN_SENT rA=SYN_SENT"},
		{"the client resets", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED rA=ESTABLISHED oR=CLOSE"},
		{"the pod resets", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED rA=ESTABLISHED rR=CLOSE"},
		{"a reset from the past changes nothing", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED or=ESTABLISHED rr=ESTABLISHED"},
		{"a SYN within a connection changes nothing", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED oS=ESTABLISHED rSA=ESTABLISHED oSA=ESTABLISHED"},
		{"taken over: the client's ACK is not believed alone", "oA=SYN_SENT oA=SYN_SENT rA=ESTABLISHED oF=FIN_WAIT"},
		{"taken over and refused", "oA=SYN_SENT rR=CLOSE"},
		{"taken over at its end", "oF=SYN_SENT rA=ESTABLISHED"},
		{"taken over at the pod's end", "oA=SYN_SENT rF=FIN_WAIT oA=CLOSE_WAIT oF=LAST_ACK rA=TIME_WAIT"},
		{"taken over, then asked anew", "oA=SYN_SENT oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED"},
		{"the same ports again after TIME_WAIT", "oS=SYN_SENT rSA=SYN_RECV oA=ESTABLISHED oF=FIN_WAIT rF=LAST_ACK oA=TIME_WAIT oS=SYN_SENT rSA=SYN_RECV"},
		{"the same ports again after a reset", "oS=SYN_SENT rR=CLOSE oS=SYN_SENT rSA=SYN_RECV"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := conversation{ends: [2]netip.AddrPort{at(client4, 40000), at(guest4, 80)}, next: [2]uint32{1 << 31, 7000}}
			memory := make([]byte, inbound.MemorySlot*(1+8)+admit.TombMemory)
			if strings.HasPrefix(test.name, "taken over") { // by a worker that has seen the SYN
				slots, _ := inbound.SplitMemory(memory)
				m := inbound.FlowMemory{Data: slots}
				m.Recall()
				m.Note(nat.NewTuple(packet.ProtoTCP, c.ends[0], c.ends[1]), nat.SynSent)
			}
			w := generation(t, memory, allowAll)
			for i, step := range strings.Fields(test.steps) {
				what, want, _ := strings.Cut(step, "=")
				d := nat.Original
				from, to := w.out, w.wire
				if what[0] == 'r' {
					d, from, to = nat.Reply, w.wire, w.out
				}
				arrives(t, from, to, c.say(d, what[1:]))
				if got := w.flow().State.String(); got != want {
					t.Fatalf("after step %d, %s, it is %s", i, step, got)
				}
			}
		})
	}
}

// conversation numbers segments as two honest ends do.
type conversation struct {
	ends [2]netip.AddrPort
	next [2]uint32 // sequence number, by side
}

func (c *conversation) say(d nat.Dir, what string) ipPacket {
	flags := map[string]header.TCPFlags{
		"S": header.TCPFlagSyn, "SA": header.TCPFlagSyn | header.TCPFlagAck, "A": header.TCPFlagAck, "a": header.TCPFlagAck,
		"F": header.TCPFlagFin | header.TCPFlagAck, "R": header.TCPFlagRst, "r": header.TCPFlagRst,
	}[what]
	seq, ack := c.next[d], c.next[d^1]
	switch what {
	case "r":
		seq -= 1000
	case "a":
		ack--
	}
	if flags&header.TCPFlagAck == 0 {
		ack = 0
	}
	if flags&(header.TCPFlagSyn|header.TCPFlagFin) != 0 {
		c.next[d]++
	}
	return segment(c.ends[d], c.ends[d^1], flags, seq, ack)
}

func TestAForgedFlowGivesWay(t *testing.T) {
	w := newPodWire(t, allowAll, func(c *Config) { c.Table = nat.NewTable(nat.Config{Limits: nat.Limits{Max: 8}}) })
	w.connect(at(client4, 1), at(guest4, 80)) // a real one
	for port := uint16(1002); port < 1050; port++ {
		arrives(t, w.out, w.wire, segment(at(client4, port), at(guest4, 80), header.TCPFlagSyn, 1, 0))
	}
	// Making the pod answer does not help: only a complete handshake does.
	for port := uint16(1050); port < 1100; port++ {
		arrives(t, w.out, w.wire, segment(at(client4, port), at(guest4, 80), header.TCPFlagSyn, 1, 0))
		arrives(t, w.wire, w.out, segment(at(guest4, 80), at(client4, port), header.TCPFlagSyn|header.TCPFlagAck, 1, 2))
	}
	w.wantFlows(8)
	if s := w.table.Stats(); s.HalfOpen != 0 || s.TableFull != 0 {
		t.Errorf("the table counts %+v", s)
	}
	arrives(t, w.wire, w.out, segment(at(guest4, 80), at(client4, 1), header.TCPFlagAck, 5001, 1001))
}

func TestTheSandboxMayUseThePortsOfAFlowThatIsOver(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	host := listenHost(t)
	// Only here the far end of the inbound flow is the gateway's name for the host's loopback,
	// which makes the stack's answer visible.
	c := conversation{ends: [2]netip.AddrPort{at(client4, host), at(guest4, 4000)}, next: [2]uint32{100, 200}}
	for _, step := range strings.Fields("oS rSA oA oF rF oA") {
		from, to, d := w.out, w.wire, nat.Original
		if step[0] == 'r' {
			from, to, d = w.wire, w.out, nat.Reply
		}
		arrives(t, from, to, c.say(d, step[1:]))
	}
	w.send(c.say(nat.Reply, "S"))
	w.out.silent("a SYN of the sandbox's own connection")
	if w.f.outside.Lookup(nat.NewTuple(packet.ProtoTCP, c.ends[0], c.ends[1])) != nil {
		t.Error("the inbound flow is still there")
	}
}

func TestAResetOfNoKnownFlowPassesIfAllowed(t *testing.T) {
	w := newPodWire(t, allowAll, nil)
	arrives(t, w.out, w.wire, segment(at(client4, 40000), at(guest4, 80), header.TCPFlagRst, 1, 0))
	w.wantFlows(0)
	w.f.SetRules(compile(t, closed))
	w.stays(w.out, segment(at(client4, 40000), at(guest4, 80), header.TCPFlagRst, 1, 0), "inbound_refused")
}

func TestANewPolicyCutsInboundFlows(t *testing.T) {
	bothFamilies(t, func(t *testing.T, pod, far netip.Addr) {
		w := newPodWire(t, allowAll, nil)
		client, server := at(far, 40000), at(pod, 8080)
		w.connect(client, server)
		w.connect(client, at(pod, 80))
		arrives(t, w.out, w.wire, dataSegment(client, server, header.TCPFlagAck, 1001, 5001, pattern(100)))
		arrives(t, w.wire, w.out, dataSegment(server, client, header.TCPFlagAck, 5001, 1101, pattern(10)))
		arrives(t, w.out, w.wire, udpPacket(client, server, []byte("x")))
		w.f.SetRules(compile(t, strings.Replace(onlyHTTP, "%s", "drop", 1)))

		p := w.recv()
		if h := header.TCP(p.l4); p.src != far || h.DestinationPort() != 8080 || h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.SequenceNumber() != 1101 {
			t.Errorf("the pod got %v, seq %d, from %s", h.Flags(), h.SequenceNumber(), p.src)
		}
		p = w.out.recv()
		if h := header.TCP(p.l4); p.src != pod || h.DestinationPort() != 40000 || h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.SequenceNumber() != 5001 {
			t.Errorf("the client got %v, seq %d, from %s", h.Flags(), h.SequenceNumber(), p.src)
		}
		w.silent("more inside")
		w.out.silent("more outside")
		w.wantFlows(1) // to port 80
		w.stays(w.out, dataSegment(client, server, header.TCPFlagAck, 1101, 5011, pattern(100)), "inbound_refused")
		w.stays(w.out, udpPacket(client, server, []byte("x")), "inbound_refused")
		arrives(t, w.out, w.wire, segment(client, at(pod, 80), header.TCPFlagAck, 1001, 5001))
	})
}

func TestAByteBudgetEndsInboundFlows(t *testing.T) {
	w := newPodWire(t, allowAll[:len(allowAll)-1]+"\n  limits: {totalBytes: 1K}\n", nil)
	w.connect(at(client4, 40000), at(guest4, 80))
	arrives(t, w.out, w.wire, dataSegment(at(client4, 40000), at(guest4, 80), header.TCPFlagAck, 1001, 5001, pattern(1000)))
	for _, side := range []*wire{w.wire, w.out} {
		if p, ok := side.tryRecv(5 * time.Second); !ok || header.TCP(p.l4).Flags()&header.TCPFlagRst == 0 {
			t.Errorf("a side was not told: %v", ok)
		}
	}
	testutil.Eventually(t, "the flow is over", func() bool { return w.table.Len() == 0 && w.f.outside.Count.Load() == 0 })
}

func TestInboundFlowsTimeOut(t *testing.T) {
	clock := newTestClock()
	table := nat.NewTable(nat.Config{Now: clock.now})
	w := newPodWire(t, allowAll, func(c *Config) { c.Table, c.Now = table, clock.now })
	arrives(t, w.out, w.wire, udpPacket(at(client4, 1), at(guest4, 53), dnsQuery(t, "a.test.")))
	arrives(t, w.out, w.wire, udpPacket(at(client4, 2), at(guest4, 53), pattern(148))) // no question
	arrives(t, w.out, w.wire, udpPacket(at(client4, 1), at(guest4, 99), nil))
	w.connect(at(client4, 1), at(guest4, 80))
	for _, step := range []struct {
		after time.Duration
		left  int
	}{{11 * time.Second, 3}, {108 * time.Second, 3}, {2 * time.Second, 1}, {100 * time.Hour, 1}, {432000 * time.Second, 0}} {
		clock.advance(step.after)
		table.Expire(clock.now())
		w.wantFlows(step.left)
		if n := int(w.f.outside.Count.Load()); n != step.left {
			t.Errorf("%d inbound flows are left, want %d", n, step.left)
		}
	}
	w.silent("an end by timeout, inside")
	w.out.silent("an end by timeout, outside")
}

// The record of an ended connection says how it ended, not that nothing came afterwards.
func TestTheRecordOfAnInboundFlowSaysHowItEnded(t *testing.T) {
	for _, test := range []struct {
		name, steps string
		want        nat.Reason
	}{
		{"closed by both", "oS rSA oA oF rF oA", nat.ReasonClosed},
		{"reset by the pod", "oS rSA oA rA rR", nat.ReasonReset},
		{"refused", "oS rR", nat.ReasonReset},
		{"left open", "oS rSA oA rA", nat.ReasonTimeout},
		{"closed by one", "oS rSA oA oF rA", nat.ReasonTimeout},
	} {
		t.Run(test.name, func(t *testing.T) {
			clock := newTestClock()
			table := nat.NewTable(nat.Config{Now: clock.now})
			w := newPodWire(t, allowAll, func(c *Config) { c.Table, c.Now = table, clock.now })
			events, cancel := table.Subscribe(64)
			defer cancel()
			c := conversation{ends: [2]netip.AddrPort{at(client4, 40000), at(guest4, 80)}, next: [2]uint32{1, 2}}
			for _, step := range strings.Fields(test.steps) {
				from, to, d := w.out, w.wire, nat.Original
				if step[0] == 'r' {
					from, to, d = w.wire, w.out, nat.Reply
				}
				arrives(t, from, to, c.say(d, step[1:]))
			}
			clock.advance(10 * 24 * time.Hour)
			table.Expire(clock.now())
			for {
				select {
				case e := <-events:
					if e.Type == nat.Destroy {
						if e.Flow.Reason != test.want {
							t.Errorf("the record says %q, want %q", e.Flow.Reason, test.want)
						}
						return
					}
				default:
					t.Fatal("there is no record")
				}
			}
		})
	}
}

const openIn = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: open-in}
spec:
  defaultAction: drop
  ingress: [{name: any, action: allow}]
`

// Both links' readers, policy and the table work at the same time. The wire's clean-up checks that
// nothing is left.
func TestInboundUnderLoadFromAllSides(t *testing.T) {
	w := newPodWire(t, openIn, func(c *Config) {
		c.Memory, c.Table = make([]byte, inbound.MemorySize), nat.NewTable(nat.Config{Limits: nat.Limits{Max: 32}})
	})
	inside, outside := &sink{Endpoint: w.ep}, &sink{Endpoint: w.out.ep}
	w.f.outside.Sandbox, w.f.outside.In0 = inbound.NewOutlet(inside), inbound.NewOutlet(outside)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(g), 7))
			flags := []header.TCPFlags{header.TCPFlagSyn, header.TCPFlagSyn | header.TCPFlagAck, header.TCPFlagAck, header.TCPFlagFin | header.TCPFlagAck, header.TCPFlagRst}
			for range 3000 {
				client, server := at(client4, uint16(1+random.IntN(64))), at(guest4, uint16(80+random.IntN(2)))
				from, src, dst := w.out, client, server
				if g%2 == 1 {
					from, src, dst = w.wire, server, client
				}
				switch random.IntN(4) {
				case 0:
					from.send(udpPacket(src, dst, nil))
				case 1:
					from.sendBytes(fragment4(udpPacket(src, dst, pattern(64)), 0, true), 0)
				default:
					from.send(segment(src, dst, flags[random.IntN(len(flags))], random.Uint32N(100), random.Uint32N(100)))
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 60 {
			text := openIn
			if i%2 == 0 {
				text = strings.Replace(onlyHTTP, "%s", "drop", 1)
			}
			w.f.SetRules(compile(t, text))
			w.table.Expire(time.Now())
		}
	})
	wg.Wait()
	if n, m := w.table.Len(), int(w.f.outside.Count.Load()); m > n || n > 32 {
		t.Errorf("%d flows, %d inbound ones", n, m)
	}
}
