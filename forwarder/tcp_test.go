package forwarder

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/internal/testutil"
)

func TestTCPEchoesOverBothFamilies(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			g := newGuest(t, allowAll, nil)
			c := g.mustDial(g.listen(network, echo))
			if _, err := c.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 5)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
				t.Fatalf("echo: %q, %v", got, err)
			}
		})
	}
}

func TestTCPMovesMegabytesBothWaysUnchanged(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	addr := g.listen("tcp4", echo)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			data := make([]byte, 8<<20)
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for i := range data {
				data[i] = byte(rng.Uint32())
			}
			c, err := g.dial(addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			go func() {
				_, _ = c.Write(data)
				_ = c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
				t.Errorf("flow %d: %d of %d bytes came back, %v", i, len(got), len(data), err)
			}
		})
	}
	wg.Wait()
}

func TestTCPHalfCloseIsHalfClose(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		all, err := io.ReadAll(c) // returns only at the guest's end of stream
		if err != nil {
			t.Errorf("host side: %v", err)
		}
		_, _ = c.Write(bytes.ToUpper(all))
	}))
	if _, err := c.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "HALF" {
		t.Fatalf("after the guest's end of stream: %q, %v", got, err)
	}
	testutil.Eventually(t, "the flow has left the table", func() bool { return g.table.Len() == 0 })
}

func TestTCPHostsHalfCloseLeavesTheOtherWayOpen(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	rest := make(chan string, 1)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		_ = c.CloseWrite()
		all, _ := io.ReadAll(c)
		rest <- string(all)
	}))
	if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
		t.Fatalf("the host's end of stream: %q, %v", b, err)
	}
	if _, err := c.Write([]byte("still here")); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	if got := <-rest; got != "still here" {
		t.Fatalf("the host read %q after its own end of stream", got)
	}
}

func TestTCPResetFromTheHostIsAResetInside(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	}))
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadAll(c); !isReset(err) {
		t.Fatalf("reading after the host's reset: %v, want a reset", err)
	}
}

func TestTCPResetFromInsideIsAResetAtTheHost(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	got := make(chan error, 1)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		_, err := io.ReadAll(c)
		got <- err
	}))
	_, _ = c.Write([]byte("x"))
	abortGuest(t, g)
	if err := <-got; err == nil || !strings.Contains(err.Error(), "reset") {
		t.Fatalf("the host read %v, want a reset", err)
	}
}

// abortGuest resets every connection of the guest.
func abortGuest(t *testing.T, g *guest) {
	t.Helper()
	for _, e := range g.stack.RegisteredEndpoints() {
		e.Abort()
	}
	for _, e := range g.stack.CleanupEndpoints() {
		e.Abort()
	}
}

func TestTCPRefusedByTheHostIsRefusedInside(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	start := time.Now()
	if _, err := g.dial(netip.AddrPortFrom(gateway4, port)); !isReset(err) {
		t.Fatalf("dialling a closed port: %v, want refused", err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("it took %v", d)
	}
}

func TestTCPRejectedByPolicyIsRefusedAndDroppedIsSilent(t *testing.T) {
	for _, action := range []string{"reject", "drop"} {
		t.Run(action, func(t *testing.T) {
			g := newGuest(t, strings.Replace(allowAll, "egress:\n", "egress:\n  - {name: no, action: "+action+", to: [{cidr: 192.0.2.0/24}]}\n", 1), nil)
			done := make(chan error, 1)
			go func() {
				_, err := g.dial(netip.MustParseAddrPort("192.0.2.1:80"))
				done <- err
			}()
			if action == "reject" {
				if err := <-done; !isReset(err) {
					t.Fatalf("%v, want refused", err)
				}
				return
			}
			testutil.Eventually(t, "the SYN is counted as refused", func() bool { return g.f.Stats()["tcp_refused_by_policy"] > 0 })
			select {
			case err := <-done:
				t.Fatalf("answered: %v, want silence", err)
			default:
			}
			<-done // gives up by itself
		})
	}
}

func TestTCPNothingIsAllowedBeforeRules(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	g.f.SetRules(nil)
	addr := g.listen("tcp4", echo)
	done := make(chan error, 1)
	go func() { _, err := g.dial(addr); done <- err }()
	testutil.Eventually(t, "the SYN is refused", func() bool { return g.f.Stats()["tcp_refused_by_policy"] > 0 })
	if n := g.f.dialer.Sockets.Load(); n != 0 {
		t.Errorf("%d host sockets were opened without rules", n)
	}
	<-done
}

func TestTCPNewRulesCutWhatTheyDenyAndLeaveTheRest(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	keep, cut := g.listen("tcp4", echo), g.listen("tcp6", echo)
	kept, doomed := g.mustDial(keep), g.mustDial(cut)
	roundTrip(t, kept)
	roundTrip(t, doomed)
	g.f.SetRules(compile(t, strings.Replace(allowAll, "egress:\n", "egress:\n  - {name: no6, action: reject, to: [{cidr: \""+gateway6.String()+"/128\"}, {cidr: \"::1/128\"}]}\n", 1)))
	if _, err := io.ReadAll(doomed); !isReset(err) {
		t.Errorf("the newly denied flow reads %v, want a reset", err)
	}
	roundTrip(t, kept)
}

func roundTrip(t *testing.T, c *gonet.TCPConn) {
	t.Helper()
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
}

func TestTCPAReaderThatStopsStopsTheWriter(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	release := make(chan struct{})
	sum := make(chan int64, 1)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		<-release
		n, _ := io.Copy(io.Discard, c)
		sum <- n
	}))
	var sent int64
	chunk := make([]byte, 64<<10)
	// Everything between the two applications holds a bounded amount.
	const bound = 64 << 20
	for sent < bound {
		_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Write(chunk)
		sent += int64(n)
		if err != nil {
			break
		}
	}
	if sent >= bound {
		t.Fatalf("%d bytes were taken from a writer whose reader does not read", sent)
	}
	close(release)
	_ = c.CloseWrite()
	if got := <-sum; got != sent {
		t.Errorf("the host read %d bytes of %d", got, sent)
	}
}

