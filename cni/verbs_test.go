package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

func TestAddPutsADeviceInThePlaceOfTheInterface(t *testing.T) {
	for _, mode := range []string{"tap", "tun"} {
		t.Run(mode, func(t *testing.T) {
			n := newNode(t)
			before := n.inside()
			testutil.Must(t, n.add(`"mode": "`+mode+`"`))

			link, err := n.podH.LinkByName("eth0")
			testutil.Must(t, err)
			if tap, ok := link.(*netlink.Tuntap); !ok || (tap.Mode == netlink.TUNTAP_MODE_TAP) != (mode == "tap") {
				t.Fatalf("the pod's eth0 is %v", link)
			}
			inside := n.inside()
			if mode == "tun" {
				inside.MAC = before.MAC // it has none
			}
			inside.Neighs = before.Neighs // they are not the pod's any more
			if !reflect.DeepEqual(before, inside) {
				t.Errorf("the device has not what the interface had:\nbefore %s\nafter  %s", asJSON(before), asJSON(inside))
			}

			up, upH := n.uplink()
			_, main, err := uplink.ReadLink(upH, "eth0")
			testutil.Must(t, err)
			main.Addrs, main.Neighs = withoutLinkLocal(main.Addrs), permanent(main.Neighs)
			if !reflect.DeepEqual(before, main) {
				t.Errorf("in the uplink namespace the interface has not what it had:\nbefore %s\nafter  %s", asJSON(before), asJSON(main))
			}
			for name, want := range map[string]string{
				"ipv4/ip_forward": "1", "ipv4/ip_local_port_range": "32768 65535", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/eth0/rp_filter": "0",
				"ipv4/conf/in0/accept_local": "1", "ipv6/conf/all/forwarding": "1", "ipv6/conf/eth0/accept_ra": "0",
			} {
				var got []byte
				testutil.Must(t, up.Do(func(ns.NetNS) (err error) { got, err = os.ReadFile("/proc/sys/net/" + name); return err }))
				if strings.Join(strings.Fields(string(got)), " ") != want {
					t.Errorf("%s is %q in the uplink namespace, not %s", name, got, want)
				}
			}
			testutil.Must(t, n.check())
			if err := n.add(); err == nil || !strings.Contains(err.Error(), "already") {
				t.Errorf("a second ADD: %v", err)
			}
			testutil.Must(t, n.del())
			n.unchanged(before)
			n.clean()
			testutil.Must(t, n.del()) // again
			n.unchanged(before)
			n.clean()
		})
	}
}

func TestADefaultRouteIsAlwaysThere(t *testing.T) {
	n := newNode(t)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		testutil.Must(t, n.podH.RouteDel(&netlink.Route{Family: family, Dst: uplink.IPNet(netip.PrefixFrom(uplink.Unspecified(family), 0))}))
	}
	before := n.inside()
	testutil.Must(t, n.add())
	for family, gateway := range map[int]string{netlink.FAMILY_V4: "169.254.1.1", netlink.FAMILY_V6: "fe80::1"} {
		i := slices.IndexFunc(n.inside().Routes, func(r uplink.RouteState) bool { return r.Family == family && r.IsDefault() })
		if i < 0 || n.inside().Routes[i].Gateway.String() != gateway {
			t.Errorf("the pod's routes %s lack a default by %s", asJSON(n.inside().Routes), gateway)
		}
	}
	testutil.Must(t, n.del())
	n.unchanged(before)
}

// TestASecondNetworkLeavesTheRoutesOfTheFirst has a container in two networks, as podman
// makes them: both main plugins give a default route, the last one's goes first.
func TestASecondNetworkLeavesTheRoutesOfTheFirst(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.podH.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "first"}, PeerName: "far"}))
	for _, command := range []string{
		"link set far up", "link set first up", "addr add 10.99.0.5/24 dev first",
		"route append default via 10.99.0.1 dev first", // bridge of the second network came before it
	} {
		n.ip(strings.Fields(command)...)
	}
	defaults := func() (via []string) {
		all, err := n.podH.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN, Dst: nil}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		testutil.Must(t, err)
		for _, r := range all {
			via = append(via, r.Gw.String())
		}
		return via
	}
	same(t, "the default routes of a pod in two networks", defaults(), host4, "10.99.0.1")
	testutil.Must(t, n.add())
	same(t, "the default routes after ADD", defaults(), host4, "10.99.0.1")
	testutil.Must(t, n.del())
	same(t, "the default routes after DEL", defaults(), host4, "10.99.0.1")
}

