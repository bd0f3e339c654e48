package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice.dev/sluice/policy"
)

const gatePolicy = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: gate}
spec:
  egress:
    - {name: python, action: allow, to: [{domain: pypi.org}], ports: [{protocol: TCP, port: 443}]}
    - {name: api, action: allow, to: [{domain: api.test}], ports: [{protocol: TCP, port: 80}], http: [{methods: [GET], path: /v1/*}]}
    - {name: ping, action: allow, icmp: [{family: IPv6, type: 128}]}
  ingress:
    - {name: office, action: allow, from: [{cidr: 192.0.2.0/24}], ports: [{protocol: TCP, port: 8080}]}
`

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// status returns the status that the process would exit with.
func status(err error) int {
	var s exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &s):
		return int(s)
	}
	return -1
}

func TestPolicyTestSaysWhatWouldHappen(t *testing.T) {
	f := file(t, "gate.yaml", gatePolicy)
	tests := []struct {
		line   string
		status int
		want   string
	}{
		{"--to pypi.org:443", 0, "allow by egress[0] python\nassumed: pypi.org resolves to a public address that no rule names, such as 192.0.2.1\nassumed: the first bytes are TLS and say the name \"pypi.org\"\n"},
		{"--to PYPI.org.:443 --address 203.0.113.1", 0, "allow by egress[0] python\n"},
		{"--to pypi.org:443 --said evil.io", 1, "reject by default (egress[0] python: name-mismatch)\n"},
		{"--to pypi.org:443 --said=", 1, "reject by default (egress[0] python: no-name)\n"},
		{"--to pypi.org:443 --address 10.0.0.1", 1, "reject by default (egress[0] python: private-address)\n"},
		{"--to pypi.org:443 --address 169.254.169.254", 1, "reject by special:metadata\n"},
		{"--to evilpypi.org:443", 1, "nxdomain by default: the name may not be asked\n"},
		{"--to api.test:80 --path /v1/a", 0, "allow by egress[1] api\n"},
		{"--to api.test:80 --method POST --path /v1/a", 1, "reject by egress[1] api (egress[1] api: http-request)\n"},
		{"--to [2001:db8::1]:443", 1, "reject by default\n"},
		{"--to 2001:db8::1 --proto icmpv6", 0, "allow by egress[2] ping\n"},
		{"--to 198.51.100.1:53 --proto udp", 1, "reject by builtin:dns\n"},
		{"--from 192.0.2.9 --to 8080", 0, "allow by ingress[0] office\n"},
		{"--from 198.51.100.9 --to :8080", 1, "reject by default\n"},
		{"--to pypi.org", -1, "--to pypi.org: want HOST:PORT, as example.com:443"},
		{"--to pypi.org:0", -1, "the port is a number from 1 to 65535"},
		{"--to a..b:443", -1, "as a name: it has an empty label"},
		{"--to 1.2.3.4:443 --address 1.2.3.5", -1, "an address resolves to no other"},
		{"--to pypi.org:443 --proto gre", -1, "want tcp, udp, sctp, icmp or icmpv6"},
		{"--to pypi.org:443 --address x", -1, "--address x: want an address"},
		{"", -1, "want --to HOST:PORT"},
	}
	for _, tt := range tests {
		out, err := runApp(t, append([]string{"policy", "test", f}, strings.Fields(tt.line)...)...)
		if status(err) == -1 {
			out = err.Error()
		}
		if status(err) != tt.status || !strings.Contains(out, tt.want) || tt.status != -1 && !strings.HasPrefix(out, tt.want) {
			t.Errorf("%s: status %d, %q; want %d, %q", tt.line, status(err), out, tt.status, tt.want)
		}
	}
	var got trialJSON
	out, err := runApp(t, "policy", "test", f, "--to", "pypi.org:443", "--said", "evil.io", "-o", "json")
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if status(err) != 1 || got.Allowed || got.Rule != "default" || got.Tried != "egress[0] python" || got.Reason != policy.ReasonMismatch || got.Asked == nil || !*got.Asked {
		t.Errorf("got %+v, status %d", got, status(err))
	}
}

func TestPolicyExplainSaysWhy(t *testing.T) {
	f := file(t, "gate.yaml", gatePolicy)
	out, err := runApp(t, "policy", "explain", f, "--to", "pypi.org:22")
	want := `reject by default
assumed: pypi.org resolves to a public address that no rule names, such as 192.0.2.1
RULE              ACTION  DECIDES  WHY
egress[0] python  allow   no       it does not list this protocol and port
egress[1] api     allow   no       the address is none of its peers, and granted as pypi.org, which it does not have
egress[2] ping    allow   no       it does not list this protocol and port
default           reject  yes      no rule matches
`
	if err != nil || out != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, out, want)
	}
	var got struct {
		Allowed bool
		Target  string
		Steps   []struct {
			Rule, Action string
			Decides      bool
		}
	}
	out, err = runApp(t, "policy", "explain", f, "--to", "pypi.org:443", "-o", "json")
	if err2 := json.Unmarshal([]byte(out), &got); err != nil || err2 != nil || len(got.Steps) != 1 || !got.Steps[0].Decides || got.Steps[0].Action != "allow" || !got.Allowed || got.Target != "192.0.2.1:443" {
		t.Errorf("%v, %v: %s", err, err2, out)
	}
}

func TestPolicyDiffSaysWhatOpensAndCloses(t *testing.T) {
	before := file(t, "before.yaml", gatePolicy)
	after := file(t, "after.yaml", strings.NewReplacer("domain: pypi.org", `domain: "*.pypi.org"`, "192.0.2.0/24", "192.0.2.0/25").Replace(gatePolicy))
	out, err := runApp(t, "policy", "diff", before, after)
	want := `CHANGE  DIRECTION  TO              PORTS    BEFORE                       AFTER
opens   egress     *.pypi.org      TCP 443  reject by default            allow by egress[0] python
closes  egress     pypi.org        TCP 443  allow by egress[0] python    reject by default
closes  ingress    192.0.2.128/25  TCP 8080 allow by ingress[0] office   reject by default
`
	if strings.Join(strings.Fields(out), " ") != strings.Join(strings.Fields(want), " ") || status(err) != 1 {
		t.Errorf("status %d, got\n%s\nwant\n%s", status(err), out, want)
	}
	if out, err := runApp(t, "policy", "diff", before, before); err != nil || out != "nothing is decided otherwise\n" {
		t.Errorf("the same: %q, %v", out, err)
	}
	var changes []policy.Change
	if out, err := runApp(t, "policy", "diff", after, before, "-o", "json"); status(err) != 1 || json.Unmarshal([]byte(out), &changes) != nil || len(changes) != 3 {
		t.Errorf("as JSON: status %d, %s", status(err), out)
	}
	if _, err := runApp(t, "policy", "diff", before); err == nil || !strings.Contains(err.Error(), "want BEFORE and AFTER") {
		t.Errorf("one file: %v", err)
	}
}

func TestPolicySuggestReadsAFlowLog(t *testing.T) {
	const lines = `{"verdict":"FORWARDED","traffic_direction":"EGRESS","IP":{"source":"10.0.2.100","destination":"198.51.100.1","ipVersion":"IPv4"},"l4":{"TCP":{"source_port":40000,"destination_port":443}},"destination_names":["cdn.test","pypi.org"],"sni":"pypi.org","ech":true}
{"verdict":"AUDIT","traffic_direction":"EGRESS","IP":{"source":"10.0.2.100","destination":"198.51.100.2"},"l4":{"TCP":{"destination_port":80}},"destination_names":["web.test"],"Type":"L7","l7":{"type":"REQUEST","http":{"method":"GET","url":"http://web.test/a"}}}
{"verdict":"DROPPED","traffic_direction":"EGRESS","IP":{"source":"10.0.2.100","destination":"203.0.113.1"},"l4":{"TCP":{"destination_port":25}}}
{"verdict":"FORWARDED","traffic_direction":"EGRESS","IP":{"source":"10.0.2.100","destination":"10.0.2.3"},"l4":{"UDP":{"destination_port":53}},"l7":{"dns":{"query":"pypi.org."}}}
{"verdict":"FORWARDED","traffic_direction":"EGRESS","IP":{"source":"10.0.2.100","destination":"2001:db8::9"},"l4":{"ICMPv6":{"type":128,"code":0}}}
{"verdict":"FORWARDED","traffic_direction":"EGRESS","IP":{"source":"10.0.2.100","destination":"203.0.113.2"},"l4":{"protocol":47}}
{"verdict":"FORWARDED","traffic_direction":"INGRESS","IP":{"source":"192.0.2.7","destination":"192.0.2.1"},"l4":{"TCP":{"destination_port":9090}},"reply_source":"10.0.2.100:8080"}
`
	const want = `# Not covered: protocol 47, which rules can not list
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata:
  name: learnt
spec:
  defaultAction: reject
  egress:
    - name: pypi.org
      action: allow
      to:
        - domain: pypi.org
      ports:
        - protocol: TCP
          port: 443
      ech: allow
    - name: web.test
      action: allow
      to:
        - domain: web.test
      ports:
        - protocol: TCP
          port: 80
    - name: address
      action: allow
      to:
        - cidr: 2001:db8::9/128
      icmp:
        - family: IPv6
          type: 128
  ingress:
    - name: client
      action: allow
      from:
        - cidr: 192.0.2.7/32
      ports:
        - protocol: TCP
          port: 8080
`
	log := file(t, "flows.jsonl", lines)
	if out, err := runApp(t, "policy", "suggest", log, "--name", "learnt"); err != nil || out != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, out, want)
	}
	list := file(t, "flows.json", "["+strings.Join(strings.Split(strings.TrimSpace(lines), "\n"), ",")+"]")
	if out, err := runApp(t, "policy", "suggest", list, "--name", "learnt"); err != nil || out != want {
		t.Errorf("of a list: %v, got\n%s", err, out)
	}
	var p policy.Policy
	if out, err := runApp(t, "policy", "suggest", log, "-o", "json"); err != nil || json.Unmarshal([]byte(out), &p) != nil || p.Metadata.Name != "suggested" {
		t.Errorf("as JSON: %v, %s", err, out)
	}
	for text, want := range map[string]string{"": "no flow that passed", "{}{}": "no flow that passed", "{": "read the flow log: byte", `{"IP":{"source":"x"}}`: "read the flow log: before byte 21", "[1]": "read the flow log"} {
		if _, err := runApp(t, "policy", "suggest", file(t, "bad", text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
