package forwarder

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
)

// ungated opens nothing and leaves names to others.
var ungated = strings.Replace(allowNone, "drop}", "drop, dns: {names: ungated}}", 1)

// gatesNames opens the world by address, and one name.
const gatesNames = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: gates}
spec:
  defaultAction: reject
  egress:
  - {action: allow, to: [{domain: pypi.test}]}
  - {action: allow, to: [{entity: world}]}
`

func TestEveryQueryGoesToTheResolverWhereNamesAreGated(t *testing.T) {
	for _, side := range sides {
		far := far4
		if side.guest.Is6() {
			far = far6
		}
		t.Run(side.name, func(t *testing.T) {
			w := newWire(t, gatesNames, func(c *Config) { c.DNSHandler = resolver{} })
			w.send(udpPacket(at(side.guest, 4000), at(far, 53), []byte("abc")))
			src, dst, payload, _ := w.recvUDP()
			if src != at(far, 53) || dst != at(side.guest, 4000) || string(payload) != "cba" {
				t.Fatalf("got %q from %s to %s", payload, src, dst)
			}
			if n := w.f.dialer.Sockets.Load(); n != 0 {
				t.Errorf("%d host sockets for a query that stays here", n)
			}
		})
	}
	t.Run("over TCP", func(t *testing.T) {
		w := newWire(t, gatesNames, func(c *Config) { c.DNSHandler = resolver{} })
		w.send(segment(at(guest4, 4000), at(far4, 53), header.TCPFlagSyn, 1, 0))
		if h := w.recvTCP(4000, header.TCPFlagSyn|header.TCPFlagRst); !h.Flags().Contains(header.TCPFlagSyn | header.TCPFlagAck) {
			t.Errorf("a connection to a resolver is answered %v", h.Flags())
		}
		if n := w.f.dialer.Sockets.Load(); n != 0 {
			t.Errorf("%d host sockets for a connection that stays here", n)
		}
	})
	t.Run("not where they are not", func(t *testing.T) {
		w := newWire(t, ungated, func(c *Config) { c.DNSHandler = resolver{} })
		w.send(udpPacket(at(guest4, 4000), at(far4, 53), []byte("abc")))
		if n := w.f.Stats()["udp_refused"]; n != 1 {
			t.Errorf("%d refused; counters: %v", n, w.counters())
		}
	})
}

// waiting never answers, like a question under way.
type waiting struct{}

func (waiting) AnswerPacket([]byte, netip.AddrPort) []byte { return nil }

func (waiting) ServePacket(context.Context, []byte, netip.AddrPort, func([]byte, policy.Outcome)) {}

func (waiting) ServeStream(ctx context.Context, _ net.Conn, _ func(policy.Outcome)) { <-ctx.Done() }

// An answer that the resolver gave in another server's place belongs to that server again, at once.
func TestNobodyIsAnsweredForOnceNamesAreNotGated(t *testing.T) {
	for _, row := range []struct {
		name  string
		first string
		// How many flows are left under a policy that gates names too, and under one that does not.
		gated, open int
		dst         netip.AddrPort
	}{
		{"at any address", gatesNames, 2, 0, at(far4, 53)},
		{"at the resolver's own", gatesNames, 2, 2, at(dns4, 53)},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWire(t, row.first, func(c *Config) { c.DNSHandler = waiting{} })
			w.send(udpPacket(at(guest4, 4000), row.dst, []byte("abc")))
			w.send(segment(at(guest4, 4001), row.dst, header.TCPFlagSyn, 1, 0))
			sa := w.recvTCP(4001, header.TCPFlagSyn)
			w.send(segment(at(guest4, 4001), row.dst, header.TCPFlagAck, 2, sa.SequenceNumber()+1))
			testutil.Eventually(t, "a question and a connection", func() bool { return w.table.Len() == 2 })
			w.f.SetRules(compile(t, strings.Replace(gatesNames, "pypi.test", "other.test", 1)))
			if n := w.table.Len(); n != row.gated {
				t.Errorf("%d flows under another policy by name, want %d", n, row.gated)
			}
			w.f.SetRules(compile(t, ungated))
			testutil.Eventually(t, fmt.Sprintf("%d flows under one that does not", row.open), func() bool { return w.table.Len() == row.open })
			if row.open > 0 {
				return
			}
			w.send(udpPacket(at(guest4, 4000), row.dst, []byte("abc")))
			testutil.Eventually(t, "the policy decides again", func() bool { return w.f.Stats()["udp_refused"] == 1 })
		})
	}
}
