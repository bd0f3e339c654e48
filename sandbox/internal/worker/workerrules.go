package worker

import (
	"fmt"
	"time"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
)

// The rules in force, as the worker's parts know them. The resolver reads them for each question.
// The forwarder is given them and ends the flows that they refuse. Addresses that the resolver
// granted under earlier rules stay granted, and count as far as the new rules allow the name.

// setRules puts rules in force. They reset the table's limits, so the limits that were set by hand,
// and that the policy leaves open, are set again.
func (w *Worker) setRules(r *policy.Rules) {
	d := r.DNS()
	w.names.Configure(policy.NamesConfig{TTLFloor: time.Duration(d.TTLFloor), TTLCap: time.Duration(d.TTLCap)})
	if w.in0 != nil && r.GatesNames() && r.OpensNames() {
		w.tellResolvers(r)
	}
	w.rules.Store(r)
	w.fwd.SetRules(r)
	w.limits = r.Limits()
	for name, value := range w.sysctls {
		if !w.policySets(name) {
			_ = w.SetTunable(name, value) // it was accepted before
		}
	}
}

// tellResolvers logs which servers are asked for the names of a pod's policy.
func (w *Worker) tellResolvers(r *policy.Rules) {
	if u := w.cfg.Upstreams.Servers; len(u) > 0 {
		w.log.Info(fmt.Sprintf("names of the policy %s are asked of %v (%s)", r.Name(), u, w.cfg.ResolversNote))
		return
	}
	w.log.Warn(fmt.Sprintf("the policy %s lets names be asked, and no resolver is known that could be asked for the pod (%s): no name resolves, and rules by domain match nothing; "+
		"name resolvers in the network configuration, or have the runtime say which the pod has (docs/cni.md), and make the pod anew", r.Name(), w.cfg.ResolversNote))
}

// setSysctl sets a tunable by hand. A limit that the policy sets cannot be set here.
func (w *Worker) setSysctl(p api.SysctlParams) error {
	if w.policySets(p.Name) {
		return fmt.Errorf("%s is set by the policy: change it there", p.Name)
	}
	if err := w.SetTunable(p.Name, p.Value); err != nil {
		return err
	}
	w.sysctls[p.Name] = p.Value
	return nil
}

func (w *Worker) policySets(name string) bool {
	limit := map[string]int64{
		"nf_conntrack_max":                 int64(w.limits.Flows),
		"nf_conntrack_max_half_open":       int64(w.limits.HalfOpen),
		"nf_conntrack_max_per_destination": int64(w.limits.FlowsPerDestination),
		"nf_conntrack_max_new_per_second":  int64(w.limits.NewFlowsPerSecond),
		"nf_conntrack_max_total_bytes":     int64(w.limits.TotalBytes),
	}
	return limit[trimSysctl(name)] > 0
}