func TestTCPTuplesAreReusableAtOnce(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	addr := g.listen("tcp4", func(c *net.TCPConn) { _, _ = c.Write([]byte("x")) }) // the host closes first
	for i := range 50 {
		c, err := gonet.DialTCPWithBind(t.Context(), g.stack, full(netip.AddrPortFrom(guest4, 40000)), full(addr), packet.NetProto(guest4))
		if err != nil {
			t.Fatalf("connection %d from the same port: %v", i, err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "x" {
			t.Fatalf("connection %d: %q, %v", i, b, err)
		}
		c.Close()
		testutil.Eventually(t, "the guest has let go of the tuple", func() bool {
			return len(g.stack.RegisteredEndpoints()) == 0 && g.table.Len() == 0
		})
	}
}

func TestTCPManyShortConnectionsLeaveNothing(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	addr := g.listen("tcp4", echo)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 60 {
				c, err := g.dial(addr)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = c.Write([]byte("y"))
				_, _ = io.ReadFull(c, make([]byte, 1))
				c.Close()
			}
		})
	}
	wg.Wait()
	testutil.Eventually(t, "every flow has left the table", func() bool { return g.table.Len() == 0 && g.f.dialer.Sockets.Load() == 0 })
}

// The timer that ends hopeless dials may have picked one that succeeds before its turn comes.
func TestTCPADialThatSucceededIsNotGivenUp(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	addr := g.listen("tcp4", echo)
	for range 200 {
		c := g.mustDial(addr)
		defer c.Close()
	}
	tf := g.f.tcp
	tf.Mu.Lock()
	waiting, flows := tf.Dials.Len(), len(tf.Flows)
	for _, fl := range tf.Flows {
		fl.Dialing = tf.Dials.PushBack(fl)
	}
	tf.Mu.Unlock()
	if waiting != 0 || flows != 200 {
		t.Fatalf("%d of %d connected flows are among the dials", waiting, flows)
	}
	tf.ExpireDials(time.Now().Add(time.Hour))
	if n := g.table.Len(); n != 200 || g.f.Stats()["tcp_dial_cancelled"] != 0 {
		t.Fatalf("%d of 200 connected flows are left, %d were given up", n, g.f.Stats()["tcp_dial_cancelled"])
	}
}

// Each byte is answered by one byte, so a wake-up lost anywhere between the two sides silences a
// connection for good.
func TestTCPNoRoundTripIsLost(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	addr := g.listen("tcp4", echo)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := g.dial(addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			b := make([]byte, 1)
			for i := range 6000 {
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := c.Write(b); err != nil {
					t.Errorf("round trip %d: %v", i, err)
					return
				}
				if _, err := io.ReadFull(c, b); err != nil {
					t.Errorf("round trip %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// The up pump looks at the down pump's counters under the down pump's lock. Data that arrive
// meanwhile must not get stuck.
func TestTCPDataThatComeDuringATallyAreDelivered(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	conns := make(chan *net.TCPConn, 1)
	done := make(chan struct{})
	defer close(done)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) { conns <- c; <-done }))
	host := <-conns
	var fl *tcpflow.Flow
	testutil.Eventually(t, "the flow is live", func() bool {
		all := g.f.tcp.All()
		if len(all) == 1 {
			fl = all[0]
		}
		return fl != nil && fl.Live.Load()
	})
	fl.Down.Mu.Lock() // as a tally does
	if _, err := host.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the down pump was called", fl.Down.Again.Load)
	fl.Down.Mu.Unlock()
	fl.Up.Mu.Lock()
	fl.TallyUp(0)
	fl.Up.Mu.Unlock()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatalf("the byte stayed at the host: %v", err)
	}
}
