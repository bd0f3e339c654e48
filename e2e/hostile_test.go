package e2e

// A hostile sandbox: root inside, raw sockets, a packet socket. Each attempt is made
// for both families before, while and after the policy is replaced; whatever of it
// reaches the machine's own loopback or leaves it is a failure, and so is a refusal
// that nobody counted. The run writes what it saw to docs/threat-model.md.

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// attempt is one way out that must be shut.
type attempt struct {
	name    string
	packets func(v6 bool) []ipPacket // to put on the link; none: not for this family
	command func(v6 bool) []string   // or to run
	only    string                   // a family
	reason  string                   // the rule that refuses it, or the counter that rises
}

func (a *attempt) is(v6 bool) bool {
	if a.only != "" && (a.only == "IPv6") != v6 {
		return false
	}
	if a.packets != nil {
		return len(a.packets(v6)) > 0
	}
	return a.command(v6) != nil
}

// argv makes the attempt inside a sandbox.
func (a *attempt) argv(v6 bool) []string {
	if a.packets == nil {
		return a.command(v6)
	}
	argv := []string{peerBin(), "raw"}
	for _, p := range a.packets(v6) {
		argv = append(argv, p.base64())
	}
	return argv
}

// hostileSpec opens what an ordinary policy would beside the names: the web by
// address, in two halves, so that what is special is not refused by default only.
const hostileSpec = gateSpec + `
- name: web
  action: allow
  to: [{cidr: 0.0.0.0/1}, {cidr: 128.0.0.0/1}, {cidr: "::/1"}, {cidr: "8000::/1"}]
  ports: [{protocol: TCP, port: 80}, {protocol: TCP, port: 443, endPort: 1023}, {protocol: UDP, port: 443, endPort: 1023}]`

func TestHostileSandbox(t *testing.T) {
	area(t, "gate.hostile", "curl", "dig", "nginx")
	w := newWorld(t)
	zone := w.zone(t, append(gateZone, hostileZone...)...)
	nginx(t, w.far, 8080, true)
	serve(t, w.far)
	serve(t, w.host)
	// Even where the machine has a route to them.
	w.far.ip(t, "addr add 169.254.169.254/32 dev lo\naddr add fd00:ec2::254/128 dev lo nodad")
	w.router.ip(t, "route add 169.254.169.254/32 via "+far4+"\nroute add fd00:ec2::254/128 via "+far6)
	watchers := map[string]*watcher{"left the machine": w.router.watch(t, "r0"), "reached the machine's loopback": w.host.watch(t, "lo")}
	sb := w.host.sandbox(t, "--root", "--policy", policyFile(t, hostileSpec))
	// The gateway's hardware address, learned as a kernel would.
	ok(t, sb, 10*time.Second, "curl", "-gsS", "-m", "8", "http://pypi.test:8080/").wantOut(t, "hello from nginx")
	looked := map[string]int{}
	leaks := func(phase string) {
		t.Helper()
		for what, watch := range watchers {
			seen := looked[what]
			looked[what] = watch.count()
			for _, p := range watch.since(seen) {
				if !permitted(p) {
					t.Errorf("%s: a packet %s: %v", phase, what, p)
				}
			}
		}
		if out := strings.ToLower(zone.result("").out); strings.Contains(out, "evil") || strings.Contains(out, "secret") {
			t.Errorf("%s: a refused name was asked upstream\n%s", phase, out)
		}
	}
	attempts := slices.Concat(hostilePackets, hostileCommands(t), hostileStreams())
	seen := map[string]string{}
	w.host.ip(t, "addr add "+late4+"/24 dev h0\naddr add "+late6+"/64 dev h0 nodad")
	for i := range attempts {
		a := &attempts[i]
		for _, f := range families {
			if v6 := f.name == "IPv6"; a.is(v6) {
				t.Run(a.name+" "+f.name, func(t *testing.T) {
					seen[a.name+f.name] = sb.attempt(t, a, v6)
					leaks("before")
				})
			}
		}
	}
	everything := func() {
		for v6 := range 2 {
			argv := []string{peerBin(), "raw"}
			for i := range attempts {
				a := &attempts[i]
				if a.is(v6 == 1) && a.packets != nil {
					argv = append(argv, a.argv(v6 == 1)[2:]...)
				} else if a.is(v6 == 1) {
					if r := run(t, sb, 15*time.Second, a.argv(v6 == 1)...); strings.Contains(r.out, "hello from") {
						t.Errorf("%s is let through\n%s", a.name, r)
					}
				}
			}
			ok(t, sb, 15*time.Second, argv...)
		}
	}
	tighter := policyFile(t, gateSpec)
	wider := policyFile(t, hostileSpec)
	t.Run("while the policy is replaced", func(t *testing.T) {
		stop := make(chan struct{})
		var setter sync.WaitGroup
		setter.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					w.host.sluiceOK(t, "policy", "set", sb.name, []string{tighter, wider}[i%2])
				}
			}
		})
		everything()
		close(stop)
		setter.Wait()
		leaks("during")
	})
	t.Run("after it was replaced", func(t *testing.T) {
		w.host.sluiceOK(t, "policy", "set", sb.name, wider)
		everything()
		leaks("after")
		ok(t, sb, 10*time.Second, "curl", "-gsS", "-m", "8", "http://pypi.test:8080/").wantOut(t, "hello from nginx")
	})
	if !t.Failed() {
		recordAttempts(t, attempts, seen)
	}
}

