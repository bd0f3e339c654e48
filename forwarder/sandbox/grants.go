package sandbox

// A worker's table of grants.

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"sluice/policy"
)

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
	_ = g.tell(grantMessage{Name: name, Addrs: addrs[:min(len(addrs), policy.MaxGrantsPerName)], TTL: g.names.Bounded(ttl)})
	return nil
}

func (w *worker) tellGrant(g grantMessage) error { return w.ch.Send(msgGrant, 0, g) }
