package nat

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"
)

// Flow is a lease as it stood at one time: what is listed, logged and told.
type Flow struct {
	ID          uint64
	State       State
	Orig, Reply Tuple // Reply: as the far side's packets come to the host's socket

	OrigPackets, OrigBytes   int64
	ReplyPackets, ReplyBytes int64

	SeenReply bool // without it conntrack(8) prints [UNREPLIED]
	Assured   bool

	TimeoutLeft time.Duration // 0 of a flow that timed out
	Start       time.Time
	LastSeen    time.Time
	End         time.Time // zero while it lives

	Ingress bool
	Rule    string
	Names   []string
	About   any    // of the owner's
	Reason  string // why it ended; empty while it lives
}

// at turns the table's time into the world's.
func (t *Table) at(ns int64) time.Time { return t.epoch.Add(time.Duration(ns)) }

// snapshot makes the Flow of l, whose mu is held.
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

// flowJSON is Flow's shape as JSON: `sluice flows -o json` and the flow log.
type flowJSON struct {
	ID       uint64     `json:"id"`
	Protocol string     `json:"protocol"` // tcp, udp, icmp, icmpv6, else the number
	State    string     `json:"state"`
	Original halfJSON   `json:"original"`
	Reply    halfJSON   `json:"reply"`
	Replied  bool       `json:"replied"`
	Assured  bool       `json:"assured"`
	Timeout  float64    `json:"timeout"` // seconds left
	Start    time.Time  `json:"start"`
	LastSeen time.Time  `json:"lastSeen"`
	End      *time.Time `json:"end,omitempty"`
	Duration float64    `json:"duration"` // seconds, to the end or the last packet
	Ingress  bool       `json:"ingress,omitempty"`
	Rule     string     `json:"rule,omitempty"`
	Names    []string   `json:"names,omitempty"`
	Reason   string     `json:"reason,omitempty"`
}

// halfJSON is one direction. Ports for TCP and UDP; type, code and id for ICMP.
type halfJSON struct {
	Src     netip.Addr `json:"src"`
	Dst     netip.Addr `json:"dst"`
	Sport   *uint16    `json:"sport,omitempty"`
	Dport   *uint16    `json:"dport,omitempty"`
	Type    *uint8     `json:"type,omitempty"`
	Code    *uint8     `json:"code,omitempty"`
	ICMPID  *uint16    `json:"icmpId,omitempty"`
	Packets int64      `json:"packets"`
	Bytes   int64      `json:"bytes"`
}

func newHalf(t Tuple, packets, bytes int64) halfJSON {
	h := halfJSON{Src: t.addr(t.src), Dst: t.addr(t.dst), Packets: packets, Bytes: bytes}
	if t.isICMP() {
		typ, code := uint8(t.dport>>8), uint8(t.dport)
		h.Type, h.Code, h.ICMPID = &typ, &code, &t.sport
	} else {
		h.Sport, h.Dport = &t.sport, &t.dport
	}
	return h
}

func (h halfJSON) valid() bool { return h.Src.IsValid() && h.Dst.IsValid() }

func (h halfJSON) tuple(proto uint8) Tuple {
	sport, dport := h.Sport, h.Dport
	if h.ICMPID != nil && h.Type != nil && h.Code != nil {
		port := uint16(*h.Type)<<8 | uint16(*h.Code)
		sport, dport = h.ICMPID, &port
	}
	if sport == nil || dport == nil {
		sport, dport = new(uint16), new(uint16)
	}
	return NewTuple(proto, netip.AddrPortFrom(h.Src, *sport), netip.AddrPortFrom(h.Dst, *dport))
}

// MarshalJSON gives the flow with conntrack's words; times are RFC 3339, timeout
// and duration are seconds.
func (f Flow) MarshalJSON() ([]byte, error) {
	j := flowJSON{
		ID: f.ID, Protocol: protoJSON(f.Orig.proto), State: f.State.String(),
		Original: newHalf(f.Orig, f.OrigPackets, f.OrigBytes), Reply: newHalf(f.Reply, f.ReplyPackets, f.ReplyBytes),
		Replied: f.SeenReply, Assured: f.Assured, Timeout: f.TimeoutLeft.Seconds(),
		Start: f.Start, LastSeen: f.LastSeen, Duration: f.LastSeen.Sub(f.Start).Seconds(),
		Ingress: f.Ingress, Rule: f.Rule, Names: f.Names, Reason: f.Reason,
	}
	if !f.End.IsZero() {
		j.End, j.Duration = &f.End, f.End.Sub(f.Start).Seconds()
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads what MarshalJSON wrote: a client's side of the control API.
func (f *Flow) UnmarshalJSON(data []byte) error {
	var j flowJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return fmt.Errorf("reading a flow: %w", err)
	}
	proto, ok := parseProto(j.Protocol)
	if !ok {
		return fmt.Errorf("reading a flow: unknown protocol %q", j.Protocol)
	}
	state, ok := parseState(j.State)
	if !ok {
		return fmt.Errorf("reading a flow: unknown state %q", j.State)
	}
	if !j.Original.valid() || !j.Reply.valid() {
		return fmt.Errorf("reading a flow: an address is missing")
	}
	*f = Flow{
		ID: j.ID, State: state, Orig: j.Original.tuple(proto), Reply: j.Reply.tuple(proto),
		OrigPackets: j.Original.Packets, OrigBytes: j.Original.Bytes,
		ReplyPackets: j.Reply.Packets, ReplyBytes: j.Reply.Bytes,
		SeenReply: j.Replied, Assured: j.Assured, TimeoutLeft: time.Duration(j.Timeout * float64(time.Second)),
		Start: j.Start, LastSeen: j.LastSeen,
		Ingress: j.Ingress, Rule: j.Rule, Names: j.Names, Reason: j.Reason,
	}
	if j.End != nil {
		f.End = *j.End
	}
	return nil
}

// protoJSON is the protocol's name, or its number where it has none here.
func protoJSON(p uint8) string {
	if n := protoName(p); n != "unknown" {
		return n
	}
	return fmt.Sprint(p)
}

func parseProto(name string) (uint8, bool) {
	for _, p := range []uint8{protoICMP, protoTCP, protoUDP, protoICMPv6} {
		if protoName(p) == name {
			return p, true
		}
	}
	var p uint8
	if _, err := fmt.Sscanf(name, "%d", &p); err != nil || fmt.Sprint(p) != name {
		return 0, false
	}
	return p, true
}
