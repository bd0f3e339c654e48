package e2e

// Other main plugins, plugins around sluice, and the keys that select its pods.

import (
	"strings"
	"testing"
	"time"
)

// both tries TCP, UDP and ping between two places, at the address of each.
func both(t *testing.T, a place, addrA string, b place, addrB string) {
	t.Helper()
	for _, way := range []struct {
		from, to     place
		source, addr string
	}{{a, b, addrA, addrB}, {b, a, addrB, addrA}} {
		d, r := dial(t, way.from, "-timeout", "3s", at(way.addr, portWhoami))
		if !strings.Contains(d.Got, way.source) {
			t.Errorf("%s saw %q, not %s\n%s", way.to, d.Got, way.source, r)
		}
		if u, r := udp(t, way.from, "-size", "1200", "-count", "20", at(way.addr, portEcho)); u.Received != 20 || u.Wrong != 0 {
			t.Errorf("datagrams fail\n%s", r)
		}
		ok(t, way.from, 10*time.Second, "ping", "-c", "2", "-i", "0.05", "-W", "3", way.addr)
	}
}

// TestCNIMacvlan puts pods on far's own link, by macvlan over the node's.
func TestCNIMacvlan(t *testing.T) {
	cniArea(t, "cni.macvlan", "ping")
	for _, alone := range []bool{false, true} {
		t.Run(map[bool]string{false: "chained", true: "delegating"}[alone], func(t *testing.T) {
			n := newNode(t)
			serve(t, n.far)
			list := n.conflist(t, network{version: "1.1.0", main: "macvlan", alone: alone, keys: map[string]any{
				"master": "h0", "mode": "bridge",
				"ipam": map[string]any{"type": "host-local", "dataDir": n.leases, "ranges": []any{
					[]any{map[string]any{"subnet": "198.51.100.0/24", "rangeStart": "198.51.100.100", "gateway": far4}},
					[]any{map[string]any{"subnet": "2001:db8:2::/64", "rangeStart": "2001:db8:2::100", "gateway": far6}},
				}, "routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}}},
			}})
			p, other := n.add(t, list), n.add(t, list)
			serve(t, p)
			serve(t, other)
			for _, six := range []bool{false, true} {
				both(t, p, p.addr(six), n.far, farAddr(six))
				both(t, p, p.addr(six), other, other.addr(six))
			}
			if err := p.check(); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			kill(t, p.attachment(t).PID)
			if err := n.gc(t.Context(), list, p, other); err != nil {
				t.Errorf("GC: %v", err)
			}
			both(t, p, p.addr(false), n.far, far4)
		})
	}
}

// TestCNIBandwidth limits a pod's rate by the bandwidth plugin, or by the worker in its place.
// After sluice, the plugin finds no veth in the pod and says so.
func TestCNIBandwidth(t *testing.T) {
	cniArea(t, "cni.bandwidth", "tc")
	const rate = 24_000_000
	n := newNode(t)
	serve(t, n.far)
	if r := run(t, n, 5*time.Second, "sh", "-c", "ip link add tbf0 type veth peer name tbf1 && tc qdisc add dev tbf0 root tbf rate 1mbit burst 32k latency 25ms; s=$?; ip link del tbf0; exit $s"); r.status != 0 {
		t.Skipf("this kernel has no tbf, which the plugin bandwidth shapes by: %s", strings.TrimSpace(r.err))
	}
	plugin := map[string]any{"type": "bandwidth", "capabilities": map[string]any{"bandwidth": true}}
	off := map[string]any{"capabilities": map[string]any{}}
	caps := map[string]any{"bandwidth": map[string]any{"ingressRate": rate, "ingressBurst": rate / 10, "egressRate": rate, "egressBurst": rate / 10}}
	for _, row := range []struct {
		name string
		network
		fails string
	}{
		{"the worker's own", network{}, ""},
		{"before sluice", network{before: plugin, sluice: off}, ""},
		// Delegates get only what sluice declares: both limit the rate.
		{"as delegate", network{before: plugin, alone: true}, ""},
		{"after sluice", network{after: plugin, sluice: off}, "veth"},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.version, row.main, row.subnets = "1.0.0", "ptp", dual
			p := n.newPod(t, n.conflist(t, row.network))
			p.rt.CapabilityArgs = caps
			err := p.tryAdd()
			if row.fails != "" {
				if err == nil || !strings.Contains(err.Error(), row.fails) {
					t.Errorf("ADD says %v, want %q", err, row.fails)
				}
			} else if err != nil {
				t.Fatalf("ADD: %v", err)
			} else {
				serve(t, p)
				if shapes := strings.Contains(ok(t, n, 5*time.Second, "tc", "qdisc", "show").out, "qdisc tbf"); shapes != (row.before != nil) {
					t.Errorf("the plugin shapes: %v", shapes)
				}
				for _, way := range []struct {
					what string
					from place
					to   string
				}{{"out", p, far4}, {"in", n.far, p.addr(true)}} {
					r := ok(t, way.from, 20*time.Second, peerBin(), "xfer", "-streams", "1", "-size", "2500000", at(way.to, portXfer))
					var x struct {
						OK   int
						Gbps float64 `json:"gbit_per_s"`
					}
					r.into(t, &x)
					if mbps := x.Gbps * 1000; x.OK != 1 || mbps < rate/1e6*0.5 || mbps > rate/1e6*1.3 {
						t.Errorf("%s: %.1f Mbit/s, want about %d\n%s", way.what, mbps, rate/1_000_000, r)
					}
				}
			}
			if err := p.del(); err != nil {
				t.Errorf("DEL: %v", err)
			}
			p.close(t)
			n.clean(t)
		})
	}
}

