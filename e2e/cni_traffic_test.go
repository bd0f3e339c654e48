package e2e

// Traffic between pods, the node and the outside, and the addresses that it shows.

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// mains are the main plugins that the traffic tests run behind, chained and delegated.
var mains = []struct {
	name string
	network
}{
	{"after ptp", network{version: "1.0.0", main: "ptp", subnets: dual}},
	{"after bridge", network{version: "1.0.0", main: "bridge", subnets: dual}},
	{"with ptp as delegate", network{version: "1.0.0", main: "ptp", subnets: dual, alone: true}},
	{"as TUN after ptp", network{version: "1.1.0", main: "ptp", subnets: dual, sluice: map[string]any{"mode": "tun"}}},
}

// nodeAddr returns the node's own address on far's link.
func nodeAddr(six bool) string { return map[bool]string{false: pair4, true: pair6}[six] }

func farAddr(six bool) string { return map[bool]string{false: far4, true: far6}[six] }

func TestCNITraffic(t *testing.T) {
	cniArea(t, "cni.traffic", "curl", "ping")
	for _, m := range mains {
		t.Run(m.name, func(t *testing.T) {
			n := newNode(t)
			list := n.conflist(t, m.network)
			a, b := n.add(t, list), n.add(t, list)
			for _, in := range []place{n, n.far, a, b} {
				serve(t, in)
			}
			for _, six := range []bool{false, true} {
				for _, row := range []struct {
					what   string
					from   place
					to     string
					source string // "" where the main plugin has the node use another one
				}{
					{"pod to node", a, nodeAddr(six), a.addr(six)},
					{"pod to far", a, farAddr(six), a.addr(six)},
					{"pod to pod", a, b.addr(six), a.addr(six)},
					{"pod to pod, back", b, a.addr(six), b.addr(six)},
					{"far to pod", n.far, a.addr(six), farAddr(six)},
					{"node to pod", n, a.addr(six), ""},
					{"pod to itself", a, a.addr(six), a.addr(six)},
				} {
					t.Run(fmt.Sprintf("%s %s", row.what, map[bool]string{false: "IPv4", true: "IPv6"}[six]), func(t *testing.T) {
						r := ok(t, row.from, 10*time.Second, "curl", "-gsS", "-m", "5", url(row.to, portHTTP, "/addr"))
						got, _, err := net.SplitHostPort(strings.TrimSpace(r.out))
						if err != nil {
							got = strings.TrimSpace(r.out)
						}
						if row.source != "" && got != row.source {
							t.Errorf("the server saw %q, not %q\n%s", got, row.source, r)
						}
						d, r := udp(t, row.from, "-size", "1200", "-count", "20", at(row.to, portEcho))
						if d.Received != 20 || d.Wrong != 0 {
							t.Errorf("datagrams fail\n%s", r)
						}
						ok(t, row.from, 10*time.Second, "ping", "-c", "2", "-i", "0.05", "-W", "3", row.to)
						if d, r := dial(t, row.from, "-timeout", "2s", at(row.to, 4)); d.Error != "ECONNREFUSED" {
							t.Errorf("a closed port: %q\n%s", d.Error, r)
						}
					})
				}
			}
		})
	}
}

func TestCNIHostPort(t *testing.T) {
	cniArea(t, "cni.hostport", "curl", "iptables")
	for _, row := range []struct {
		name  string
		alone bool
	}{{"portmap before sluice", false}, {"portmap as delegate", true}} {
		t.Run(row.name, func(t *testing.T) {
			n := newNode(t)
			list := n.conflist(t, network{version: "1.0.0", main: "ptp", subnets: dual, portmap: true, alone: row.alone})
			p := n.add(t, list, map[string]any{"portMappings": []map[string]any{
				{"hostPort": 8088, "containerPort": portHTTP, "protocol": "tcp"},
				{"hostPort": 8085, "containerPort": portWhoami, "protocol": "udp"},
			}})
			serve(t, p)
			for _, six := range []bool{false, true} {
				r := ok(t, n.far, 10*time.Second, "curl", "-gsS", "-m", "5", url(nodeAddr(six), 8088, "/addr"))
				if !strings.Contains(r.out, farAddr(six)) {
					t.Errorf("the pod saw not %s\n%s", farAddr(six), r)
				}
				if d, r := udp(t, n.far, at(nodeAddr(six), 8085)); !strings.Contains(d.Got, farAddr(six)) {
					t.Errorf("the pod saw not %s\n%s", farAddr(six), r)
				}
			}
			if err := p.del(); err != nil {
				t.Errorf("DEL: %v", err)
			}
			if d, r := dial(t, n.far, "-timeout", "2s", at(pair4, 8088)); d.Error != "ECONNREFUSED" {
				t.Errorf("the port after DEL: %q\n%s", d.Error, r)
			}
			p.close(t)
		})
	}
}

