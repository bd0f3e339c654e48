package forwarder

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/forwarder/internal/hostsock"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// told holds the reports about a forwarder's flows: why those in the table ended, and why others
// were refused.
type told struct {
	ended <-chan nat.Event

	mu      sync.Mutex
	refused []admit.Refusal
}

// hears collects reports about the guest's flows; refusals come by Config.Refused.
func (o *told) hears(t *testing.T, g *guest) {
	events, cancel := g.table.Subscribe(64)
	o.ended = events
	t.Cleanup(cancel)
}

func (o *told) refusal(r admit.Refusal) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.refused = append(o.refused, r)
}

// wantEnd waits for the next flow to end, for a reason.
func (o *told) wantEnd(t *testing.T, want nat.Reason) nat.Flow {
	t.Helper()
	late := time.After(10 * time.Second)
	for {
		select {
		case e := <-o.ended:
			if e.Type != nat.Destroy {
				continue
			}
			if e.Flow.Reason != want {
				t.Errorf("the flow ended for %q, want %q", e.Flow.Reason, want)
			}
			return e.Flow
		case <-late:
			t.Fatalf("no flow ended, want one for %q", want)
		}
	}
}

// wantRefused waits for the only refusal, with policy's reason or else the flow's.
func (o *told) wantRefused(t *testing.T, want policy.Reason, reason nat.Reason, sandboxTold bool) {
	t.Helper()
	testutil.Eventually(t, "a refusal", func() bool { o.mu.Lock(); defer o.mu.Unlock(); return len(o.refused) > 0 })
	o.mu.Lock()
	defer o.mu.Unlock()
	r := o.refused[0]
	got := r.Because
	if got == "" {
		got = r.Verdict.Reason()
	}
	if len(o.refused) != 1 || got != want || r.Reason != reason || r.Told != sandboxTold {
		t.Errorf("refused %d times, for %q, %q, told %v; want once, for %q, %q, %v", len(o.refused), got, r.Reason, r.Told, want, reason, sandboxTold)
	}
}

func (o *told) wantNoRefusal(t *testing.T) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.refused) != 0 {
		t.Errorf("%d refusals: %+v", len(o.refused), o.refused)
	}
}

// vanish silences the guest, once its only flow has come as far as ok says. Only one probe of it is
// waited for.
func (g *guest) vanish(ok func(*tcpflow.Flow) bool) {
	g.t.Helper()
	fl := g.onlyFlow("it has come so far", ok)
	if terr := fl.Ep.SetSockOptInt(tcpip.KeepaliveCountOption, 1); terr != nil {
		g.t.Fatal(terr)
	}
	if err := g.stack.DisableNIC(1); err != nil {
		g.t.Fatal(err)
	}
}

func isLive(fl *tcpflow.Flow) bool { return fl.Phase == tcpflow.PhaseOpen }

func waits(fl *tcpflow.Flow) bool { return fl.Phase == tcpflow.PhaseVerifying }

func readAll(c net.Conn) { _, _ = io.Copy(io.Discard, c) }

