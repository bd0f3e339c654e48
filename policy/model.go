package policy

import (
	"fmt"
	"net/netip"
)

// The only version and kind that this package reads.
const (
	APIVersion = "sluice.dev/v1alpha1"
	Kind       = "SandboxPolicy"
)

// Policy is a SandboxPolicy as its author wrote it. It is plain data: code can build it and compare
// it field by field, and YAML and encoding/json print it in a form that Parse reads back to the
// same value.
type Policy struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   Metadata `json:"metadata"`
	Spec       Spec     `json:"spec"`
}

// Metadata names a policy.
type Metadata struct {
	Name string `json:"name"`
}

// Spec is what a policy says. In each direction the first rule that matches
// decides; where none does, DefaultAction does.
type Spec struct {
	Mode          Mode   `json:"mode,omitempty"`
	DefaultAction Action `json:"defaultAction"`
	Egress        []Rule `json:"egress,omitempty"`
	Ingress       []Rule `json:"ingress,omitzero"`
	DNS           DNS    `json:"dns,omitzero"`
	Limits        Limits `json:"limits,omitzero"`
}

// Mode is whether a policy is enforced.
type Mode string

const (
	Enforce Mode = "enforce"
	Audit   Mode = "audit" // admit and report flows that would be refused; special addresses stay closed
)

var modes = []Mode{Enforce, Audit}

// Rule is one ordered rule. It matches a flow whose far end is one of the peers
// (To in egress, From in ingress; none listed: every address) and whose protocol
// and port, or ICMP type, is listed in Ports or ICMP (both empty: everything).
type Rule struct {
	Name   string `json:"name,omitempty"`
	Action Action `json:"action"`
	To     []Peer `json:"to,omitempty"`
	From   []Peer `json:"from,omitempty"`
	Ports  []Port `json:"ports,omitempty"`
	ICMP   []ICMP `json:"icmp,omitempty"`

	// How a peer by domain matches, in egress; the empty value is the default.
	Verify           VerifyRule `json:"verify,omitempty"`
	MissingName      Setting    `json:"missingName,omitempty"`      // flows that say no name although they could (Seen.Nameless)
	ECH              Setting    `json:"ech,omitempty"`              // hellos that carry an encrypted one
	QUIC             Setting    `json:"quic,omitempty"`             // UDP, for allow rules
	PrivateAddresses Setting    `json:"privateAddresses,omitempty"` // names that resolve to entity private

	// The clear-text HTTP requests that an allow rule lets through, in egress. The rule refuses
	// everything else that reaches it.
	HTTP []HTTPMatch `json:"http,omitempty"`

	Limits RuleLimits `json:"limits,omitzero"`
}

// VerifyRule is what a rule by domain must read before it matches.
type VerifyRule string

const (
	VerifyRuleDefault VerifyRule = ""       // strict, except for protocols that carry no name (domains.go)
	VerifyRuleStrict  VerifyRule = "strict" // the name, in the first bytes
	VerifyRuleGrant   VerifyRule = "grant"  // nothing: address and port are enough
)

var verifyRules = []VerifyRule{VerifyRuleStrict, VerifyRuleGrant}

// Setting is one of two words; empty is the field's default.
type Setting string

const (
	SettingAllow  Setting = "allow"
	SettingRefuse Setting = "refuse"
)

var settings = []Setting{SettingRefuse, SettingAllow}

// Peer is a set of addresses: a CIDR less its exceptions, an entity or, in egress, the addresses
// granted under names that a domain pattern matches. "x" matches x itself, "*.x" one label before
// it, "**.x" one or more.
type Peer struct {
	Domain string         `json:"domain,omitempty"`
	CIDR   netip.Prefix   `json:"cidr,omitzero"`
	Except []netip.Prefix `json:"except,omitempty"`
	Entity Entity         `json:"entity,omitempty"`
}

// Port is a protocol with, for TCP, UDP and SCTP, a destination port or an
// inclusive range of them. Port 0 stands for every port.
type Port struct {
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port,omitempty"`
	EndPort  uint16   `json:"endPort,omitempty"`
}

// ICMP matches ICMP messages of one family; a nil Type or Code matches all.
type ICMP struct {
	Family Family `json:"family"`
	Type   *uint8 `json:"type,omitempty"`
	Code   *uint8 `json:"code,omitempty"`
}

// Action is what happens to a flow. The zero value denies.
type Action uint8

const (
	Drop   Action = iota // refuse in silence: the sandbox sees a timeout
	Reject               // refuse at once: RST or ICMP administratively prohibited
	Allow
)

var actionNames = []string{Drop: "drop", Reject: "reject", Allow: "allow"}

func (a Action) String() string {
	if int(a) < len(actionNames) {
		return actionNames[a]
	}
	return fmt.Sprintf("action(%d)", uint8(a))
}

// MarshalText returns the word used in policy files.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Protocol is an IP protocol number that a rule can name.
type Protocol uint8

const (
	ICMPv4 Protocol = 1
	TCP    Protocol = 6
	UDP    Protocol = 17
	ICMPv6 Protocol = 58
	SCTP   Protocol = 132
)

type protocolName struct {
	name string
	num  Protocol
}

var protocols = []protocolName{{"TCP", TCP}, {"UDP", UDP}, {"SCTP", SCTP}, {"ICMP", ICMPv4}, {"ICMPv6", ICMPv6}}

func (p Protocol) String() string {
	for _, k := range protocols {
		if k.num == p {
			return k.name
		}
	}
	return fmt.Sprintf("protocol(%d)", uint8(p))
}

// MarshalText returns the word used in policy files.
func (p Protocol) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

func (p Protocol) hasPorts() bool { return p == TCP || p == UDP || p == SCTP }

// Family is an address family as Kubernetes spells it.
type Family string

const (
	IPv4 Family = "IPv4"
	IPv6 Family = "IPv6"
)

// Entity names a set of addresses that the machine knows better than the author of a policy.
// special.go lists what each covers.
type Entity string

const (
	EntityWorld        Entity = "world"         // every address that is not special
	EntityPrivate      Entity = "private"       // RFC 1918, RFC 6598, RFC 4193
	EntityHost         Entity = "host"          // the host's own addresses
	EntityHostLoopback Entity = "host-loopback" // the host's 127.0.0.1 and ::1, through the gateway address
	EntityLinkLocal    Entity = "link-local"
	EntityMetadata     Entity = "metadata" // the clouds' instance metadata services
	EntityMulticast    Entity = "multicast"
	EntityReserved     Entity = "reserved" // class E
)

var entities = []Entity{EntityWorld, EntityPrivate, EntityHost, EntityHostLoopback,
	EntityLinkLocal, EntityMetadata, EntityMulticast, EntityReserved}
