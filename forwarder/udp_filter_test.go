package forwarder

// Mapping and filtering of RFC 4787.

import (
	"fmt"
	"net/netip"
	"testing"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

func TestUDPOneSocketServesAllPeersOfAnEndpoint(t *testing.T) {
	w := newWire(t, allowAll, nil)
	a, b := udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.1:0")
	w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(a)), nil))
	w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(b)), nil))
	w.send(udpPacket(at(guest4, 4001), at(gateway4, portOf(a)), nil))
	_, first := read(t, a)
	_, second := read(t, b)
	_, other := read(t, a)
	if first != second {
		t.Errorf("two peers see %s and %s, expected one mapping (RFC 4787 REQ-1)", first, second)
	}
	if first == other {
		t.Errorf("two endpoints of the sandbox share %s", first)
	}
}

func TestUDPOnlyAddressedPeersMayAnswer(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv, stranger := udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.2:0")
	w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(srv)), nil))
	_, mapped := read(t, srv)
	_, _ = stranger.WriteToUDPAddrPort([]byte("let me in"), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), mapped.Port()))
	_, _ = srv.WriteToUDPAddrPort([]byte("answer"), mapped)
	if _, _, payload, _ := w.recvUDP(); string(payload) != "answer" {
		t.Fatalf("the sandbox got %q", payload)
	}
	if n := w.f.Stats()["udp_unsolicited"]; n != 1 {
		t.Errorf("%d datagrams counted as unsolicited, expected one", n)
	}
}

func TestUDPAnotherPortOfAnAddressedPeerMayAnswerIfPolicyLetsItBeAnswered(t *testing.T) {
	for _, allowed := range []bool{true, false} {
		srv, other := udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.1:0")
		text := allowAll
		if !allowed {
			text = fmt.Sprintf(onlyPort, 1, portOf(srv))
		}
		w := newWire(t, text, nil)
		w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(srv)), nil))
		_, mapped := read(t, srv)
		_, _ = other.WriteToUDPAddrPort([]byte("from another port"), mapped)
		if !allowed {
			testutil.Eventually(t, "it is counted as unsolicited", func() bool { return w.f.Stats()["udp_unsolicited"] == 1 })
			continue
		}
		src, dst, payload, _ := w.recvUDP()
		if string(payload) != "from another port" || src != at(gateway4, portOf(other)) || dst != at(guest4, 4000) {
			t.Fatalf("the sandbox got %q from %s to %s", payload, src, dst)
		}
		w.send(udpPacket(dst, src, []byte("and back")))
		if payload, from := read(t, other); string(payload) != "and back" || from != mapped {
			t.Errorf("the other port got %q from %s, expected the endpoint's one mapping %s", payload, from, mapped)
		}
	}
}

// An address that was sent to once cannot keep itself known by moving from port to port.
func TestUDPOnlyTheSandboxMakesAnAddressKnown(t *testing.T) {
	w := newWire(t, allowAll, nil)
	srv, second, third := udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.1:0"), udpServer(t, "127.0.0.1:0")
	w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(srv)), nil))
	_, mapped := read(t, srv)
	_, _ = second.WriteToUDPAddrPort([]byte("from another port"), mapped)
	_, _, _, _ = w.recvUDP()
	end := func(peer netip.AddrPort) {
		t.Helper()
		l := w.f.gate.Table.Lookup(nat.NewTuple(packet.ProtoUDP, at(guest4, 4000), peer))
		if l == nil || !l.Kill("test") {
			t.Fatalf("there is no flow to %s", peer)
		}
	}
	end(at(gateway4, portOf(srv)))
	_, _ = third.WriteToUDPAddrPort([]byte("from a third port"), mapped)
	testutil.Eventually(t, "it is counted as unsolicited", func() bool { return w.f.Stats()["udp_unsolicited"] == 1 })
	// Once the sandbox has sent there, the address is known again.
	w.send(udpPacket(at(guest4, 4000), at(gateway4, portOf(second)), []byte("and back")))
	read(t, second)
	_, _ = third.WriteToUDPAddrPort([]byte("from a third port"), mapped)
	if _, _, payload, _ := w.recvUDP(); string(payload) != "from a third port" {
		t.Errorf("the sandbox got %q", payload)
	}
	end(at(gateway4, portOf(second)))
	end(at(gateway4, portOf(third)))
	if n := len(w.f.dgram.UDP.Socks); n != 0 {
		t.Errorf("%d sockets are left", n)
	}
}
