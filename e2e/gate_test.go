package e2e

// The gate: a policy by name, as ordinary clients meet it.
//
//	pypi.test, a.files.test, cdn.test   far's first addresses: granted by name
//	evil.test                           the same addresses, a name that no rule has
//	other4, other6                      far's second addresses: the same servers, never granted

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const gateSpec = `
defaultAction: reject
egress:
- name: index
  action: allow
  to: [{domain: pypi.test}, {domain: "*.files.test"}]
  ports: [{protocol: TCP, port: 8080}, {protocol: TCP, port: 8443}]
- name: repository
  action: allow
  to: [{domain: git.test}]
  ports: [{protocol: TCP, port: 8080}]
- name: git
  action: allow
  to: [{domain: git.test}]
  ports: [{protocol: TCP, port: 9418}]
  verify: grant # git's own protocol says no name`

// gateZone is the zone of far's name server.
var gateZone = []string{
	"pypi.test. pypi.test. 3600 CNAME cdn.test.", "pypi.test. cdn.test. 3600 A " + far4, "pypi.test. cdn.test. 3600 AAAA " + far6,
	"a.files.test. a.files.test. 3600 A " + far4, "a.files.test. a.files.test. 3600 AAAA " + far6,
	"git.test. git.test. 3600 A " + far4, "git.test. git.test. 3600 AAAA " + far6,
	"evil.test. evil.test. 3600 A " + far4, "evil.test. evil.test. 3600 AAAA " + far6,
	"pypi.test.evil.io. pypi.test.evil.io. 3600 A " + far4, "evilpypi.test. evilpypi.test. 3600 A " + far4,
}

// zone starts far's name server with the given records.
func (w *world) zone(t *testing.T, records ...string) *proc {
	t.Helper()
	return w.zoneAt(t, far4, recordFlags(records)...)
}

func recordFlags(records []string) (flags []string) {
	for _, r := range records {
		flags = append(flags, "-record", r)
	}
	return flags
}

// zoneAt starts a name server at one of far's addresses (e2e/peer/dns.go).
func (w *world) zoneAt(t *testing.T, addr string, flags ...string) *proc {
	t.Helper()
	p := w.far.start(t, slices.Concat([]string{peerBin(), "dns"}, flags, []string{addr})...)
	p.waitText(t, `"listening"`, 5*time.Second)
	return p
}

// refusals counts the refused flows by rule, from the sandbox's own record.
func (sb *sandbox) refusals(t *testing.T) map[string]int {
	t.Helper()
	rules := map[string]int{}
	var records []struct {
		Verdict, Rule, Tried, Reason string
		Count                        int // refusals folded into one record
	}
	r := sb.host.sluiceOK(t, "flows", "--ended", "-o", "json", sb.name)
	if err := json.Unmarshal([]byte(r.out), &records); err != nil {
		t.Fatalf("flow records that are no JSON: %v\n%s", err, r)
	}
	for _, r := range records {
		if !strings.EqualFold(r.Verdict, "forwarded") {
			by := cmp.Or(r.Tried, r.Rule)
			if strings.HasPrefix(r.Reason, "grant-") {
				by = r.Rule // Tried is the rule that let it pass before
			}
			rules[by] += max(r.Count, 1)
		}
	}
	return rules
}