func TestWhyAConnectionEnded(t *testing.T) {
	for _, row := range []struct {
		what string
		want nat.Reason
		do   func(*testing.T, *guest)
	}{
		{"both ended", nat.ReasonClosed, func(_ *testing.T, g *guest) {
			c := g.mustDial(g.listen("tcp4", echo))
			_, _ = c.Write([]byte("x"))
			_ = c.CloseWrite()
			readAll(c)
			c.Close()
		}},
		{"the server resets", nat.ReasonResetByPeer, func(_ *testing.T, g *guest) {
			c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); _ = c.SetLinger(0) }))
			_, _ = c.Write([]byte("x"))
			readAll(c)
		}},
		{"the client resets", nat.ReasonResetBySandbox, func(t *testing.T, g *guest) {
			roundTrip(t, g.mustDial(g.listen("tcp4", echo)))
			abortGuest(t, g)
		}},
		{"the client is gone", nat.ReasonSandboxTimeout, func(t *testing.T, g *guest) {
			roundTrip(t, g.mustDial(g.listen("tcp4", echo)))
			g.vanish(isLive)
		}},
		{"the client is gone behind its end of stream", nat.ReasonSandboxTimeout, func(t *testing.T, g *guest) {
			c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) { readAll(c); _, _ = c.Write([]byte("x")); <-t.Context().Done() }))
			_ = c.CloseWrite()
			_, _ = c.Read(make([]byte, 1))
			g.vanish(isLive)
		}},
		{"nobody listens", nat.ReasonRefused, func(t *testing.T, g *guest) {
			at := g.listen("tcp4", echo)
			if _, err := g.dial(netip.AddrPortFrom(gateway4, at.Port()^1)); !isReset(err) {
				t.Errorf("dialling a closed port: %v", err)
			}
		}},
		{"new rules cut it", nat.ReasonPolicy, func(t *testing.T, g *guest) {
			roundTrip(t, g.mustDial(g.listen("tcp4", echo)))
			g.f.SetRules(compile(t, allowNone))
		}},
		{"nobody listens inside", nat.ReasonRefusedBySandbox, func(t *testing.T, g *guest) { wantReset(t, g.publishTCP("127.0.0.1:0", 81)) }},
	} {
		t.Run(row.what, func(t *testing.T) {
			var o told
			g := newGuest(t, allowAll, func(c *Config) {
				c.Refused = o.refusal
				c.Keepalive = hostsock.Keepalive{Time: time.Second, Interval: time.Second, Probes: 1}
			})
			o.hears(t, g)
			row.do(t, g)
			o.wantEnd(t, row.want)
			o.wantNoRefusal(t)
		})
	}
}

// TestAFarSideThatIsSilentHasNotReset takes the loopback down under the connection.
func TestAFarSideThatIsSilentHasNotReset(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var o told
	g := newGuest(t, allowAll, func(c *Config) { c.Keepalive = hostsock.Keepalive{Time: time.Second, Interval: time.Second, Probes: 1} })
	o.hears(t, g)
	roundTrip(t, g.mustDial(serveEcho(t, addrA.String()+":0").at))
	ip(t, "link", "set", "lo", "down")
	o.wantEnd(t, nat.ReasonPeerTimeout)
}

