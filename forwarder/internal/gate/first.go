package gate

// A client's first bytes, which are awaited until they say what it wants. They are peeked at, from
// the front each time: bytes that were let pass are still queued when the gate begins.

import (
	"errors"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// seenOf converts a whole, well-formed reading to policy's type.
func seenOf(s sniff.Seen) policy.Seen { return firstbytes.SeenOf(s) }

// First judges a client's first bytes before any of them passes. up.mu is held.
type First struct {
	shared   *Shared
	need     int            // bytes that it needs to see
	greeting sniff.Greeting // answers to an HTTP/2 client
}

// NewFirst returns the First of a connection on which nothing has been heard yet.
func (s *Shared) NewFirst() First { return First{shared: s, need: 1} }

// Greeted reports whether an HTTP/2 client was answered in the server's place. Such a connection is
// set up, to the client, and may be idle for as long as its two sides let it.
func (f *First) Greeted() bool { return f.greeting.Settings() > 0 }

// Look is the result of a look at the first bytes. Without End and Decide, more bytes are awaited.
type Look struct {
	Say    []byte      // to be sent to the client at once, in the server's place
	SetUp  bool        // Say greets the client
	End    *Ending     // the client asks for nothing
	Decide bool        // the connection is to be judged by Seen
	Seen   policy.Seen // zero without Decide

	said   sniff.Seen
	unread error // why they could not be read
}

// Read looks at the queued bytes. last says that no more are awaited, ended that the client sends
// no more, and left that the far side has closed.
func (f *First) Read(flow Flow, last, ended, left bool) (at Look, gone nat.Reason) {
	queued, gone := flow.Queued()
	if gone != "" {
		return at, gone
	}
	greeted := f.Greeted()
	last = last || ended
	if queued < f.need && !last && !(left && greeted) {
		return at, ""
	}
	buf := looks.Get().(*look)
	defer looks.Put(buf)
	n, gone := flow.Peek(buf[:])
	switch {
	case gone != "":
		return at, gone
	case n == 0 && ended:
		at.End = new(Ending) // it closed without having sent anything
		return at, ""
	}
	said, need, err := sniff.Stream(buf[:n])
	cut := err == nil && need > 0
	if cut && (!last || greeted) {
		f.need = need
		return f.greet(buf[:n], last, ended, left), ""
	}
	return f.decide(firstSeen(said, n, cut, err), said, err), ""
}

// greet answers the frames of an HTTP/2 client that has not asked for anything yet. The client gets
// a GOAWAY when the far side leaves, or when there is no more room for it.
func (f *First) greet(p []byte, last, ended, left bool) (at Look) {
	before := f.Greeted()
	say, err := f.greeting.Hear(p)
	if err != nil {
		at = f.decide(policy.Seen{Kind: policy.SeenOpaque}, sniff.Seen{Kind: sniff.HTTP2}, err)
		at.Say = say
		return at
	}
	at.Say, at.SetUp = say, !before && f.Greeted()
	switch {
	case ended && !at.SetUp:
		at.End = new(Ending) // it closed without having asked for anything
	case f.Greeted() && (last || left):
		at.End = &Ending{Answer: string(firstbytes.GoAway(0, firstbytes.NoErrorCode, ""))}
	}
	return at
}

func (f *First) decide(seen policy.Seen, said sniff.Seen, unread error) Look {
	if unread != nil {
		f.shared.malformed.Add(1)
	}
	return Look{Decide: true, Seen: seen, said: said, unread: unread}
}

// Refuse records that v refuses the first bytes. It returns the answer for a client that
// understands one, or nil if the connection ends by a reset.
func (f *First) Refuse(flow Flow, v policy.Verdict, at *Look) *Ending {
	f.shared.refusedFirst.Add(1)
	q := flow.Question()
	q.Seen = at.Seen
	f.shared.noteRefused(&q, v, "")
	name := f.shared.policyName()
	e := &Ending{Why: nat.ReasonRefusedByPolicy}
	switch {
	case at.unread != nil && at.said.Kind == sniff.HTTP2:
		r := firstbytes.RefusedStream{Broken: at.unread}
		e.Answer = r.Answer(name, f.Greeted())
	case at.unread != nil && at.said.Kind == sniff.HTTP:
		e.Answer = firstbytes.BadRequest(at.unread)
	case at.Seen.Kind == policy.SeenHTTP:
		e.Answer = firstbytes.Forbidden(v, name)
	case at.Seen.Kind == policy.SeenHTTP2:
		r := firstbytes.RefusedStream{Verdict: v, ID: at.said.Stream, Grpc: at.said.GRPC, Head: at.said.Method == "HEAD"}
		e.Answer = r.Answer(name, f.Greeted())
	default:
		return nil
	}
	return e
}

// Gate returns the gate for the bytes after the first ones on a connection that v let in, or nil if
// none of them matters.
func (f *First) Gate(flow Flow, v policy.Verdict, seen policy.Seen) Gate {
	of := of{flow, f.shared}
	switch {
	case v.EachRequest() && seen.Kind == policy.SeenHTTP:
		return &requestGate{of: of}
	case seen.Kind == policy.SeenTLS && (seen.Name != "" || seen.Nameless):
		return &helloGate{of: of, seen: seen}
	case v.EachRequest(), f.Greeted():
		return newStreamGate(of, &f.greeting, v.EachRequest())
	}
	return nil
}

// firstSeen converts sniff.Stream's reading of the first n bytes to policy's type, when no more are
// awaited. cut says that sniff.Stream wanted more.
func firstSeen(said sniff.Seen, n int, cut bool, err error) policy.Seen {
	seen := seenOf(said)
	switch {
	case n == 0:
		seen = policy.Seen{Kind: policy.SeenServerFirst}
	case cut:
		seen.Flaw = policy.ReasonIncomplete
	case err != nil:
		// It may have carried a name, and another one besides.
		if seen = (policy.Seen{Kind: seen.Kind}); seen.Kind == policy.SeenHTTP || seen.Kind == policy.SeenHTTP2 {
			seen.Kind = policy.SeenOpaque
		}
		seen.Flaw = flawOf(err)
	}
	return seen
}

// flawOf returns why the first bytes could not be read.
func flawOf(err error) policy.Reason {
	if errors.Is(err, sniff.ErrTooLong) {
		return policy.ReasonTooLong
	}
	return policy.ReasonMalformed
}
