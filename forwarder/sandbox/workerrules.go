package sandbox

import (
	"fmt"
	"time"

	"sluice/forwarder/sandbox/api"
	"sluice/policy"
)

// The rules in force, as the worker's parts know them: the resolver asks for them
// with each question, the forwarder is given them and cuts what they refuse. What
// the resolver granted under the rules before them stays granted, and counts as
// far as they allow the name.

// setRules puts rules in force. They reset the table's limits: those that were
// set by hand since, and that the policy leaves open, are set again.
func (w *worker) setRules(r *policy.Rules) {
	d := r.DNS()
	w.names.Configure(policy.NamesConfig{TTLFloor: time.Duration(d.TTLFloor), TTLCap: time.Duration(d.TTLCap)})
	if w.in0 != nil && r.GatesNames() {
		w.log.Warn(fmt.Sprintf("the policy %s has rules by domain, which match nothing here, and closes DNS: no resolver of ours serves a pod; use rules by cidr", r.Name()))
	}
	w.rules.Store(r)
	w.fwd.SetRules(r)
	w.limits = r.Limits()
	for name, value := range w.sysctls {
		if !w.policySets(name) {
			_ = w.table.SetSysctl(name, value) // it was accepted before
		}
	}
}

// setSysctl sets a tunable by hand. What the policy limits is the policy's.
func (w *worker) setSysctl(p api.SysctlParams) error {
	if w.policySets(p.Name) {
		return fmt.Errorf("%s is set by the policy: change it there", p.Name)
	}
	if err := w.table.SetSysctl(p.Name, p.Value); err != nil {
		return err
	}
	w.sysctls[p.Name] = p.Value
	return nil
}

func (w *worker) policySets(name string) bool {
	limit := map[string]int64{
		"nf_conntrack_max":                 int64(w.limits.Flows),
		"nf_conntrack_max_half_open":       int64(w.limits.HalfOpen),
		"nf_conntrack_max_per_destination": int64(w.limits.FlowsPerDestination),
		"nf_conntrack_max_new_per_second":  int64(w.limits.NewFlowsPerSecond),
		"nf_conntrack_max_total_bytes":     int64(w.limits.TotalBytes),
	}
	return limit[trimSysctl(name)] > 0
}
