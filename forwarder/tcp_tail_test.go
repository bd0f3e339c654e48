package forwarder

import (
	"bytes"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/nat"
)

// response is what a reader that stands still must get in the end: more than it takes by itself,
// less than the stack holds for it.
var response = bytes.Repeat([]byte("sluice gate\n"), 75_000)

// narrow gives the guest's connections a receive buffer too small for the response.
func (g *guest) narrow() {
	g.t.Helper()
	o := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 64 << 10, Max: 64 << 10}
	if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &o); err != nil {
		g.t.Fatal(err)
	}
}

// onlyFlow waits for the only TCP flow to come as far as ok says.
func (g *guest) onlyFlow(what string, ok func(*tcpflow.Flow) bool) (fl *tcpflow.Flow) {
	g.t.Helper()
	testutil.Eventually(g.t, what, func() bool {
		all := g.f.tcp.All()
		if len(all) != 1 {
			return false
		}
		fl = all[0]
		fl.Mu.Lock()
		defer fl.Mu.Unlock()
		return fl.Ep != nil && ok(fl)
	})
	return fl
}

func queuedOf(fl *tcpflow.Flow) int { return netstack.SendQueued(fl.Ep.(*tcp.Endpoint)) }

// mustRead reads the whole response, and returns what ends it.
func mustRead(t *testing.T, c net.Conn) error {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(c)
	if !bytes.Equal(got, response) {
		t.Errorf("%d of %d bytes arrived, then %v", len(got), len(response), err)
	}
	return err
}

// silentForEver is longer than any state's timeout.
const silentForEver = 1000 * time.Hour

// Each row leaves bytes with us that a stalled reader has yet to take, in a different state of the
// connection; no timeout may end it.
func TestTCPTheTailWaitsForAReaderThatStandsStill(t *testing.T) {
	for _, row := range []struct {
		what           string
		server, client func(closeWrite func() error)
		ready          func(*tcpflow.Flow) bool
	}{
		{"both have ended", func(c func() error) { _ = c() }, func(c func() error) { _ = c() },
			func(fl *tcpflow.Flow) bool { return fl.Phase == tcpflow.PhaseClosing }},
		{"the server has ended", func(c func() error) { _ = c() }, func(func() error) {},
			func(fl *tcpflow.Flow) bool { return fl.Down.Done.Load() }},
		{"the client has ended", func(func() error) {}, func(c func() error) { _ = c() },
			func(fl *tcpflow.Flow) bool { return fl.Up.Done.Load() && queuedOf(fl) > 0 }},
		{"neither has ended", func(func() error) {}, func(func() error) {},
			func(fl *tcpflow.Flow) bool { return queuedOf(fl) > 0 }},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newGuest(t, allowAll, nil)
			g.narrow()
			over := make(chan struct{})
			c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
				_, _ = c.Write(response)
				row.server(c.CloseWrite)
				<-over
			}))
			row.client(c.CloseWrite)
			fl := g.onlyFlow(row.what, row.ready)
			testutil.Eventually(t, "the reader is full", func() bool { return netstack.SendWindow(fl.Ep.(*tcp.Endpoint)) == 0 })
			for n := range 3 {
				g.table.Expire(time.Now().Add(silentForEver * time.Duration(n+1)))
			}
			got := make([]byte, len(response))
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, response) {
				t.Errorf("%d of %d bytes arrived, then %v", n, len(response), err)
			}
			close(over)
			if n, err := c.Read(got); n != 0 || err != io.EOF {
				t.Errorf("after the response: %d bytes, %v, want the end", n, err)
			}
		})
	}
}

// The same holds for a stalled server, whose bytes wait in the stack and in the host's kernel.
func TestTCPTheTailWaitsForAServerThatStandsStill(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	release, got := make(chan struct{}), make(chan []byte, 1)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		_ = c.SetReadBuffer(64 << 10)
		<-release
		all, _ := io.ReadAll(c)
		got <- all
	}))
	if _, err := c.Write(response); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	g.onlyFlow("some of it is with us", func(fl *tcpflow.Flow) bool { return fl.Live.Load() && tcpflow.HostHolds(fl.FD) })
	for n := range 3 {
		g.table.Expire(time.Now().Add(silentForEver * time.Duration(n+1)))
	}
	close(release)
	if all := <-got; !bytes.Equal(all, response) {
		t.Errorf("%d of %d bytes arrived", len(all), len(response))
	}
}

// A connection with nothing under way is silent, and ends.
func TestTCPASilentFlowStillTimesOut(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	c := g.mustDial(g.listen("tcp4", echo))
	roundTrip(t, c)
	g.onlyFlow("what was sent has been taken", func(fl *tcpflow.Flow) bool {
		return !tcpflow.StackHolds(fl.Ep.(*tcp.Endpoint)) && !tcpflow.HostHolds(fl.FD)
	})
	g.table.Expire(time.Now().Add(silentForEver))     // records the last acknowledgement
	g.table.Expire(time.Now().Add(2 * silentForEver)) // and now there has been none for long
	if n := g.table.Len(); n != 0 {
		t.Fatalf("%d flows are left", n)
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the client reads %v, want a reset", err)
	}
}

