package e2e

// Policy as a user meets it: what is denied, how that is reported, and what a reload cuts.

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// policyFile writes a policy with the given spec.
func policyFile(t *testing.T, spec string) string {
	t.Helper()
	return write(t, "policy.yaml", "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata:\n  name: test\nspec:\n"+
		"  "+strings.ReplaceAll(strings.TrimSpace(spec), "\n", "\n  ")+"\n")
}

func TestPolicyDeniesAsItSays(t *testing.T) {
	area(t, "policy.deny", "ping", "dig")
	w := newWorld(t)
	serve(t, w.far)
	watch := w.far.watch(t, "f0")
	for _, row := range []struct {
		action, tcp, udp string
		fastest, slowest float64
	}{
		{"reject", "ECONNREFUSED EHOSTUNREACH ENETUNREACH EACCES", "ECONNREFUSED EHOSTUNREACH ENETUNREACH EACCES EPERM", 0, 300},
		{"drop", "timeout", "timeout", 1900, 4000},
	} {
		t.Run(row.action, func(t *testing.T) {
			sb := w.host.sandbox(t, "--policy", policyFile(t, fmt.Sprintf(`
defaultAction: %[1]s
egress:
- name: far-server
  action: allow
  to: [{cidr: %[2]s/32}, {cidr: "%[3]s/128"}]
- name: not-the-other
  action: %[1]s
  to: [{cidr: %[4]s/32}, {cidr: "%[5]s/128"}]`, row.action, far4, far6, other4, other6)))
			from := watch.count()
			for _, f := range families {
				if d, r := dial(t, sb, "-timeout", "2s", at(f.far, portWhoami)); d.Error != "" {
					t.Errorf("%s: what is allowed does not work\n%s", f.name, r)
				}
				d, r := dial(t, sb, "-timeout", "2s", at(f.other, portWhoami))
				if !contains(strings.Fields(row.tcp), d.Error) || d.Ms < row.fastest || d.Ms > row.slowest {
					t.Errorf("%s: a denied TCP connection got %q after %.0f ms\n%s", f.name, d.Error, d.Ms, r)
				}
				u, r := udp(t, sb, "-timeout", "2s", at(f.other, portEcho))
				if !contains(strings.Fields(row.udp), u.Error) || u.Ms < row.fastest || u.Ms > row.slowest {
					t.Errorf("%s: a denied datagram got %q after %.0f ms\n%s", f.name, u.Error, u.Ms, r)
				}
				if r := run(t, sb, 10*time.Second, "ping", "-c", "1", "-W", "1", f.other); r.status == 0 {
					t.Errorf("%s: a denied ping is answered\n%s", f.name, r)
				}
			}
			for _, p := range watch.since(from) {
				if a := p.dst.String(); a == other4 || a == other6 {
					t.Errorf("a denied packet reached the far side: %v", p)
				}
			}
		})
	}
}

