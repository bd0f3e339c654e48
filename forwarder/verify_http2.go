package forwarder

// Requests of clear-text HTTP/2, each judged before a byte of it is passed on.
//
// The gate stands in the up pump and walks the frames of what is queued. What is no header
// block passes as it is, and content may pass before it is there: of a frame only the header
// is looked at. A header block waits until it is whole, and is read and judged; what came
// before it has passed then, and what comes after it waits for the verdict.
//
// A refusal ends the connection, with all its requests. A block that the server never saw
// would leave its decoder out of step with the client's encoder, so that nothing could
// follow it. The client is told at the next place between two frames of the server's, by
// an answer to that request and a GOAWAY behind it.
//
// Clients may wait for the server's SETTINGS, for the acknowledgement of theirs, or for the
// answer to a PING, before they make a request. They are answered in the server's place
// (sniff.Greeting) as long as nothing may reach it:
//
//	client                     gate, before the first request       behind it
//	SETTINGS                   empty ones, acknowledges             passes; the server's acknowledgement does not
//	SETTINGS, acknowledged                                          the first one, of ours, does not pass
//	PING                       answers                              does not pass
//	WINDOW_UPDATE, PRIORITY    -                                    passes
//
// What passes is what is still queued: the server sees the whole connection, but for what was
// answered for it, and its own SETTINGS come behind ours as a change of them.

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice/forwarder/sniff"
	"sluice/nat"
	"sluice/policy"
)

// maxStreamBytes bounds what a connection keeps of the requests under way: what each has
// said, and 128 bytes more.
const maxStreamBytes = 256 << 10

// streamGate is one flow's.
type streamGate struct {
	fl *tcpFlow

	// Guarded by the flow's up.mu.
	frames  sniff.Frames
	ahead   int  // bytes that may pass, from the front of what is queued; may be more than are queued
	heard   int  // likewise, that were answered before anything passed
	judging bool // else it only waits for what it owes
	owed    bool // an acknowledgement that is not the server's business will come

	refused atomic.Pointer[refusedStream]

	// Guarded by the flow's down.mu.
	ends    sniff.FrameEnds
	swallow int  // acknowledgements of SETTINGS that the client has had from us
	greeted bool // the client has had SETTINGS, of the server's or from us
	told    bool

	mu    sync.Mutex
	open  map[uint32]*openStream // the requests under way
	bytes int                    // of maxStreamBytes
}

// openStream is a request under way.
type openStream struct {
	seen policy.Seen
	left int64 // of the content that was announced; -1: none was

	sent, answered bool // each side's end
}

func (o *openStream) cost() int {
	return 128 + len(o.seen.Name) + len(o.seen.Method) + len(o.seen.Path)
}

// newStreamGate is for a flow of which nothing has passed yet. greeting is what its client has
// heard, and judging tells that its requests are to be judged.
func newStreamGate(fl *tcpFlow, greeting *sniff.Greeting, judging bool) *streamGate {
	greeted := greeting.Settings() > 0
	s := &streamGate{
		fl: fl, judging: judging, ahead: sniff.Preface, open: make(map[uint32]*openStream),
		heard: greeting.Heard(), owed: greeted, swallow: greeting.Settings(), greeted: greeted,
	}
	s.ends.Ended = s.ended
	return s
}

func (s *streamGate) admit(g *gather) (pass, drop int, abort nat.Reason) {
	if r := s.refused.Load(); r != nil {
		if s.fl.check.over.Load() {
			return 0, 0, r.reason()
		}
		return 0, 0, ""
	}
	if !s.walks() {
		return g.bytes, 0, ""
	}
	at := place{g: g}
	at.skip(s.ahead)
	for s.ahead < g.bytes {
		var look [sniff.FrameLook]byte
		fr, need, err := s.frames.Next(look[:at.look(look[:])])
		if err != nil && s.judging {
			return s.malformed(err)
		}
		if need > 0 {
			break
		}
		switch {
		case fr.Ack && s.owed, fr.Ping && s.ahead < s.heard:
			if s.ahead > 0 {
				return s.ahead, 0, ""
			}
			s.owed = s.owed && !fr.Ack
			s.heard = max(s.heard-fr.Size, 0)
			return 0, fr.Size, ""
		case !s.judging:
		case fr.Fields:
			if s.ahead > 0 {
				return s.ahead, 0, ""
			}
			return s.fieldsAt(g, fr.Size)
		case !s.goesOn(fr):
			return s.malformed(sniff.ErrMalformed)
		}
		s.ahead += fr.Size
		at.skip(fr.Size)
	}
	if s.ahead == 0 {
		return s.unfinished()
	}
	return min(s.ahead, g.bytes), 0, ""
}

