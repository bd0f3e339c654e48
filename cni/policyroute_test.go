package cni

import (
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

// several gives the pod a route with two gateways in each family, and a rule by its own
// address to a table of the main interface's.
func (n *node) several() {
	n.t.Helper()
	eth0, err := n.podH.LinkByName("eth0")
	testutil.Must(n.t, err)
	for _, r := range []*netlink.Route{
		{Dst: network("203.0.113.0/24"), MultiPath: []*netlink.NexthopInfo{{Gw: net.ParseIP(host4), Hops: 2}, {Gw: net.ParseIP("10.88.0.9")}}},
		{Dst: network("2001:db8:7::/48"), MultiPath: []*netlink.NexthopInfo{{Gw: net.ParseIP(host6)}, {Gw: net.ParseIP("fd88::9"), Hops: 4}}},
	} {
		for _, h := range r.MultiPath {
			h.LinkIndex = eth0.Attrs().Index
		}
		testutil.Must(n.t, n.podH.RouteAdd(r))
	}
	testutil.Must(n.t, n.podH.RuleAdd(fromPod()))
}

func fromPod() *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Src, r.Table, r.Priority = netlink.FAMILY_V4, network(pod4+"/32"), 99, 1000
	return r
}

func TestRulesAndRoutesOfSeveralGatewaysAreFollowed(t *testing.T) {
	n := newNode(t)
	n.several()
	before := n.inside()
	multi := 0
	for _, r := range before.Routes {
		multi += len(r.Hops)
	}
	if multi != 4 {
		t.Fatalf("the pod has %d gateways of such routes: %s", multi, asJSON(before))
	}
	testutil.Must(t, n.add())
	if now := n.inside(); !slices.EqualFunc(now.Routes[:len(before.Routes)], before.Routes, func(a, b uplink.RouteState) bool { return asJSON(a) == asJSON(b) }) {
		t.Errorf("the pod's routes were\n%s\nand are\n%s", asJSON(before.Routes), asJSON(now.Routes))
	}
	_, uplinkNS := n.uplink()
	rules, err := uplinkNS.RuleList(netlink.FAMILY_V4)
	testutil.Must(t, err)
	if !slices.ContainsFunc(rules, func(r netlink.Rule) bool {
		return r.Priority == 1000 && r.Table == 99 && r.Src != nil && r.Src.IP.String() == pod4
	}) {
		t.Errorf("the uplink namespace's rules: %v", rules)
	}
	_, state, err := uplink.ReadLink(uplinkNS, "eth0")
	testutil.Must(t, err)
	multi = 0
	for _, r := range state.Routes {
		multi += len(r.Hops)
	}
	if multi != 4 {
		t.Errorf("the uplink namespace has %d gateways of such routes: %s", multi, asJSON(state.Routes))
	}
	testutil.Must(t, n.check())
	testutil.Must(t, uplinkNS.RuleDel(fromPod()))
	if err := n.check(); err == nil || !strings.Contains(err.Error(), "the routing rule 1000") {
		t.Errorf("CHECK without the rule: %v", err)
	}
	testutil.Must(t, n.del())
	n.unchanged(before)
	n.clean()
}

func TestWhatCannotBeFollowedIsRefused(t *testing.T) {
	for _, test := range []struct {
		name, want string
		spoil      func(*testing.T, *node)
	}{
		{"a rule by mark", "have the plugin before choose by address", func(t *testing.T, n *node) {
			r := fromPod()
			r.Mark = 7
			testutil.Must(t, n.podH.RuleAdd(r))
		}},
		{"a rule before ours", "have the plugin before use a later one", func(t *testing.T, n *node) {
			r := fromPod()
			r.Priority = 50
			testutil.Must(t, n.podH.RuleAdd(r))
		}},
		{"a route by two interfaces", "is by several interfaces", func(t *testing.T, n *node) {
			testutil.Must(t, n.podH.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "net1"}, PeerName: "net1far"}))
			net1, err := n.podH.LinkByName("net1")
			testutil.Must(t, err)
			testutil.Must(t, n.podH.LinkSetUp(net1))
			testutil.Must(t, n.podH.AddrAdd(net1, address("10.99.0.2/24")))
			eth0, err := n.podH.LinkByName("eth0")
			testutil.Must(t, err)
			testutil.Must(t, n.podH.RouteAdd(&netlink.Route{Dst: network("203.0.113.0/24"), MultiPath: []*netlink.NexthopInfo{
				{Gw: net.ParseIP(host4), LinkIndex: eth0.Attrs().Index}, {Gw: net.ParseIP("10.99.0.1"), LinkIndex: net1.Attrs().Index}}}))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := newNode(t)
			test.spoil(t, n)
			if err := n.add(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("ADD says %v, want %q", err, test.want)
			}
			if link, err := n.podH.LinkByName("eth0"); err != nil || link.Type() != "veth" || link.Attrs().Flags&unix.IFF_UP == 0 {
				t.Errorf("the pod's interface: %v, %v", link, err)
			}
		})
	}
}

// Rules that are about something else are not ours to judge.
func TestOtherRulesAreLeft(t *testing.T) {
	n := newNode(t)
	elsewhere, forwarded := fromPod(), fromPod()
	elsewhere.Table, elsewhere.Mark = 1234, 5
	forwarded.IifName, forwarded.Mark = "net1", 5
	testutil.Must(t, n.podH.RuleAdd(elsewhere))
	testutil.Must(t, n.podH.RuleAdd(forwarded))
	testutil.Must(t, n.add())
	_, uplinkNS := n.uplink()
	rules, err := uplinkNS.RuleList(netlink.FAMILY_V4)
	testutil.Must(t, err)
	if slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Priority == 1000 }) {
		t.Errorf("the uplink namespace's rules: %v", rules)
	}
	testutil.Must(t, n.del())
	n.clean()
}