// TestAPrefixIsReachedAsTheMainPluginSays has routes as ptp makes them: its pods are not
// on one link, so what the kernel makes of an address and its prefix must not come back.
func TestAPrefixIsReachedAsTheMainPluginSays(t *testing.T) {
	n := newNode(t)
	for _, p := range [][2]string{{"10.88.0.0/24", host4}, {"fd88::/64", host6}} {
		n.ip("route", "del", p[0], "dev", "eth0", "proto", "kernel")
		n.ip("route", "add", p[1], "dev", "eth0")
		n.ip("route", "add", p[0], "via", p[1], "dev", "eth0")
	}
	before := n.inside()
	testutil.Must(t, n.add())
	for _, p := range [][2]string{{"10.88.0.0/24", host4}, {"fd88::/64", host6}} {
		dst := network(p[0])
		list, err := n.podH.RouteListFiltered(uplink.FamilyOf(uplink.PrefixOf(dst).Addr()), &netlink.Route{Dst: dst}, netlink.RT_FILTER_DST)
		testutil.Must(t, err)
		if len(list) != 1 || list[0].Gw.String() != p[1] {
			t.Errorf("the routes to %s are %v, not one by %s", p[0], list, p[1])
		}
	}
	testutil.Must(t, n.del())
	n.unchanged(before)
}

func TestAFailureAtAnyStepTakesEverythingBack(t *testing.T) {
	n := newNode(t)
	before := n.inside()
	reached := 0
	for _, step := range addSteps {
		if step == uplink.StepDelegated {
			continue // TestDelegates
		}
		fault := errors.New("a fault at " + step)
		n.plugin.Reached = func(s string) error {
			if s == step {
				reached++
				return fault
			}
			return nil
		}
		if err := n.add(); !errors.Is(err, fault) {
			t.Fatalf("ADD with a fault at %s: %v", step, err)
		}
		t.Run(step, func(t *testing.T) {
			at := *n
			at.t = t
			at.unchanged(before)
			at.clean()
		})
	}
	if reached != len(addSteps)-1 {
		t.Errorf("%d of the steps were reached", reached)
	}
	n.plugin.Reached = nil
	n.procs.fail = errors.New("no monitor today")
	if err := n.add(); !errors.Is(err, n.procs.fail) {
		t.Errorf("ADD without a monitor: %v", err)
	}
	n.unchanged(before)
	n.clean()
	if err := n.add(`"policy": {"mistake": true}`); err == nil || !strings.Contains(err.Error(), "mistake") {
		t.Errorf("ADD with a policy that is none: %v", err)
	}
	n.unchanged(before)
	n.clean()
}

func TestDelOfWhateverIsLeft(t *testing.T) {
	for _, row := range []struct {
		name    string
		spoil   func(*node)
		podGone bool
	}{
		{name: "the monitor was killed", spoil: func(n *node) { endProcess(n.procs.pid(n.name())) }},
		{name: "the pod is gone", spoil: (*node).closePod, podGone: true},
		{name: "the record is half-written", spoil: func(n *node) {
			testutil.Must(n.t, os.Truncate(filepath.Join(n.state, attachmentsDir, n.name(), recordFile), 100))
		}},
		{name: "the record is gone", spoil: func(n *node) {
			testutil.Must(n.t, os.Remove(filepath.Join(n.state, attachmentsDir, n.name(), recordFile)))
		}},
		{name: "the attachment's directory is gone", spoil: func(n *node) {
			testutil.Must(n.t, os.RemoveAll(filepath.Join(n.state, attachmentsDir, n.name())))
		}},
		{name: "the device is gone from the pod", spoil: func(n *node) {
			link, err := n.podH.LinkByName("eth0")
			testutil.Must(n.t, err)
			testutil.Must(n.t, n.podH.LinkDel(link))
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			n := newNode(t)
			before := n.inside()
			testutil.Must(t, n.add())
			row.spoil(n)
			testutil.Must(t, n.del())
			if !row.podGone {
				n.unchanged(before)
			}
			n.clean()
			testutil.Must(t, n.del())
			n.clean()
		})
	}
}

func TestDelWithoutTheUplinkNamespace(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.add())
	testutil.Must(t, unix.Unmount(filepath.Join(n.state, netnsDir, n.name()), unix.MNT_DETACH))
	testutil.Must(t, n.del())
	n.clean()
}

func TestAnotherPodsNamespaceIsLeftAlone(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.add())
	n.closePod()
	bindNetns(t, n.podNS) // by the same path
	testutil.Must(t, n.del())
	other, err := ns.GetNS(n.podNS)
	testutil.Must(t, err)
	h, err := uplink.Handle(other)
	testutil.Must(t, err)
	links, err := h.LinkList()
	testutil.Must(t, err)
	if len(links) != 1 {
		t.Errorf("the other pod has got interfaces: %v", links)
	}
	h.Close()
	testutil.Must(t, other.Close())
	testutil.Must(t, unix.Unmount(n.podNS, unix.MNT_DETACH))
	n.clean()
}

