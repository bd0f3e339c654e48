package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const h2cSpec = `
defaultAction: reject
egress:
- name: api
  action: allow
  to: [{domain: pypi.test}]
  ports: [{protocol: TCP, port: 7008}]
  http: [{methods: [GET], path: "/open/*"}, {methods: [PUT], path: /digest}]
- name: files
  action: allow
  to: [{domain: "*.files.test"}]
  ports: [{protocol: TCP, port: 7008}]`

// curl and Go's client speak HTTP/2 in clear text to a server that many names lead to. (curl 7.88
// cannot use such a connection twice, with or without Sluice.)
func TestGateJudgesEachStream(t *testing.T) {
	area(t, "gate.h2c", "curl")
	w := newWorld(t)
	w.zone(t, gateZone...)
	serve(t, w.far)
	sb := w.host.sandbox(t, "--policy", policyFile(t, h2cSpec))
	curl := func(flags ...string) result {
		t.Helper()
		return run(t, sb, 60*time.Second, append([]string{"curl", "-gsS", "-m", "50", "--http2-prior-knowledge", "-w", "%{http_version} %{http_code}\n"}, flags...)...)
	}
	counted := func(t *testing.T, rule string, before map[string]int) {
		t.Helper()
		testutil.Within(t, 2*time.Second, func() (bool, string) {
			after := sb.refusals(t)
			return after[rule] > before[rule], fmt.Sprintf("no refusal by %q: %v, before %v", rule, after, before)
		})
	}
	for _, f := range families {
		flag := map[string]string{"IPv4": "-4", "IPv6": "-6"}[f.name]
		t.Run(f.name+" what is allowed", func(t *testing.T) {
			curl(flag, "http://pypi.test:7008/open/1").wantStatus(t, 0).wantOut(t, "hello from peer\n2 200")
			curl(flag, "http://a.files.test:7008/").wantStatus(t, 0).wantOut(t, "hello from peer\n2 200")
		})
		t.Run(f.name+" many requests on one connection", func(t *testing.T) {
			d, r := h2(t, sb, "-n", "100", "http://pypi.test:7008/open/1", "http://pypi.test:7008/open/2")
			if d.OK != 100 || d.Status != 200 || d.Connections != 1 || d.Error != "" {
				t.Errorf("want 101 answers on one connection\n%s", r)
			}
		})
		t.Run(f.name+" another path on the same connection", func(t *testing.T) {
			before := sb.refusals(t)
			d, r := h2(t, sb, "-n", "20", "http://pypi.test:7008/open/1", "http://pypi.test:7008/secret")
			if d.OK != 20 || d.Status != 403 || d.Connections != 1 || !strings.Contains(d.Body, `rule "egress[0] api"`) {
				t.Errorf("want 20 answers and a 403 that names the rule on one connection\n%s", r)
			}
			counted(t, "egress[0] api", before)
		})
		for _, row := range []struct {
			what, rule string
			flags      []string
		}{
			{"another path", "egress[0] api", []string{flag, "http://pypi.test:7008/secret"}},
			{"another method", "egress[0] api", []string{flag, "-X", "DELETE", "http://pypi.test:7008/open/1"}},
			{"another name", "egress[0] api", []string{flag, "-H", "Host: evil.test", "http://pypi.test:7008/open/1"}},
			{"the bare address", "egress[0] api", []string{url(f.far, 7008, "/open/1")}},
		} {
			t.Run(f.name+" "+row.what, func(t *testing.T) {
				before := sb.refusals(t)
				r := curl(row.flags...)
				if !strings.Contains(r.out, fmt.Sprintf("rule %q", row.rule)) || !strings.Contains(r.out, "2 403") {
					t.Errorf("no 403 that names the rule\n%s", r)
				}
				counted(t, row.rule, before)
			})
		}
	}
	t.Run("100 MiB arrive as they were sent", func(t *testing.T) {
		r := run(t, sb, 60*time.Second, "sh", "-ec", `f=$(mktemp); head -c 104857600 /dev/urandom >"$f"
echo "104857600 $(sha256sum "$f" | cut -d" " -f1)"
curl -gsS -m 50 --http2-prior-knowledge -T "$f" http://pypi.test:7008/digest; rm "$f"`)
		lines := strings.Split(strings.TrimSpace(r.out), "\n")
		if r.status != 0 || len(lines) != 2 || lines[0] != lines[1] {
			t.Errorf("they do not\n%s", r)
		}
	})
	t.Run("an offer to upgrade from HTTP/1", func(t *testing.T) {
		curl := []string{"curl", "-gsS", "-m", "8", "--http2", "-w", "%{http_version} %{http_code}", "http://pypi.test:7008/open/1"}
		direct, inside := run(t, w.host, 10*time.Second, curl...), run(t, sb, 10*time.Second, curl...)
		if direct.status != 0 || direct.status != inside.status || direct.out != inside.out {
			t.Errorf("it is not as without Sluice\ndirectly: %s\ninside: %s", direct, inside)
		}
	})
}

// streamed is the output of peer h2.
type streamed struct {
	OK, Connections, Status int
	Body, Error             string
}

func h2(t *testing.T, in place, args ...string) (d streamed, r result) {
	t.Helper()
	r = ok(t, in, 30*time.Second, append([]string{peerBin(), "h2"}, args...)...)
	r.into(t, &d)
	return d, r
}
