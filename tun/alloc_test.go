package tun

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"sluice.dev/sluice/internal/testutil"

	"golang.org/x/sys/unix"
)

// discard is the cheapest dispatcher.
type discard struct{}

func (discard) KeepsRXChecksumValidated() bool                                        { return true }
func (discard) DeliverNetworkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}
func (discard) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer)    {}

// The packet path allocates nothing in steady state; the pools of gvisor's buffers
// are warm after the first run, which AllocsPerRun does not count.
func TestPacketPathDoesNotAllocate(t *testing.T) {
	if testutil.Race {
		t.Skip("sync.Pool drops objects at random under the race detector")
	}
	large := vnetHeader{flags: vnetNeedsChecksum, gsoType: gsoTCPv4, gsoSize: 1400, csumStart: 34, csumOffset: 16}
	for _, test := range []struct {
		name  string
		frame []byte
	}{
		{"reading a small frame", withVnet(vnetHeader{}, toGateway(etherIPv4, ipv4Packet(6, tcpSegment(nil))))},
		{"reading a 64 KiB segment", withVnet(large, toGateway(etherIPv4, ipv4Packet(6, tcpSegment(make([]byte, 65000)))))},
		{"refusing a frame", withVnet(vnetHeader{}, make([]byte, 60))},
	} {
		t.Run(test.name, func(t *testing.T) {
			e, peer := newTwinEndpoint(t, Config{}, allOffloads)
			q := e.queues[0]
			q.to = &dispatcher{NetworkDispatcher: discard{}, keeper: discard{}}
			if n := testing.AllocsPerRun(200, func() {
				send(t, peer, test.frame)
				if more, ended := q.readFrame(); !more || ended {
					t.Fatal("no frame was read")
				}
			}); n != 0 {
				t.Errorf("%v allocations", n)
			}
		})
	}
	t.Run("writing a 64 KiB segment", func(t *testing.T) {
		e, peer := newTwinEndpoint(t, Config{}, allOffloads)
		pkt := outgoing(e, header.IPv4ProtocolNumber, header.TCPProtocolNumber, ipv4Packet(6, tcpSegment(make([]byte, 65000))), 20)
		defer pkt.DecRef()
		pkt.GSOOptions = stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1400, L3HdrLen: 20}
		qdisc := e.QDisc()
		buf := make([]byte, vnetHeaderLen+maxFrame)
		if n := testing.AllocsPerRun(200, func() {
			if err := qdisc.WritePacket(pkt); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Read(peer, buf); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}
