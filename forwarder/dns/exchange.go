package dns

// Asking upstream.
//
// One query makes up to Attempts rounds over the servers, in the order of the host's configuration
// (or rotated), with servers that failed lately last. A server that cannot answer (SERVFAIL,
// REFUSED, ...) is not asked again; its error is kept, and passed on if no other server gives an
// answer.
//
// Over UDP each try has a connected socket of its own, so the kernel draws a fresh source port and
// discards datagrams from other addresses. It also has an ID of its own from the system's random
// source. A datagram with another ID or question is ignored, and the wait goes on (RFC 5452 section
// 9). After maxIgnored of them, somebody is guessing: the question is asked again over TCP, where
// guesses do not arrive. So a forger who floods us cannot keep the true answer out either.
//
// A server without EDNS answers it with FORMERR, NOTIMP or silence. The gate asks such a server
// again without EDNS; a client's own query is passed on unchanged.
//
// The gate also asks again over TCP when the question comes back with its letters in another case
// than the gate mixed (gate.go). A server that folds case and cannot be reached over TCP is asked
// once more, in lower case. If it answers, it is asked in lower case for foldedFor: a home router
// must not cost the sandbox all names. Only the port and the ID then protect against forgers, as
// they do for every other resolver on the host.
//
// An answer that upstream truncated, or that did not fit udpBuffer, is fetched again over TCP when
// the client can take more than UDP brought.

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sluice.dev/sluice/policy"
)

const (
	// udpBuffer is the largest answer taken from UDP. Larger ones would be
	// fragmented on most paths; TCP carries them.
	udpBuffer = 4096

	// maxIgnored is how many stray datagrams one try over UDP tolerates.
	maxIgnored = 64

	// repeatedly is how many tries must fail within seldom.Every before they are logged: those for
	// one question to one silent server.
	repeatedly = 2

	// failedFor is how long a server that failed is asked last.
	failedFor = 10 * time.Second

	// foldedFor is how long a server that folds case, and has no TCP, is asked in lower case before
	// mixed case is tried again.
	foldedFor = time.Hour
)

var (
	errNoServer  = errors.New("no upstream server")
	errMalformed = errors.New("malformed answer")
	errForeign   = errors.New("answers to other questions only")
	errFolded    = errors.New("the question came back in other letters")
)

// serverSet is one state of the configuration. up is read-only.
type serverSet struct {
	up Upstreams

	mu     sync.Mutex // guards the rest
	next   int        // of the rotation
	failed map[netip.AddrPort]time.Time
	folds  map[netip.AddrPort]time.Time // when a server was found to fold case
}

func newServerSet(u Upstreams) *serverSet {
	return &serverSet{up: u, failed: make(map[netip.AddrPort]time.Time), folds: make(map[netip.AddrPort]time.Time)}
}

// order returns the servers in the order to ask them.
func (s *serverSet) order(now time.Time) []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.up.Servers)
	good := make([]netip.AddrPort, 0, n)
	var bad []netip.AddrPort
	for i := range n {
		server := s.up.Servers[(s.next+i)%n]
		if t, ok := s.failed[server]; ok && now.Sub(t) < failedFor {
			bad = append(bad, server)
		} else {
			good = append(good, server)
		}
	}
	if s.up.Rotate && n > 0 {
		s.next = (s.next + 1) % n
	}
	return append(good, bad...)
}

func (s *serverSet) note(server netip.AddrPort, failed bool, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if failed {
		s.failed[server] = now // only servers of up get here, which bounds the map
	} else {
		delete(s.failed, server)
	}
}

// inSmall reports whether server is asked in lower case.
func (s *serverSet) inSmall(server netip.AddrPort, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.folds[server]
	return ok && now.Sub(t) < foldedFor
}

// noteFolds makes inSmall true for server from now on.
func (s *serverSet) noteFolds(server netip.AddrPort, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.folds[server] = now // only servers of up get here, which bounds the map
}