// Acknowledgements move no bytes, but a connection that has them is not silent.
func TestTCPAcknowledgementsKeepAFlow(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	c := g.mustDial(g.listen("tcp4", echo))
	roundTrip(t, c)
	fl := g.onlyFlow("what was sent has been taken", func(fl *tcpflow.Flow) bool {
		return !tcpflow.StackHolds(fl.Ep.(*tcp.Endpoint)) && !tcpflow.HostHolds(fl.FD)
	})
	g.table.Expire(time.Now().Add(silentForEver))
	fl.Counts.SegmentsReceived.Increment() // as a keepalive probe does
	g.table.Expire(time.Now().Add(2 * silentForEver))
	roundTrip(t, c)
}

func TestTCPLastAckBeginsWhenTheSandboxHasTakenEveryByte(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	g.narrow()
	events, cancel := g.table.Subscribe(64)
	defer cancel()
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) { _, _ = c.Write(response) }))
	_ = c.CloseWrite()
	fl := g.onlyFlow("both have ended", func(fl *tcpflow.Flow) bool { return fl.Phase == tcpflow.PhaseClosing })
	if s := fl.Lease.State(); s != nat.CloseWait {
		t.Errorf("with bytes unsent the state is %v, want CLOSE_WAIT", s)
	}
	if err := mustRead(t, c); err != nil {
		t.Error(err)
	}
	testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
	var states []nat.State
	for range len(events) {
		states = append(states, (<-events).Flow.State)
	}
	last := slices.Index(states, nat.LastAck)
	if over := slices.Index(states, nat.TimeWait); over < 0 || last > over {
		t.Errorf("the flow went through %v", states)
	}
}

// A reset from the far side does not overtake the bytes before it.
func TestTCPAResetComesBehindTheBytesBeforeIt(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	g.narrow()
	reset := make(chan struct{})
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		_, _ = c.Write(response)
		<-reset
		_ = c.SetLinger(0)
	}))
	fl := g.onlyFlow("all of it is with us", func(fl *tcpflow.Flow) bool {
		return fl.Live.Load() && g.table.List()[0].ReplyBytes > int64(len(response))
	})
	close(reset)
	testutil.Eventually(t, "the reset has come", func() bool {
		fl.Mu.Lock()
		defer fl.Mu.Unlock()
		return fl.FD < 0
	})
	if err := mustRead(t, c); !isReset(err) {
		t.Errorf("behind the response there is %v, want a reset", err)
	}
	testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
}

// A reset after an end of stream has nothing to wait for: iperf3's server ends its side of an
// upload and closes with bytes unread.
func TestTCPAResetBehindTheEndOfStreamEndsTheFlow(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	told := make(chan struct{})
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) {
		_ = c.CloseWrite()
		<-told
		_ = c.SetLinger(0)
	}))
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("reading gives %v, want the end of stream", err)
	}
	g.onlyFlow("the stack knows that it was taken", func(fl *tcpflow.Flow) bool {
		return netstack.EndpointState(fl.Ep) == tcp.StateFinWait2
	})
	close(told)
	testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
	testutil.Eventually(t, "the sandbox is told of the reset", func() bool {
		_, err := c.Write([]byte("x"))
		return err != nil
	})
}

// A server that answers early and closes with a request unread resets the connection. The client's
// next write fails first, but the answer can still be read.
func TestTCPAnEarlyAnswerIsReadThoughWritingFails(t *testing.T) {
	g := newGuest(t, allowAll, nil)
	conns, over := make(chan *net.TCPConn, 1), make(chan struct{})
	defer close(over)
	c := g.mustDial(g.listen("tcp4", func(c *net.TCPConn) { conns <- c; <-over }))
	server := <-conns
	fl := g.onlyFlow("the flow is live", func(fl *tcpflow.Flow) bool { return fl.Live.Load() })
	fl.Down.Mu.Lock() // the down pump is late
	if _, err := server.Write(response[:4096]); err != nil {
		t.Fatal(err)
	}
	_ = server.SetLinger(0)
	server.Close()
	if _, err := c.Write([]byte("more of the request")); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "writing has failed", func() bool { return fl.Up.Done.Load() || phaseOf(fl) == tcpflow.PhaseClosed })
	fl.UnlockDown()
	got := make([]byte, 4096)
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("%d bytes of the answer, then %v", n, err)
	}
	if _, err := c.Read(got); !isReset(err) {
		t.Errorf("behind the answer there is %v, want a reset", err)
	}
}

func phaseOf(fl *tcpflow.Flow) tcpflow.Phase {
	fl.Mu.Lock()
	defer fl.Mu.Unlock()
	return fl.Phase
}