func TestCNISelect(t *testing.T) {
	cniArea(t, "cni.select")
	const annotations = "io.kubernetes.cri.pod-annotations"
	n := newNode(t)
	serve(t, n.far)
	for _, alone := range []bool{false, true} {
		list := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: alone, sluice: map[string]any{
			"capabilities": map[string]any{annotations: true}, "policy": gate["policy"],
			"select": map[string]any{"namespaces": []string{"team-*"}, "annotations": map[string]string{"sluice.dev/gate": "yes"}, "notAnnotations": map[string]string{"sluice.dev/out": "*"}},
		}})
		for _, row := range []struct {
			name, namespace string
			annotations     map[string]any
			taken           bool
		}{
			{"all conditions hold", "team-a", map[string]any{"sluice.dev/gate": "yes"}, true},
			{"another namespace", "default", map[string]any{"sluice.dev/gate": "yes"}, false},
			{"another value", "team-a", map[string]any{"sluice.dev/gate": "no"}, false},
			{"no annotation", "team-a", nil, false},
			{"excluded", "team-b", map[string]any{"sluice.dev/gate": "yes", "sluice.dev/out": "1"}, false},
		} {
			t.Run(map[bool]string{false: "chained, ", true: "delegating, "}[alone]+row.name, func(t *testing.T) {
				p := n.newPod(t, list)
				p.rt.Args = [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", row.namespace}, {"K8S_POD_NAME", "web"}}
				p.rt.CapabilityArgs = map[string]any{annotations: row.annotations}
				if err := p.tryAdd(); err != nil {
					t.Fatalf("ADD: %v", err)
				}
				link := ok(t, p, 5*time.Second, "ip", "-d", "-o", "link", "show", "eth0").out
				if taken := !strings.Contains(link, " veth "); taken != row.taken {
					t.Errorf("the pod's interface: %s", link)
				}
				if d, r := dial(t, p, "-timeout", "3s", at(far4, portWhoami)); !strings.HasPrefix(d.Got, p.addr(false)) {
					t.Errorf("the pod is seen as %q\n%s", d.Got, r)
				}
				// Only a pod that sluice took is gated.
				if d, r := dial(t, p, "-timeout", "500ms", "-send", "GET / HTTP/1.0\r\n\r\n", at(far6, portHTTP)); (d.Error == "") == row.taken {
					t.Errorf("to a port that the policy denies: %q\n%s", d.Error, r)
				}
				var all []attachment
				n.sluiceJSON(t, &all, "ps", "-o", "json")
				if (len(all) == 1) != row.taken {
					t.Errorf("`sluice ps` has %+v", all)
				}
				if err := p.check(); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				for _, f := range []func() error{
					func() error { return n.runtime("1.1.0").GetStatusNetworkList(t.Context(), list) },
					func() error { return n.gc(t.Context(), list, p) },
					p.del, p.del,
				} {
					if err := f(); err != nil {
						t.Error(err)
					}
				}
				p.close(t)
				n.clean(t)
			})
		}
	}
}

