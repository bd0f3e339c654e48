package channel

// Grants outlive the worker that made them. Clients keep the addresses that they were given, and
// would otherwise be refused until they ask again.
//
//	resolver ─ Grant ─► worker's table ─ MsgGrant ─► monitor's table ─ WorkerConfig ─► next worker's table
//
// The message is sent before the client sees the answer. The monitor's table has the same bound as
// the worker's own (policy.MaxGrants), and it gives a worker no more than it could do itself: a
// grant counts only as far as the policy allows its name.

import (
	"fmt"
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
)

// GrantMessage says that a name has these addresses for TTL from now on.
type GrantMessage struct {
	Name  string        `json:"name"`
	Addrs []netip.Addr  `json:"addrs"`
	TTL   time.Duration `json:"ttl"`
}

// NewKeptGrants returns a table that takes every TTL as given.
func NewKeptGrants() *policy.Names {
	return policy.NewNames(policy.NamesConfig{TTLFloor: 1, TTLCap: policy.MaxTTL})
}

// Take records in names a grant that a worker reported.
func (g *GrantMessage) Take(names *policy.Names, now time.Time) error {
	if len(g.Addrs) > policy.MaxGrantsPerName || g.TTL <= 0 {
		return fmt.Errorf("%w: a grant of %d addresses for %v", ErrProtocol, len(g.Addrs), g.TTL)
	}
	if err := names.Grant(g.Name, g.Addrs, g.TTL, now); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}

// KeptGrants returns the grants in names, for the next worker.
func KeptGrants(names *policy.Names, now time.Time) (all []GrantMessage) {
	for g := range names.All(now) {
		all = append(all, GrantMessage{Name: g.Name, Addrs: []netip.Addr{g.Addr}, TTL: g.TTL})
	}
	return all
}
