package gate

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

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// maxStreamBytes bounds what a connection keeps of the requests under way: what each has
// said, and 128 bytes more.
const maxStreamBytes = 256 << 10

// streamGate is one connection's.
type streamGate struct {
	of

	// Guarded by the flow's up.mu.
	frames  sniff.Frames
	ahead   int  // bytes that may pass, from the front of what is queued; may be more than are queued
	heard   int  // likewise, that were answered before anything passed
	judging bool // else it only waits for what it owes
	owed    bool // an acknowledgement that is not the server's business will come

	refused atomic.Pointer[firstbytes.RefusedStream]

	// Guarded by the flow's down.mu.
	ends    sniff.FrameEnds
	swallow int  // acknowledgements of SETTINGS that the client has had from us
	greeted bool // the client has had SETTINGS, of the server's or from us
	told    bool
	header  [sniff.FrameHeader]byte // room for one

	mu    sync.Mutex
	open  map[uint32]*openStream // the requests under way
	bytes int                    // of maxStreamBytes
}

// openStream is a request under way.
type openStream struct {
	seen policy.Seen
	left int64 // of the content that was announced; -1: none was
	asH1 bool  // the request came as HTTP/1: nothing of it may follow

	sent, answered bool // each side's end
}

func (o *openStream) cost() int {
	return 128 + len(o.seen.Name) + len(o.seen.Method) + len(o.seen.Path)
}

// newStreamGate is for a connection of which nothing has passed yet. greeting is what its client
// has heard, and judging tells that its requests are to be judged.
func newStreamGate(of of, greeting *sniff.Greeting, judging bool) *streamGate {
	greeted := greeting.Settings() > 0
	s := &streamGate{
		of: of, judging: judging, ahead: sniff.Preface, open: make(map[uint32]*openStream),
		heard: greeting.Heard(), owed: greeted, swallow: greeting.Settings(), greeted: greeted,
	}
	s.ends.Ended = s.ended
	return s
}

// newUpgradedGate is for a connection that goes on with HTTP/2 behind a request of HTTP/1, which
// said what was seen and is answered on stream 1.
func newUpgradedGate(of of, seen policy.Seen) *streamGate {
	s := newStreamGate(of, new(sniff.Greeting), true)
	o := &openStream{seen: seen, asH1: true, sent: true}
	s.frames.Begin(1)
	s.open[1], s.bytes = o, o.cost()
	return s
}

func (s *streamGate) Admit(g *Gather) Step {
	if r := s.refused.Load(); r != nil {
		return Step{Refusing: r.Reason()}
	}
	if !s.walks() {
		return Step{Pass: g.Bytes}
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
				return Step{Pass: s.ahead}
			}
			s.owed = s.owed && !fr.Ack
			s.heard = max(s.heard-fr.Size, 0)
			return Step{Drop: fr.Size}
		case !s.judging:
		case fr.Fields:
			if s.ahead > 0 {
				return Step{Pass: s.ahead}
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
	return Step{Pass: min(s.ahead, g.Bytes)}
}

// walks reports whether anything of what comes is to be judged or kept back.
func (s *streamGate) walks() bool { return s.judging || s.owed || s.heard > 0 }

func (s *streamGate) Passed(_ *Gather, n int) {
	if s.walks() {
		s.ahead -= n
		s.heard = max(s.heard-n, 0)
	}
}

// unfinished waits for the rest of what begins what is queued.
func (s *streamGate) unfinished() Step {
	if s.flow.Ended() {
		return Step{Abort: nat.ReasonIncompleteRequest} // its end came before the frame's
	}
	return Step{}
}

// malformed ends the connection for err's sake.
func (s *streamGate) malformed(err error) Step {
	s.shared.malformed.Add(1)
	return s.refuse(&firstbytes.RefusedStream{ID: s.frames.Last(), Broken: err})
}

// refuse has the client told at the next place between two frames of the server's.
func (s *streamGate) refuse(r *firstbytes.RefusedStream) Step {
	s.refused.Store(r)
	return Step{Refusing: r.Reason()}
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
	case o.asH1 && !fr.Reset:
		return false
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
func (s *streamGate) fieldsAt(g *Gather, want int) Step {
	buf := looks.Get().(*look)
	defer looks.Put(buf)
	for want <= len(buf) {
		queued, gone := s.flow.Queued()
		if gone != "" {
			return Step{Abort: gone}
		}
		if queued < want {
			return s.unfinished()
		}
		n, gone := s.flow.Peek(buf[:want])
		if gone != "" {
			return Step{Abort: gone}
		}
		req, need, err := s.frames.Fields(buf[:n])
		switch {
		case err != nil:
			return s.malformed(err)
		case need > 0:
			want = need
			continue
		}
		step := s.judge(&req)
		if step.Abort == "" && step.Refusing == "" {
			s.ahead = req.Size
			step.Pass = min(req.Size, g.Bytes)
		}
		return step
	}
	return s.malformed(sniff.ErrTooLong)
}

// judge decides about a request, or notes that one ends. The zero Step lets it pass.
func (s *streamGate) judge(req *sniff.StreamRequest) Step {
	if req.Trailers {
		if !s.goesOn(sniff.Frame{Stream: req.Stream, End: true}) {
			return s.malformed(sniff.ErrMalformed)
		}
		return Step{}
	}
	if req.End && req.Length > 0 {
		return s.malformed(sniff.ErrMalformed)
	}
	a := s.shared.ask(s.flow, sniff.Seen{Kind: sniff.HTTP2, Name: req.Name, Method: req.Method, Path: req.Path, Override: req.Override}, req.Upgrade)
	if a.refused {
		return s.refuse(&firstbytes.RefusedStream{Verdict: a.Verdict, ID: req.Stream, Grpc: req.GRPC, Head: req.Method == "HEAD"})
	}
	o := &openStream{seen: a.Seen, left: req.Length, sent: req.End}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes += o.cost(); s.bytes > maxStreamBytes {
		return Step{Abort: nat.ReasonTooManyRequests}
	}
	s.open[req.Stream] = o
	return Step{Abort: s.shared.stillInForce(&a)}
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

func (s *streamGate) Answered(p []byte) { s.ends.Feed(p) }

// Room keeps from the client what it has had from us, and lets what the far side sends pass up
// to the end of a frame once there is a refusal to be told there.
func (s *streamGate) Room() (int, *Ending) {
	n := s.ends.Until()
	r := s.refused.Load()
	switch {
	case r == nil && s.swallow == 0:
		return Chunk, nil
	case n > 0:
		return n, nil
	case r == nil:
		return s.nextFrame(), nil
	case !s.told:
		s.told = true
		return 0, &Ending{Answer: r.Answer(s.shared.policyName(), s.ends.Begun() || s.greeted), Why: r.Reason()}
	}
	return 0, nil
}

// nextFrame takes acknowledgements that the client has had off the front of what the far side
// has sent, and returns how much of the frame behind them may pass: 0 if its header is not there.
func (s *streamGate) nextFrame() int {
	for s.swallow > 0 {
		header := s.header[:]
		switch n := s.flow.PeekFar(header); {
		case n < len(header):
			if s.flow.FarEnded() {
				return Chunk // its end came before the frame's
			}
			return 0
		case !sniff.OnlyAck(header):
			return min(sniff.FrameSize(header), Chunk)
		}
		if !s.flow.SkipFar(header) {
			return 0 // a reset, which the pump is told of
		}
		s.swallow--
	}
	return Chunk
}

func (s *streamGate) UnderWay() (all []policy.Seen) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.open {
		all = append(all, o.seen)
	}
	return all
}