func TestGateOpensForANameOnly(t *testing.T) {
	area(t, "gate.names", "curl", "nginx", "dig")
	w := newWorld(t)
	zone := w.zone(t, gateZone...)
	nginx(t, w.far, 8080, true)
	sb := w.host.sandbox(t, "--policy", policyFile(t, gateSpec))
	curl := func(flags ...string) result {
		t.Helper()
		return run(t, sb, 15*time.Second, append([]string{"curl", "-gsSk", "-m", "8", "-w", "%{http_code}"}, flags...)...)
	}
	for _, f := range families {
		flag := map[string]string{"IPv4": "-4", "IPv6": "-6"}[f.name]
		for _, u := range []string{"http://pypi.test:8080/", "https://pypi.test:8443/", "https://a.files.test:8443/", "https://PyPI.TEST:8443/"} {
			t.Run(f.name+" "+u, func(t *testing.T) {
				curl(flag, u).wantStatus(t, 0).wantOut(t, "hello from nginx\n200")
				curl(flag, "--http1.1", u).wantStatus(t, 0).wantOut(t, "hello from nginx\n200")
			})
		}
		t.Run(f.name+" the name in pieces", func(t *testing.T) {
			for _, row := range []struct{ record, chunk int }{{1, 0}, {1 << 14, 1}} {
				hello := base64.StdEncoding.EncodeToString(hello(t, "pypi.test", "", row.record))
				d, r := dial(t, sb, "-timeout", "5s", "-send-base64", hello, "-chunk", fmt.Sprint(row.chunk), at(f.far, 8443))
				if d.Error != "" || d.Got == "" {
					t.Errorf("records of %d bytes in segments of %d: no server answers\n%s", row.record, row.chunk, r)
				}
			}
		})
		to := func(name string, port int, addr string) string { return fmt.Sprintf("%s:%d:%s", name, port, addr) }
		if strings.Contains(f.far, ":") {
			to = func(name string, port int, addr string) string { return fmt.Sprintf("%s:%d:[%s]", name, port, addr) }
		}
		for _, row := range []struct {
			what  string
			flags []string
			rule  string
		}{
			{"the server by its bare address", []string{url(f.far, 8080, "/")}, "egress[0] index"},
			{"over TLS by its bare address, without SNI", []string{"https://" + at(f.far, 8443) + "/"}, "egress[0] index"},
			{"another SNI", []string{"--resolve", to("evil.test", 8443, f.far), "https://evil.test:8443/"}, "egress[0] index"},
			{"another Host", []string{"-H", "Host: evil.test", flag, "http://pypi.test:8080/"}, "egress[0] index"},
			{"a look-alike before the name", []string{"--resolve", to("evilpypi.test", 8443, f.far), "https://evilpypi.test:8443/"}, "egress[0] index"},
			{"a look-alike behind it", []string{"--resolve", to("pypi.test.evil.io", 8443, f.far), "https://pypi.test.evil.io:8443/"}, "egress[0] index"},
			{"the right SNI at an address that was not granted", []string{"--resolve", to("pypi.test", 8443, f.other), "https://pypi.test:8443/"}, "default"},
			{"a port that the rule does not have", []string{flag, "http://pypi.test:7008/"}, "default"},
		} {
			t.Run(f.name+" "+row.what, func(t *testing.T) {
				before := sb.refusals(t)
				r := curl(row.flags...)
				if strings.Contains(r.out, "hello from") {
					t.Errorf("it is let through\n%s", r)
				}
				testutil.Within(t, 2*time.Second, func() (bool, string) {
					after := sb.refusals(t)
					return after[row.rule] > before[row.rule], fmt.Sprintf("no refusal by %q: %v, before %v\n%s", row.rule, after, before, r)
				})
			})
		}
	}
	t.Run("a name that no rule has", func(t *testing.T) {
		r := curl("https://evil.test:8443/")
		if r.status != 6 {
			t.Errorf("curl could resolve it\n%s", r)
		}
		ok(t, sb, 10*time.Second, "dig", "evil.test").wantOut(t, "NXDOMAIN").wantOut(t, "(default)")
		ok(t, sb, 10*time.Second, "dig", "@"+other4, "evil.test").wantOut(t, "NXDOMAIN")
		ok(t, sb, 10*time.Second, "dig", "@"+other6, "+tcp", "evil.test").wantOut(t, "NXDOMAIN")
		ok(t, sb, 10*time.Second, "dig", "+short", "@"+other4, "+tcp", "pypi.test").wantOut(t, far4)
		if out := zone.result("").out; strings.Contains(strings.ToLower(out), "evil") {
			t.Errorf("it was asked upstream\n%s", out)
		}
	})
}