// walks reports whether anything of what comes is to be judged or kept back.
func (s *streamGate) walks() bool { return s.judging || s.owed || s.heard > 0 }

func (s *streamGate) passed(_ *gather, n int) {
	if s.walks() {
		s.ahead -= n
		s.heard = max(s.heard-n, 0)
	}
}

// unfinished waits for the rest of what begins what is queued.
func (s *streamGate) unfinished() (int, int, nat.Reason) {
	if endpointState(s.fl.ep) != tcp.StateEstablished {
		return 0, 0, nat.ReasonIncompleteRequest // its end came before the frame's
	}
	return 0, 0, ""
}

// malformed ends the connection for err's sake.
func (s *streamGate) malformed(err error) (int, int, nat.Reason) {
	s.fl.t.firstMalformed.Add(1)
	return 0, 0, s.refuse(&refusedStream{id: s.frames.Last(), broken: err})
}

// refuse has the client told at the next place between two frames of the server's.
func (s *streamGate) refuse(r *refusedStream) (abort nat.Reason) {
	fl := s.fl
	if fl.down.done.Load() {
		return r.reason() // an answer would come behind the server's end
	}
	s.refused.Store(r)
	fl.check.over.Store(false)
	fl.t.checks.enter(&fl.check.entry, fl, refusalTimeout)
	fl.t.engine.put(&fl.downTask)
	return ""
}