// answer is a message for the client; release is called once it has been delivered.
type answer struct {
	msg     []byte
	became  policy.Outcome
	release func()
}

// forward asks upstream and returns the answer for the client; there always is one.
func (r *Resolver) forward(ctx context.Context, qy *query) answer {
	if qy.gated != nil {
		return r.forwardGated(qy)
	}
	ctx, cancel := context.WithTimeout(ctx, r.limits.QueryTime)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	a, err := r.ask(ctx, qy)
	if err != nil {
		r.stats.ServFail.Add(1)
		return answer{msg: qy.fail(qy.asked, rcodeServFail), became: policy.OutcomeFailed, release: func() {}}
	}
	r.stats.Forwarded.Add(1)
	put16(a.msg, 0, qy.id)
	// The client's own spelling, in case upstream folded its letters: a client that mixes case as a
	// nonce checks it.
	copy(a.msg[headerLen:qy.q.end], qy.asked[headerLen:])
	a.msg, a.became = r.fit(a.msg, qy), policy.OutcomeAnswered
	return a
}

func (r *Resolver) ask(ctx context.Context, qy *query) (answer, error) {
	var unwilling []byte // the first answer with an error code, if any
	refused := make(map[netip.AddrPort]bool)
	cause := errNoServer
	set := r.set.Load()
rounds:
	for round := 0; round < set.up.attempts(); round++ {
		for _, server := range set.order(time.Now()) {
			if refused[server] {
				continue
			}
			a, err := r.try(ctx, set, server, qy)
			if err == nil && qy.strict && noEDNS(a.msg) {
				a.release()
				a, err = r.try(ctx, set, server, qy.withoutEDNS())
			}
			if ctx.Err() != nil && err != nil { // the query's end is not the server's fault
				cause = ctx.Err()
				break rounds
			}
			set.note(server, err != nil, time.Now())
			if err != nil {
				r.stats.UpstreamFailures.Add(1)
				r.tellFailed(server, err)
				cause = err
				continue
			}
			switch code := rcode(be16(a.msg, 2) & maskRcode); code {
			case rcodeFormErr, rcodeServFail, rcodeNotImp, rcodeRefused:
				// Release its token at once: waiting for another token while holding one could
				// deadlock.
				a.release()
				refused[server] = true
				if unwilling == nil && len(a.msg) <= udpBuffer {
					unwilling = a.msg
				} else if unwilling == nil {
					unwilling = qy.fail(qy.asked, code)
				}
			default:
				return a, nil
			}
		}
		if set = r.set.Load(); qy.strict {
			qy = qy.withoutEDNS() // some servers drop queries that they do not understand
		}
	}
	if unwilling != nil {
		return answer{msg: unwilling, release: func() {}}, nil
	}
	return answer{}, cause
}

// tellFailed logs a server that keeps giving no answer. It is no warning: the sandbox gets the
// failure, and its command's standard error is not the place for it.
func (r *Resolver) tellFailed(server netip.AddrPort, err error) {
	if n, tell := r.failures.Note(repeatedly, time.Now()); tell {
		r.log.Info(fmt.Sprintf("DNS servers give no answer, %d tries within a minute, the last one at %v: %v", n, server, err))
	}
}

