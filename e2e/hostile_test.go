package e2e

// A hostile sandbox has root inside, raw sockets and a packet socket. It makes each attempt for
// both families before, while and after the policy is replaced. It is a failure if anything reaches
// the machine's own loopback or leaves the machine, and if a refusal is not counted. The result
// must match docs/threat-model.md.

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// attempt is one way out that must be shut.
type attempt struct {
	name    string
	packets func(v6 bool) []ipPacket // to put on the link; none: not for this family
	command func(v6 bool) []string   // or to run
	only    string                   // the only family, if set
	reason  string                   // the rule that refuses it, or the counter that rises
	// scene is an attempt that takes more than that, mostly in a sandbox of its own. It returns
	// what refused it. Scenes about a reload make their own.
	scene func(t *testing.T, h *hostile, v6 bool) string
}

func (a *attempt) is(v6 bool) bool {
	if a.only != "" && (a.only == "IPv6") != v6 {
		return false
	}
	switch {
	case a.scene != nil:
		return true
	case a.packets != nil:
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

// hostileSpec opens what an ordinary policy would open beside the names: the web by address, in two
// halves, so that special addresses are refused by more than the default.
const hostileSpec = gateSpec + `
- name: web
  action: allow
  to: [{cidr: 0.0.0.0/1}, {cidr: 128.0.0.0/1}, {cidr: "::/1"}, {cidr: "8000::/1"}]
  ports: [{protocol: TCP, port: 80}, {protocol: TCP, port: 443, endPort: 1023}, {protocol: UDP, port: 443, endPort: 1023}]
- name: quic
  action: allow
  to: [{domain: pypi.test}]
  ports: [{protocol: UDP, port: 8444}]
- name: tunnel
  action: allow
  to: [{domain: "**.tunnel.test"}]`

// hostile is the world of the attempts.
type hostile struct {
	w        *world
	zone     *proc
	sb       *sandbox
	watchers map[string]*watcher
	looked   map[string]int
	attempts []attempt
	seen     map[string]string // what refused it, by name and family
}

func newHostile(t *testing.T) *hostile {
	t.Helper()
	h := &hostile{w: newWorld(t), looked: map[string]int{}, seen: map[string]string{}}
	w := h.w
	w.far.ip(t, "addr add "+scene4+"/24 dev f0\naddr add "+scene6+"/64 dev f0 nodad preferred_lft 0\n"+
		"addr add "+second4+"/24 dev f0\naddr add "+second6+"/64 dev f0 nodad preferred_lft 0")
	h.zone = w.zoneAt(t, far4, slices.Concat(recordFlags(gateZone), recordFlags(hostileZone), hostileServer)...)
	nginx(t, w.far, 8080, true)
	serve(t, w.far)
	serve(t, w.host)
	// It holds even where the machine has a route to them.
	w.far.ip(t, "addr add 169.254.169.254/32 dev lo\naddr add fd00:ec2::254/128 dev lo nodad")
	w.router.ip(t, "route add 169.254.169.254/32 via "+far4+"\nroute add fd00:ec2::254/128 via "+far6)
	h.watchers = map[string]*watcher{left: w.router.watch(t, "r0"), "reached the machine's loopback": w.host.watch(t, "lo")}
	h.sb = w.host.sandbox(t, rootInside, "--policy", policyFile(t, hostileSpec))
	// The gateway's hardware address is learned as a kernel would.
	ok(t, h.sb, 10*time.Second, "curl", "-gsS", "-m", "8", "http://pypi.test:8080/").wantOut(t, "hello from nginx")
	w.host.ip(t, "addr add "+late4+"/24 dev h0\naddr add "+late6+"/64 dev h0 nodad preferred_lft 0")
	h.attempts = slices.Concat(hostilePackets, hostileQUIC(t), hostileCommands(t), hostileStreams(), hostileScenes)
	return h
}

const left = "left the machine"

// leaks fails if a forbidden packet was seen since the last look.
func (h *hostile) leaks(t *testing.T, phase string) {
	t.Helper()
	for what, watch := range h.watchers {
		seen := h.looked[what]
		h.looked[what] = watch.count()
		for _, p := range watch.since(seen) {
			if !permitted(p) {
				t.Errorf("%s: a packet %s: %v", phase, what, p)
			}
		}
	}
	if out := strings.ToLower(h.zone.result("").out); strings.Contains(out, "evil") || strings.Contains(out, "secret") {
		t.Errorf("%s: a refused name was asked upstream\n%s", phase, out)
	}
}

func TestHostileSandbox(t *testing.T) {
	area(t, "gate.hostile", "curl", "dig", "nginx", "nsenter", "unshare")
	h := newHostile(t)
	h.each(t, "before", func(t *testing.T, a *attempt, v6 bool) {
		h.seen[a.name+family6(v6)] = h.sb.attempt(t, h, a, v6)
	})
	tighter, wider := policyFile(t, gateSpec), policyFile(t, hostileSpec)
	t.Run("while the policy is replaced", func(t *testing.T) {
		stop := make(chan struct{})
		var setter sync.WaitGroup
		setter.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					h.w.host.sluiceOK(t, "policy", "set", h.sb.name, []string{tighter, wider}[i%2])
				}
			}
		})
		h.everything(t)
		close(stop)
		setter.Wait()
		h.leaks(t, "during")
	})
	t.Run("after it was replaced", func(t *testing.T) {
		h.w.host.sluiceOK(t, "policy", "set", h.sb.name, wider)
		h.everything(t)
		h.leaks(t, "after")
		ok(t, h.sb, 10*time.Second, "curl", "-gsS", "-m", "8", "http://pypi.test:8080/").wantOut(t, "hello from nginx")
	})
	if !t.Failed() {
		recordAttempts(t, h.attempts, h.seen)
	}
}

