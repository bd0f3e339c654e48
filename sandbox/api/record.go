package api

import (
	"net/netip"
	"time"
)

// Verdicts of a FlowRecord, under Hubble's names.
const (
	VerdictUnknown   = "VERDICT_UNKNOWN" // its first bytes are still to decide, or it ended before they were read
	VerdictForwarded = "FORWARDED"
	VerdictDropped   = "DROPPED" // refused, silently or not: see Rejected
	VerdictError     = "ERROR"   // allowed, but failed: a DNS question without an answer, a flow without a host socket
	VerdictAudit     = "AUDIT"   // allowed because the policy is in audit mode
)

// Other words of a FlowRecord that come from Hubble.
const (
	Egress       = "EGRESS"
	Ingress      = "INGRESS"
	TypeFlow     = "L3_L4"
	TypeL7       = "L7"
	PolicyDenied = "POLICY_DENIED"
	RateLimited  = "DROP_RATE_LIMITED"       // over a rate limit
	NoRoom       = "CT_MAP_INSERTION_FAILED" // over another bound, or its tuple is in use
)

// FlowRecord describes a flow, live or over, a refused flow or HTTP request, or a DNS question: a
// line of the flow log, of `sluice flows -o json`, or a row of `run --show-flows`. Fields that
// Hubble has carry its names and meanings (api/v1/flow of Cilium); the others follow. Times are RFC
// 3339.
type FlowRecord struct {
	Time             time.Time `json:"time"`    // when the flow ended; if it is live, when it was read
	Verdict          string    `json:"verdict"` // FORWARDED, DROPPED, ERROR, AUDIT; VERDICT_UNKNOWN
	DropReasonDesc   string    `json:"drop_reason_desc,omitempty"`
	Type             string    `json:"Type"`              // L3_L4, L7
	TrafficDirection string    `json:"traffic_direction"` // EGRESS, INGRESS
	IP               IP        `json:"IP"`
	L4               L4        `json:"l4"`
	// DestinationNames are the names that the destination was granted under.
	DestinationNames []string `json:"destination_names,omitempty"`
	L7               *L7      `json:"l7,omitempty"`

	ID     uint64 `json:"id,omitempty"` // absent if there was no flow
	Policy string `json:"policy,omitempty"`
	Rule   string `json:"rule,omitempty"` // the rule that decided
	// Tried is a rule by domain that matched the address and the port, but not the first bytes.
	Tried string `json:"tried,omitempty"`
	// Reason says why the flow ended ("closed", "timeout") or was refused: "policy", or why Tried
	// did not match ("no-name", "name-mismatch").
	Reason   string `json:"reason,omitempty"`
	Rejected bool   `json:"rejected,omitempty"` // the sandbox was told of the refusal
	SNI      string `json:"sni,omitempty"`      // the name in the flow's ClientHello
	ECH      bool   `json:"ech,omitempty"`      // the ClientHello carries an encrypted one too
	State    string `json:"state,omitempty"`    // conntrack's state, now or at the end

	Start    time.Time `json:"start"`            // when its first packet came
	Duration float64   `json:"duration_seconds"` // from start to time
	Bytes    uint64    `json:"bytes"`            // of IP packets, both directions
	Orig     Counter   `json:"orig"`             // sent by the side that began the flow
	Reply    Counter   `json:"reply"`            // sent by the other side
	// ReplySource and ReplyDestination are the addresses of the replies as they reach the host's
	// socket.
	ReplySource      netip.AddrPort `json:"reply_source,omitzero"`
	ReplyDestination netip.AddrPort `json:"reply_destination,omitzero"`
	// Conntrack is set for flows that were in the table when the record was made.
	Conntrack *Conntrack `json:"conntrack,omitempty"`
	// Count is more than 1 if refusals of the same kind were folded into one record, so that a
	// scanner cannot fill the log.
	Count uint64 `json:"count,omitempty"`
}

// IP is the network layer of a FlowRecord.
type IP struct {
	Source      netip.Addr `json:"source"`
	Destination netip.Addr `json:"destination"`
	Version     string     `json:"ipVersion"` // IPv4, IPv6
}

// L4 is the transport layer; at most one field is set.
type L4 struct {
	TCP    *Ports `json:"TCP,omitempty"`
	UDP    *Ports `json:"UDP,omitempty"`
	SCTP   *Ports `json:"SCTP,omitempty"`
	ICMPv4 *ICMP  `json:"ICMPv4,omitempty"`
	ICMPv6 *ICMP  `json:"ICMPv6,omitempty"`
	// Other is the number of a protocol that Hubble has no field for.
	Other uint8 `json:"protocol,omitempty"`
}

// Ports holds the ports of a protocol that has them.
type Ports struct {
	Source      uint16 `json:"source_port"`
	Destination uint16 `json:"destination_port"`
}

// ICMP describes the message that began an echo flow.
type ICMP struct {
	Type uint8  `json:"type"`
	Code uint8  `json:"code"`
	ID   uint16 `json:"id"` // the echo identifier
}

// L7 is a DNS question with its answer, or an HTTP request.
type L7 struct {
	Type string  `json:"type"` // REQUEST, RESPONSE
	DNS  *L7DNS  `json:"dns,omitempty"`
	HTTP *L7HTTP `json:"http,omitempty"`
}

// L7DNS is a question and its answer.
type L7DNS struct {
	Query  string   `json:"query"` // with its trailing dot
	IPs    []string `json:"ips,omitempty"`
	TTL    uint32   `json:"ttl,omitempty"` // seconds
	CNAMEs []string `json:"cnames,omitempty"`
	Source string   `json:"observation_source"` // always proxy
	RCode  uint32   `json:"rcode"`
	QTypes []string `json:"qtypes,omitempty"`
}

// L7HTTP is an unencrypted request.
type L7HTTP struct {
	Method string `json:"method"`
	URL    string `json:"url"` // without the query string
}

// Counter counts what one direction of a flow carried.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Proto returns the protocol's name: tcp, udp, sctp, icmp, icmpv6, or "" for any other.
func (l L4) Proto() string {
	switch {
	case l.TCP != nil:
		return "tcp"
	case l.UDP != nil:
		return "udp"
	case l.SCTP != nil:
		return "sctp"
	case l.ICMPv4 != nil:
		return "icmp"
	case l.ICMPv6 != nil:
		return "icmpv6"
	}
	return ""
}

// ports returns the zero value for protocols without ports.
func (l L4) ports() Ports {
	for _, p := range []*Ports{l.TCP, l.UDP, l.SCTP} {
		if p != nil {
			return *p
		}
	}
	return Ports{}
}

// Source and Destination return the flow's endpoints; the port is 0 for a protocol without ports.
func (r *FlowRecord) Source() netip.AddrPort {
	return netip.AddrPortFrom(r.IP.Source, r.L4.ports().Source)
}

func (r *FlowRecord) Destination() netip.AddrPort {
	return netip.AddrPortFrom(r.IP.Destination, r.L4.ports().Destination)
}
