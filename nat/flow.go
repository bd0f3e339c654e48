package nat

import "time"

// Flow is a snapshot of a lease, for lists, logs and events.
type Flow struct {
	ID          uint64
	State       State
	Orig, Reply Tuple // Reply: the packets that arrive at the host's socket

	OrigPackets, OrigBytes   int64
	ReplyPackets, ReplyBytes int64

	SeenReply bool // without it conntrack(8) prints [UNREPLIED]
	Assured   bool

	TimeoutLeft time.Duration // 0 for a flow that timed out
	Start       time.Time
	LastSeen    time.Time
	End         time.Time // zero while it lives

	Ingress bool
	Rule    string
	Names   []string
	About   any    // Spec.About
	Reason  Reason // why it ended; empty while it lives
}

// at converts the table's time to wall-clock time.
func (t *Table) at(ns int64) time.Time { return t.epoch.Add(time.Duration(ns)) }

// snapshot returns the Flow of l, whose mu is held.
func (l *Lease) snapshot() Flow {
	t := l.table
	now := t.clock()
	s := l.load()
	if s&dead != 0 {
		now = l.ended
	}
	seen := min(l.seen.Load(), now) // the cached clock may be ahead
	f := Flow{
		ID: l.id, State: s.state(), Orig: l.spec.Orig, Reply: l.reply,
		OrigPackets: l.count[Original].packets.Load(), OrigBytes: l.count[Original].bytes.Load(),
		ReplyPackets: l.count[Reply].packets.Load(), ReplyBytes: l.count[Reply].bytes.Load(),
		SeenReply: s&seenReply != 0, Assured: s&assured != 0,
		TimeoutLeft: time.Duration(max(0, l.ends(s.state(), seen, min(l.sent.Load(), now))-now)),
		Start:       t.at(l.began), LastSeen: t.at(seen),
		Ingress: l.spec.Ingress, Rule: l.spec.Rule, Names: l.spec.Names, About: l.spec.About, Reason: l.reason,
	}
	if s&dead != 0 {
		f.End = t.at(now)
	}
	return f
}