// TestCNIOneFamily has pods with a single family: traffic to the other fails at once.
func TestCNIOneFamily(t *testing.T) {
	cniArea(t, "cni.families", "ping")
	n := newNode(t)
	serve(t, n.far)
	for _, row := range []struct {
		name, main string
		six, alone bool
	}{
		{"IPv4 after ptp", "ptp", false, false}, {"IPv6 after ptp", "ptp", true, false},
		{"IPv4 by bridge", "bridge", false, true}, {"IPv6 by bridge", "bridge", true, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			subnets := []string{map[bool]string{false: pods4, true: pods6}[row.six]}
			p := n.add(t, n.conflist(t, network{version: "1.0.0", main: row.main, alone: row.alone, subnets: subnets}))
			serve(t, p)
			if len(p.addrs()) != 1 {
				t.Fatalf("the pod has %q", p.addrs())
			}
			both(t, p, p.addr(row.six), n.far, farAddr(row.six))
			both(t, p, p.addr(row.six), p, p.addr(row.six))
			if d, r := dial(t, p, "-timeout", "3s", at(farAddr(!row.six), portWhoami)); d.Error != "ENETUNREACH" && d.Error != "EADDRNOTAVAIL" || d.Ms > 500 {
				t.Errorf("the other family: %q\n%s", d.Error, r)
			}
			family := map[bool]string{false: "-6", true: "-4"}[row.six]
			if got := ok(t, p, 5*time.Second, "ip", family, "-o", "addr", "show", "dev", "eth0", "scope", "global").out; got != "" {
				t.Errorf("the pod has of the other family %s", got)
			}
		})
	}
}

func TestCNIFailClosed(t *testing.T) {
	cniArea(t, "cni.failclosed")
	n := newNode(t)
	serve(t, n.far)
	list := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, sluice: map[string]any{"failClosed": true}})
	p := n.add(t, list)
	serve(t, p)
	shut := func(t *testing.T, want bool) {
		t.Helper()
		for _, six := range []bool{false, true} {
			for _, way := range []struct {
				from place
				addr string
			}{{p, farAddr(six)}, {n.far, p.addr(six)}} {
				if d, r := dial(t, way.from, "-timeout", "500ms", at(way.addr, portWhoami)); (d.Error != "") != want {
					t.Errorf("it is to be shut: %v\n%s", want, r)
				}
			}
		}
	}
	shut(t, true)
	open := write(t, "open.yaml", `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: open}
spec:
  defaultAction: drop
  egress: [{name: out, action: allow, to: [{entity: world}]}]
  ingress: [{name: in, action: allow}]
`)
	name := p.attachment(t).Name
	n.sluiceCtl(t, "policy", "set", name, open).wantStatus(t, 0)
	shut(t, false)
	kill(t, p.attachment(t).PID)
	if err := n.gc(t.Context(), list, p); err != nil {
		t.Fatal(err)
	}
	shut(t, false)
	t.Run("the next pod is shut again", func(t *testing.T) {
		if err := p.del(); err != nil {
			t.Fatal(err)
		}
		if err := p.tryAdd(); err != nil {
			t.Fatal(err)
		}
		shut(t, true)
	})
}

// TestCNITuning has the tuning plugin set what it may on the pod's interface.
func TestCNITuning(t *testing.T) {
	cniArea(t, "cni.tuning")
	n := newNode(t)
	plugin := map[string]any{
		"type": "tuning", "promisc": true, "allmulti": true,
		"sysctl": map[string]any{"net.ipv4.conf.eth0.arp_ignore": "1", "net.ipv4.neigh.eth0.gc_stale_time": "123", "net.ipv6.conf.eth0.hop_limit": "33"},
	}
	for _, row := range []struct {
		name string
		network
	}{
		{"without sluice", network{before: plugin, bare: true}},
		{"before sluice", network{before: plugin}},
		{"as delegate", network{before: plugin, alone: true}},
		{"after sluice", network{after: plugin}},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.version, row.main, row.subnets = "1.0.0", "ptp", dual
			p := n.add(t, n.conflist(t, row.network))
			ok(t, p, 5*time.Second, "cat", "/proc/sys/net/ipv4/conf/eth0/arp_ignore", "/proc/sys/net/ipv4/neigh/eth0/gc_stale_time", "/proc/sys/net/ipv6/conf/eth0/hop_limit").wantOut(t, "1\n123\n33")
			ok(t, p, 5*time.Second, "ip", "-details", "link", "show", "eth0").wantOut(t, "promiscuity 1").wantOut(t, "ALLMULTI")
			if err := p.del(); err != nil {
				t.Errorf("DEL: %v", err)
			}
			p.close(t)
			n.clean(t)
		})
	}
}
