package api

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/nat"
)

// Conntrack holds what conntrack shows of a flow in the table, beside its counters.
type Conntrack struct {
	Replied  bool      `json:"replied"` // without it, conntrack prints [UNREPLIED]
	Assured  bool      `json:"assured"`
	Timeout  float64   `json:"timeout_seconds"` // time left
	LastSeen time.Time `json:"last_seen"`       // time of its last packet
}

// Flow converts the record to a conntrack flow, to be printed as conntrack does.
func (r *FlowRecord) Flow() (nat.Flow, error) {
	f := nat.Flow{
		ID: r.ID, OrigPackets: int64(r.Orig.Packets), OrigBytes: int64(r.Orig.Bytes), ReplyPackets: int64(r.Reply.Packets), ReplyBytes: int64(r.Reply.Bytes),
		Start: r.Start, Ingress: r.TrafficDirection == Ingress, Rule: r.Rule, Names: r.DestinationNames, Reason: nat.Reason(r.Reason),
	}
	if !r.IP.Source.IsValid() || !r.IP.Destination.IsValid() || !r.ReplySource.IsValid() || !r.ReplyDestination.IsValid() {
		return f, errors.New("a flow without an address of its four")
	}
	var ok bool
	if f.State, ok = nat.ParseState(r.State); !ok {
		return f, fmt.Errorf("a flow in the unknown state %q", r.State)
	}
	proto, src, dst := r.L4.tuple()
	f.Orig = nat.NewTuple(proto, netip.AddrPortFrom(r.IP.Source, src), netip.AddrPortFrom(r.IP.Destination, dst))
	f.Reply = nat.NewTuple(proto, r.ReplySource, r.ReplyDestination)
	if c := r.Conntrack; c != nil {
		f.SeenReply, f.Assured, f.LastSeen = c.Replied, c.Assured, c.LastSeen
		f.TimeoutLeft = time.Duration(c.Timeout * float64(time.Second))
	}
	return f, nil
}

// tuple returns the protocol's number and the ports in the form of a nat.Tuple.
func (l L4) tuple() (proto uint8, src, dst uint16) {
	p := l.ports()
	switch {
	case l.TCP != nil:
		return unix.IPPROTO_TCP, p.Source, p.Destination
	case l.UDP != nil:
		return unix.IPPROTO_UDP, p.Source, p.Destination
	case l.SCTP != nil:
		return unix.IPPROTO_SCTP, p.Source, p.Destination
	case l.ICMPv4 != nil:
		return unix.IPPROTO_ICMP, l.ICMPv4.ID, uint16(l.ICMPv4.Type)<<8 | uint16(l.ICMPv4.Code)
	case l.ICMPv6 != nil:
		return unix.IPPROTO_ICMPV6, l.ICMPv6.ID, uint16(l.ICMPv6.Type)<<8 | uint16(l.ICMPv6.Code)
	}
	return l.Other, 0, 0
}