func TestCNIIperf(t *testing.T) {
	cniArea(t, "cni.iperf3", "iperf3")
	n := newNode(t)
	list := n.conflist(t, network{version: "1.0.0", main: "ptp", subnets: dual})
	a, b := n.add(t, list), n.add(t, list)
	iperfServer(t, n)
	iperfServer(t, b)
	for _, six := range []bool{false, true} {
		for _, row := range []struct {
			what string
			from place
			to   string
		}{
			// At the address from which the node answers a pod, since iperf3's server picks no
			// source for its datagrams.
			{"pod to node", a, a.gateway(six)},
			{"node to pod", n, b.addr(six)},
			{"pod to pod", a, b.addr(six)},
			{"far to pod", n.far, b.addr(six)},
		} {
			for _, flags := range [][]string{{"-n", "300M"}, {"-n", "300M", "-R", "-P", "4"}, {"-u", "-b", "20M", "-t", "1"}} {
				rep, r := iperf(t, row.from, append([]string{"-c", row.to}, flags...)...)
				switch {
				case flags[0] == "-u" && (rep.End.Sum.Packets == 0 || rep.End.Sum.LostPercent > 1):
					t.Errorf("%s: %.1f %% of %d datagrams lost\n%s", row.what, rep.End.Sum.LostPercent, rep.End.Sum.Packets, r)
				case flags[0] == "-n" && rep.End.SumReceived.Bytes < 290<<20:
					t.Errorf("%s: %d bytes received\n%s", row.what, rep.End.SumReceived.Bytes, r)
				case flags[0] == "-n":
					t.Logf("%s to %s %v: %.1f Gbit/s", row.what, row.to, flags, rep.End.SumReceived.BitsPerSecond/1e9)
				}
			}
		}
	}
}

// TestCNIPolicy has one pod that may reach the server and one that may not, both ways.
func TestCNIPolicy(t *testing.T) {
	cniArea(t, "cni.policy", "curl")
	n := newNode(t)
	open := n.conflist(t, network{version: "1.0.0", main: "ptp", subnets: dual})
	friend, stranger := n.add(t, open), n.add(t, open)
	rule := func(key string, ports ...int) map[string]any {
		peers := []any{map[string]any{"cidr": friend.addr(false) + "/32"}, map[string]any{"cidr": friend.addr(true) + "/128"}}
		var list []any
		for _, p := range ports {
			list = append(list, map[string]any{"protocol": "TCP", "port": p})
		}
		return map[string]any{"name": "friend", "action": "allow", key: peers, "ports": list}
	}
	for _, action := range []string{"drop", "reject"} {
		t.Run(action, func(t *testing.T) {
			gated := n.add(t, n.conflist(t, network{version: "1.0.0", main: "ptp", subnets: dual, sluice: map[string]any{
				"policy": map[string]any{
					"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": map[string]any{"name": "gate"},
					"spec": map[string]any{"defaultAction": action,
						"ingress": []any{rule("from", portHTTP, 4)}, "egress": []any{rule("to", portHTTP)}},
				}}}))
			for _, p := range []*pod{gated, friend, stranger} {
				server := serve(t, p)
				defer func() { server.stop(t, 9) }()
			}
			refused := map[string]string{"drop": "timeout", "reject": "ECONNREFUSED"}[action]
			for _, six := range []bool{false, true} {
				for _, row := range []struct {
					what     string
					from, to *pod
					port     int
					error    string
				}{
					{"allowed in", friend, gated, portHTTP, ""},
					{"another port", friend, gated, portWhoami, refused},
					{"another pod", stranger, gated, portHTTP, refused},
					{"an allowed port that is closed", friend, gated, 4, "ECONNREFUSED"},
					{"allowed out", gated, friend, portHTTP, ""},
					{"out to another pod", gated, stranger, portHTTP, refused},
				} {
					d, r := dial(t, row.from, "-timeout", "700ms", "-send", "GET / HTTP/1.0\r\n\r\n", at(row.to.addr(six), row.port))
					if d.Error != row.error && !(action == "reject" && row.error == refused && d.Error == "EACCES") {
						t.Errorf("%s: %q, not %q\n%s", row.what, d.Error, row.error, r)
					}
				}
				if r := run(t, n, 5*time.Second, "curl", "-gsS", "-m", "1", url(gated.addr(six), portHTTP, "/")); r.status == 0 {
					t.Errorf("the node, which the policy does not name, gets in\n%s", r)
				}
			}
			if err := gated.del(); err != nil {
				t.Errorf("DEL: %v", err)
			}
		})
	}
}
