package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Selects the resolvers of a pod whose policy has rules by name. They decide which addresses are
// granted, so the policy's owner must trust them and the pod must not choose them: its own
// resolv.conf is ignored. The first of these that names a resolver is used, and only that one:
//
//	the configuration's own `resolvers`
//	the runtime's `dns` capability: what it writes into the pod's resolv.conf
//	the main plugin's result, which has the `dns` of its configuration

// maxResolvers is how many are kept; more are never asked.
const maxResolvers = 8

// Resolvers are those of a pod, as recorded.
type Resolvers struct {
	Servers []netip.Addr `json:"servers,omitempty"`
	// Note says, for people, where they come from and which were left out.
	Note string `json:"note,omitempty"`
}

// resolverList is the configuration's own list: an unusable one in it is an error.
type resolverList []netip.Addr

func (l *resolverList) UnmarshalJSON(b []byte) error {
	*l = nil
	var texts []string
	if err := json.Unmarshal(b, &texts); err != nil || len(texts) == 0 || len(texts) > maxResolvers {
		return fmt.Errorf("resolvers %s: want a list of 1 to %d addresses", b, maxResolvers)
	}
	for _, text := range texts {
		a, why := resolver(text, nil)
		if why != "" {
			return fmt.Errorf("resolvers: %s: %s", text, why)
		}
		*l = append(*l, a)
	}
	return nil
}

// resolversFor finds a pod's resolvers. own are its addresses.
func (c *Config) resolversFor(result *types100.Result, own []netip.Prefix) (Resolvers, error) {
	var configured []string
	for _, a := range c.Resolvers {
		configured = append(configured, a.String())
	}
	var runtime struct {
		Servers []string `json:"servers"`
	}
	if len(c.RuntimeConfig.DNS) > 0 {
		if err := json.Unmarshal(c.RuntimeConfig.DNS, &runtime); err != nil {
			return Resolvers{}, fmt.Errorf("the runtime's dns: %w", err)
		}
	}
	var plugin []string
	if result != nil {
		plugin = result.DNS.Nameservers
	}
	for _, source := range []struct {
		name    string
		servers []string
	}{{"from the network configuration", configured}, {"from the runtime", runtime.Servers}, {"from the main plugin", plugin}} {
		if len(source.servers) > 0 {
			return usable(source.name, source.servers, own), nil
		}
	}
	return Resolvers{Note: "neither the network configuration nor the runtime nor the main plugin names one"}, nil
}

// usable keeps the servers that can be asked, and records the others.
func usable(from string, servers []string, own []netip.Prefix) Resolvers {
	var r Resolvers
	var left []string
	for _, text := range servers {
		a, why := resolver(text, own)
		switch {
		case why != "":
			left = append(left, fmt.Sprintf("%q: %s", text, why))
		case len(r.Servers) < maxResolvers && !slices.Contains(r.Servers, a):
			r.Servers = append(r.Servers, a)
		}
	}
	r.Note = from
	if len(left) > 0 {
		const shown = 3
		r.Note += "; left out: " + strings.Join(left[:min(len(left), shown)], ", ")
	}
	return r
}

// resolver reads an address that can be asked from a pod's uplink namespace, or says why it cannot.
// Link-local IPv4 is allowed: node-local caches and the resolvers of some clouds have such
// addresses.
func resolver(text string, own []netip.Prefix) (a netip.Addr, why string) {
	if len(text) > maxAddrText {
		return a, "not an IP address"
	}
	a, err := netip.ParseAddr(text)
	if err != nil {
		return a, "not an IP address"
	}
	a = a.Unmap()
	switch {
	case a.Zone() != "":
		return a, "its zone is an interface of the node, not of the pod"
	case a.IsLoopback():
		return a, "a loopback address, of which each namespace has its own"
	case a.IsUnspecified() || a.IsMulticast() || a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240):
		return a, "not the address of one server"
	case a.Is6() && a.IsLinkLocalUnicast():
		return a, "a link-local address without its link"
	case slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Addr() == a }):
		return a, "the pod's own address, so that it would answer itself"
	}
	return a, ""
}

// maxAddrText is longer than any address.
const maxAddrText = 64
