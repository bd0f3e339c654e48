package policy

import "cmp"

// Limits bound a sandbox. Zero means not set: the enforcer's default holds.
type Limits struct {
	Flows               int       `json:"flows,omitempty"`
	HalfOpen            int       `json:"halfOpen,omitempty"`
	NewFlowsPerSecond   int       `json:"newFlowsPerSecond,omitempty"`
	EgressBandwidth     Bandwidth `json:"egressBandwidth,omitempty"`
	IngressBandwidth    Bandwidth `json:"ingressBandwidth,omitempty"`
	TotalBytes          Bytes     `json:"totalBytes,omitempty"`
	FlowsPerDestination int       `json:"flowsPerDestination,omitempty"`
	DNSQueriesPerSecond int       `json:"dnsQueriesPerSecond,omitempty"`
}

// Or merges two sets of limits: those that l leaves unset come from other.
func (l Limits) Or(other Limits) Limits {
	return Limits{
		Flows:               cmp.Or(l.Flows, other.Flows),
		HalfOpen:            cmp.Or(l.HalfOpen, other.HalfOpen),
		NewFlowsPerSecond:   cmp.Or(l.NewFlowsPerSecond, other.NewFlowsPerSecond),
		EgressBandwidth:     cmp.Or(l.EgressBandwidth, other.EgressBandwidth),
		IngressBandwidth:    cmp.Or(l.IngressBandwidth, other.IngressBandwidth),
		TotalBytes:          cmp.Or(l.TotalBytes, other.TotalBytes),
		FlowsPerDestination: cmp.Or(l.FlowsPerDestination, other.FlowsPerDestination),
		DNSQueriesPerSecond: cmp.Or(l.DNSQueriesPerSecond, other.DNSQueriesPerSecond),
	}
}

// RuleLimits bound all flows that one rule admitted, taken together. Zero means only the sandbox's
// limits apply.
type RuleLimits struct {
	Flows             int       `json:"flows,omitempty"`
	NewFlowsPerSecond int       `json:"newFlowsPerSecond,omitempty"`
	EgressBandwidth   Bandwidth `json:"egressBandwidth,omitempty"`
	IngressBandwidth  Bandwidth `json:"ingressBandwidth,omitempty"`
	TotalBytes        Bytes     `json:"totalBytes,omitempty"`
}
