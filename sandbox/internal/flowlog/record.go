package flowlog

import (
	"cmp"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
)

// record describes a flow that ended or was refused.
func (l *FlowLog) record(e FlowEnd) api.FlowRecord {
	f := &e.Flow
	about, _ := f.About.(forwarder.About)
	r := api.FlowRecord{
		Time: f.End, Start: f.Start, Duration: f.End.Sub(f.Start).Seconds(), Type: api.TypeFlow,
		ID: f.ID, TrafficDirection: api.Egress, Verdict: api.VerdictForwarded,
		Rule: f.Rule, Reason: string(f.Reason), DestinationNames: f.Names,
		Orig:  api.Counter{Packets: uint64(f.OrigPackets), Bytes: uint64(f.OrigBytes)},
		Reply: api.Counter{Packets: uint64(f.ReplyPackets), Bytes: uint64(f.ReplyBytes)},
		Bytes: uint64(f.OrigBytes + f.ReplyBytes),
	}
	r.IP, r.L4 = layers(f.Orig)
	if l.Policy != nil {
		r.Policy = l.Policy()
	}
	if f.Ingress {
		r.TrafficDirection = api.Ingress
	} else if len(r.DestinationNames) == 0 && l.Names != nil {
		r.DestinationNames = l.Names(r.IP.Destination)
	}
	if f.ID != 0 && !e.refused() {
		r.State = f.State.String()
		r.ReplySource, r.ReplyDestination = f.Reply.Src(), f.Reply.Dst()
	}
	r.Verdict, r.DropReasonDesc = e.outcome(&about)
	r.Rejected = e.told
	v := about.Verdict
	if e.fate != passed || v.Audited() {
		r.Tried = v.Tried()
	}
	if e.refused() && v.Verify() == policy.VerifyNone {
		r.Reason = cmp.Or(string(e.because), string(v.Reason()), r.Reason)
	}
	switch about.Questions { // this outcome, not that the questions had an answer
	case policy.OutcomeRefused:
		r.Reason, r.Rejected = string(nat.ReasonPolicy), f.ReplyPackets > 0
	case policy.OutcomeFailed:
		r.Reason = string(nat.ReasonNoUpstream)
	}
	switch s := &about.Seen; s.Kind {
	case policy.SeenTLS, policy.SeenQUIC:
		r.SNI, r.ECH = s.Name, s.ECH
	case policy.SeenHTTP, policy.SeenHTTP2:
		r.Type = api.TypeL7
		r.L7 = &api.L7{Type: "REQUEST", HTTP: &api.L7HTTP{Method: s.Method, URL: "http://" + s.Name + s.Path}}
	}
	return r
}

// fate is policy's decision on a flow.
type fate uint8

const (
	passed    fate = iota
	undecided      // its first bytes decide, or were to decide
	refused
)

// fateOf returns the fate of a flow in the table.
func fateOf(f *nat.Flow) fate {
	about, ok := f.About.(forwarder.About)
	switch {
	case !ok || about.Verdict.Allowed() || about.Verdict.Rule() == "":
		return passed
	case about.Verdict.Verify() != policy.VerifyNone && f.Reason != nat.ReasonPolicy:
		return undecided
	}
	return refused
}

// refused reports whether policy refused the flow, or a request on it.
func (e *FlowEnd) refused() bool { return e.fate == refused && !e.Flow.Reason.Refuses() }

// outcome returns a flow's verdict and the reason of a drop, if any, in Hubble's words.
func (e *FlowEnd) outcome(about *forwarder.About) (verdict, drop string) {
	reason := e.Flow.Reason
	switch {
	case reason.Refuses():
		return api.VerdictDropped, dropOf(reason.Rate())
	case e.fate == refused, about.Questions == policy.OutcomeRefused:
		return api.VerdictDropped, api.PolicyDenied
	case reason.Shortage(), about.Questions == policy.OutcomeFailed:
		return api.VerdictError, ""
	case e.fate == undecided:
		return api.VerdictUnknown, ""
	case about.Verdict.Audited():
		return api.VerdictAudit, ""
	}
	return api.VerdictForwarded, ""
}

// dropOf returns Hubble's name for a refusal by a bound.
func dropOf(rate bool) string {
	if rate {
		return api.RateLimited
	}
	return api.NoRoom
}

// LiveRecord describes a flow in the table as it is at a given time. Any goroutine may call it.
func (l *FlowLog) LiveRecord(f nat.Flow, at time.Time) api.FlowRecord {
	e := FlowEnd{Flow: f, fate: fateOf(&f)}
	if over := !f.End.IsZero(); !over {
		e.Flow.End = at
	}
	r := l.record(e)
	r.State, r.ReplySource, r.ReplyDestination = f.State.String(), f.Reply.Src(), f.Reply.Dst()
	r.Conntrack = &api.Conntrack{Replied: f.SeenReply, Assured: f.Assured, Timeout: f.TimeoutLeft.Seconds(), LastSeen: f.LastSeen}
	return r
}

// layers converts a tuple to the fields of a record.
func layers(t nat.Tuple) (api.IP, api.L4) {
	src, dst := t.Src(), t.Dst()
	ip := api.IP{Source: src.Addr(), Destination: dst.Addr(), Version: "IPv6"}
	if dst.Addr().Is4() {
		ip.Version = "IPv4"
	}
	var l4 api.L4
	ports := &api.Ports{Source: src.Port(), Destination: dst.Port()}
	icmp := &api.ICMP{Type: uint8(dst.Port() >> 8), Code: uint8(dst.Port()), ID: src.Port()}
	switch t.Proto() {
	case unix.IPPROTO_TCP:
		l4.TCP = ports
	case unix.IPPROTO_UDP:
		l4.UDP = ports
	case unix.IPPROTO_SCTP:
		l4.SCTP = ports
	case unix.IPPROTO_ICMP:
		l4.ICMPv4 = icmp
	case unix.IPPROTO_ICMPV6:
		l4.ICMPv6 = icmp
	default:
		l4.Other = t.Proto()
	}
	return ip, l4
}
