package e2e

// Under a policy that allows no name, nothing leaves the machine, not even a question.

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// shutSpecs allow no name: one allows nothing at all, the other addresses where a name server
// listens.
var shutSpecs = map[string]string{
	"deny all":       "defaultAction: reject",
	"addresses only": fmt.Sprintf("defaultAction: reject\negress:\n- {action: allow, to: [{cidr: %s/32}, {cidr: \"%s/128\"}]}", other4, other6),
}

// asksEverything asks for names in every way that a client has, at resolvers of both families. The
// sandbox itself answers, and tells nothing.
func asksEverything(t *testing.T, in place, resolvers ...string) {
	t.Helper()
	for _, server := range append(resolvers, far4, far6, other4, other6) {
		for _, q := range []string{"+notcp web.test A", "+tcp web.test AAAA", "+notcp tag.test TXT", "+notcp -x " + far4, "+tcp -x " + far6, "+notcp CH TXT version.bind"} {
			argv := append([]string{"dig", "+time=2", "+tries=1", "@" + server}, strings.Fields(q)...)
			if r := run(t, in, 15*time.Second, argv...); strings.Contains(r.out, "ANSWER SECTION") || !strings.Contains(r.out, "NXDOMAIN") && !strings.Contains(r.out, "REFUSED") {
				t.Errorf("%s: it was told something, or nothing\n%s", strings.Join(argv, " "), r)
			}
		}
	}
	if r := run(t, in, 15*time.Second, "getent", "ahosts", "web.test"); r.status == 0 {
		t.Errorf("the C library resolves a name\n%s", r)
	}
}

// leaks returns a watch's packets that came from beyond the link: a router's own packets to its
// neighbours come from its link-local address.
func leaks(w *watcher, from int) (out []packet) {
	for _, p := range w.since(from) {
		if !p.neighbour && !p.src.IsLinkLocalUnicast() {
			out = append(out, p)
		}
	}
	return out
}

func TestNoQuestionLeavesUnderAPolicyWithoutNames(t *testing.T) {
	area(t, "gate.shut", "dig", "getent")
	for name, spec := range shutSpecs {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			server := w.nameServer(t, "far", far4, far6, other4, other6)
			watch := w.far.watch(t, "f0")
			file := policyFile(t, spec)
			sb := w.host.sandbox(t, rootInside, "--policy", file)
			own := []string{dns4, dns6}
			from := watch.count()
			asksEverything(t, sb, own...)
			for i := range 3 { // the same policy repeatedly, while it asks
				during := sb.start(t, "sh", "-c", fmt.Sprintf("for i in 1 2 3 4 5 6 7 8; do dig +time=1 +tries=1 @%s web.test; dig +time=1 +tries=1 @%s web.test; done", dns4, far6))
				w.host.sluiceOK(t, "policy", "set", sb.name, file)
				if r := during.wait(t, 60*time.Second); strings.Contains(r.out, "ANSWER SECTION") {
					t.Errorf("reload %d: it was told something\n%s", i, r)
				}
			}
			asksEverything(t, sb, own...)
			if out := leaks(watch, from); len(out) > 0 {
				t.Errorf("%d packets left, the first %v", len(out), out[0])
			}
			if n := watch.lost(t); n > 0 {
				t.Errorf("the watch lost %d packets", n)
			}
			if asked := questions(server); strings.Contains(asked, "web.test") || strings.Contains(asked, "arpa") {
				t.Errorf("the name server was asked\n%s", asked)
			}

			// The watch works: names: any opens names, and nothing else.
			w.host.sluiceOK(t, "policy", "set", sb.name, policyFile(t, spec+"\ndns: {names: any}"))
			from = watch.count()
			ok(t, sb, 10*time.Second, "dig", "+time=3", "+tries=1", "web.test").wantOut(t, far4)
			ok(t, sb, 10*time.Second, "getent", "ahosts", "web.test").wantOut(t, far4).wantOut(t, far6)
			if len(leaks(watch, from)) == 0 {
				t.Error("the watch does not see the questions that are allowed")
			}
			if d, r := dial(t, sb, "-timeout", "2s", at(far4, 53)); d.Error != "" {
				t.Errorf("the gate does not answer over TCP\n%s", r)
			}
			if r := run(t, sb, 10*time.Second, "ping", "-c", "1", "-W", "1", far4); r.status == 0 {
				t.Errorf("names: any opens an address\n%s", r)
			}
		})
	}
}

func TestCNINoQuestionLeavesUnderAPolicyWithoutNames(t *testing.T) {
	cniArea(t, "cni.shut", "dig", "getent")
	n := newNode(t)
	n.file(t, "/etc/resolv.conf", "nameserver "+far4+"\noptions timeout:1 attempts:1\n")
	server := names(t, n.far, []string{far4, far6, other4, other6}, "web.test "+far4, "web.test "+far6)
	watch := n.far.watchFor(t, "f0", nil)
	for name, spec := range shutSpecs {
		t.Run(name, func(t *testing.T) {
			file := policyFile(t, spec)
			p := n.add(t, n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, sluice: map[string]any{"policy": file, "resolvers": []string{far4}}}))
			from, before := watch.count(), len(questions(server))
			asksEverything(t, p)
			for range 3 {
				during := p.start(t, "sh", "-c", fmt.Sprintf("for i in 1 2 3 4 5 6 7 8; do dig +time=1 +tries=1 @%s web.test; dig +time=1 +tries=1 @%s web.test; done", far4, far6))
				n.sluice(t, "policy", "set", p.attachment(t).Name, file)
				if r := during.wait(t, 60*time.Second); strings.Contains(r.out, "ANSWER SECTION") {
					t.Errorf("during a reload it was told something\n%s", r)
				}
			}
			asksEverything(t, p)
			if out := leaks(watch, from); len(out) > 0 {
				t.Errorf("%d packets left, the first %v", len(out), out[0])
			}
			if asked := questions(server)[before:]; strings.Contains(asked, "web.test") || strings.Contains(asked, "arpa") {
				t.Errorf("the name server was asked\n%s", asked)
			}
			from = watch.count()
			n.sluice(t, "policy", "set", p.attachment(t).Name, policyFile(t, spec+"\ndns: {names: any}"))
			ok(t, p, 10*time.Second, "dig", "+time=3", "+tries=1", "@"+other6, "web.test").wantOut(t, far4)
			if len(leaks(watch, from)) == 0 {
				t.Error("the watch does not see the question that is allowed")
			}
		})
	}
}
