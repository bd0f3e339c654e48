package policy

import (
	"fmt"
	"net/netip"
)

// Verdict is the outcome of one decision. Only this package can make one that
// allows, and the dialer takes nothing else, so no host socket can be opened to
// an address that was not judged. The zero value denies.
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

// Rule names what decided: a rule by place and name ("egress[2] pypi"),
// "default", a special address class ("special:metadata"), or "no-policy" when
// there are no rules in force.
func (v Verdict) Rule() string { return v.rule }

// Target is the one address that may be dialled: for egress the destination,
// or the host's loopback where the gateway stands for it; for ingress the
// sandbox's address. Invalid unless allowed. The port is 0 for protocols
// without ports.
func (v Verdict) Target() netip.AddrPort {
	if v.action != Allow {
		return netip.AddrPort{}
	}
	return v.target
}

// Contact is the one address that a TCP connection may be set up to: Target, or, where first
// bytes are to be read, what will be Target if they are allowed. Nothing is sent on the
// connection before a verdict Permits it. Invalid if the flow is refused whatever it says.
func (v Verdict) Contact() netip.AddrPort { return v.target }

// Proto is the IP protocol that was judged.
func (v Verdict) Proto() uint8 { return v.proto }

// Verify says what must be read before it can be decided; not VerifyNone only if
// not allowed. Connect to Contact, read it, fill in Query.Seen, and ask again: that verdict is final.
func (v Verdict) Verify() Verify { return v.verify }

// EachRequest reports whether every request of an HTTP flow must be judged, not
// just the first: by Decide with what it said.
func (v Verdict) EachRequest() bool { return v.requests }

// Name is the granted name by which a rule by domain matched; empty if it
// matched by address. To ask again about a flow that lives on, put it into
// Query.Held.
func (v Verdict) Name() string { return v.name }

// Audited reports whether the flow is allowed only because the policy is in
// audit mode; Rule and Reason say what would have refused it.
func (v Verdict) Audited() bool { return v.audited }

// Tried is the rule by domain that fitted the address and the port of a flow,
// but not what the first bytes said, and Reason says why it did not. Empty if
// there is no such rule.
func (v Verdict) Tried() string { return v.tried }

// Reason says why the rule that looked right did not let the flow pass.
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
