package sandbox

// Grants outlive the worker that made them: clients keep the addresses that they were
// told, and would be refused until they ask again.
//
//	resolver ─ Grant ─► worker's table ─ msgGrant ─► monitor's table ─ workerConfig ─► next worker's table
//
// A message is sent before the client sees the answer. What the monitor remembers is
// bounded as the worker's own table is (policy.MaxGrants), and says nothing that the
// worker could not have done itself: grants count only as far as the policy allows
// their names.

import (
	"fmt"
	"net/netip"
	"time"

	"sluice/policy"
)

// grantMessage says that a name has these addresses for so long from now on.
type grantMessage struct {
	Name  string        `json:"name"`
	Addrs []netip.Addr  `json:"addrs"`
	TTL   time.Duration `json:"ttl"`
}

// newKeptGrants is a table that takes every TTL as it is told.
func newKeptGrants() *policy.Names {
	return policy.NewNames(policy.NamesConfig{TTLFloor: 1, TTLCap: policy.MaxTTL})
}

// take notes what a worker said it granted.
func (g *grantMessage) take(names *policy.Names, now time.Time) error {
	if len(g.Addrs) > policy.MaxGrantsPerName || g.TTL <= 0 {
		return fmt.Errorf("%w: a grant of %d addresses for %v", errProtocol, len(g.Addrs), g.TTL)
	}
	if err := names.Grant(g.Name, g.Addrs, g.TTL, now); err != nil {
		return fmt.Errorf("%w: %w", errProtocol, err)
	}
	return nil
}

// keptGrants lists what names holds, for the next worker.
func keptGrants(names *policy.Names, now time.Time) (all []grantMessage) {
	for g := range names.All(now) {
		all = append(all, grantMessage{Name: g.Name, Addrs: []netip.Addr{g.Addr}, TTL: g.TTL})
	}
	return all
}
