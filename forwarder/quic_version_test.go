package forwarder

import (
	"net"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"sluice.dev/sluice/internal/testutil"
)

// TestAServerMayAnswerInAnotherVersion has a client begin in version 1, its server answer in
// another, and the client continue in that one (RFC 9368, section 2.3; RFC 9369, section 4.1). What
// the client then says is sealed with the new version's Initial keys, which still follow from its
// first connection ID.
func TestAServerMayAnswerInAnotherVersion(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, row := range []struct {
		what    string
		version uint32
		server  []byte // the connection ID that the server chooses
	}{
		{"of version 2", quic2, craftID()},
		{"of version 2, by an ID of no length", quic2, []byte{}},
		{"of version 2, by the ID that the client said", quic2, nil},
		{"of a draft of version 2", quicDraft2, craftID()},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byName, nil)
			s := startNamed(t, func(*testing.T, *named) {}) // this test is the server
			pc, err := gonet.DialUDP(g.stack, nil, nil, ipv4.ProtocolNumber)
			testutil.Must(t, err)
			defer pc.Close()
			client, first := craftID(), craftID()
			server := row.server
			if server == nil {
				server = first
			}
			b := make([]byte, 1500)
			var peer net.Addr
			arrives := func(from net.PacketConn, what string, want []byte) {
				t.Helper()
				testutil.Must(t, from.SetReadDeadline(time.Now().Add(5*time.Second)))
				n, addr, err := from.ReadFrom(b)
				if err != nil || string(b[:n]) != string(want) {
					t.Fatalf("%s: %d bytes, %v, want %d; counters %v", what, n, err, len(want), g.f.Stats())
				}
				peer = addr
			}
			say := func(p []byte) {
				t.Helper()
				_, err := pc.WriteTo(p, net.UDPAddrFromAddrPort(s.at))
				testutil.Must(t, err)
			}
			send := func(what string, p []byte) {
				t.Helper()
				say(p)
				arrives(s, what, p)
			}
			send("the hello", crafted{id: first, source: client, frames: craftCrypto(0, craftHello(t, "a.example")), size: 1200}.seal())

			answer := crafted{version: row.version, id: client, source: server, keys: first, frames: []byte{1}, size: 1200}.seal()
			_, err = s.WriteTo(answer, peer)
			testutil.Must(t, err)
			arrives(pc, "the answer", answer)

			ack := []byte{2, 0, 0, 0, 0}
			handshake := slices.Concat(longHead(0xf0, row.version, server, client), []byte{0x40, 40}, make([]byte, 40))
			short := slices.Concat([]byte{0x40}, server, make([]byte, 30))
			head := crafted{version: row.version, id: server, keys: first, source: client, number: 1, frames: ack}.seal()
			send("an acknowledgement, the end of the handshake, and data behind it", slices.Concat(head, handshake, short))

			// The new version says nothing that the old one did not.
			evil := craftCrypto(0, craftHello(t, "b.example"))
			say(crafted{version: row.version, id: server, keys: craftID(), source: client, number: 2, frames: evil, size: 1200}.seal())
			say(crafted{version: row.version, id: server, keys: first, source: client, number: 3, frames: evil, size: 1200}.seal())
			send("nothing but data after another hello", short)
			if n := g.f.Stats()["udp_refused"]; n != 2 {
				t.Errorf("%d packets were refused, want both that say another hello", n)
			}
		})
	}
}
