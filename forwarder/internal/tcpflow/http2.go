package tcpflow

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

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// maxStreamBytes bounds what a connection keeps of the requests under way: what each has
// said, and 128 bytes more.
const maxStreamBytes = 256 << 10

// StreamGate is one flow's.
type StreamGate struct {
	fl *Flow

	// Guarded by the flow's up.mu.
	frames  sniff.Frames
	ahead   int  // bytes that may pass, from the front of what is queued; may be more than are queued
	heard   int  // likewise, that were answered before anything passed
	judging bool // else it only waits for what it owes
	owed    bool // an acknowledgement that is not the server's business will come

	Refused atomic.Pointer[firstbytes.RefusedStream]

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
func newStreamGate(fl *Flow, greeting *sniff.Greeting, judging bool) *StreamGate {
	greeted := greeting.Settings() > 0
	s := &StreamGate{
		fl: fl, judging: judging, ahead: sniff.Preface, open: make(map[uint32]*openStream),
		heard: greeting.Heard(), owed: greeted, swallow: greeting.Settings(), greeted: greeted,
	}
	s.ends.Ended = s.ended
	return s
}

func (s *StreamGate) Admit(g *Gather) (pass, drop int, abort nat.Reason) {
	if r := s.Refused.Load(); r != nil {
		if s.fl.Check.over.Load() {
			return 0, 0, r.Reason()
		}
		return 0, 0, ""
	}
	if !s.walks() {
		return g.Bytes, 0, ""
	}
	at := place{g: g}
	at.skip(s.ahead)
	for s.ahead < g.Bytes {
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
	return min(s.ahead, g.Bytes), 0, ""
}

// walks reports whether anything of what comes is to be judged or kept back.
func (s *StreamGate) walks() bool { return s.judging || s.owed || s.heard > 0 }

func (s *StreamGate) Passed(_ *Gather, n int) {
	if s.walks() {
		s.ahead -= n
		s.heard = max(s.heard-n, 0)
	}
}

// unfinished waits for the rest of what begins what is queued.
func (s *StreamGate) unfinished() (int, int, nat.Reason) {
	if netstack.EndpointState(s.fl.Ep) != tcp.StateEstablished {
		return 0, 0, nat.ReasonIncompleteRequest // its end came before the frame's
	}
	return 0, 0, ""
}

// malformed ends the connection for err's sake.
func (s *StreamGate) malformed(err error) (int, int, nat.Reason) {
	s.fl.T.firstMalformed.Add(1)
	return 0, 0, s.refuse(&firstbytes.RefusedStream{ID: s.frames.Last(), Broken: err})
}

// refuse has the client told at the next place between two frames of the server's.
func (s *StreamGate) refuse(r *firstbytes.RefusedStream) (abort nat.Reason) {
	fl := s.fl
	if fl.Down.Done.Load() {
		return r.Reason() // an answer would come behind the server's end
	}
	s.Refused.Store(r)
	fl.Check.over.Store(false)
	fl.T.Checks.Enter(&fl.Check.entry, fl, firstbytes.RefusalTimeout)
	fl.T.Engine.Put(&fl.DownTask)
	return ""
}

// goesOn follows the request that a frame is about.
func (s *StreamGate) goesOn(fr sniff.Frame) bool {
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
func (s *StreamGate) fieldsAt(g *Gather, want int) (pass, drop int, abort nat.Reason) {
	fl := s.fl
	buf := firstBytes.Get().(*FirstRoom)
	defer firstBytes.Put(buf)
	for want <= len(buf) {
		queued, terr := fl.Ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
		if terr != nil {
			return 0, 0, lostSandbox(fl.Ep)
		}
		if queued < want {
			return s.unfinished()
		}
		look := PeekInto{To: buf[:want]}
		if _, terr := fl.Ep.Read(&look, tcpip.ReadOptions{Peek: true}); terr != nil {
			return 0, 0, lostSandbox(fl.Ep)
		}
		req, need, err := s.frames.Fields(buf[:look.N])
		switch {
		case err != nil:
			return s.malformed(err)
		case need > 0:
			want = need
			continue
		}
		if abort := s.judge(&req); abort != "" || s.Refused.Load() != nil {
			return 0, 0, abort
		}
		s.ahead = req.Size
		return min(req.Size, g.Bytes), 0, ""
	}
	return s.malformed(sniff.ErrTooLong)
}

// judge decides about a request, or notes that one ends.
func (s *StreamGate) judge(req *sniff.StreamRequest) (abort nat.Reason) {
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
	q := fl.Question()
	q.Seen = firstbytes.SeenOf(sniff.Seen{Kind: sniff.HTTP2, Name: req.Name, Method: req.Method, Path: req.Path, Override: req.Override})
	rules := fl.T.Gate.Rules.Load()
	v := fl.T.Gate.Judge(rules, q)
	if !v.Allowed() || req.Upgrade || v.Target() != fl.Verdict().Target() {
		fl.T.refusedRequest.Add(1)
		fl.noteRequest(v, q.Seen, q.Src, q.Dst, beside(v, req.Upgrade))
		return s.refuse(&firstbytes.RefusedStream{Verdict: v, ID: req.Stream, Grpc: req.GRPC, Head: req.Method == "HEAD"})
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
func (s *StreamGate) ended(stream uint32, reset bool) {
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
func (s *StreamGate) forget(stream uint32, o *openStream) {
	s.bytes -= o.cost()
	delete(s.open, stream)
}

func (s *StreamGate) Answered(p []byte) { s.ends.Feed(p) }

// Room keeps from the client what it has had from us, and lets what the far side sends pass up
// to the end of a frame once there is a refusal to be told there.
func (s *StreamGate) Room() int {
	n := s.ends.Until()
	r := s.Refused.Load()
	switch {
	case r == nil && s.swallow == 0:
		return DownChunk
	case n > 0:
		return n
	case r == nil:
		return s.nextFrame()
	case !s.told:
		s.told = true
		fl := s.fl
		fl.Check.answer, fl.Check.why = r.Answer(fl.T.Gate.Rules.Load().Name(), s.ends.Begun() || s.greeted), r.Reason()
		fl.T.Engine.Put(&fl.Check.Telling)
	}
	return 0
}

// nextFrame takes acknowledgements that the client has had off the front of what the far side
// has sent, and returns how much of the frame behind them may pass: 0 if its header is not there.
func (s *StreamGate) nextFrame() int {
	for s.swallow > 0 {
		var header [sniff.FrameHeader]byte
		n, errno := recvPeek(s.fl.FD, header[:])
		switch {
		case errno != 0 || n < len(header):
			if s.fl.hostEvents.Load() != 0 {
				return DownChunk // its end came before the frame's
			}
			return 0
		case !sniff.OnlyAck(header[:]):
			return min(sniff.FrameSize(header[:]), DownChunk)
		}
		if n, err := unix.Read(s.fl.FD, header[:]); err != nil || n < len(header) {
			return 0 // a reset, which the pump is told of
		}
		s.swallow--
	}
	return DownChunk
}

func (s *StreamGate) underWay() (all []policy.Seen) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.open {
		all = append(all, o.seen)
	}
	return all
}

// place is a place in what was gathered.
type place struct {
	g   *Gather
	i   int // the piece
	off int // in it
}

// skip goes n bytes on, and stops at the end.
func (p *place) skip(n int) {
	for p.i < p.g.N {
		rest := int(p.g.Iov[p.i].Len) - p.off
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
	for i := p.i; i < p.g.N && n < len(to); i++ {
		n += copy(to[n:], p.g.piece(i)[off:])
		off = 0
	}
	return n
}
