package forwarder

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/internal/testutil"
)

// limitedPort returns a rule with limits for one port of the host's loopback, and one without for
// the rest.
func limitedPort(port uint16, limits string) string {
	return fmt.Sprintf(`
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: limited}
spec:
  defaultAction: reject
  egress:
  - {name: one, action: allow, to: [{entity: host-loopback}], ports: [{protocol: TCP, port: %d}, {protocol: UDP, port: %[1]d}], limits: %s}
  - {name: rest, action: allow, to: [{entity: host-loopback}]}
`, port, limits)
}

func TestARulesFlowsAreBounded(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	one, rest := g.listen("tcp4", echo), g.listen("tcp4", echo)
	g.f.SetRules(compile(t, limitedPort(one.Port(), "{flows: 2}")))
	first := g.mustDial(one)
	g.mustDial(one)
	dropped := func() (n uint64) { return g.table.Stats().BudgetLimit }
	go func() { // ends with the guest
		if c, err := g.dial(one); err == nil {
			c.Close()
		}
	}()
	testutil.Eventually(t, "a third is refused", func() bool { return dropped() > 0 })
	g.mustDial(rest)
	first.Close()
	testutil.Eventually(t, "there is room again", func() bool {
		c, err := g.dial(one)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	// Flows that exist when their rule gets a limit count for it, even if they exceed it.
	for range 3 {
		g.mustDial(rest)
	}
	g.f.SetRules(compile(t, limitedPort(rest.Port(), "{flows: 3}")))
	before := dropped()
	go func() {
		if c, err := g.dial(rest); err == nil {
			c.Close()
		}
	}()
	testutil.Eventually(t, "one more is refused", func() bool { return dropped() > before })
}

func TestARulesBytesAreBounded(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	one, rest := g.listen("tcp4", echo), g.listen("tcp4", echo)
	g.f.SetRules(compile(t, limitedPort(one.Port(), "{totalBytes: 100Ki}")))
	spent, other := g.mustDial(one), g.mustDial(rest)
	go func() {
		for {
			if _, err := spent.Write(make([]byte, 10<<10)); err != nil {
				return
			}
		}
	}()
	_ = spent.SetReadDeadline(time.Now().Add(5 * time.Second))
	// The reset may reach the reader or the writer. What moves before the table notices, moves; the
	// writer would go on for five seconds.
	n, err := io.Copy(io.Discard, spent)
	if over := g.table.Stats().OverBytes; over != 1 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the flow that used it up: %d bytes, %v; %d flows were ended for their bytes", n, err, over)
	}
	if _, err := sendAndRead(other, []byte("still here"), 100); err != nil {
		t.Errorf("another rule's flow: %v", err)
	}
}

// TestARulesBandwidthIsItsOwn runs a bulk flow of a limited rule and one of another rule side by
// side.
func TestARulesBandwidthIsItsOwn(t *testing.T) {
	for _, direction := range []string{"egressBandwidth", "ingressBandwidth"} {
		t.Run(direction, func(t *testing.T) {
			g := newGuest(t, allowAll, nil)
			sink := func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }
			source := func(c *net.TCPConn) { _, _ = c.Write(make([]byte, 64<<20)) }
			serve := map[string]func(*net.TCPConn){"egressBandwidth": sink, "ingressBandwidth": source}[direction]
			one, rest := g.listen("tcp4", serve), g.listen("tcp4", serve)
			g.f.SetRules(compile(t, limitedPort(one.Port(), "{"+direction+": 8M}"))) // 1 MB/s
			moved := func(to netip.AddrPort) func() int64 {
				c := g.mustDial(to)
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				go func() {
					if direction == "egressBandwidth" {
						_, _ = c.Write(make([]byte, 64<<20))
					} else {
						_, _ = io.Copy(io.Discard, c)
					}
				}()
				return func() int64 {
					for _, f := range g.table.List() {
						if f.Orig.Dst() == to {
							return f.OrigBytes + f.ReplyBytes
						}
					}
					return 0
				}
			}
			slow, fast := moved(one), moved(rest)
			start := time.Now()
			testutil.Eventually(t, "the free flow has moved 8 MB", func() bool { return fast() > 8<<20 })
			testutil.Eventually(t, "the limited one has moved 300 kB", func() bool { return slow() > 300<<10 })
			// The bucket's fill, then the rate, with its acknowledgements.
			if most := int64(float64(time.Since(start).Seconds())*1.2e6) + 2*admit.BucketMin; slow() > most {
				t.Errorf("the limited flow moved %d bytes in %v, want at most %d", slow(), time.Since(start), most)
			}
		})
	}
}