func TestDefaultPolicyOpensPublicAddressesOnly(t *testing.T) {
	area(t, "policy.default")
	w := newWorld(t)
	const (
		host10, lan10, lan100 = "10.7.0.2", "10.7.0.1", "100.64.7.1"
		hostFD, lanFD         = "fd07::2", "fd07::1"
	)
	w.host.ip(t, "addr add "+host10+"/24 dev h0\naddr add "+hostFD+"/64 dev h0 nodad")
	w.router.ip(t, "addr add "+lan10+"/24 dev r0\naddr add "+lan100+"/32 dev lo\naddr add "+lanFD+"/64 dev r0 nodad")
	// Metadata and loopback stay closed even if the machine routes them.
	w.far.ip(t, "addr add 169.254.169.254/32 dev lo\naddr add fd00:ec2::254/128 dev lo nodad")
	w.router.ip(t, "route add 169.254.169.254/32 via "+far4+"\nroute add fd00:ec2::254/128 via "+far6)
	for _, in := range []*netns{w.far, w.host, w.router} {
		serve(t, in)
	}
	for _, to := range []string{lan10, lan100, lanFD} {
		if d, r := dial(t, w.host, "-timeout", "2s", at(to, portWhoami)); d.Error != "" {
			t.Fatalf("the host does not reach the local network itself\n%s", r)
		}
	}
	const private, host, never = "--allow-private", "--allow-host", "never"
	targets := []struct {
		what, addr string
		opener     string // what opens it; "" is open
	}{
		{"the far server", far4, ""},
		{"the far server over IPv6", far6, ""},
		{"a neighbour in 10/8", lan10, private},
		{"a neighbour in 100.64/10", lan100, private},
		{"a neighbour in fc00::/7", lanFD, private},
		{"the host's own address", host4, host},
		{"the host's own global IPv6 address", host6, host},
		{"the host's own private address", host10, host},
		{"the host's own unique local address", hostFD, host},
		{"the metadata address", "169.254.169.254", never},
		{"the IPv6 metadata address", "fd00:ec2::254", never},
		{"the gateway as the host's loopback", "10.0.2.2", never},
		{"an IPv4-mapped loopback", "::ffff:127.0.0.2", never},
		{"NAT64's metadata address", "64:ff9b::a9fe:a9fe", never},
		{"this network", "0.0.0.1", never},
	}
	for _, flags := range [][]string{nil, {private}, {host}, {private, host}} {
		t.Run(strings.Join(append([]string{"run"}, flags...), " "), func(t *testing.T) {
			sb := w.host.sandbox(t, flags...)
			for _, to := range targets {
				want := to.opener == "" || slices.Contains(flags, to.opener)
				d, r := dial(t, sb, "-timeout", "2s", at(to.addr, portWhoami))
				if open := d.Error == ""; open != want {
					t.Errorf("%s: open is %v\n%s", to.what, open, r)
				}
				if !want && d.Ms > 1000 {
					t.Errorf("%s: not refused at once but after %.0f ms\n%s", to.what, d.Ms, r)
				}
				if want || to.opener == never {
					continue
				}
				flows := w.host.sluiceOK(t, "flows", "--ended", "-o", "json", sb.name)
				if !strings.Contains(flows.out, "needs"+to.opener) {
					t.Errorf("%s: no refusal in the flow table names %s\n%s", to.what, to.opener, flows)
				}
			}
			said := w.host.sluiceOK(t, "logs", sb.name).out
			for _, flag := range []string{private, host} {
				if n := strings.Count(said, flag+" opens such addresses"); n != map[bool]int{true: 0, false: 1}[slices.Contains(flags, flag)] {
					t.Errorf("%s is told of %d times\n%s", flag, n, said)
				}
			}
		})
	}
	t.Run("a name that leads to a private address is refused by a rule that names the flag", func(t *testing.T) {
		w.zone(t, "nas.lan.test. nas.lan.test. 60 A "+lan10)
		sb := w.host.sandbox(t)
		d, r := dial(t, sb, "-timeout", "2s", "nas.lan.test:"+fmt.Sprint(portWhoami))
		if d.Error == "" {
			t.Errorf("the name leads to the local network\n%s", r)
		}
		w.host.sluiceOK(t, "flows", "--ended", "-o", "json", sb.name).wantOut(t, "needs"+private)
	})
	t.Run("the flags are about the default policy", func(t *testing.T) {
		for _, flag := range []string{private, host} {
			r := w.host.sluiceRun(t, "run", flag, "--policy", policyFile(t, "defaultAction: reject"), "--", "true")
			r.wantStatus(t, 125).wantMessage(t, flag, "--policy")
		}
	})
	t.Run("--host-loopback opens the host's loopback at the gateway", func(t *testing.T) {
		sb := w.host.sandbox(t, "--host-loopback")
		d, r := dial(t, sb, "-timeout", "2s", at("10.0.2.2", portWhoami))
		if !strings.HasPrefix(d.Got, "127.0.0.1:") {
			t.Errorf("the host's loopback saw %q\n%s", d.Got, r)
		}
	})
	t.Run("a client on a private address reaches a published port", func(t *testing.T) {
		sb := w.host.sandbox(t, "-p", "9021:"+fmt.Sprint(portWhoami))
		serve(t, sb)
		if d, r := dial(t, w.router, "-timeout", "3s", at(host10, 9021)); d.Error != "" || !strings.HasPrefix(d.Got, lan10) {
			t.Errorf("the client saw %q\n%s", d.Got, r)
		}
	})
}

func TestReloadCutsWhatIsNewlyDenied(t *testing.T) {
	area(t, "policy.reload")
	w := newWorld(t)
	serve(t, w.far)
	open := policyFile(t, "defaultAction: allow")
	narrow := policyFile(t, fmt.Sprintf(`
defaultAction: reject
egress:
- action: allow
  to: [{cidr: %s/32}, {cidr: "%s/128"}]`, far4, far6))
	sb := w.host.sandbox(t, "--policy", open)
	kept := sb.start(t, peerBin(), "hold", "-count", "50", at(far4, portEcho))
	cut := sb.start(t, peerBin(), "hold", "-count", "50", "-timeout", "1s", at(other4, portEcho))
	for _, p := range []*proc{kept, cut} {
		p.waitText(t, `"held","open":50`, 10*time.Second)
	}
	w.host.sluiceOK(t, "policy", "set", sb.name, narrow)
	testutil.Within(t, time.Second, func() (bool, string) {
		left := 0
		for _, f := range sb.flows(t) {
			if f.orig.dst.String() == other4 && f.state == "ESTABLISHED" {
				left++
			}
		}
		return left == 0, fmt.Sprintf("%d flows to an address denied by now still stand", left)
	})
	kept.write([]byte("echo\n"))
	kept.waitText(t, `"echoed","open":50`, 10*time.Second)
	cut.write([]byte("echo\n"))
	cut.waitText(t, `"echoed","open":0`, 30*time.Second)
	if d, r := dial(t, sb, "-timeout", "2s", at(other4, portWhoami)); d.Error == "" {
		t.Errorf("a newly denied address answers\n%s", r)
	}
	w.host.sluiceOK(t, "policy", "show", sb.name).wantOut(t, far4+"/32")
	w.host.sluiceOK(t, "policy", "set", sb.name, open)
	if d, r := dial(t, sb, "-timeout", "2s", at(other4, portWhoami)); d.Error != "" {
		t.Errorf("an address allowed again does not answer\n%s", r)
	}
	bad := policyFile(t, "defaultAction: perhaps")
	r := w.host.sluiceRun(t, "policy", "set", sb.name, bad)
	if r.status == 0 {
		t.Errorf("a wrong policy is accepted\n%s", r)
	}
	kept.write([]byte("echo\n"))
	kept.waitOutput(t, 10*time.Second, "a second echo", func(out string) bool { return strings.Count(out, `"echoed","open":50`) == 2 })
	for _, p := range []*proc{kept, cut} {
		p.closeInput()
		p.wait(t, 5*time.Second)
	}
}