// try asks one server once. The answer is well formed and matches the question.
func (r *Resolver) try(ctx context.Context, set *serverSet, server netip.AddrPort, qy *query) (answer, error) {
	if r.dialer == nil {
		return answer{}, errNoServer
	}
	r.stats.UpstreamTries.Add(1)
	done := func() {}
	if !set.up.UseVC {
		if qy.strict && set.inSmall(server, time.Now()) {
			qy = qy.inSmall()
		}
		msg, whole, err := r.tryUDP(ctx, set.up.timeout(), server, qy)
		if errors.Is(err, errFolded) || errors.Is(err, errForeign) {
			a, tcpErr := r.tryTCP(ctx, set.up.timeout(), server, qy)
			if tcpErr == nil || !errors.Is(err, errFolded) || ctx.Err() != nil {
				return a, tcpErr
			}
			qy = qy.inSmall()
			if msg, whole, err = r.tryUDP(ctx, set.up.timeout(), server, qy); err == nil {
				set.noteFolds(server, time.Now())
				r.log.Warn(fmt.Sprintf("the DNS server %v returns questions in other letters than they were asked in, and does not answer over TCP: it is asked in small letters from now on, with one protection less against forged answers", server), "tcp", tcpErr)
			}
		}
		if err != nil {
			return answer{}, err
		}
		// A client that takes no more than fits a datagram everywhere would get a truncated answer
		// from TCP as well, only later.
		if whole || qy.limit <= ednsUDPSize {
			return answer{msg: msg, release: done}, nil
		}
		if a, err := r.tryTCP(ctx, set.up.timeout(), server, qy); err == nil {
			return a, nil
		}
		return answer{msg: msg, release: done}, nil // truncated, and says so
	}
	return r.tryTCP(ctx, set.up.timeout(), server, qy)
}

// dial opens a socket that ends with ctx or after timeout, whichever is first.
func (r *Resolver) dial(ctx context.Context, network string, timeout time.Duration, server netip.AddrPort) (net.Conn, func(), error) {
	deadline := time.Now().Add(timeout)
	dctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	c, err := r.dialer.Dial(dctx, network, server)
	if err != nil {
		return nil, nil, fmt.Errorf("dialling %s %v: %w", network, server, err)
	}
	if err := c.SetDeadline(deadline); err != nil {
		c.Close()
		return nil, nil, fmt.Errorf("setting a deadline: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	return c, func() { stop(); c.Close() }, nil
}

// newID puts a fresh ID into the query.
func (qy *query) newID() {
	rand.Read(qy.msg[:2]) // never fails: crypto/rand
}

// tryUDP returns an answer, and whether it is whole.
func (r *Resolver) tryUDP(ctx context.Context, timeout time.Duration, server netip.AddrPort, qy *query) (msg []byte, whole bool, err error) {
	c, done, err := r.dial(ctx, "udp", timeout, server)
	if err != nil {
		return nil, false, err
	}
	defer done()
	qy.newID()
	if _, err := c.Write(qy.msg); err != nil {
		return nil, false, fmt.Errorf("asking %v: %w", server, err)
	}
	// One byte more than wanted reveals a datagram that was cut short.
	buf := make([]byte, min(max(qy.limit, ednsUDPSize), udpBuffer)+1)
	for range maxIgnored {
		n, err := c.Read(buf)
		if err != nil {
			return nil, false, fmt.Errorf("waiting for %v: %w", server, err)
		}
		if !answers(buf[:n], qy) {
			r.stats.UpstreamIgnored.Add(1)
			continue
		}
		if qy.strict && !repeats(buf[:n], qy) {
			r.stats.UpstreamFolded.Add(1)
			return nil, false, fmt.Errorf("%v: %w", server, errFolded)
		}
		cut := n == len(buf) || be16(buf, 2)&bitTC != 0
		msg, ok := tidy(buf[:n], qy, cut)
		if !ok {
			return nil, false, fmt.Errorf("%v: %w", server, errMalformed)
		}
		return msg, !cut, nil
	}
	return nil, false, fmt.Errorf("%v: %w", server, errForeign)
}

// tryTCP holds a token of r.large from before the answer is read until it is delivered, which
// bounds the memory in large answers whatever clients do.
func (r *Resolver) tryTCP(ctx context.Context, timeout time.Duration, server netip.AddrPort, qy *query) (answer, error) {
	select {
	case r.large <- struct{}{}:
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
	release := sync.OnceFunc(func() { <-r.large })
	r.stats.UpstreamTCP.Add(1)
	msg, err := r.overTCP(ctx, timeout, server, qy)
	if err != nil {
		release()
		return answer{}, err
	}
	return answer{msg: msg, release: release}, nil
}

func (r *Resolver) overTCP(ctx context.Context, timeout time.Duration, server netip.AddrPort, qy *query) ([]byte, error) {
	c, done, err := r.dial(ctx, "tcp", timeout, server)
	if err != nil {
		return nil, err
	}
	defer done()
	qy.newID()
	if _, err := c.Write(prefixed(qy.msg)); err != nil {
		return nil, fmt.Errorf("asking %v: %w", server, err)
	}
	var prefix [2]byte
	if _, err := io.ReadFull(c, prefix[:]); err != nil {
		return nil, fmt.Errorf("waiting for %v: %w", server, err)
	}
	msg := make([]byte, be16(prefix[:], 0))
	if _, err := io.ReadFull(c, msg); err != nil {
		return nil, fmt.Errorf("reading from %v: %w", server, err)
	}
	if !answers(msg, qy) {
		return nil, fmt.Errorf("%v: %w", server, errForeign)
	}
	msg, ok := tidy(msg, qy, false)
	if !ok {
		return nil, fmt.Errorf("%v: %w", server, errMalformed)
	}
	return msg, nil
}

// prefixed returns msg with its length in front, as a stream carries it, in one piece (RFC 7766
// section 8).
func prefixed(msg []byte) []byte {
	out := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg)))
	return append(out, msg...)
}

