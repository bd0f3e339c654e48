package gate

// Two judges side by side: ours, and a real server's parser behind it. However the server reads the
// bytes that the gates let pass, the rules must allow it.
//
//	client's bytes, in pieces ─► queue ─► first bytes, gate ─► far ─► a server's parser
//	                                            ▲─────────── its answers ◄┘
//
// Nothing waits for a clock: the server takes the available bytes and then blocks, which the other
// side sees.

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

var (
	guest4 = netip.MustParseAddr("10.0.2.100")
	addrA  = netip.MustParseAddr("203.0.113.10")
)

// queueFlow is a flow whose two sides are queues: the bytes from the client, and from the far side,
// that have not been taken.
type queueFlow struct {
	question policy.Query
	verdict  policy.Verdict
	pieces   [][]byte
	far      []byte
	ended    bool
	farEnded bool
	again    int // how often it was to look again
}

func (q *queueFlow) Question() policy.Query  { return q.question }
func (q *queueFlow) Verdict() policy.Verdict { return q.verdict }
func (q *queueFlow) Ended() bool             { return q.ended }
func (q *queueFlow) FarEnded() bool          { return q.farEnded }
func (q *queueFlow) LookAgain()              { q.again++ }

func (q *queueFlow) Queued() (n int, _ nat.Reason) {
	for _, p := range q.pieces {
		n += len(p)
	}
	return n, ""
}

func (q *queueFlow) Peek(to []byte) (n int, _ nat.Reason) {
	for _, p := range q.pieces {
		n += copy(to[n:], p)
	}
	return n, ""
}

func (q *queueFlow) PeekFar(to []byte) int { return copy(to, q.far) }

func (q *queueFlow) SkipFar(p []byte) bool {
	if len(q.far) < len(p) {
		return false
	}
	q.far = q.far[len(p):]
	return true
}

// gather returns the bytes that the up pump would show a gate.
func (q *queueFlow) gather() *Gather {
	g := new(Gather)
	for _, p := range q.pieces {
		if _, err := g.Write(p); err != nil {
			break
		}
	}
	return g
}

// take takes the first n bytes off the queue.
func (q *queueFlow) take(n int) (taken []byte) {
	for n > 0 {
		k := min(n, len(q.pieces[0]))
		taken = append(taken, q.pieces[0][:k]...)
		if q.pieces[0] = q.pieces[0][k:]; len(q.pieces[0]) == 0 {
			q.pieces = q.pieces[1:]
		}
		n -= k
	}
	return taken
}

// comesDown acts as the pump for the far side's bytes. It returns the bytes that the client hears,
// and how the connection ends, if it does.
func (q *queueFlow) comesDown(gate Gate, answer []byte) (heard []byte, end *Ending) {
	q.far = append(q.far, answer...)
	for {
		room := Chunk
		if gate != nil {
			if room, end = gate.Room(); end != nil {
				return heard, end
			}
		}
		n := min(room, len(q.far))
		if n == 0 {
			return heard, nil
		}
		p := q.far[:n:n]
		q.far = q.far[n:]
		if gate != nil {
			gate.Answered(p)
		}
		heard = append(heard, p...)
	}
}

// blockingConn is the server's side. Its reader blocks when no bytes are left.
type blockingConn struct {
	net.Conn // methods not defined below are not used

	mu      sync.Mutex
	cond    sync.Cond
	in, out []byte
	blocked bool
	over    bool // the reader is gone
	ended   bool // no more bytes will come
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

// serve runs a server until it is done.
func (c *blockingConn) serve(server func(net.Conn)) {
	server(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	c.cond.Broadcast()
}

// say gives the server bytes, and returns its answer up to where it blocks.
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

// twinJudge is our side.
type twinJudge struct {
	shared *Shared
	dst    netip.AddrPort
	heard  []byte // by the client, in the last run
}

func newTwinJudge(t testing.TB, text string, port uint16) *twinJudge {
	t.Helper()
	names := policy.NewNames(policy.NamesConfig{})
	if err := names.Grant("a.example", []netip.Addr{addrA}, time.Hour, time.Now()); err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse("test.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.Compile(p, policy.Environment{Guest: []netip.Addr{guest4}})
	if err != nil {
		t.Fatal(err)
	}
	a := &admit.Gate{Config: admit.Config{Granted: names, Now: time.Now}}
	a.Rules.Store(rules)
	return &twinJudge{shared: NewShared(a, new(count.Set)), dst: netip.AddrPortFrom(addrA, port)}
}

// cutter cuts bytes into pieces. It takes their sizes from cuts, over and over; if cuts is empty,
// there is one piece.
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

// begin returns a flow on which nothing has been heard yet.
func (j *twinJudge) begin() *queueFlow {
	return &queueFlow{question: policy.Query{Proto: unix.IPPROTO_TCP, Src: netip.AddrPortFrom(guest4, 1234), Dst: j.dst}}
}

// open judges a flow by seen, as admission does, and returns its gate.
func (j *twinJudge) open(fl *queueFlow, first *First, seen policy.Seen) (gate Gate, allowed bool) {
	q := fl.question
	q.Seen = seen
	v := j.shared.admit.Judge(j.shared.admit.Rules.Load(), q)
	if !v.Allowed() {
		return nil, false
	}
	q.Held = v.Name()
	fl.question, fl.verdict = q, v
	return first.Gate(fl, v, seen), true
}

// run sends a client's bytes past our judges to a server, until neither moves any more. It returns
// the bytes that passed while the gate still had something to judge.
func (j *twinJudge) run(client, cuts []byte, server func(net.Conn)) (passed []byte) {
	cut := cutter{cuts: cuts}
	fl := j.begin()
	j.heard = nil
	more := func() bool {
		if len(client) == 0 {
			more := !fl.ended
			fl.ended = true
			return more
		}
		n := cut.next(len(client))
		fl.pieces = append(fl.pieces, client[:n:n])
		client = client[n:]
		return true
	}

	first := j.shared.NewFirst()
	at, _ := first.Read(fl, false, fl.Ended(), false)
	for !at.Decide && at.End == nil {
		j.heard = append(j.heard, at.Say...)
		more()
		at, _ = first.Read(fl, false, fl.Ended(), false)
	}
	j.heard = append(j.heard, at.Say...)
	if at.End != nil {
		return nil
	}
	gate, allowed := j.open(fl, &first, at.Seen)
	if !allowed {
		return nil
	}
	far := newBlockingConn()
	go far.serve(server)
	defer far.end()
	for {
		g := fl.gather()
		step := Step{Pass: g.Bytes}
		if gate != nil && g.Bytes > 0 {
			step = gate.Admit(g)
		}
		switch {
		case step.Abort != "", step.Refusing != "", step.End != nil:
			return passed
		case step.Drop > 0:
			fl.take(step.Drop)
		case step.Pass > 0:
			n := cut.next(step.Pass)
			if gate != nil {
				gate.Passed(g, n)
			}
			p := fl.take(n)
			if h, ok := gate.(*helloGate); !ok || !h.open {
				passed = append(passed, p...)
			}
			heard, _ := fl.comesDown(gate, far.say(p))
			j.heard = append(j.heard, heard...)
		case !more():
			return passed
		}
	}
}