func TestPolicyCheckNamesThePlace(t *testing.T) {
	area(t, "policy.check")
	w := newPair(t)
	for _, row := range []struct {
		what, spec string
		want       []string
	}{
		{"an unknown field", "defaultAction: allow\negres: []", []string{":7:", "egres"}},
		{"a bad CIDR", "egress:\n- action: allow\n  to: [{cidr: 10.0.0.0/33}]", []string{":8:", "10.0.0.0/33"}},
		{"an inverted range", "egress:\n- action: allow\n  ports: [{protocol: TCP, port: 20, endPort: 10}]", []string{":8:", "10"}},
	} {
		t.Run(row.what, func(t *testing.T) {
			r := w.host.sluiceRun(t, "policy", "check", policyFile(t, row.spec))
			if r.status == 0 {
				t.Errorf("accepted\n%s", r)
			}
			r.wantMessage(t, append(row.want, "policy.yaml:")...)
			r = w.host.sluiceRun(t, "run", "--policy", policyFile(t, row.spec), "--", "true")
			r.wantStatus(t, 125)
			r.wantMessage(t, row.want...)
		})
	}
	w.host.sluiceOK(t, "policy", "check", policyFile(t, "defaultAction: reject"))
}

func TestLimitsHold(t *testing.T) {
	area(t, "policy.limits")
	w := newPair(t)
	serve(t, w.far)
	t.Run("flows", func(t *testing.T) {
		sb := w.host.sandbox(t, "--policy", policyFile(t, "defaultAction: allow\nlimits: {flows: 20}"))
		p := sb.start(t, peerBin(), "hold", "-count", "30", "-timeout", "1s", at(far4, portEcho))
		out := p.waitText(t, `"held"`, 30*time.Second)
		if h, _ := lastHeld(out, "held"); h.Open != 20 {
			t.Errorf("%d of 30 connections stand under a limit of 20 flows: %s", h.Open, out)
		}
		p.write([]byte("echo\n"))
		p.waitText(t, `"echoed","open":20`, 30*time.Second)
		p.closeInput()
		p.wait(t, 5*time.Second)
		if d, r := dial(t, sb, "-timeout", "5s", at(far4, portWhoami)); d.Error != "" {
			t.Errorf("the next connection, with the table empty again, fails\n%s", r)
		}
	})
	t.Run("bandwidth", func(t *testing.T) {
		sb := w.host.sandbox(t, "--policy", policyFile(t, "defaultAction: allow\nlimits: {egressBandwidth: 80M, ingressBandwidth: 160M}"))
		for _, row := range []struct {
			dir       string
			low, high float64
		}{{"up", 0.05, 0.1}, {"down", 0.1, 0.2}} {
			var got transfer
			r := ok(t, sb, 60*time.Second, peerBin(), "xfer", "-streams", "4", "-size", fmt.Sprint(6<<20), "-dir", row.dir, at(far4, portXfer))
			if r.into(t, &got); got.OK != 4 || got.Gbps < row.low || got.Gbps > row.high {
				t.Errorf("%s: %.3f Gbit/s, not within %.2f … %.2f\n%s", row.dir, got.Gbps, row.low, row.high, r)
			}
		}
	})
	t.Run("total bytes", func(t *testing.T) {
		sb := w.host.sandbox(t, "--policy", policyFile(t, "defaultAction: allow\nlimits: {totalBytes: 4M}"))
		var got transfer
		r := ok(t, sb, 30*time.Second, peerBin(), "xfer", "-streams", "1", "-size", fmt.Sprint(32<<20), "-timeout", "5s", at(far4, portXfer))
		if r.into(t, &got); got.OK != 0 {
			t.Errorf("32 MiB passed a limit of 4 MB\n%s", r)
		}
	})
}