// goesOn follows the request that a frame is about.
func (s *streamGate) goesOn(fr sniff.Frame) bool {
	if fr.Data == 0 && !fr.End && !fr.Reset {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.open[fr.Stream]
	switch {
	case o == nil: // it has ended: nobody takes this
		return true
	case o.left < 0 || fr.Reset:
	case int64(fr.Data) > o.left || fr.End && int64(fr.Data) < o.left:
		// As HTTP/1, which the server may make of it, what is too much would be a
		// request of its own.
		return false
	default:
		o.left -= int64(fr.Data)
	}
	o.sent = o.sent || fr.End
	if fr.Reset || o.sent && o.answered {
		s.forget(fr.Stream, o)
	}
	return true
}

// fieldsAt looks at the header block that begins what is queued, in a frame of so many
// bytes and those that follow it.
func (s *streamGate) fieldsAt(g *gather, want int) (pass, drop int, abort nat.Reason) {
	fl := s.fl
	buf := firstBytes.Get().(*firstRoom)
	defer firstBytes.Put(buf)
	for want <= len(buf) {
		queued, terr := fl.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
		if terr != nil {
			return 0, 0, lostSandbox(fl.ep)
		}
		if queued < want {
			return s.unfinished()
		}
		look := peekInto{to: buf[:want]}
		if _, terr := fl.ep.Read(&look, tcpip.ReadOptions{Peek: true}); terr != nil {
			return 0, 0, lostSandbox(fl.ep)
		}
		req, need, err := s.frames.Fields(buf[:look.n])
		switch {
		case err != nil:
			return s.malformed(err)
		case need > 0:
			want = need
			continue
		}
		if abort := s.judge(&req); abort != "" || s.refused.Load() != nil {
			return 0, 0, abort
		}
		s.ahead = req.Size
		return min(req.Size, g.bytes), 0, ""
	}
	return s.malformed(sniff.ErrTooLong)
}

// judge decides about a request, or notes that one ends.
func (s *streamGate) judge(req *sniff.StreamRequest) (abort nat.Reason) {
	fl := s.fl
	if req.Trailers {
		if !s.goesOn(sniff.Frame{Stream: req.Stream, End: true}) {
			_, _, abort = s.malformed(sniff.ErrMalformed)
		}
		return abort
	}
	if req.End && req.Length > 0 {
		_, _, abort = s.malformed(sniff.ErrMalformed)
		return abort
	}
	q := fl.question()
	q.Seen = seenOf(sniff.Seen{Kind: sniff.HTTP2, Name: req.Name, Method: req.Method, Path: req.Path, Override: req.Override})
	rules := fl.t.gate.rules.Load()
	v := fl.t.gate.judge(rules, q)
	if !v.Allowed() || req.Upgrade || v.Target() != fl.verdict().Target() {
		fl.t.refusedRequest.Add(1)
		fl.noteRequest(v, q.Seen, q.Src, q.Dst, beside(v, req.Upgrade))
		return s.refuse(&refusedStream{verdict: v, id: req.Stream, grpc: req.GRPC, head: req.Method == "HEAD"})
	}
	o := &openStream{seen: q.Seen, left: req.Length, sent: req.End}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes += o.cost(); s.bytes > maxStreamBytes {
		return nat.ReasonTooManyRequests
	}
	s.open[req.Stream] = o
	return fl.stillInForce(rules, q)
}

// ended is told by the server's frames of an answer that is whole, or will not be.
func (s *streamGate) ended(stream uint32, reset bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.open[stream]; o != nil {
		o.answered = true
		if o.sent || reset {
			s.forget(stream, o)
		}
	}
}

// forget takes a request off those under way. mu is held.
func (s *streamGate) forget(stream uint32, o *openStream) {
	s.bytes -= o.cost()
	delete(s.open, stream)
}

func (s *streamGate) answered(p []byte) { s.ends.Feed(p) }

// room keeps from the client what it has had from us, and lets what the far side sends pass up
// to the end of a frame once there is a refusal to be told there.
func (s *streamGate) room() int {
	n := s.ends.Until()
	r := s.refused.Load()
	switch {
	case r == nil && s.swallow == 0:
		return downChunk
	case n > 0:
		return n
	case r == nil:
		return s.nextFrame()
	case !s.told:
		s.told = true
		fl := s.fl
		fl.check.answer, fl.check.why = r.answer(fl.t.gate.rules.Load().Name(), s.ends.Begun() || s.greeted), r.reason()
		fl.t.engine.put(&fl.check.telling)
	}
	return 0
}

// nextFrame takes acknowledgements that the client has had off the front of what the far side
// has sent, and returns how much of the frame behind them may pass: 0 if its header is not there.
func (s *streamGate) nextFrame() int {
	for s.swallow > 0 {
		var header [sniff.FrameHeader]byte
		n, errno := recvPeek(s.fl.fd, header[:])
		switch {
		case errno != 0 || n < len(header):
			if s.fl.hostEvents.Load() != 0 {
				return downChunk // its end came before the frame's
			}
			return 0
		case !sniff.OnlyAck(header[:]):
			return min(sniff.FrameSize(header[:]), downChunk)
		}
		if n, err := unix.Read(s.fl.fd, header[:]); err != nil || n < len(header) {
			return 0 // a reset, which the pump is told of
		}
		s.swallow--
	}
	return downChunk
}

func (s *streamGate) underWay() (all []policy.Seen) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.open {
		all = append(all, o.seen)
	}
	return all
}

// place is a place in what was gathered.
type place struct {
	g   *gather
	i   int // the piece
	off int // in it
}

// skip goes n bytes on, and stops at the end.
func (p *place) skip(n int) {
	for p.i < p.g.n {
		rest := int(p.g.iov[p.i].Len) - p.off
		if n < rest {
			p.off += n
			return
		}
		n -= rest
		p.i, p.off = p.i+1, 0
	}
}

// look copies what is there, and does not move.
func (p *place) look(to []byte) (n int) {
	off := p.off
	for i := p.i; i < p.g.n && n < len(to); i++ {
		n += copy(to[n:], p.g.piece(i)[off:])
		off = 0
	}
	return n
}
