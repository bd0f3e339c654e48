package e2e

// Rules by name inside pods. The pod's resolv.conf names a server of its own choice; the answers
// must come from the resolver that its configuration trusts.

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

const podNames = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  dns: {refusal: %s}
  egress:
  - {name: index, action: allow, to: [{domain: pypi.test}, {domain: inner.test}], ports: [{protocol: TCP, port: 7008}]}
  - {name: services, action: allow, to: [{domain: "*.default.svc.cluster.local"}], privateAddresses: allow, ports: [{protocol: TCP, port: 7008}]}
`

// rogueResolvConf is the pod's choice; the search list is a kubelet's.
const rogueResolvConf = "nameserver " + other4 + "\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 timeout:1 attempts:1\n"

// names starts a name server; each record is a name and an address.
func names(t *testing.T, in place, addrs []string, records ...string) *proc {
	t.Helper()
	argv := []string{peerBin(), "dns"}
	for _, r := range records {
		name, addr, _ := strings.Cut(r, " ")
		kind := "A"
		if strings.Contains(addr, ":") {
			kind = "AAAA"
		}
		argv = append(argv, "-record", fmt.Sprintf("%s. %[1]s. 30 %s %s", name, kind, addr))
	}
	p := in.start(t, append(argv, addrs...)...)
	p.waitText(t, `"listening"`, 5*time.Second)
	return p
}

// questions returns what a name server has been asked so far.
func questions(p *proc) string { return strings.ToLower(p.result("").out) }

func TestCNINames(t *testing.T) {
	cniArea(t, "cni.names", "curl", "dig", "getent")
	n := newNode(t)
	serve(t, n.far)
	n.file(t, "/etc/resolv.conf", rogueResolvConf)
	chain := network{version: "1.1.0", main: "ptp", subnets: dual}
	one, two := n.add(t, n.conflist(t, chain)), n.add(t, n.conflist(t, chain))
	serve(t, one)
	serve(t, two)
	trusted := names(t, n.far, []string{far4, far6},
		"pypi.test "+far4, "pypi.test "+far6, "evil.test "+far4, "inner.test "+one.addr(false),
		"api.default.svc.cluster.local "+one.addr(false), "api.default.svc.cluster.local "+one.addr(true),
		"headless.default.svc.cluster.local "+one.addr(false), "headless.default.svc.cluster.local "+two.addr(false))
	rogue := names(t, n.far, []string{other4, other6}, "pypi.test "+other4, "pypi.test "+other6, "evil.test "+other4)
	// Nodes run a cache at such an address, which is the node's alone.
	n.ip(t, "addr add 169.254.20.10/32 dev lo")
	cache := names(t, n, []string{"169.254.20.10"}, "pypi.test "+far4)
	policy := write(t, "names.yaml", fmt.Sprintf(podNames, "nxdomain"))
	gated := func(t *testing.T, servers ...string) *pod {
		t.Helper()
		w := chain
		w.sluice = map[string]any{"policy": policy, "resolvers": servers}
		return n.add(t, n.conflist(t, w))
	}
	dig := func(t *testing.T, p *pod, args ...string) string {
		t.Helper()
		return ok(t, p, 10*time.Second, append([]string{"dig", "+tries=1", "+time=3"}, args...)...).out
	}

	p := gated(t, far4)
	t.Run("by name", func(t *testing.T) {
		for _, client := range [][]string{
			{"curl", "-gsS4", "-m", "5"}, {"curl", "-gsS6", "-m", "5"}, // glibc's resolver
			{peerBin(), "get"}, // Go's
		} {
			for _, u := range []string{"http://pypi.test:7008/", "http://PyPI.test.:7008/"} {
				ok(t, p, 10*time.Second, append(client, u)...).wantOut(t, "hello from peer")
			}
		}
		ok(t, p, 10*time.Second, "getent", "ahostsv4", "pypi.test").wantOut(t, far4)
		if out := dig(t, p, "+short", "+tcp", "pypi.test"); !strings.Contains(out, far4) {
			t.Errorf("over TCP\n%s", out)
		}
	})
	t.Run("nothing else", func(t *testing.T) {
		for _, server := range []string{far4, far6, other4, other6, "10.96.0.10"} {
			for _, how := range []string{"+notcp", "+tcp"} {
				if out := dig(t, p, how, "@"+server, "evil.test"); !strings.Contains(out, "NXDOMAIN") || !strings.Contains(out, "(default)") {
					t.Errorf("%s %s\n%s", server, how, out)
				}
				if out := dig(t, p, how, "+short", "@"+server, "pypi.test"); strings.TrimSpace(out) != far4 {
					t.Errorf("%s %s\n%s", server, how, out)
				}
			}
		}
		if out := dig(t, p, "inner.test"); !strings.Contains(out, "ANSWER: 0") || !strings.Contains(out, "(dns:rebinding)") {
			t.Errorf("a name of the world that is an address of the cluster\n%s", out)
		}
		for what, flags := range map[string][]string{
			"a bare address":                               {url(far4, 7008, "/")},
			"another name in the request":                  {"-H", "Host: evil.test", "http://pypi.test:7008/"},
			"the address that the rogue server would have": {"-H", "Host: pypi.test", url(other4, 7008, "/")},
			"another port":                                 {"http://pypi.test:7005/"},
			"a service's address":                          {url(one.addr(false), 7008, "/")},
		} {
			if r := run(t, p, 10*time.Second, append([]string{"curl", "-gsS", "-m", "5"}, flags...)...); strings.Contains(r.out, "hello") || r.status == 28 {
				t.Errorf("%s: let through, or dropped\n%s", what, r)
			}
		}
	})
	t.Run("services", func(t *testing.T) {
		for _, flag := range []string{"-4", "-6"} {
			ok(t, p, 10*time.Second, "curl", flag, "-gsS", "-m", "5", "http://api.default.svc.cluster.local:7008/").wantOut(t, "hello from peer")
		}
		ok(t, p, 10*time.Second, peerBin(), "get", "http://api.default.svc.cluster.local:7008/").wantOut(t, "hello from peer")
		// The name resolves by the search list, but the request has another name.
		ok(t, p, 10*time.Second, "getent", "ahostsv4", "api").wantOut(t, one.addr(false))
		ok(t, p, 10*time.Second, "curl", "-gsS4", "-m", "5", "-H", "Host: api.default.svc.cluster.local", "http://api:7008/").wantOut(t, "hello from peer")
		if r := run(t, p, 10*time.Second, "curl", "-gsS4", "-m", "5", "http://api:7008/"); strings.Contains(r.out, "hello") {
			t.Errorf("a request that says a name that nobody granted\n%s", r)
		}
		out := dig(t, p, "+short", "headless.default.svc.cluster.local")
		for _, q := range []*pod{one, two} {
			if !strings.Contains(out, q.addr(false)+"\n") {
				t.Errorf("the answer has not %s\n%s", q.addr(false), out)
			}
			ok(t, p, 10*time.Second, "curl", "-gsS", "-m", "5", "-H", "Host: headless.default.svc.cluster.local", url(q.addr(false), 7008, "/")).wantOut(t, "hello from peer")
		}
	})
	t.Run("what was asked", func(t *testing.T) {
		if out := questions(rogue); strings.Contains(out, "asked") {
			t.Errorf("the rogue server was asked\n%s", out)
		}
		for _, name := range []string{"evil", "pypi.test.default", "pypi.test.svc", "api.svc"} {
			if out := questions(trusted); strings.Contains(out, name) {
				t.Errorf("%s was asked upstream\n%s", name, out)
			}
		}
		n.sluice(t, "logs", p.attachment(t).Name).wantOut(t, "names of the policy names are asked of ["+far4+":53] (from the network configuration)")
	})

	t.Run("where resolvers are from", func(t *testing.T) {
		asks := func(t *testing.T, w network, caps map[string]any, who *proc) {
			t.Helper()
			w.sluice["policy"] = policy
			q := n.add(t, n.conflist(t, w), caps)
			before := questions(who)
			for _, how := range []string{"+notcp", "+tcp"} {
				if out := dig(t, q, how, "+short", "pypi.test"); strings.TrimSpace(out) != far4 {
					t.Errorf("%s\n%s", how, out)
				}
			}
			if questions(who) == before {
				t.Error("another one was asked")
			}
		}
		runtime := map[string]any{"dns": map[string]any{"servers": []string{"127.0.0.53", far6}, "searches": []string{"svc.test"}, "options": []string{"ndots:5"}}}
		plugin := map[string]any{"dns": map[string]any{"nameservers": []string{far4}}}
		t.Run("the runtime", func(t *testing.T) {
			asks(t, network{version: "1.0.0", main: "ptp", subnets: dual, keys: map[string]any{"dns": map[string]any{"nameservers": []string{other4}}},
				sluice: map[string]any{"capabilities": map[string]any{"dns": true}}}, runtime, trusted)
		})
		t.Run("the main plugin before", func(t *testing.T) {
			asks(t, network{version: "1.0.0", main: "ptp", subnets: dual, keys: plugin, sluice: map[string]any{}}, nil, trusted)
		})
		t.Run("a delegate", func(t *testing.T) {
			asks(t, network{version: "1.0.0", main: "bridge", subnets: dual, alone: true, keys: plugin, sluice: map[string]any{}}, nil, trusted)
		})
		t.Run("the configuration: a cache on the node", func(t *testing.T) {
			asks(t, network{version: "1.0.0", main: "ptp", subnets: dual,
				sluice: map[string]any{"resolvers": []string{"169.254.20.10"}, "capabilities": map[string]any{"dns": true}}}, runtime, cache)
		})
		t.Run("nobody", func(t *testing.T) {
			w := chain
			w.sluice = map[string]any{"policy": policy}
			q := n.add(t, n.conflist(t, w))
			if out := dig(t, q, "pypi.test"); !strings.Contains(out, "SERVFAIL") {
				t.Errorf("an allowed name\n%s", out)
			}
			n.sluice(t, "logs", q.attachment(t).Name).wantOut(t, "no resolver is known that could be asked for the pod")
		})
		if out := questions(rogue); strings.Contains(out, "asked") {
			t.Errorf("the rogue server was asked\n%s", out)
		}
	})

	t.Run("set while it runs", func(t *testing.T) {
		w := chain
		w.sluice = map[string]any{"resolvers": []string{far4}}
		list := n.conflist(t, w)
		q := n.add(t, list)
		name := q.attachment(t).Name
		answers := func(when, want string) {
			t.Helper()
			for _, how := range []string{"+notcp", "+tcp"} {
				if out := dig(t, q, how, "+short", "pypi.test"); strings.TrimSpace(out) != want {
					t.Errorf("%s %s: want %s\n%s", when, how, want, out)
				}
			}
		}
		answers("without a policy the pod's own server answers", other4)
		n.sluice(t, "policy", "set", name, policy)
		answers("by name", far4)
		// The next monitor knows whom to ask, and so does a new binary.
		kill(t, q.attachment(t).PID)
		if err := n.runtime("1.1.0").GetStatusNetworkList(t.Context(), list); err != nil {
			t.Fatal(err)
		}
		answers("after a repair", far4)
		n.sluice(t, "upgrade", name)
		answers("after an upgrade", far4)
		n.sluice(t, "policy", "set", name, write(t, "open.yaml", "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: open}\nspec: {defaultAction: allow}\n"))
		answers("every name by the gate", far4)
		n.sluice(t, "policy", "set", name, write(t, "ungated.yaml", "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: ungated}\nspec: {defaultAction: allow, dns: {names: ungated}}\n"))
		answers("by address again", other4)
	})

	// The policy reference says so.
	t.Run("REFUSED ends a search list", func(t *testing.T) {
		const second = "api.default" // it is found by the second entry of the list
		ok(t, p, 10*time.Second, "getent", "ahostsv4", second).wantOut(t, one.addr(false))
		n.sluice(t, "policy", "set", p.attachment(t).Name, write(t, "refused.yaml", fmt.Sprintf(podNames, "refused")))
		if r := run(t, p, 10*time.Second, "getent", "ahostsv4", second); r.status == 0 {
			t.Errorf("glibc goes on\n%s", r)
		}
		ok(t, p, 10*time.Second, "getent", "ahostsv4", "pypi.test.").wantOut(t, far4)
	})
}
