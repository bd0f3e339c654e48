package dns

// DNS over TCP, the sandbox's side (RFC 7766): length-prefixed messages, many
// in flight on a connection, answers in the order they become ready.
//
// One goroutine reads; each forwarded query has one that asks and then writes. The reader stops
// reading while Limits.Pipeline queries are in flight. A connection whose peer takes no answers is
// closed after StreamIdle, as is one whose peer sends no whole query for as long while none is in
// flight.

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"sluice.dev/sluice/policy"
)

// stream is one connection.
type stream struct {
	r     *Resolver
	c     net.Conn
	from  netip.AddrPort
	slots chan struct{} // a token per query in flight

	became func(policy.Outcome) // called with each query's outcome

	writing  sync.Mutex // held for one answer at a time; guards answered
	answered time.Time  // when the last answer had been written

	work sync.WaitGroup
}

// ServeStream serves c until its peer closes it, it is idle for too long, ctx ends, or Close is
// called. It closes c and returns after its last goroutine. became is called with the outcome of
// each question.
func (r *Resolver) ServeStream(ctx context.Context, c net.Conn, became func(policy.Outcome)) {
	defer c.Close()
	if !r.begin() {
		return
	}
	defer r.work.Done()
	select {
	case r.streams <- struct{}{}:
		defer func() { <-r.streams }()
	default:
		r.stats.StreamsRefused.Add(1)
		return
	}
	r.stats.Streams.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	defer context.AfterFunc(ctx, func() { c.Close() })()

	s := &stream{r: r, c: c, became: became, slots: make(chan struct{}, r.limits.Pipeline)}
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		ap := a.AddrPort()
		s.from = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	if s.read(ctx) {
		// The peer may have closed only its sending half: it still gets its answers.
		s.work.Wait()
		return
	}
	cancel()
	s.work.Wait()
}

// read handles queries until the peer's end of file, when it returns true, or until the connection
// is of no more use.
func (s *stream) read(ctx context.Context) bool {
	br := bufio.NewReaderSize(s.c, 2+maxQuery)
	for {
		msg, err := s.next(br)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				s.r.stats.StreamsIdle.Add(1)
				return false
			}
			return errors.Is(err, io.EOF) && br.Buffered() == 0
		}
		v := s.r.judge(msg, s.from, true)
		if _, err := br.Discard(2 + len(msg)); err != nil {
			return false
		}
		if v.forward == nil {
			s.became(v.became)
			// A stream cannot leave a message unanswered: one that is not a query ends it.
			if v.answer == nil || s.write(v.answer) != nil {
				return false
			}
			continue
		}
		if !take(ctx, s.slots) {
			return false
		}
		if !take(ctx, s.r.inFlight) {
			<-s.slots
			return false
		}
		// Owned by ServeStream; stopped by ctx, or Limits.QueryTime and then
		// the write deadline.
		s.work.Go(func() {
			defer func() { <-s.slots }()
			defer func() { <-s.r.inFlight }()
			a := s.r.forward(ctx, v.forward)
			defer a.release()
			s.became(a.became)
			if s.write(a.msg) != nil {
				s.c.Close() // wakes the reader
			}
		})
	}
}

var errTooLong = errors.New("message longer than any query")

// next returns the next message, still in br's buffer.
func (s *stream) next(br *bufio.Reader) ([]byte, error) {
	idle := s.r.limits.StreamIdle
	since := time.Now()
	for {
		if err := s.c.SetReadDeadline(since.Add(idle)); err != nil {
			return nil, err
		}
		_, err := br.Peek(1)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, err
		}
		// While an answer is due the peer waits for us, not we for it; its own time starts at the
		// last answer.
		if len(s.slots) > 0 {
			since = time.Now()
		} else if last := s.lastAnswer(); last.After(since) {
			since = last
		} else {
			return nil, err
		}
	}
	// The deadline is not extended for the rest: a message that drips in does not keep a connection
	// open.
	prefix, err := br.Peek(2)
	if err != nil {
		return nil, err
	}
	n := int(be16(prefix, 0))
	if n > maxQuery {
		return nil, errTooLong
	}
	b, err := br.Peek(2 + n)
	if err != nil {
		return nil, err
	}
	return b[2:], nil
}

func (s *stream) write(msg []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.c.SetWriteDeadline(time.Now().Add(s.r.limits.StreamIdle)); err != nil {
		return err
	}
	_, err := s.c.Write(prefixed(msg))
	s.answered = time.Now()
	return err
}

func (s *stream) lastAnswer() time.Time {
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.answered
}

// take takes a token, waiting for one until ctx ends.
func take(ctx context.Context, tokens chan struct{}) bool {
	select {
	case tokens <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}