// permitted tells whether a packet may be seen outside: to the servers by name, to the
// name server, and what neighbours say to each other.
func permitted(p packet) bool {
	switch dst := p.dst.String(); {
	case p.proto == protoICMPv6 || p.proto == protoHopByHop:
		// Neighbours, and who listens to which group.
		return p.dst.IsMulticast() || p.dst.IsLinkLocalUnicast() || strings.HasSuffix(dst, "::1")
	case dst == far4, dst == far6:
		return p.dport == 8080 || p.dport == 8443 || p.dport == 9418 || p.dport == 53
	}
	return false
}

// attempt makes one and returns what refused it.
func (sb *sandbox) attempt(t *testing.T, a *attempt, v6 bool) string {
	t.Helper()
	before := sb.tally(t)
	r := run(t, sb, 15*time.Second, a.argv(v6)...)
	if strings.Contains(r.out, "hello from") {
		t.Errorf("it is let through\n%s", r)
	}
	var why string
	eventually(t, 2*time.Second, func() (bool, string) {
		after := sb.tally(t)
		var rose []string
		for _, k := range slices.Sorted(maps.Keys(after)) {
			if after[k] > before[k] {
				rose = append(rose, k)
				if k == a.reason || strings.HasSuffix(k, " "+a.reason) {
					why = k
				}
			}
		}
		return why != "", fmt.Sprintf("%q did not rise, but %q\n%s", a.reason, rose, r)
	})
	return why
}

// tally is everything that is counted: "part counter" of stats, and "rule NAME" of
// refused flows.
func (sb *sandbox) tally(t *testing.T) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	var flatten func(path string, v any)
	flatten = func(path string, v any) {
		switch v := v.(type) {
		case float64:
			all[path] += v
		case map[string]any:
			for k, x := range v {
				part, _, _ := strings.Cut(path, " ")
				if path == "" || path == "stats" {
					flatten(k, x)
				} else {
					flatten(part+" "+k, x)
				}
			}
		}
	}
	flatten("", sb.stats(t))
	for rule, n := range sb.refusals(t) {
		all["rule "+rule] = float64(n)
	}
	return all
}

const (
	attemptsBegin = "<!-- attempts: written by the end-to-end tests -->"
	attemptsEnd   = "<!-- end of attempts -->"
)

// recordAttempts writes the table into docs/threat-model.md, and fails if the one that
// was there misses an attempt or says otherwise.
func recordAttempts(t *testing.T, attempts []attempt, seen map[string]string) {
	t.Helper()
	var table strings.Builder
	table.WriteString("\n| attempt | IPv4 | IPv6 |\n|---|---|---|\n")
	for i := range attempts {
		a := &attempts[i]
		cell := func(family string) string {
			if s := seen[a.name+family]; s != "" {
				return "refused: " + s
			}
			return "–"
		}
		fmt.Fprintf(&table, "| %s | %s | %s |\n", a.name, cell("IPv4"), cell("IPv6"))
	}
	table.WriteString("\n")
	path := os.Getenv("THREAT_MODEL")
	if path == "" {
		path = "../docs/threat-model.md"
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("reading the threat model, whose table this run writes: %v", err)
	}
	head, rest, ok1 := strings.Cut(string(b), attemptsBegin)
	old, tail, ok2 := strings.Cut(rest, attemptsEnd)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the table: want %s and %s", path, attemptsBegin, attemptsEnd)
	}
	if old == table.String() {
		return
	}
	for line := range strings.Lines(table.String()) {
		if !strings.Contains(old, line) {
			t.Errorf("%s lacks or contradicts: %s", path, line)
		}
	}
	// As the ordinary user this may fail: the table is then as it was, and the test has failed.
	os.WriteFile(path, []byte(head+attemptsBegin+table.String()+attemptsEnd+tail), 0o644)
}
