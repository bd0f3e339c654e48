package e2e

// Replacing a policy by name under live flows.

import (
	"fmt"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const liveSpec = `
defaultAction: reject
egress:
- name: kept
  action: allow
  to: [{domain: kept.test}]
  ports: [{protocol: TCP, port: 7000, endPort: 7010}]
  verify: grant`

const liveCut = `
- name: cut
  action: allow
  to: [{domain: cut.test}]
  ports: [{protocol: TCP, port: 7000, endPort: 7010}]
  verify: grant`

func TestReloadUnderAThousandFlows(t *testing.T) {
	area(t, "gate.reload", "dig")
	w := newWorld(t)
	w.zone(t, "kept.test. kept.test. 60 A "+far4, "kept.test. kept.test. 60 AAAA "+far6, "cut.test. cut.test. 60 A "+other4, "cut.test. cut.test. 60 AAAA "+other6)
	serve(t, w.far)
	both, one := policyFile(t, liveSpec+liveCut), policyFile(t, liveSpec)
	sb := w.host.sandbox(t, "--policy", both)
	for _, name := range []string{"kept.test", "cut.test"} {
		ok(t, sb, 10*time.Second, "dig", "+short", name, "A", name, "AAAA")
	}
	hold := func(addr string) *proc {
		return sb.start(t, peerBin(), "hold", "-count", "250", "-timeout", "2s", at(addr, portEcho))
	}
	kept := []*proc{hold(far4), hold(far6)}
	cut := []*proc{hold(other4), hold(other6)}
	for _, p := range append(kept, cut...) {
		p.waitText(t, `"held","open":250`, 20*time.Second)
	}
	bulk := sb.start(t, peerBin(), "xfer", "-streams", "4", "-size", fmt.Sprint(64<<20), at(far4, portXfer))
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		return len(sb.flows(t)) >= 1004, fmt.Sprintf("%d flows", len(sb.flows(t)))
	})
	w.host.sluiceOK(t, "policy", "set", sb.name, one)
	testutil.Within(t, time.Second, func() (bool, string) {
		left := 0
		for _, f := range sb.flows(t) {
			if a := f.orig.dst.String(); (a == other4 || a == other6) && f.state == "ESTABLISHED" {
				left++
			}
		}
		return left == 0, fmt.Sprintf("%d flows to a name that is denied by now still stand", left)
	})
	for _, p := range append(kept, cut...) {
		p.write([]byte("echo\n"))
	}
	for _, p := range kept {
		p.waitText(t, `"echoed","open":250`, 20*time.Second)
	}
	for _, p := range cut {
		p.waitText(t, `"echoed","open":0`, 20*time.Second)
	}
	var got transfer
	r := bulk.wait(t, 60*time.Second).wantStatus(t, 0)
	if r.into(t, &got); got.OK != 4 {
		t.Errorf("a transfer under a reload that allows it: %d of 4 streams are whole\n%s", got.OK, r)
	}
	if d, r := dial(t, sb, "-timeout", "2s", at(other4, portWhoami)); d.Error == "" {
		t.Errorf("what is denied by now answers\n%s", r)
	}
	w.host.sluiceOK(t, "policy", "set", sb.name, both)
	if d, r := dial(t, sb, "-timeout", "2s", at(other4, portWhoami)); d.Error != "" {
		t.Errorf("a grant did not outlive the policy that did not know its name\n%s", r)
	}
	for _, p := range append(kept, cut...) {
		p.closeInput()
		p.wait(t, 10*time.Second)
	}
}

// TestTheCallersHostsFileIsOfTheRules uses a name that no DNS server knows, as machines in
// companies and laboratories have.
func TestTheCallersHostsFileIsOfTheRules(t *testing.T) {
	area(t, "gate.hosts", "curl")
	w := newWorld(t)
	serve(t, w.far)
	w.zone(t, gateZone...)
	w.host.file(t, "/etc/hosts", "127.0.0.1 localhost\n"+far4+" Build.corp build\n"+far6+" build.corp\n"+other4+" secret.corp\n")
	sb := w.host.sandbox(t, "--policy", policyFile(t, `
defaultAction: reject
egress:
- {action: allow, to: [{domain: build.corp}], ports: [{protocol: TCP, port: 7008}]}`))
	curl := func(in place, flags ...string) result {
		t.Helper()
		return run(t, in, 15*time.Second, append([]string{"curl", "-fgsS", "-m", "8"}, flags...)...)
	}
	for _, flag := range []string{"-4", "-6"} {
		direct := curl(w.host, flag, url("build.corp", portHTTP, "/"))
		through := curl(sb, flag, url("build.corp", portHTTP, "/"))
		if direct.status != 0 || through.status != 0 || direct.out != through.out {
			t.Errorf("by a name of the caller's hosts file: directly\n%s\nthrough the gate\n%s", direct, through)
		}
	}
	for what, flags := range map[string][]string{
		"another name of the file": {url("secret.corp", portHTTP, "/")}, "its address": {url(far4, portHTTP, "/")},
		"another name at its address": {"--resolve", "evil.test:7008:" + far4, url("evil.test", portHTTP, "/")},
		"the alias that no rule has":  {url("build", portHTTP, "/")},
	} {
		if r := curl(sb, flags...); r.status == 0 {
			t.Errorf("%s is let through\n%s", what, r)
		}
	}
}