func TestAnAttachmentOfAnotherBoot(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.add())
	n.edit(func(a *Attachment) { a.BootID = "00000000-0000-0000-0000-000000000000" })
	if err := n.check(); err == nil || !strings.Contains(err.Error(), "reboot") {
		t.Errorf("CHECK: %v", err)
	}
	n.procs.stopAll(t)
	testutil.Must(t, n.gc(false))
	n.clean()
}

// edit changes the record.
func (n *node) edit(f func(*Attachment)) {
	n.t.Helper()
	path := filepath.Join(n.state, attachmentsDir, n.name(), recordFile)
	b, err := os.ReadFile(path)
	testutil.Must(n.t, err)
	var a Attachment
	testutil.Must(n.t, json.Unmarshal(b, &a))
	f(&a)
	b, err = json.Marshal(a)
	testutil.Must(n.t, err)
	testutil.Must(n.t, os.WriteFile(path, b, 0o600))
}

func TestCheckMissesWhateverIsMissing(t *testing.T) {
	for _, row := range []struct {
		name  string
		spoil func(*node)
		says  string
	}{
		{"the monitor", func(n *node) { _ = n.procs.Stop(n.t.Context(), LaunchSpec{Name: n.name()}) }, "nothing serves the pod"},
		{"the monitor behind a device that stays", func(n *node) { testutil.Must(n.t, os.Remove(n.procs.file(n.name()))) }, "dead"},
		{"an address", func(n *node) { n.ip("addr", "del", pod4+"/24", "dev", "eth0") }, pod4},
		{"a route", func(n *node) { n.ip("route", "del", "192.0.2.0/24") }, "192.0.2.0/24"},
		{"the IPv6 address", func(n *node) { n.ip("addr", "del", pod6+"/64", "dev", "eth0") }, pod6},
		{"the link's state", func(n *node) { n.ip("link", "set", "eth0", "down") }, "down"},
		{"the MTU", func(n *node) { n.ip("link", "set", "eth0", "mtu", "1400") }, "1400"},
		{"the main interface", func(n *node) {
			_, h := n.uplink()
			link, err := h.LinkByName("eth0")
			testutil.Must(n.t, err)
			testutil.Must(n.t, h.LinkDel(link))
		}, "uplink"},
		{"the rules", func(n *node) {
			up, _ := n.uplink()
			testutil.Must(n.t, up.Do(func(ns.NetNS) error { return dropRules() }))
		}, "rules"},
		{"the record", func(n *node) {
			testutil.Must(n.t, os.Remove(filepath.Join(n.state, attachmentsDir, n.name(), recordFile)))
		}, "no attachment"},
	} {
		t.Run(row.name, func(t *testing.T) {
			n := newNode(t)
			testutil.Must(t, n.add())
			testutil.Must(t, n.check())
			pid := n.procs.pid(n.name())
			row.spoil(n)
			if err := n.check(); err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("CHECK without it: %v", err)
			}
			endProcess(pid)
			testutil.Must(t, n.del())
		})
	}
}

func TestGCRemovesWhatIsNotValid(t *testing.T) {
	n := newNode(t)
	before := n.inside()
	testutil.Must(t, n.add())
	testutil.Must(t, n.gc(true))
	testutil.Must(t, n.check())
	// Another network's GC leaves it alone.
	c, args := n.config()
	c.Name, c.prevResult = "othernet", nil
	testutil.Must(t, n.plugin.gc(t.Context(), c, args))
	testutil.Must(t, n.check())
	testutil.Must(t, n.gc(false))
	n.unchanged(before)
	n.clean()
	testutil.Must(t, n.gc(false))
}

func TestADeadMonitorIsReplaced(t *testing.T) {
	for name, repair := range map[string]func(*node) error{
		"by GC":     func(n *node) error { return n.gc(true) },
		"by repair": func(n *node) error { return n.plugin.Repair(n.t.Context(), n.state) },
		"by STATUS": func(n *node) error { return n.status() },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			before := n.inside()
			testutil.Must(t, n.add())
			first := n.procs.pid(n.name())
			endProcess(first)
			testutil.Eventually(t, "the device ends with its monitor", func() bool {
				_, err := n.podH.LinkByName("eth0")
				return err != nil
			})
			testutil.Must(t, repair(n))
			testutil.Must(t, n.check())
			second := n.procs.pid(n.name())
			if second == first {
				t.Fatal("there is no other monitor")
			}
			testutil.Must(t, repair(n))
			if n.procs.pid(n.name()) != second {
				t.Error("a monitor that lives was replaced")
			}
			testutil.Must(t, n.del())
			n.unchanged(before)
			n.clean()
		})
	}
}

