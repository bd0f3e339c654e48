package policy

import (
	"fmt"
	"net/netip"
)

// Verdict is the outcome of one decision. Only this package can make one that allows, and the
// dialer accepts nothing else, so no host socket can connect to an address that was not judged. The
// zero value denies.
//
// A Verdict is comparable: two are equal when they say the same thing about the
// same target.
type Verdict struct {
	target netip.AddrPort // unmapped; valid only if the flow is allowed, or may be once it is read
	rule   string
	name   string
	tried  string
	reason Reason
	proto  uint8
	action Action
	verify Verify

	audited, requests bool
}

// Allowed reports whether the flow may pass.
func (v Verdict) Allowed() bool { return v.action == Allow }

// Action is what to do with the flow.
func (v Verdict) Action() Action { return v.action }

// Rule names the rule that decided: a rule by index and name ("egress[2] pypi"), "default", a
// special address class ("special:metadata"), or "no-policy" when there are no rules in force.
func (v Verdict) Rule() string { return v.rule }

// Target is the one address that may be dialled: for egress the destination, or the host's loopback
// where the gateway stands for it; for ingress the sandbox's address. It is invalid unless the flow
// is allowed. The port is 0 for protocols without ports.
func (v Verdict) Target() netip.AddrPort {
	if v.action != Allow {
		return netip.AddrPort{}
	}
	return v.target
}

// Contact is the only address to which a TCP connection may be established: Target or, if first
// bytes must be read, what will be Target if they are allowed. Nothing is sent on the connection
// until a verdict Permits it. It is invalid if the flow is refused whatever it says.
func (v Verdict) Contact() netip.AddrPort { return v.target }

// Proto is the IP protocol that was judged.
func (v Verdict) Proto() uint8 { return v.proto }

// Verify is what must be read before the flow can be decided. It is other than VerifyNone only if
// the flow is not allowed yet. The caller connects to Contact, reads, fills in Query.Seen and asks
// again: that verdict is final.
func (v Verdict) Verify() Verify { return v.verify }

// EachRequest reports whether Decide must judge every request of an HTTP flow, not just the first.
func (v Verdict) EachRequest() bool { return v.requests }

// Name is the granted name by which a rule by domain matched; empty if it matched by address. To
// judge a living flow again, put it into Query.Held.
func (v Verdict) Name() string { return v.name }

// Audited reports whether the flow is allowed only because the policy is in
// audit mode; Rule and Reason say what would have refused it.
func (v Verdict) Audited() bool { return v.audited }

// Tried is the rule by domain that matched a flow's address and port but not its first bytes;
// Reason says why. It is empty if there is no such rule.
func (v Verdict) Tried() string { return v.tried }

// Reason is why the rule that looked right did not let the flow pass.
func (v Verdict) Reason() Reason { return v.reason }

// Permits reports whether a is the target: the last check before anything is sent.
func (v Verdict) Permits(a netip.AddrPort) bool {
	return v.action == Allow && v.verify == VerifyNone && a.IsValid() && a.Addr().Zone() == "" && netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) == v.target
}

// PermitsContact reports whether a is the Contact: the last check before connect.
func (v Verdict) PermitsContact(a netip.AddrPort) bool {
	return a.IsValid() && a.Addr().Zone() == "" && netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) == v.target
}

func (v Verdict) String() string {
	if v.verify != VerifyNone {
		return fmt.Sprintf("read %v %v for %s", v.verify, Protocol(v.proto), v.tried)
	}
	if v.action == Allow {
		return fmt.Sprintf("allow %v to %v by %s", Protocol(v.proto), v.target, v.rule)
	}
	return fmt.Sprintf("%v %v by %s", v.action, Protocol(v.proto), v.rule)
}
