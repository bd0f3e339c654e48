package gate

// Requests of clear-text HTTP/2, each judged before any of its bytes is passed on.
//
// The gate stands in the up pump and walks the queued frames. Frames outside a header block pass
// unchanged, and their content may be let pass before it has arrived: only a frame's header is
// looked at. A header block waits until it is whole, and is then read and judged; the bytes before
// it have passed by then, and the bytes after it wait for the verdict.
//
// A refusal ends the connection, with all its requests. A block that the server never saw would
// leave its decoder out of step with the client's encoder, so nothing could follow it. The client
// is told at the next boundary between two of the server's frames, by an answer to that request and
// a GOAWAY after it.
//
// Clients may wait for the server's SETTINGS, for the acknowledgement of theirs, or for the answer
// to a PING, before they make a request. They are answered in the server's place (sniff.Greeting)
// as long as no bytes may reach it:
//
//	client                     gate, before the first request       behind it
//	SETTINGS                   empty ones, acknowledges             passes; the server's acknowledgement does not
//	SETTINGS, acknowledged                                          the first one, of ours, does not pass
//	PING                       answers                              does not pass
//	WINDOW_UPDATE, PRIORITY    -                                    passes
//
// All that is still queued then passes: the server sees the whole connection, except the frames
// answered in its place, and its own SETTINGS come after ours as a change to them.

import (
	"sync"
	"sync/atomic"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// maxStreamBytes bounds the memory that a connection keeps for the requests under way: each one's
// content as seen by policy, and 128 bytes more.
const maxStreamBytes = 256 << 10

// streamGate is the gate of one HTTP/2 connection.
type streamGate struct {
	of

	// Guarded by the flow's up.mu.
	frames  sniff.Frames
	ahead   int  // bytes that may pass, from the front of the queue; may exceed those queued
	heard   int  // likewise, bytes that were answered before anything passed
	judging bool // else it only waits for what it owes
	owed    bool // an acknowledgement that the server must not see will come

	refused atomic.Pointer[firstbytes.RefusedStream]

	// Guarded by the flow's down.mu.
	ends    sniff.FrameEnds
	swallow int  // acknowledgements of SETTINGS that the client has had from us
	greeted bool // the client has had SETTINGS, from the server or from us
	told    bool
	header  [sniff.FrameHeader]byte // room for one

	mu    sync.Mutex
	open  map[uint32]*openStream // the requests under way
	bytes int                    // of maxStreamBytes
}

// openStream is a request under way.
type openStream struct {
	seen policy.Seen
	left int64 // of the announced content; -1: none was announced
	asH1 bool  // the request came as HTTP/1: nothing of it may follow

	sent, answered bool // each side has ended
}

func (o *openStream) cost() int {
	return 128 + len(o.seen.Name) + len(o.seen.Method) + len(o.seen.Path)
}

// newStreamGate returns the gate of a connection on which nothing has passed yet. greeting is the
// record of the answers to its client, and judging says whether its requests are to be judged.
func newStreamGate(of of, greeting *sniff.Greeting, judging bool) *streamGate {
	greeted := greeting.Settings() > 0
	s := &streamGate{
		of: of, judging: judging, ahead: sniff.Preface, open: make(map[uint32]*openStream),
		heard: greeting.Heard(), owed: greeted, swallow: greeting.Settings(), greeted: greeted,
	}
	s.ends.Ended = s.ended
	return s
}

// newUpgradedGate returns the gate of a connection that switches to HTTP/2 after an HTTP/1 request,
// which was judged by seen and is answered on stream 1.
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

// walks reports whether any coming bytes are to be judged or kept back.
func (s *streamGate) walks() bool { return s.judging || s.owed || s.heard > 0 }

func (s *streamGate) Passed(_ *Gather, n int) {
	if s.walks() {
		s.ahead -= n
		s.heard = max(s.heard-n, 0)
	}
}

// unfinished waits for the rest of the frame or block at the front of the queue.
func (s *streamGate) unfinished() Step {
	if s.flow.Ended() {
		return Step{Abort: nat.ReasonIncompleteRequest} // its end came before the frame's
	}
	return Step{}
}

// malformed ends the connection because of err.
func (s *streamGate) malformed(err error) Step {
	s.shared.malformed.Add(1)
	return s.refuse(&firstbytes.RefusedStream{ID: s.frames.Last(), Broken: err})
}

// refuse has the client told at the next boundary between two of the server's frames.
func (s *streamGate) refuse(r *firstbytes.RefusedStream) Step {
	s.refused.Store(r)
	return Step{Refusing: r.Reason()}
}

// goesOn follows the request that a frame is about. It reports whether the frame may pass.
func (s *streamGate) goesOn(fr sniff.Frame) bool {
	if fr.Data == 0 && !fr.End && !fr.Reset {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.open[fr.Stream]
	switch {
	case o == nil: // it has ended: the frame is ignored
		return true
	case o.asH1 && !fr.Reset:
		return false
	case o.left < 0 || fr.Reset:
	case int64(fr.Data) > o.left || fr.End && int64(fr.Data) < o.left:
		// In HTTP/1, to which the server may convert it, the excess would be a request of its own.
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

// fieldsAt looks at the header block at the front of the queue: the first frame has want bytes, and
// others may follow.
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

// ended is called when the server's frames show that an answer is whole, or will never be.
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

// forget removes a request from those under way. mu is held.
func (s *streamGate) forget(stream uint32, o *openStream) {
	s.bytes -= o.cost()
	delete(s.open, stream)
}

func (s *streamGate) Answered(p []byte) { s.ends.Feed(p) }

// Room keeps from the client the acknowledgements that it has had from us. Once there is a refusal
// to send, it lets the far side's bytes pass only up to the end of a frame.
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

// nextFrame discards acknowledgements that the client has had from the front of the far side's
// bytes, and returns how many bytes of the next frame may pass: 0 if its header is not there yet.
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