// TestWhyAFlowThatWaitedEnded covers flows under a rule by domain, which are dialled first.
func TestWhyAFlowThatWaitedEnded(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const long = 70 << 10
	hello := gatetest.ClientHello(t, "a.example")
	say := func(b []byte, end bool) func(*testing.T, *guest, netip.AddrPort) {
		return func(_ *testing.T, g *guest, at netip.AddrPort) {
			c := g.mustDial(at)
			_, _ = c.Write(b)
			if end {
				_ = c.CloseWrite()
			}
			readAll(c)
			c.Close()
		}
	}
	for _, row := range []struct {
		what    string
		end     nat.Reason
		refused policy.Reason // empty if it was not refused
		do      func(*testing.T, *guest, netip.AddrPort)
	}{
		{"the client ends without a word", nat.ReasonClosed, "", say(nil, true)},
		{"the client resets without a word", nat.ReasonResetBySandbox, "", func(t *testing.T, g *guest, at netip.AddrPort) {
			g.mustDial(at)
			g.onlyFlow("it waits", waits)
			abortGuest(t, g)
		}},
		{"the client resets in the middle of its hello", nat.ReasonResetBySandbox, "", func(t *testing.T, g *guest, at netip.AddrPort) {
			_, _ = g.mustDial(at).Write(hello[:50])
			abortGuest(t, g)
		}},
		{"the client is gone", nat.ReasonSandboxTimeout, "", func(t *testing.T, g *guest, at netip.AddrPort) {
			g.mustDial(at)
			g.vanish(waits)
		}},
		{"the server resets", nat.ReasonResetByPeer, "", func(t *testing.T, g *guest, _ netip.AddrPort) {
			s := serve(t, addrA.String()+":0", func(c *net.TCPConn) { _ = c.SetLinger(0) })
			readAll(g.mustDial(s.at))
		}},
		{"nobody listens", nat.ReasonRefused, "", func(t *testing.T, g *guest, at netip.AddrPort) {
			if _, err := g.dial(netip.AddrPortFrom(addrA, at.Port()^1)); !isReset(err) {
				t.Errorf("dialling a closed port: %v", err)
			}
		}},
		{"new rules cut it", nat.ReasonPolicy, "", func(t *testing.T, g *guest, at netip.AddrPort) {
			c := g.mustDial(at)
			g.onlyFlow("it waits", waits)
			g.f.SetRules(compile(t, allowNone))
			readAll(c)
		}},
		{"its hello ends early", nat.ReasonRefusedByPolicy, policy.ReasonIncomplete, say(hello[:50], true)},
		{"its hello is malformed", nat.ReasonRefusedByPolicy, policy.ReasonMalformed, say(append([]byte{22, 3, 1, 0, 6, 1, 0, 0, 2, 3, 3}, hello...), false)},
		{"its hello is too long", nat.ReasonRefusedByPolicy, policy.ReasonTooLong, say([]byte{22, 3, 1, 0x40, 0, 1, 1, 0, 0}, false)},
		{"its head ends early", nat.ReasonRefusedByPolicy, policy.ReasonIncomplete, say([]byte("GET / HTTP/1.1\r\nHost: a.exa"), true)},
		{"its head is malformed", nat.ReasonRefusedByPolicy, policy.ReasonMalformed, say([]byte("GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n"), false)},
		{"its head is too long", nat.ReasonRefusedByPolicy, policy.ReasonTooLong, say([]byte("GET / HTTP/1.1\r\nHost: a.example\r\nX: "+strings.Repeat("x", long)+"\r\n\r\n"), false)},
		{"its HTTP/2 is malformed", nat.ReasonRefusedByPolicy, policy.ReasonMalformed, say([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff"), false)},
		{"it speaks something else", nat.ReasonRefusedByPolicy, policy.ReasonNoName, say([]byte("\x00\x01\x02hello"), false)},
		{"it says another name", nat.ReasonRefusedByPolicy, policy.ReasonMismatch, say(gatetest.ClientHello(t, "b.example"), false)},
	} {
		t.Run(row.what, func(t *testing.T) {
			var o told
			g := newNamed(t, byName, func(c *Config) {
				c.Refused = o.refusal
				c.Keepalive = hostsock.Keepalive{Time: time.Second, Interval: time.Second, Probes: 1}
			})
			o.hears(t, g)
			row.do(t, g, serveEcho(t, addrA.String()+":0").at)
			fl := o.wantEnd(t, row.end)
			if row.refused != "" {
				o.wantRefused(t, row.refused, nat.ReasonPolicy, true)
				return
			}
			o.wantNoRefusal(t)
			if v := fl.About.(admit.About).Verdict; v.Allowed() || v.Verify() == policy.VerifyNone {
				t.Errorf("its verdict is %v, want none yet", v)
			}
		})
	}
}

// TestWhyARequestEndedTheConnection covers what comes after a request that was let pass.
func TestWhyARequestEndedTheConnection(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const first = "GET /open/1 HTTP/1.1\r\nHost: a.example:8080\r\n\r\n"
	for _, row := range []struct {
		what, then string
		end        nat.Reason
		refused    policy.Reason
	}{
		{"it is not listed", "GET /secret HTTP/1.1\r\nHost: a.example:8080\r\n\r\n", nat.ReasonRefusedByPolicy, policy.ReasonRequest},
		{"it is malformed", "GET /open/2 HTTP/1.1\r\nHost : a.example\r\n\r\n", nat.ReasonMalformedRequest, ""},
		{"it is too long", "GET /open/2 HTTP/1.1\r\nX: " + strings.Repeat("x", 70<<10) + "\r\n\r\n", nat.ReasonRequestTooLong, ""},
		{"the client ends in the middle", "GET /open/2 HT", nat.ReasonIncompleteRequest, ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			var o told
			g := newNamed(t, byRequest, func(c *Config) { c.Refused = o.refusal })
			o.hears(t, g)
			serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
				_, _ = io.ReadFull(c, make([]byte, len(first)))
				_, _ = io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
				readAll(c)
			})
			c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
			_, _ = c.Write([]byte(first + row.then))
			_ = c.CloseWrite()
			readAll(c)
			c.Close()
			o.wantEnd(t, row.end)
			if row.refused == "" {
				o.wantNoRefusal(t)
			} else {
				o.wantRefused(t, row.refused, nat.ReasonPolicy, true)
			}
		})
	}
}

