package forwarder

// Two judges side by side: ours, and a real server's parser behind it. Whatever the server
// makes of the bytes that the gates let pass must be what the rules allow.
//
//	client's bytes, in pieces ─► queue ─► first bytes, gate ─► far ─► a server's parser
//	                                            ▲─────────── its answers ◄┘
//
// Nothing of it waits for a clock: the server takes what is there and then blocks, which
// the other side sees.

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpflow"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// queueEndpoint is the stack's side of a flow: what a client sent and nobody took.
type queueEndpoint struct {
	tcpip.Endpoint // what is not below is not used
	pieces         [][]byte
	ended          bool
}

func (e *queueEndpoint) Read(w io.Writer, _ tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	if len(e.pieces) == 0 {
		return tcpip.ReadResult{}, &tcpip.ErrWouldBlock{}
	}
	for _, p := range e.pieces {
		if _, err := w.Write(p); err != nil {
			break
		}
	}
	return tcpip.ReadResult{}, nil
}

func (e *queueEndpoint) GetSockOptInt(tcpip.SockOptInt) (n int, _ tcpip.Error) {
	for _, p := range e.pieces {
		n += len(p)
	}
	return n, nil
}

func (e *queueEndpoint) State() uint32 {
	if e.ended {
		return uint32(tcp.StateCloseWait)
	}
	return uint32(tcp.StateEstablished)
}

// take takes the first n bytes off the queue.
func (e *queueEndpoint) take(n int) (taken []byte) {
	for n > 0 {
		k := min(n, len(e.pieces[0]))
		taken = append(taken, e.pieces[0][:k]...)
		if e.pieces[0] = e.pieces[0][k:]; len(e.pieces[0]) == 0 {
			e.pieces = e.pieces[1:]
		}
		n -= k
	}
	return taken
}

// blockingConn is the server's side. Its reader blocks where nothing is left.
type blockingConn struct {
	net.Conn // what is not below is not used

	mu      sync.Mutex
	cond    sync.Cond
	in, out []byte
	blocked bool
	over    bool // nobody reads any more
	ended   bool // nothing more comes
}

func newBlockingConn() *blockingConn {
	c := new(blockingConn)
	c.cond.L = &c.mu
	return c
}

func (c *blockingConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.in) == 0 && !c.ended {
		c.blocked = true
		c.cond.Broadcast()
		c.cond.Wait()
	}
	c.blocked = false
	if len(c.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *blockingConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = append(c.out, p...)
	return len(p), nil
}

func (c *blockingConn) Close() error { return nil }

func (c *blockingConn) SetDeadline(time.Time) error { return nil }

func (c *blockingConn) SetReadDeadline(time.Time) error { return nil }

func (c *blockingConn) SetWriteDeadline(time.Time) error { return nil }