func TestAMonitorThatDoesNotAnswerIsNotReplaced(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.add())
	first := n.procs.pid(n.name())
	n.procs.mute = true
	if err := n.check(); err == nil {
		t.Error("CHECK does not mind")
	}
	testutil.Must(t, n.gc(true))
	testutil.Must(t, n.status())
	if now := n.procs.pid(n.name()); now != first {
		t.Errorf("the monitor %d has taken the place of %d, which lives", now, first)
	}
	n.procs.mute = false
	testutil.Must(t, n.del())
	n.clean()
}

// A runtime that is told of an error by STATUS takes the node to be without network.
func TestStatusDoesNotFailForOneContainer(t *testing.T) {
	n := newNode(t)
	testutil.Must(t, n.add())
	endProcess(n.procs.pid(n.name()))
	var told strings.Builder
	n.plugin.Stderr = &told
	n.procs.fail = errors.New("no room for a monitor")
	testutil.Must(t, n.status())
	if !strings.Contains(told.String(), n.name()) || !strings.Contains(told.String(), "no room for a monitor") {
		t.Errorf("it says %q", told.String())
	}
	if err := n.check(); err == nil {
		t.Error("CHECK does not mind")
	}
	n.procs.fail = nil
	testutil.Must(t, n.status())
	testutil.Must(t, n.check())
	testutil.Must(t, n.del())
	n.clean()
}

// Who is root in a pod can name interfaces as they like, and give lo the names that DEL needs.
func TestDelIsNotHinderedByNames(t *testing.T) {
	onTheWay := (&giving{ifName: "eth0"}).onTheWay()
	for _, row := range []struct {
		name  string
		steps [][]string
	}{
		{"the pod has an eth0 of its own", [][]string{{"link", "set", "eth0", "name", "tap0"}, {"link", "add", "eth0", "type", "veth", "peer", "name", "other"}}},
		{"another interface is called eth0 too", [][]string{{"link", "set", "eth0", "name", "tap0"}, {"link", "property", "add", "dev", "lo", "altname", "eth0"}}},
		{"lo is called eth0", [][]string{{"link", "set", "eth0", "name", "tap0"}, {"link", "set", "lo", "down"}, {"link", "set", "lo", "name", "eth0"}}},
		{"the name on the way is taken", [][]string{{"link", "add", onTheWay, "type", "veth", "peer", "name", "other"}}},
		{"lo has the name on the way", [][]string{{"link", "property", "add", "dev", "lo", "altname", onTheWay}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			n := newNode(t)
			before := n.inside()
			testutil.Must(t, n.add())
			for _, step := range row.steps {
				n.ip(step...)
			}
			testutil.Must(t, n.del())
			n.unchanged(before)
			if _, err := os.Lstat(filepath.Join(n.state, attachmentsDir, n.name())); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("left: the record: %v", err)
			}
		})
	}
}

func TestAContainerThatIsNotSelectedPasses(t *testing.T) {
	n := newNode(t)
	before := n.inside()
	selector := `"select": {"namespaces": ["other"]}`
	testutil.Must(t, n.add(selector))
	n.unchanged(before)
	testutil.Must(t, n.check())
	testutil.Must(t, n.del(selector))
	n.unchanged(before)
	n.clean()
}

func TestAddRefuses(t *testing.T) {
	n := newNode(t)
	c, args := n.config()
	args.IfName = "eth7"
	if _, err := n.plugin.add(t.Context(), c, args); err == nil || !strings.Contains(err.Error(), "no interface eth7") {
		t.Errorf("an interface that is not there: %v", err)
	}
	c, args = n.config()
	args.Netns = fmt.Sprintf("/proc/%d/ns/net", os.Getpid())
	if _, err := n.plugin.add(t.Context(), c, args); err == nil || !strings.Contains(err.Error(), "own namespace") {
		t.Errorf("the host's namespace: %v", err)
	}
	if err := n.add(`"delegate": {"type": "ptp"}`); err == nil || !strings.Contains(err.Error(), "delegate too") {
		t.Errorf("chained and with a delegate: %v", err)
	}
	n.clean()
}

// ip runs ip(8) in the pod.
func (n *node) ip(args ...string) {
	n.t.Helper()
	testutil.Must(n.t, n.pod.Do(func(ns.NetNS) error {
		out, err := exec.Command("ip", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
		return nil
	}))
}

func dropRules() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	conn.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: uplink.TableName})
	return conn.Flush()
}
