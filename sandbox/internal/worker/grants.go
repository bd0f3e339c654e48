package worker

// A worker's table of grants.

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/channel"
)

// NewNames returns a worker's table of grants. It holds the sandbox's hosts and the caller's for
// good: they are in its /etc/hosts, so no client asks for them. It holds the previous worker's
// grants for the time they have left.
func NewNames(hosts, callers map[string][]netip.Addr, kept []channel.GrantMessage, log *slog.Logger) *policy.Names {
	names := channel.NewKeptGrants()
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
		if err := g.Take(names, now); err != nil {
			log.Warn(fmt.Sprintf("a grant of the worker before is lost: %v", err))
		}
	}
	return names
}

// ToldGrants is the worker's table as the resolver sees it. It reports each grant to the monitor.
type ToldGrants struct {
	Names *policy.Names
	Tell  func(channel.GrantMessage) error
}

// Grant implements dns.Names.
func (g ToldGrants) Grant(name string, addrs []netip.Addr, ttl time.Duration, now time.Time) error {
	if err := g.Names.Grant(name, addrs, ttl, now); err != nil {
		return err
	}
	// If the channel fails, the monitor is gone and the worker soon will be too.
	_ = g.Tell(channel.GrantMessage{Name: name, Addrs: addrs[:min(len(addrs), policy.MaxGrantsPerName)], TTL: g.Names.Bounded(ttl)})
	return nil
}

func (w *Worker) tellGrant(g channel.GrantMessage) error { return w.ch.Send(channel.MsgGrant, 0, g) }
