package e2e

// Learning a policy from a session.

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestASuggestedPolicyLetsTheSessionPass(t *testing.T) {
	area(t, "gate.suggest", "curl", "nginx")
	w := newWorld(t)
	w.zone(t, gateZone...)
	nginx(t, w.far, 8080, true)
	session := func(sb *sandbox) (failed string) {
		t.Helper()
		for _, u := range []string{"http://pypi.test:8080/", "https://a.files.test:8443/", "https://pypi.test:8443/"} {
			for _, family := range []string{"-4", "-6"} {
				if r := run(t, sb, 10*time.Second, "curl", "-gsSk", "-m", "8", family, u); !strings.Contains(r.out, "hello from nginx") {
					failed += r.String()
				}
			}
		}
		return failed
	}
	log := filepath.Join(w.host.dir, "flows.log")
	sb := w.host.sandbox(t, "--flow-log", log, "--policy", policyFile(t, `
mode: audit
egress:
- name: first
  action: allow
  to: [{domain: example.test}]`))
	if failed := session(sb); failed != "" {
		t.Errorf("audit mode does not let it pass\n%s", failed)
	}
	sb.end(t)
	suggested := write(t, "suggested.yaml", w.host.sluiceOK(t, "policy", "suggest", log).out)
	sb = w.host.sandbox(t, "--policy", suggested)
	if failed := session(sb); failed != "" {
		t.Errorf("the suggested policy does not let the session pass\n%s\n%s", failed, w.host.sluiceOK(t, "policy", "show", sb.name).out)
	}
	for _, row := range [][]string{
		{"http://git.test:8080/"},
		{"--resolve", "evil.test:8443:" + far4, "https://evil.test:8443/"},
		{"http://" + far4 + ":8080/"},
		{"http://" + other4 + ":8080/"},
		{"http://a.files.test:8080/"},
	} {
		if r := run(t, sb, 10*time.Second, append([]string{"curl", "-gsSk", "-m", "5"}, row...)...); strings.Contains(r.out, "hello from nginx") {
			t.Errorf("what was no part of the session passes\n%s", r)
		}
	}
}
