package flowlog

import (
	"cmp"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/sandbox/api"
)

// DNS questions in the flow log. While the policy gates names, each leaves one record, with the
// answer or with the rule that refused it. Questions without an answer are in `flows --ended` too:
// the flow that carried such a question, if there was one, does not show it.

// Asked implements dns.Config.Tell.
func (l *FlowLog) Asked(e dns.Event) {
	if !l.Logged && e.Forwarded {
		return // there are too many cached ones to handle for nothing
	}
	now := l.Now()
	l.put(FlowEnd{question: &e, Flow: nat.Flow{Start: now, End: now}})
}

const DNSPort = 53

// questionRecord describes a question the way Hubble describes what its DNS proxy sees. The
// destination is the sandbox's resolver, or for a pod the one that is asked, whatever address the
// question was sent to. If there is none of the family, it is unspecified.
func (l *FlowLog) questionRecord(e *dns.Event, at time.Time) api.FlowRecord {
	r := api.FlowRecord{
		Time: at, Start: at, Type: api.TypeL7, TrafficDirection: api.Egress,
		Verdict: api.VerdictForwarded, Rule: e.Rule, Reason: e.Reason,
		L7: &api.L7{Type: "RESPONSE", DNS: &api.L7DNS{
			Query: e.Name + ".", TTL: uint32(e.TTL / time.Second), Source: "proxy", RCode: uint32(e.Code), QTypes: []string{e.Type},
		}},
	}
	if l.Policy != nil {
		r.Policy = l.Policy()
	}
	proto := uint8(unix.IPPROTO_UDP)
	if e.Stream {
		proto = unix.IPPROTO_TCP
	}
	to := netip.IPv6Unspecified()
	if e.From.Addr().Is4() {
		to = netip.IPv4Unspecified()
	}
	for _, a := range l.Resolvers {
		if a.Is4() == to.Is4() {
			to = a
			break
		}
	}
	r.IP, r.L4 = layers(nat.NewTuple(proto, e.From, netip.AddrPortFrom(to, DNSPort)))
	for _, a := range e.Addrs {
		r.L7.DNS.IPs = append(r.L7.DNS.IPs, a.String())
	}
	for _, n := range e.Names {
		r.L7.DNS.CNAMEs = append(r.L7.DNS.CNAMEs, n+".")
	}
	switch {
	case e.Failed:
		r.Verdict = api.VerdictError
	case !e.Forwarded:
		r.Verdict, r.DropReasonDesc, r.Rejected = api.VerdictDropped, api.PolicyDenied, e.Told
		if e.Bound() {
			r.DropReasonDesc = dropOf(e.Rate())
		}
		r.Reason = cmp.Or(r.Reason, string(nat.ReasonPolicy))
	case e.Audited:
		r.Verdict = api.VerdictAudit
	}
	return r
}
