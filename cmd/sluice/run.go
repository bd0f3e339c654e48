package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cmd/internal/cmdline"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
	"sluice.dev/sluice/tun"
)

// The categories under which the help lists the flags of run and attach.
const (
	ofNetwork = "network"
	ofPolicy  = "policy"
	ofNames   = "name resolution"
	ofLogs    = "log"
	ofProcess = "identity and process"
)

// sandboxFlags returns the flags common to run and attach; withoutPolicy says what applies without
// --policy.
func sandboxFlags(withoutPolicy string) []cli.Flag {
	return slices.Concat(
		cmdline.InCategory(ofNetwork,
			&cli.StringSliceFlag{Name: "publish", Aliases: []string{"p"}, Usage: "publish `PORTS`, written [IP:]HOST[-RANGE]:GUEST[-RANGE][/udp]; may be repeated"},
			&cli.BoolFlag{Name: "publish-auto", Usage: "publish on 127.0.0.1 and ::1 every port that the sandbox listens on, while it does, except ports below 1024, well-known ports and ports in use"},
			&cli.StringFlag{Name: "link", Value: "tap", Usage: "make a device of `KIND` tap or tun"},
			&cli.StringFlag{Name: "interface", Usage: "`NAME` of the device inside (default: tap0 or tun0)"},
			&cli.IntFlag{Name: "mtu", Value: tun.DefaultMTU, Usage: fmt.Sprintf("MTU of the device, %d to %d `BYTES`", tun.MinMTU, tun.MaxMTU)},
			&cli.IntFlag{Name: "queues", Value: tun.DefaultQueues(), DefaultText: "2, or 1 on a single processor", Usage: fmt.Sprintf("give the device `N` queues, 1 to %d; all are used while several flows send bulk data", tun.MaxQueues)},
			&cli.BoolFlag{Name: "no-offload", Usage: "make the device without checksum and segmentation offloads"},
			&cli.StringFlag{Name: "mac", Usage: "hardware `ADDRESS` of the device inside (default: the kernel's choice)"},
			&cli.StringFlag{Name: "address", Usage: "IPv4 `ADDRESS/BITS` of the sandbox (default: 10.0.2.100/24; gateway and resolver are .2 and .3)"},
			&cli.StringFlag{Name: "address6", Usage: "IPv6 `ADDRESS/BITS` of the sandbox"},
			&cli.StringFlag{Name: "gateway", Usage: "IPv4 `ADDRESS` of the gateway"},
			&cli.StringFlag{Name: "gateway6", Usage: "IPv6 `ADDRESS` of the gateway"},
			&cli.BoolFlag{Name: "ipv4-only", Usage: "no IPv6 inside"},
			&cli.BoolFlag{Name: "ipv6-only", Usage: "no IPv4 inside"},
			&cli.StringSliceFlag{Name: "sysctl", Usage: "set `NAME=VALUE` of the flow table, the memory budget or keepalive, such as nf_conntrack_max=1000 or net.ipv4.tcp_keepalive_time=30; may be repeated"},
		),
		cmdline.InCategory(ofPolicy,
			&cli.StringFlag{Name: "policy", Usage: "policy `FILE`, see sluice-policy(5) (default: " + withoutPolicy + ")"},
			&cli.BoolFlag{Name: "host-loopback", Usage: "let the gateway address lead to the host's 127.0.0.1 and ::1"},
			&cli.StringSliceFlag{Name: "metadata-address", Usage: "treat `ADDR|CIDR` as a metadata service too, see sluice-policy(5); may be repeated"},
			&cli.StringSliceFlag{Name: "nat64-prefix", Usage: "judge an address behind the network's own NAT64 `PREFIX` also as the IPv4 address that it carries; may be repeated"},
		),
		cmdline.InCategory(ofNames,
			&cli.StringSliceFlag{Name: "dns", Usage: "ask the name server at `ADDRESS[:PORT]` instead of the host's; may be repeated"},
			&cli.StringSliceFlag{Name: "dns-search", Usage: "search `DOMAIN` instead of the host's domains; may be repeated"},
			&cli.StringSliceFlag{Name: "add-host", Usage: "answer `NAME:ADDRESS`; may be repeated"},
		),
		cmdline.InCategory(ofLogs,
			&cli.StringFlag{Name: "flow-log", Usage: "append a JSON record of each ended flow to `FILE`, - for standard output"},
			&cli.StringFlag{Name: "flow-log-max-size", Value: policy.Bytes(sandbox.DefaultFlowLogMaxSize).String(), Usage: "rename the flow log to FILE.1 before it exceeds `BYTES`, such as 500M or 64Mi; 0: never"},
			&cli.IntFlag{Name: "flow-log-max-files", Value: sandbox.DefaultFlowLogMaxFiles, Usage: "keep `N` files of the flow log, FILE included, and delete older ones"},
			&cli.BoolFlag{Name: "verbose", Usage: "report on standard error what happens"},
		),
		cmdline.InCategory(ofProcess,
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the sandbox for the other commands (default: a generated one)"},
		),
	)
}

