package sandbox

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/tun"
)

// Config describes one sandbox. Only Guest.Command is needed: everything else has a default.
type Config struct {
	// Name is the sandbox's name; "" generates one.
	Name string
	// Version is shown by `info`.
	Version string

	// Start makes the guest: guest.Start, or an attachment. nil means guest.Start.
	Start StartGuest
	// Guest is completed by Run: addresses (unless NoIPv4, NoIPv6 or
	// NoConfigure), resolv.conf, hosts, directories to hide.
	Guest          guest.Config
	NoIPv4, NoIPv6 bool
	DNS4, DNS6     netip.Addr // where the resolver listens; default: the prefix's third address
	GatewayMAC     net.HardwareAddr

	Servers    []netip.AddrPort        // --dns; nil follows ResolvConf
	Search     []string                // --dns-search; nil follows ResolvConf
	ResolvConf string                  // "" means /etc/resolv.conf
	Hosts      map[string][]netip.Addr // --add-host

	// Metadata are metadata services in addition to the known ones, NAT64 the prefixes of the
	// network's translators.
	Metadata []netip.Prefix
	NAT64    []netip.Prefix
	// HostLoopback maps the gateway address to the host's loopback.
	HostLoopback bool
	// Policy is required: a document or, explicitly, none, with the built-in policy that applies
	// instead.
	Policy policy.Source

	// UnderPolicy covers the host's sockets, because the caller has said what the command may
	// reach. AllowSockets stay in reach all the same; HostSockets leaves all of them.
	UnderPolicy  bool
	AllowSockets []string
	HostSockets  bool
	// ReadOnly are files that control the command, so it may not change them.
	ReadOnly []string
	// Quiet suppresses the line that says what is covered.
	Quiet bool

	Ports []api.Port
	// PublishAuto publishes what the sandbox listens on, at PublishAutoAddr
	// (default 127.0.0.1).
	PublishAuto     bool
	PublishAutoAddr netip.Addr

	// FlowLog is a file to append flow records to, "-" for standard output.
	FlowLog string
	// FlowLogMaxSize is the size in bytes at which it is renamed to FlowLog.1, and that to .2; 0
	// means DefaultFlowLogMaxSize, FlowLogUnbounded never. FlowLogMaxFiles is how many files there
	// may be; 0 means DefaultFlowLogMaxFiles.
	FlowLogMaxSize  int64
	FlowLogMaxFiles int
	// Sysctls are tunables of the flow table, under nf_conntrack's names.
	Sysctls map[string]string

	// Ready is called once traffic can flow, before the command is started.
	Ready func(api.Info) error
	// Ended, if set, receives the flows that are still there at the end.
	Ended func(api.FlowsResult)
	// Stderr gets warnings, or everything with Verbose; nil means os.Stderr.
	Stderr  io.Writer
	Verbose bool
}

// The default addresses of a sandbox. The IPv4 ones are slirp4netns's, so that existing habits and
// configurations keep working. Too many hosts and container networks use its fd00::/64, so IPv6 has
// its own prefix (RFC 4193, the global identifier spells sluice).
var (
	defaultPrefix4 = netip.MustParsePrefix("10.0.2.100/24")
	defaultPrefix6 = netip.MustParsePrefix("fd73:6c75:6963:65::100/64")
	// 52:55 and the gateway's address: locally administered, and stable, so
	// that neighbour caches survive.
	defaultGatewayMAC = net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2}
)

func (c Config) withDefaults() (Config, error) {
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.Stderr == nil {
		c.Stderr = os.Stderr
	}
	if c.GatewayMAC == nil {
		c.GatewayMAC = defaultGatewayMAC
	}
	if !c.PublishAutoAddr.IsValid() {
		c.PublishAutoAddr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if c.Guest.Link.MTU == 0 {
		c.Guest.Link.MTU = tun.DefaultMTU
	}
	if c.NoIPv4 && c.NoIPv6 {
		return c, errors.New("a sandbox needs IPv4 or IPv6")
	}
	err := errors.Join(
		plan(&c.Guest.Addr4, &c.Guest.Gateway4, &c.DNS4, c.NoIPv4, defaultPrefix4),
		plan(&c.Guest.Addr6, &c.Guest.Gateway6, &c.DNS6, c.NoIPv6, defaultPrefix6),
	)
	return c, err
}

// plan completes the addresses of one family: by default the gateway is the prefix's second address
// and the resolver its third.
func plan(addr *netip.Prefix, gateway, dns *netip.Addr, off bool, def netip.Prefix) error {
	if off {
		*addr, *gateway, *dns = netip.Prefix{}, netip.Addr{}, netip.Addr{}
		return nil
	}
	if !addr.IsValid() {
		*addr = def
	}
	p := *addr
	if p.Addr().BitLen()-p.Bits() < 3 {
		return fmt.Errorf("the prefix %s is too small: want room for 8 addresses", p)
	}
	first := p.Masked().Addr().Next()
	if !gateway.IsValid() {
		*gateway = first.Next()
	}
	if !dns.IsValid() {
		*dns = first.Next().Next()
	}
	for _, a := range []netip.Addr{*gateway, *dns} {
		if !p.Contains(a) {
			return fmt.Errorf("the address %s is not in the sandbox's prefix %s", a, p.Masked())
		}
		if a == p.Addr() {
			return fmt.Errorf("the address %s is the sandbox's and cannot be its gateway or resolver too", a)
		}
	}
	if *gateway == *dns {
		return fmt.Errorf("the gateway and the resolver cannot both be %s", *dns)
	}
	return nil
}

// addrs returns the valid addresses.
func addrs(list ...netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// environment returns the environment of the rules, without the host's addresses.
func (c *Config) environment() policy.Environment {
	return policy.Environment{
		Gateway4: c.Guest.Gateway4, Gateway6: c.Guest.Gateway6,
		DNS4: c.DNS4, DNS6: c.DNS6,
		Guest:        addrs(c.Guest.Addr4.Addr(), c.Guest.Addr6.Addr()),
		HostLoopback: c.HostLoopback,
		Metadata:     c.Metadata,
		NAT64:        c.NAT64,
	}
}

// upstreams merges the host's resolvers with the caller's.
func (c *Config) upstreams(host dns.Upstreams) dns.Upstreams {
	if c.Servers != nil {
		host = dns.Upstreams{Servers: c.Servers, Search: host.Search, StubOptions: host.StubOptions}
	}
	if c.Search != nil {
		host.Search = c.Search
	}
	return host
}

// info returns the part of api.Info that does not change.
func (c *Config) info(started time.Time) api.Info {
	i := api.Info{
		Name: c.Name, PID: os.Getpid(), Command: c.Guest.Command, Started: started, Version: c.Version,
		Link: c.Guest.Link.Kind.String(), Interface: c.Guest.Link.Name, MTU: c.Guest.Link.MTU,
		Gateway: addrs(c.Guest.Gateway4, c.Guest.Gateway6), DNS: addrs(c.DNS4, c.DNS6),
	}
	for _, p := range []netip.Prefix{c.Guest.Addr4, c.Guest.Addr6} {
		if p.IsValid() {
			i.Guest = append(i.Guest, p)
		}
	}
	return i
}
