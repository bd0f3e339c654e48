package channel

// Grants outlive the worker that made them: clients keep the addresses that they were
// told, and would be refused until they ask again.
//
//	resolver ─ Grant ─► worker's table ─ MsgGrant ─► monitor's table ─ WorkerConfig ─► next worker's table
//
// A message is sent before the client sees the answer. What the monitor remembers is
// bounded as the worker's own table is (policy.MaxGrants), and says nothing that the
// worker could not have done itself: grants count only as far as the policy allows
// their names.

import (
	"fmt"
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
)

// GrantMessage says that a name has these addresses for so long from now on.
type GrantMessage struct {
	Name  string        `json:"name"`
	Addrs []netip.Addr  `json:"addrs"`
	TTL   time.Duration `json:"ttl"`
}

// NewKeptGrants is a table that takes every TTL as it is told.
func NewKeptGrants() *policy.Names {
	return policy.NewNames(policy.NamesConfig{TTLFloor: 1, TTLCap: policy.MaxTTL})
}

// Take notes what a worker said it granted.
func (g *GrantMessage) Take(names *policy.Names, now time.Time) error {
	if len(g.Addrs) > policy.MaxGrantsPerName || g.TTL <= 0 {
		return fmt.Errorf("%w: a grant of %d addresses for %v", ErrProtocol, len(g.Addrs), g.TTL)
	}
	if err := names.Grant(g.Name, g.Addrs, g.TTL, now); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}

// KeptGrants lists what names holds, for the next worker.
func KeptGrants(names *policy.Names, now time.Time) (all []GrantMessage) {
	for g := range names.All(now) {
		all = append(all, GrantMessage{Name: g.Name, Addrs: []netip.Addr{g.Addr}, TTL: g.TTL})
	}
	return all
}