func runCommand() *cli.Command {
	return &cli.Command{
		Name:      "run",
		Usage:     "run a command in a sandboxed network",
		ArgsUsage: "-- COMMAND [ARGUMENT...]",
		UsageText: `sluice run -- curl https://example.com
sluice run --allow-private -- ssh nas.lan
sluice run --policy policy.yaml -- ./agent
sluice run -p 8080:80 -- nginx -g 'daemon off;'
# a log of every flow, from which to make a policy
sluice run --flow-log flows.json -- make
sluice policy suggest flows.json`,
		Description: `Makes user, network and mount namespaces, puts a device into them, and carries each
connection that the policy allows to a socket of the caller's network. The only
privilege it needs is access to /dev/net/tun.

Without --policy, public addresses are open. Private networks and the host's own
addresses are closed until --allow-private and --allow-host open them, and the host's
loopback until --host-loopback does. Link-local, metadata and other special addresses
stay closed.

COMMAND sees the caller's files. With --policy, sockets among them that lead past the
network (D-Bus, docker, ssh-agent, X11 and the like) are out of reach, unless
--allow-socket or --host-sockets leaves them; a line on standard error lists what is
covered.

The exit status is COMMAND's; 128+N if signal N ended it; 126 if it cannot be executed;
127 if there is no such command; and 125 if sluice itself failed, which it explains on
standard error.`,
		HideHelpCommand: true, // a first argument "help" is COMMAND
		Flags: slices.Concat(sandboxFlags("public addresses are open, all others closed"),
			cmdline.InCategory(ofPolicy,
				&cli.BoolFlag{Name: "allow-private", Usage: "without --policy: open private networks too (10/8, 172.16/12, 192.168/16, 100.64/10, fc00::/7)"},
				&cli.BoolFlag{Name: "allow-host", Usage: "without --policy: open the host's own addresses too"},
				&cli.StringSliceFlag{Name: "allow-socket", Usage: "with --policy: leave the host's socket at `PATH`, or every socket below that directory, in reach; may be repeated"},
				&cli.BoolFlag{Name: "host-sockets", Usage: "leave all of the host's sockets in reach: D-Bus, docker, ssh-agent, X11, resolver daemons and so on"},
			),
			cmdline.InCategory(ofLogs,
				&cli.BoolFlag{Name: "show-flows", Usage: "print the flows that were seen to standard error at the end"},
				&cli.BoolFlag{Name: "quiet", Usage: "do not report on standard error what is covered, or what a start by root means"},
			),
			cmdline.InCategory(ofProcess,
				&cli.BoolFlag{Name: "root", Usage: "be root inside, with capabilities over the sandbox's namespaces only (default: the caller's own user)"},
				&cli.BoolFlag{Name: "subids", Usage: "map the caller's /etc/subuid and /etc/subgid ranges too"},
				&cli.BoolFlag{Name: "pid", Usage: "make a PID namespace: everything inside ends with COMMAND"},
				&cli.IntFlag{Name: "preserve-fds", Usage: "pass `N` more descriptors to COMMAND, from 3 on"},
			),
		),
		Before:       noStrayOptions,
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			none := policy.Builtin{AllowPrivate: c.Bool("allow-private"), AllowHost: c.Bool("allow-host")}
			cfg, err := sandboxConfig(c, none)
			if err != nil {
				return err
			}
			if _, given := cfg.Policy.Document(); given && none != (policy.Builtin{}) {
				return errors.New("--allow-private and --allow-host widen the default policy, which --policy replaces: let the policy allow entity private or host")
			}
			g := &cfg.Guest
			g.Command = c.Args().Slice()
			if len(g.Command) == 0 {
				return errors.New("run: no command: sluice run [flags] -- COMMAND")
			}
			if c.Bool("root") {
				g.User = guest.MapRoot
			}
			g.SubIDs, g.PIDNamespace = c.Bool("subids"), c.Bool("pid")
			if g.Files, err = preserved(c.Int("preserve-fds")); err != nil {
				return err
			}
			cfg.UnderPolicy, cfg.HostSockets, cfg.Quiet = c.IsSet("policy"), c.Bool("host-sockets"), c.Bool("quiet")
			if cfg.AllowSockets = c.StringSlice("allow-socket"); len(cfg.AllowSockets) > 0 && cfg.HostSockets {
				return errors.New("--allow-socket leaves one socket in reach, --host-sockets all of them: give one of the two")
			}
			for _, name := range []string{"policy", "flow-log"} {
				if v := c.String(name); v != "" && v != "-" {
					cfg.ReadOnly = append(cfg.ReadOnly, v)
				}
			}
			if c.Bool("show-flows") {
				cfg.Ended = func(r api.FlowsResult) { _ = printEnded(os.Stderr, r) }
			}
			return finish(sandbox.Run(c.Context, cfg))
		},
	}
}

