package forwarder

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

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
			if n := w.f.dialer.sockets.Load(); n != 0 {
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
		if n := w.f.dialer.sockets.Load(); n != 0 {
			t.Errorf("%d host sockets for a connection that stays here", n)
		}
	})
	t.Run("not where they are not", func(t *testing.T) {
		w := newWire(t, allowNone, func(c *Config) { c.DNSHandler = resolver{} })
		w.send(udpPacket(at(guest4, 4000), at(far4, 53), []byte("abc")))
		if n := w.f.Stats()["udp_refused"]; n != 1 {
			t.Errorf("%d refused; counters: %v", n, w.counters())
		}
	})
}
