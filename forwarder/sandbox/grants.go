package sandbox

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"sluice/forwarder/sandbox/guest"
	"sluice/policy"
)

// Grants outlive the worker that made them: clients keep the addresses that they were
// told, and would be refused until they ask again.
//
//	resolver ─ Grant ─► worker's table ─ msgGrant ─► monitor's table ─ workerConfig ─► next worker's table
//
// A message is sent before the client sees the answer. What the monitor remembers is
// bounded as the worker's own table is (policy.MaxGrants), and says nothing that the
// worker could not have done itself: grants count only as far as the policy allows
// their names.

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
		all = append(all, grantMessage{g.Name, []netip.Addr{g.Addr}, g.TTL})
	}
	return all
}

// maxCallersHosts bounds the addresses of the caller's hosts file that are granted: files
// with more are block lists.
const maxCallersHosts = 1024

// hostsToGrant are the entries of a hosts file that lead out of the sandbox, by names that a
// rule can have. It counts those beyond maxCallersHosts.
func hostsToGrant(entries []guest.HostEntry) (hosts map[string][]netip.Addr, left int) {
	hosts = make(map[string][]netip.Addr)
	taken := 0
	for _, e := range entries {
		if e.Addr.IsLoopback() || e.Addr.IsUnspecified() || e.Addr.IsMulticast() || e.Addr.Zone() != "" {
			continue
		}
		for _, n := range e.Names {
			name, err := policy.NormalizeName(n)
			switch {
			case err != nil || slices.Contains(hosts[name], e.Addr):
			case taken == maxCallersHosts:
				left++
			default:
				hosts[name] = append(hosts[name], e.Addr)
				taken++
			}
		}
	}
	return hosts, left
}

// newNames makes a worker's table of grants. The hosts that the sandbox was given, and the
// caller's, are in it for good: they stand in its /etc/hosts, so that nobody asks for them.
// What the worker before granted is in it for the time that is left.
func newNames(hosts, callers map[string][]netip.Addr, kept []grantMessage, log *slog.Logger) *policy.Names {
	names := newKeptGrants()
	for name, addrs := range callers {
		if err := names.Pin(name, addrs); err != nil {
			log.Warn(fmt.Sprintf("no rule by domain will match %q of the caller's /etc/hosts: %v", name, err))
		}
	}
	for host, addrs := range hosts {
		name, err := policy.NormalizeName(host)
		if err == nil {
			err = names.Pin(name, addrs)
		}
		if err != nil {
			log.Warn(fmt.Sprintf("no rule by domain will match the host entry %q: %v", host, err))
		}
	}
	now := time.Now()
	for _, g := range kept {
		if err := g.take(names, now); err != nil {
			log.Warn(fmt.Sprintf("a grant of the worker before is lost: %v", err))
		}
	}
	return names
}

// toldGrants is the worker's table as the resolver sees it: the monitor is told of each
// grant.
type toldGrants struct {
	names *policy.Names
	tell  func(grantMessage) error
}

// Grant implements dns.Names.
func (g toldGrants) Grant(name string, addrs []netip.Addr, ttl time.Duration, now time.Time) error {
	if err := g.names.Grant(name, addrs, ttl, now); err != nil {
		return err
	}
	// Should the channel fail the monitor is gone, and soon the worker is too.
	_ = g.tell(grantMessage{name, addrs[:min(len(addrs), policy.MaxGrantsPerName)], g.names.Bounded(ttl)})
	return nil
}

func (w *worker) tellGrant(g grantMessage) error { return w.ch.Send(msgGrant, 0, g) }