// TestALimitIsToldAndATupleInUseIsNone refuses flows that policy allows.
func TestALimitIsToldAndATupleInUseIsNone(t *testing.T) {
	var o told
	g := newGuest(t, allowAll, func(c *Config) { c.Refused = o.refusal })
	at := g.listen("tcp4", echo)
	roundTrip(t, g.mustDial(at))
	limits := g.table.Limits()
	limits.PerDestination = 1
	g.table.SetLimits(limits)
	go func() { _, _ = g.dial(at) }() // dropped, so that it asks again
	o.wantRefused(t, "", nat.ErrDestLimit, false)
	if n := g.f.Stats()["tcp_refused_by_limit"]; n != 1 {
		t.Errorf("tcp_refused_by_limit is %d, want 1", n)
	}

	var inUse told
	a := &admit.Gate{Config: admit.Config{Refused: inUse.refusal}}
	a.NoteLimit(g.f.tcp.Limited, admit.Judged{Query: policy.Query{Proto: unix.IPPROTO_TCP}}, nat.ErrExists)
	inUse.wantRefused(t, "", nat.ErrExists, false)
	if n := g.f.Stats()["tcp_refused_by_limit"]; n != 1 {
		t.Errorf("tcp_refused_by_limit is %d, want 1: a tuple that is in use is no limit", n)
	}
}

// TestDialsThatKeepFailingAreInTheLog expects one line, not one for each dial.
func TestDialsThatKeepFailingAreInTheLog(t *testing.T) {
	var lines lockedLines
	g := newGuest(t, allowAll, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&lines, nil)) })
	at := g.listen("tcp4", echo)
	closed := netip.AddrPortFrom(gateway4, at.Port()^1)
	for range 10 {
		if _, err := g.dial(closed); !isReset(err) {
			t.Fatalf("dialling a closed port: %v", err)
		}
	}
	got := lines.String()
	if strings.Count(got, "\n") != 1 || !strings.Contains(got, "connections fail, 3 within a minute") || !strings.Contains(got, "connection refused") || !strings.Contains(got, "level=INFO") {
		t.Errorf("the log is %q, want one line with the cause", got)
	}
}

// lockedLines is a log that several goroutines write to.
type lockedLines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestLoopbackRelaysSayWhichSideHasReset: the client's side is the far side.
func TestLoopbackRelaysSayWhichSideHasReset(t *testing.T) {
	for _, row := range []struct {
		what   string
		inside bool
		want   nat.Reason
	}{{"the client", false, nat.ReasonResetByPeer}, {"the server", true, nat.ReasonResetBySandbox}} {
		t.Run(row.what, func(t *testing.T) {
			var o told
			g := newGuest(t, allowAll, func(c *Config) { c.Guests = &hostsOwn{} })
			o.hears(t, g)
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			c := hostDial(t, g.publishTCP("127.0.0.1:0", uint16(l.Addr().(*net.TCPAddr).Port)))
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			resets := c
			if row.inside {
				resets = server.(*net.TCPConn)
			}
			_ = resets.SetLinger(0)
			resets.Close()
			o.wantEnd(t, row.want)
		})
	}
}
