package main

// Inside is PID 1 of the run's namespaces. It builds the topology and runs the rounds.
//
//	namespace "host" (this one)                       candidates' namespaces
//	lo    127.0.0.1 ::1   ◄── far side, proxies' sockets
//	up0 ═ up1 (192.0.2.2/24, 2001:db8:1::2/64): the default route, which pasta copies
//	      its addresses from; nothing passes here
//	cable ════════════════════════════════════════════ cable (veth candidate)

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func inside() error {
	begun := time.Now()
	var o options
	if err := json.Unmarshal([]byte(os.Getenv(insideEnv)), &o); err != nil {
		return err
	}
	if err := errors.Join(os.Unsetenv(insideEnv), prepareNamespaces(&o)); err != nil {
		return fmt.Errorf("preparing the run's namespaces: %w", err)
	}
	f := newFleet(o)
	defer f.close()
	if err := f.startFarSide(); err != nil {
		return fmt.Errorf("starting the far side: %w", err)
	}
	cells, err := regexp.Compile(o.Cells)
	if err != nil {
		return err
	}
	res := newResults(o)
	probes := slices.DeleteFunc(allProbes(o.Short), func(p probe) bool { return !p.matches(cells) })
	if len(probes) == 0 {
		return fmt.Errorf("no cell matches %q", o.Cells)
	}
	for _, p := range probes {
		for _, c := range p.cells {
			if !slices.Contains(res.Order, c) {
				res.Order = append(res.Order, c)
			}
		}
	}
	if o.Short {
		res.Notes = append(res.Notes, fmt.Sprintf("the short mode leaves out 64 flows, IPv6, HTTP and %d connections in a row, and measures the limits once", manyConnects))
	}
	measure(f, res, probes, o, begun)
	f.describe(res)
	res.Seconds = time.Since(begun).Seconds()
	if err := res.writeJSON(o.JSON); err != nil {
		return err
	}
	if o.Chart != "" {
		if err := writeChart(o.Chart, res); err != nil {
			return err
		}
	}
	own := func(failure string) bool { return strings.HasPrefix(failure, ours) }
	if err := printTable(os.Stdout, res); err != nil || !slices.ContainsFunc(res.failures(), own) {
		return err
	}
	return errors.New("rounds of sluice failed, and are named above")
}

// measure runs every round, probe and candidate. Past the budget it begins only cells that have no
// sample yet, and past one and a half of it none.
func measure(f *fleet, res *results, probes []probe, o options, begun time.Time) {
	left := map[string]int{}
	for round := range o.Rounds {
		for _, p := range probes {
			if p.rounds > 0 && round >= p.rounds {
				continue
			}
			spent := time.Since(begun)
			if spent > o.Budget && (round > 0 || spent > o.Budget*3/2) {
				left[p.name]++
				continue
			}
			fmt.Fprintf(os.Stderr, "\r\033[K%4.0f s  round %d of %d  %s", spent.Seconds(), round+1, o.Rounds, p.name)
			for _, c := range p.order(round) {
				if o.Short && round > 0 && (c == veth || c == host) {
					continue // the limits only give the scale
				}
				got, err := f.measure(p, c)
				if err != nil {
					res.fail(p.name, c, err)
					continue
				}
				for metric, v := range got {
					res.add(metric, c, v)
				}
			}
		}
	}
	fmt.Fprint(os.Stderr, "\r\033[K")
	if len(left) > 0 {
		res.Notes = append(res.Notes, fmt.Sprintf("%d probes lost rounds to the time budget of %v: medians are of fewer samples (-budget, -rounds)", len(left), o.Budget))
	}
}

func prepareNamespaces(o *options) error {
	err := errors.Join(
		unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""),
	)
	if err != nil {
		return err
	}
	_ = os.WriteFile(congestionKey, []byte(congestion), 0) // the setting in force is reported
	if err := linkUp("lo"); err != nil {
		return err
	}
	if err := leadHere(netip.MustParseAddr(farNamed)); err != nil {
		return err
	}
	if err := cable("up0", "up1", 65520); err != nil {
		return err
	}
	if err := errors.Join(linkUp("up1"), addresses("up0", "192.0.2.2/24", "2001:db8:1::2/64")); err != nil {
		return err
	}
	up, err := netlink.LinkByName("up0")
	if err != nil {
		return err
	}
	for _, gw := range []string{"192.0.2.1", "2001:db8:1::1"} {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: up.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
			return fmt.Errorf("default route by %s: %w", gw, err)
		}
	}
	// Candidates get none of the capabilities that an ordinary user's run has here.
	if os.Getuid() != 0 {
		_, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0)
		if e != 0 {
			return fmt.Errorf("dropping ambient capabilities: %w (built with cgo?)", e)
		}
	}
	o.Notes = append(o.Notes, fmt.Sprintf("every candidate ran as uid %d", o.UID))
	return nil
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

func cable(a, b string, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a, mtu
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: b, PeerMTU: uint32(mtu)}
	if err := netlink.LinkAdd(v); err != nil {
		return fmt.Errorf("making the pair %s, %s: %w", a, b, err)
	}
	return nil
}

// addresses gives a link its addresses and brings it up.
func addresses(name string, prefixes ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, p := range prefixes {
		a, err := netlink.ParseAddr(p)
		if err != nil {
			return err
		}
		if strings.Contains(p, ":") {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("%s on %s: %w", p, name, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// leadHere redirects this namespace's connections to an otherwise unused IPv4 address to its
// loopback:
//
//	table ip bench { chain output { type nat hook output priority dstnat; ip daddr ADDR redirect } }
func leadHere(addr netip.Addr) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "bench"})
	chain := conn.AddChain(&nftables.Chain{Name: "output", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest})
	const destination = 16 // in an IPv4 header
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: destination, Len: 4, DestRegister: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr.AsSlice()},
		&expr.Redir{},
	}})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("redirect %s: %w", addr, err)
	}
	return nil
}

const policyHead = "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata:\n  name: many\nspec:\n  egress:\n"

// manyRules returns a policy whose last rule is the one that opens the far side.
func manyRules(n int) []byte {
	var b strings.Builder
	b.WriteString(policyHead)
	for i := range n {
		fmt.Fprintf(&b, "    - {name: r%d, action: allow, to: [{cidr: 10.%d.%d.%d/32}]}\n", i, 100+i>>14, i>>7&127, i&127)
	}
	b.WriteString("    - {name: far, action: allow, to: [{entity: host-loopback}]}\n")
	return []byte(b.String())
}

// manyDomains returns a policy of n rules by domain, the last of them the far side's. By address it
// opens only the loopback, where candidates are told to be ready.
func manyDomains(n int) []byte {
	var b strings.Builder
	b.WriteString(policyHead)
	b.WriteString("    - {name: ready, action: allow, to: [{entity: host-loopback}]}\n")
	for i := range n - 1 {
		domain := [...]string{"h%d.example.com", "*.s%d.example.com", "**.w%d.bench.test"}[i%3]
		fmt.Fprintf(&b, "    - {name: d%d, action: allow, to: [{domain: %q}]}\n", i, fmt.Sprintf(domain, i))
	}
	fmt.Fprintf(&b, "    - {name: far, action: allow, to: [{domain: %s}]}\n", farName)
	return []byte(b.String())
}

func (f *fleet) path(name string) string { return filepath.Join(f.o.Dir, name) }