// finish turns the end of a sandbox into the error that main exits with.
func finish(status int, err error) error {
	switch {
	case err != nil:
		return ownFailure{err, status}
	case status != 0:
		return exitStatus(status)
	}
	return nil
}

// noStrayOptions refuses an option that would silently become part of COMMAND: the library stops at
// the first word that is not a flag, and a typing error can be such a word.
func noStrayOptions(c *cli.Context) error {
	if a := c.Args().First(); strings.HasPrefix(a, "-") {
		return fmt.Errorf("%s: flag %q stands where COMMAND is expected", c.Command.Name, a)
	}
	return nil
}

// sandboxConfig reads the common flags; none applies without --policy.
func sandboxConfig(c *cli.Context, none policy.Builtin) (sandbox.Config, error) {
	cfg := sandbox.Config{
		Name: c.String("name"), Version: cmdline.Version(),
		NoIPv4: c.Bool("ipv6-only"), NoIPv6: c.Bool("ipv4-only"),
		HostLoopback: c.Bool("host-loopback"), PublishAuto: c.Bool("publish-auto"),
		FlowLog: c.String("flow-log"), FlowLogMaxFiles: c.Int("flow-log-max-files"), Verbose: c.Bool("verbose"),
	}
	g := &cfg.Guest
	g.Link = tun.Config{
		Name: c.String("interface"), MTU: c.Int("mtu"), Queues: c.Int("queues"), NoOffload: c.Bool("no-offload"),
	}
	var errs []error
	// A flag that was given counts even with an empty value, which is an error of its own.
	try := func(name string, f func(string) error) {
		if v := c.String(name); v != "" || c.IsSet(name) {
			if err := f(v); err != nil {
				errs = append(errs, fmt.Errorf("--%s: %w", name, err))
			}
		}
	}
	each := func(name string, f func(string) error) {
		for _, v := range c.StringSlice(name) {
			if err := f(v); err != nil {
				errs = append(errs, fmt.Errorf("--%s: %w", name, err))
			}
		}
	}
	try("link", func(v string) error {
		switch v {
		case "tap":
			g.Link.Kind = tun.TAP
		case "tun":
			g.Link.Kind = tun.TUN
		default:
			return fmt.Errorf("%q: want tap or tun", v)
		}
		if g.Link.Name == "" {
			g.Link.Name = v + "0"
		}
		return nil
	})
	if m := g.Link.MTU; m < tun.MinMTU || m > tun.MaxMTU {
		errs = append(errs, fmt.Errorf("--mtu: %d: want %d to %d", m, tun.MinMTU, tun.MaxMTU))
	}
	if q := g.Link.Queues; q < 1 || q > tun.MaxQueues {
		errs = append(errs, fmt.Errorf("--queues: %d: want 1 to %d", q, tun.MaxQueues))
	}
	try("flow-log-max-size", func(v string) (err error) { cfg.FlowLogMaxSize, err = sandbox.ParseFlowLogSize(v); return err })
	if err := sandbox.CheckFlowLogFiles(c.Int("flow-log-max-files")); err != nil {
		errs = append(errs, fmt.Errorf("--flow-log-max-files: %w", err))
	}
	if cfg.FlowLog == "" && (c.IsSet("flow-log-max-size") || c.IsSet("flow-log-max-files")) {
		errs = append(errs, errors.New("--flow-log-max-size and --flow-log-max-files bound a --flow-log FILE, which is not given"))
	}
	try("mac", func(v string) (err error) { g.MAC, err = net.ParseMAC(v); return err })
	try("address", prefixOf(&g.Addr4, 4))
	try("address6", prefixOf(&g.Addr6, 6))
	try("gateway", addrOf(&g.Gateway4, 4))
	try("gateway6", addrOf(&g.Gateway6, 6))
	prefixes := func(name string, into *[]netip.Prefix, parse func([]string) ([]netip.Prefix, error)) {
		var err error
		if *into, err = parse(c.StringSlice(name)); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", name, err))
		}
	}
	prefixes("metadata-address", &cfg.Metadata, policy.ParseMetadata)
	prefixes("nat64-prefix", &cfg.NAT64, policy.ParseNAT64)
	each("publish", func(v string) error {
		p, err := sandbox.ParsePort(v)
		cfg.Ports = append(cfg.Ports, p)
		return err
	})
	each("dns", func(v string) error {
		a, err := serverOf(v)
		cfg.Servers = append(cfg.Servers, a)
		return err
	})
	if s := c.StringSlice("dns-search"); len(s) > 0 {
		cfg.Search = s
	}
	each("add-host", func(v string) error {
		name, addr, ok := strings.Cut(v, ":")
		if !ok || name == "" {
			return fmt.Errorf("%q: want NAME:ADDRESS", v)
		}
		a, err := netip.ParseAddr(strings.Trim(addr, "[]"))
		if err != nil {
			return fmt.Errorf("%q: %w", v, err)
		}
		if cfg.Hosts == nil {
			cfg.Hosts = make(map[string][]netip.Addr)
		}
		cfg.Hosts[name] = append(cfg.Hosts[name], a.Unmap())
		return nil
	})
	each("sysctl", func(v string) error {
		name, value, ok := strings.Cut(v, "=")
		if !ok {
			return fmt.Errorf("%q: want NAME=VALUE", v)
		}
		if cfg.Sysctls == nil {
			cfg.Sysctls = make(map[string]string)
		}
		cfg.Sysctls[name] = value
		return nil
	})
	cfg.Policy = policy.NotGiven(none)
	try("policy", func(v string) error {
		d, err := readPolicy(v, filepath.Base(v))
		cfg.Policy = policy.Given(d)
		return err
	})
	return cfg, errors.Join(errs...)
}