func family6(v6 bool) string { return pick(v6, "IPv4", "IPv6") }

// each makes each attempt by itself, and looks for leaks after it.
func (h *hostile) each(t *testing.T, phase string, try func(t *testing.T, a *attempt, v6 bool)) {
	for i := range h.attempts {
		a := &h.attempts[i]
		for _, v6 := range []bool{false, true} {
			if a.is(v6) {
				t.Run(a.name+" "+family6(v6), func(t *testing.T) {
					try(t, a, v6)
					h.leaks(t, phase)
				})
			}
		}
	}
}

// everything makes all attempts in a row, except those that replace a policy themselves.
func (h *hostile) everything(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		argv := []string{peerBin(), "raw"}
		for i := range h.attempts {
			switch a := &h.attempts[i]; {
			case !a.is(v6) || a.scene != nil:
			case a.packets != nil:
				argv = append(argv, a.argv(v6)[2:]...)
			default:
				if r := run(t, h.sb, 15*time.Second, a.argv(v6)...); strings.Contains(r.out, "hello from") {
					t.Errorf("%s is let through\n%s", a.name, r)
				}
			}
		}
		ok(t, h.sb, 15*time.Second, argv...)
	}
}

// permitted reports whether a packet may be seen outside: to the servers by name, to the name
// server, to the scenes' own servers, or between neighbours.
func permitted(p packet) bool {
	switch dst := p.dst.String(); {
	case dst == scene4, dst == scene6, dst == silent4, dst == silent6:
		return true
	case dst == second4, dst == second6:
		// The host's word to the strangers, and the handshake with an address that is granted under
		// a name of its own, before the client says the wrong one.
		return p.proto == protoICMP || p.proto == protoICMPv6 || p.proto == protoTCP && p.dport == 8443 && p.payload == 0
	case p.proto == protoICMPv6 || p.proto == protoHopByHop:
		// Neighbour discovery and multicast listeners.
		return p.dst.IsMulticast() || p.dst.IsLinkLocalUnicast() || strings.HasSuffix(dst, "::1")
	case dst == far4, dst == far6:
		return p.dport == 8080 || p.dport == 8443 || p.dport == 9418 || p.dport == 53
	}
	return false
}

// attempt makes one attempt and returns what refused it.
func (sb *sandbox) attempt(t *testing.T, h *hostile, a *attempt, v6 bool) string {
	t.Helper()
	if a.scene != nil {
		return a.scene(t, h, v6)
	}
	return sb.refused(t, a.reason, func() {
		if r := run(t, sb, 15*time.Second, a.argv(v6)...); strings.Contains(r.out, "hello from") {
			t.Errorf("it is let through\n%s", r)
		}
	})
}

// refused runs try and waits until what refuses it is counted.
func (sb *sandbox) refused(t *testing.T, reason string, try func()) (why string) {
	t.Helper()
	before := sb.tally(t)
	try()
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		after := sb.tally(t)
		var rose []string
		for _, k := range slices.Sorted(maps.Keys(after)) {
			if after[k] > before[k] {
				rose = append(rose, k)
				if k == reason || strings.HasSuffix(k, " "+reason) {
					why = k
				}
			}
		}
		return why != "", fmt.Sprintf("%q did not rise, but %q", reason, rose)
	})
	return why
}

// tally returns everything that is counted: "part counter" of stats, and "rule NAME" of refused
// flows.
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

// recordAttempts compares the table in docs/threat-model.md with what was seen. With
// SLUICE_WRITE_THREAT_MODEL (`make threat-model`) it writes the table instead.
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
		t.Fatalf("reading the threat model, whose table this run checks: %v", err)
	}
	head, rest, ok1 := strings.Cut(string(b), attemptsBegin)
	old, tail, ok2 := strings.Cut(rest, attemptsEnd)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the table: want %s and %s", path, attemptsBegin, attemptsEnd)
	}
	if os.Getenv("SLUICE_WRITE_THREAT_MODEL") != "" {
		if err := os.WriteFile(path, []byte(head+attemptsBegin+table.String()+attemptsEnd+tail), 0o644); err != nil {
			t.Fatalf("writing the threat model: %v", err)
		}
		return
	}
	for line := range strings.Lines(table.String()) {
		if !strings.Contains(old, line) {
			t.Errorf("%s lacks or contradicts: %s", path, line)
		}
	}
	for line := range strings.Lines(old) {
		if !strings.Contains(table.String(), line) {
			t.Errorf("%s has what was not seen: %s", path, line)
		}
	}
	if t.Failed() {
		t.Log("`make threat-model` writes the table as it is now")
	}
}