// answers reports whether msg is a response to qy as it was last sent. An old
// server's error may come without the question (RFC 8906 section 3.1.4).
func answers(msg []byte, qy *query) bool {
	if len(msg) < headerLen || be16(msg, 0) != be16(qy.msg, 0) {
		return false
	}
	bits := be16(msg, 2)
	if bits&bitQR == 0 || bits&maskOpcode != 0 {
		return false
	}
	switch be16(msg, 4) {
	case 0:
		return len(msg) == headerLen && rcode(bits&maskRcode) != rcodeSuccess
	case 1:
		return sameQuestion(msg, qy.msg, qy.q.end)
	}
	return false
}

// repeats reports whether the answer's question has qy's letters in exactly the same case. A server
// that folds them may be honest, but only TCP can tell it from a forger.
func repeats(msg []byte, qy *query) bool {
	return be16(msg, 4) == 0 || string(msg[headerLen:qy.q.end]) == string(qy.msg[headerLen:qy.q.end])
}

// noEDNS reports whether an answer comes from a server without EDNS (RFC 6891 section 7).
func noEDNS(msg []byte) bool {
	code := rcode(be16(msg, 2) & maskRcode)
	return code == rcodeFormErr || code == rcodeNotImp
}

// withoutEDNS returns a question of our own without its OPT record.
func (qy *query) withoutEDNS() *query {
	plain := *qy
	plain.msg = slices.Clone(qy.asked)
	return &plain
}

// inSmall returns qy in lower case, which takes an answer in any case.
func (qy *query) inSmall() *query {
	small := *qy
	small.msg, small.strict = slices.Clone(qy.msg), false
	copy(small.msg[headerLen:], qy.q.name)
	return &small
}

// tidy returns an answer that is well formed to its last byte: bytes after the last record are
// dropped. If the answer was cut within a record (some servers do that), only the question is kept,
// with TC set.
func tidy(msg []byte, qy *query, cut bool) ([]byte, bool) {
	if be16(msg, 4) == 0 {
		return qy.fail(qy.msg, rcode(be16(msg, 2)&maskRcode)), true
	}
	opts := 0
	end, ok := walk(msg, qy.q.end, func(rec record) bool {
		if rec.rtype == typeOPT {
			opts++
		}
		return opts <= 1
	})
	if ok {
		return msg[:end], true
	}
	if !cut {
		return nil, false
	}
	out := msg[:qy.q.end]
	clear(out[6:headerLen])
	put16(out, 2, be16(out, 2)|bitTC)
	if qy.edns {
		out = appendOPT(out, rcodeSuccess, qy.do)
	}
	return out, true
}