func prefixOf(p *netip.Prefix, family int) func(string) error {
	return func(v string) (err error) {
		*p, err = netip.ParsePrefix(v)
		if err == nil && p.Addr().Is4() != (family == 4) {
			return fmt.Errorf("%q is not an IPv%d prefix", v, family)
		}
		return err
	}
}

func addrOf(a *netip.Addr, family int) func(string) error {
	return func(v string) (err error) {
		*a, err = netip.ParseAddr(v)
		if err == nil && a.Is4() != (family == 4) {
			return fmt.Errorf("%q is not an IPv%d address", v, family)
		}
		return err
	}
}

// serverOf parses a name server; the port defaults to 53.
func serverOf(v string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(strings.Trim(v, "[]")); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	a, err := netip.ParseAddrPort(v)
	if err != nil {
		return a, fmt.Errorf("%q is no ADDRESS or ADDRESS:PORT", v)
	}
	return a, nil
}

// preserved returns n of the caller's descriptors, from 3 on.
func preserved(n int) ([]*os.File, error) {
	if n < 0 {
		return nil, fmt.Errorf("--preserve-fds: %d: want 0 or more", n)
	}
	var files []*os.File
	for fd := 3; fd < 3+n; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("--preserve-fds: descriptor %d is not open", fd)
		}
		files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("preserved descriptor %d", fd)))
	}
	return files, nil
}

// attachTo returns a sandbox.StartGuest for an existing namespace.
func attachTo(t guest.Target) sandbox.StartGuest {
	return func(ctx context.Context, cfg guest.Config) (*guest.Guest, error) { return guest.Attach(ctx, t, cfg) }
}