// serve has a server read until it is done.
func (c *blockingConn) serve(server func(net.Conn)) {
	server(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	c.cond.Broadcast()
}

// say gives the server bytes, and returns what it answers before it blocks.
func (c *blockingConn) say(p []byte) (answer []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in = append(c.in, p...)
	c.cond.Broadcast()
	for !c.over && (!c.blocked || len(c.in) > 0) {
		c.cond.Wait()
	}
	answer, c.out = c.out, nil
	return answer
}

// end waits for the server to be done.
func (c *blockingConn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.cond.Broadcast()
	for !c.over {
		c.cond.Wait()
	}
}

// twinJudge is our side of it.
type twinJudge struct {
	f     *Forwarder
	dst   netip.AddrPort
	heard []byte // by the client, in the last run
}

func newTwinJudge(t testing.TB, text string, port uint16) *twinJudge {
	t.Helper()
	names := policy.NewNames(policy.NamesConfig{})
	if err := names.Grant("a.example", []netip.Addr{addrA}, time.Hour, time.Now()); err != nil {
		t.Fatal(err)
	}
	w := newWire(t, text, func(c *Config) { c.Names = names })
	return &twinJudge{f: w.f, dst: netip.AddrPortFrom(addrA, port)}
}

// cutter cuts what is sent into pieces, whose sizes cuts says over and over; empty: all at once.
type cutter struct {
	cuts []byte
	at   int
}

func (c *cutter) next(most int) int {
	if len(c.cuts) == 0 {
		return most
	}
	n := int(c.cuts[c.at%len(c.cuts)])
	c.at++
	return min(1+n*n/8, most)
}

// run sends a client's bytes past our judges to a server, until neither moves any more, and
// returns what passed before the gate had nothing more to judge.
func (j *twinJudge) run(client, cuts []byte, server func(net.Conn)) (passed []byte) {
	cut := cutter{cuts: cuts}
	ep := new(queueEndpoint)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	j.heard = nil
	fl := &tcpflow.Flow{T: j.f.tcp, Ep: ep, Check: new(tcpflow.Check), FD: pair[0]}
	fl.UpTask.Run, fl.DownTask.Run, fl.Check.Telling.Run = func() {}, func() {}, func() {}
	q := policy.Query{Proto: packet.ProtoTCP, Src: netip.AddrPortFrom(guest4, 1234), Dst: j.dst}
	fl.Pass.Answer.Store(&admit.Judged{Query: q})
	more := func() bool {
		if len(client) == 0 {
			more := !ep.ended
			ep.ended = true
			return more
		}
		n := cut.next(len(client))
		ep.pieces = append(ep.pieces, client[:n:n])
		client = client[n:]
		return true
	}

	var said sniff.Seen
	var buf tcpflow.FirstRoom
	for {
		look := tcpflow.PeekInto{To: buf[:]}
		_, _ = ep.Read(&look, tcpip.ReadOptions{Peek: true})
		var need int
		var err error
		said, need, err = sniff.Stream(buf[:look.N])
		if err == nil && need > 0 && !ep.ended {
			say, err := fl.Check.Greeting.Hear(buf[:look.N])
			if j.heard = append(j.heard, say...); err != nil {
				return nil
			}
			more()
			continue
		}
		q.Seen = tcpflow.FirstSeen(said, look.N, err == nil && need > 0, err)
		break
	}
	v := j.f.gate.Judge(j.f.gate.Rules.Load(), q)
	if !v.Allowed() {
		return nil
	}
	q.Held = v.Name()
	fl.Pass.Answer.Store(&admit.Judged{Query: q, Verdict: v})
	gate := tcpflow.NewGate(fl, v, q.Seen)
	far := newBlockingConn()
	go far.serve(server)
	defer far.end()
	for {
		var g tcpflow.Gather
		_, _ = ep.Read(&g, tcpip.ReadOptions{Peek: true})
		n, drop, abort := g.Bytes, 0, nat.Reason("")
		if s, ok := gate.(*tcpflow.StreamGate); ok && s.Refused.Load() != nil {
			return passed
		}
		if gate != nil && g.Bytes > 0 {
			n, drop, abort = gate.Admit(&g)
		}
		switch {
		case abort != "":
			return passed
		case drop > 0:
			ep.take(drop)
		case n > 0:
			n = cut.next(n)
			if gate != nil {
				gate.Passed(&g, n)
			}
			p := ep.take(n)
			if h, ok := gate.(*tcpflow.HelloGate); !ok || !h.Open {
				passed = append(passed, p...)
			}
			j.comesDown(fl, gate, pair[1], far.say(p))
		case !more():
			return passed
		}
	}
}

// comesDown is the pump of what the far side says.
func (j *twinJudge) comesDown(fl *tcpflow.Flow, gate tcpflow.Gate, far int, answer []byte) {
	for len(answer) > 0 {
		n, err := unix.Write(far, answer)
		if err != nil {
			panic(err)
		}
		answer = answer[n:]
		buf := make([]byte, tcpflow.DownChunk)
		for {
			room := tcpflow.DownChunk
			if gate != nil {
				room = gate.Room()
			}
			if room == 0 {
				break
			}
			n, err := unix.Read(fl.FD, buf[:room])
			if err != nil || n == 0 {
				break
			}
			if gate != nil {
				gate.Answered(buf[:n])
			}
			j.heard = append(j.heard, buf[:n]...)
		}
	}
}
