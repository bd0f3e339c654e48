package examples

import (
	"encoding/json"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"strings"
	"testing"

	"sluice.dev/sluice/policy"
)

func read(t *testing.T, name string) *policy.Policy {
	t.Helper()
	data, err := Files.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if path.Ext(name) == ".conflist" {
		data = policyOf(t, data)
	}
	p, err := policy.Parse(name, data)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// policyOf returns the policy that a network configuration list holds for Sluice.
func policyOf(t *testing.T, list []byte) []byte {
	t.Helper()
	var l struct {
		Plugins []struct {
			Type   string
			Policy json.RawMessage
		}
	}
	if err := json.Unmarshal(list, &l); err != nil {
		t.Fatal(err)
	}
	for _, p := range l.Plugins {
		if p.Type == "sluice-cni" {
			return append(p.Policy, '\n')
		}
	}
	t.Fatal("the list does not have sluice-cni")
	return nil
}

func TestEachPolicyDecidesAsItsCommentSays(t *testing.T) {
	said := func(name string) *string { return &name }
	from := netip.MustParseAddr
	tcp, udp, ping := policy.TCP, policy.UDP, policy.ICMPv4
	tried := map[string]bool{}
	for _, row := range []struct {
		file, what string
		trial      policy.Trial
		rule       string // the rule that allows, empty: refused
	}{
		{"coding-agent.yaml", "the model's API", policy.Trial{Host: "api.anthropic.com", Proto: tcp, Port: 443}, "egress[0] model"},
		{"coding-agent.yaml", "the API over QUIC", policy.Trial{Host: "api.anthropic.com", Proto: udp, Port: 443}, ""},
		{"coding-agent.yaml", "Go modules", policy.Trial{Host: "proxy.golang.org", Proto: tcp, Port: 443}, "egress[1] packages"},
		{"coding-agent.yaml", "a clone", policy.Trial{Host: "github.com", Proto: tcp, Port: 443}, "egress[2] code"},
		{"coding-agent.yaml", "a subdomain that no rule lists", policy.Trial{Host: "gist.github.com", Proto: tcp, Port: 443}, ""},
		{"coding-agent.yaml", "ssh to the code host", policy.Trial{Host: "github.com", Proto: tcp, Port: 22}, ""},
		{"coding-agent.yaml", "another name in the ClientHello", policy.Trial{Host: "pypi.org", Proto: tcp, Port: 443, Said: said("evil.example")}, ""},
		{"coding-agent.yaml", "a paste service", policy.Trial{Host: "paste.example", Proto: tcp, Port: 443}, ""},
		{"coding-agent.yaml", "an address without a name", policy.Trial{Host: "203.0.113.9", Proto: tcp, Port: 443}, ""},
		{"coding-agent.yaml", "the cloud's metadata service", policy.Trial{Host: "169.254.169.254", Proto: tcp, Port: 80}, ""},
		{"coding-agent.yaml", "an index's name that resolves to the local network", policy.Trial{Host: "pypi.org", Address: from("10.0.0.1"), Proto: tcp, Port: 443}, ""},
		{"coding-agent.yaml", "ping", policy.Trial{Host: "203.0.113.9", Proto: ping, ICMPType: 8}, ""},

		{"ci.yaml", "pip's index", policy.Trial{Host: "pypi.org", Proto: tcp, Port: 443}, "egress[0] pip"},
		{"ci.yaml", "pip's files", policy.Trial{Host: "files.pythonhosted.org", Proto: tcp, Port: 443}, "egress[0] pip"},
		{"ci.yaml", "npm", policy.Trial{Host: "registry.npmjs.org", Proto: tcp, Port: 443}, "egress[1] npm"},
		{"ci.yaml", "git over HTTPS", policy.Trial{Host: "github.com", Proto: tcp, Port: 443}, "egress[2] git-https"},
		{"ci.yaml", "git over ssh, which says no name", policy.Trial{Host: "github.com", Proto: tcp, Port: 22, Said: said("")}, "egress[3] git-ssh"},
		{"ci.yaml", "apt", policy.Trial{Host: "deb.debian.org", Proto: tcp, Port: 80, Path: "/debian/dists/stable/InRelease"}, "egress[4] apt"},
		{"ci.yaml", "an upload to apt's mirror", policy.Trial{Host: "deb.debian.org", Proto: tcp, Port: 80, Method: "PUT", Path: "/debian/x"}, ""},
		{"ci.yaml", "another path of apt's mirror", policy.Trial{Host: "deb.debian.org", Proto: tcp, Port: 80, Path: "/other"}, ""},
		{"ci.yaml", "the index in clear text", policy.Trial{Host: "pypi.org", Proto: tcp, Port: 80}, ""},
		{"ci.yaml", "a name that no rule has", policy.Trial{Host: "evil.example", Proto: tcp, Port: 443}, ""},

		{"web-app.yaml", "the database", policy.Trial{Host: "10.20.0.5", Proto: tcp, Port: 5432}, "egress[0] database"},
		{"web-app.yaml", "the database's neighbour", policy.Trial{Host: "10.20.0.6", Proto: tcp, Port: 5432}, ""},
		{"web-app.yaml", "ssh to the database", policy.Trial{Host: "10.20.0.5", Proto: tcp, Port: 22}, ""},
		{"web-app.yaml", "the payments API", policy.Trial{Host: "api.payments.example", Proto: tcp, Port: 443}, "egress[1] payments"},
		{"web-app.yaml", "the internet", policy.Trial{Host: "203.0.113.9", Proto: tcp, Port: 443}, ""},
		{"web-app.yaml", "a visitor", policy.Trial{Client: from("203.0.113.9"), Proto: tcp, Port: 8080}, "ingress[0] visitors"},
		{"web-app.yaml", "the monitoring", policy.Trial{Client: from("10.20.3.4"), Proto: tcp, Port: 9090}, "ingress[1] metrics"},
		{"web-app.yaml", "a visitor who asks for metrics", policy.Trial{Client: from("203.0.113.9"), Proto: tcp, Port: 9090}, ""},

		{"podman/containers.yaml", "one container to another", policy.Trial{Host: "10.5.0.11", Proto: tcp, Port: 7008}, "egress[0] containers"},
		{"podman/containers.yaml", "a container to the internet", policy.Trial{Host: "203.0.113.9", Proto: tcp, Port: 443}, ""},
		{"podman/containers.yaml", "alice", policy.Trial{Client: from("10.5.0.10"), Proto: tcp, Port: 7008}, "ingress[0] alice"},
		{"podman/containers.yaml", "bob", policy.Trial{Client: from("10.5.0.11"), Proto: tcp, Port: 7008}, ""},
		{"podman/containers.yaml", "alice at another port", policy.Trial{Client: from("10.5.0.10"), Proto: tcp, Port: 22}, ""},

		{"cni/10-gated.conflist", "a web server", policy.Trial{Host: "203.0.113.9", Proto: tcp, Port: 443}, "egress[0] web"},
		{"cni/10-gated.conflist", "a web server in clear text", policy.Trial{Host: "203.0.113.9", Proto: tcp, Port: 80}, ""},
		{"cni/10-gated.conflist", "the cloud's metadata service", policy.Trial{Host: "169.254.169.254", Proto: tcp, Port: 443}, ""},
	} {
		tried[row.file] = true
		t.Run(row.file+" "+row.what, func(t *testing.T) {
			r, err := row.trial.Run(read(t, row.file), policy.Environment{})
			if err != nil {
				t.Fatal(err)
			}
			if r.Allowed() != (row.rule != "") || r.Allowed() && r.Verdict.Rule() != row.rule {
				t.Errorf("decided %v by %q, want rule %q", r.Verdict.Action(), r.Verdict.Rule(), row.rule)
			}
		})
	}
	policies := 0
	err := fs.WalkDir(Files, ".", func(name string, d fs.DirEntry, err error) error {
		if ext := path.Ext(name); err == nil && (ext == ".yaml" || name == "cni/10-gated.conflist") {
			if policies++; !tried[name] {
				t.Errorf("no flow is asked of %s", name)
			}
		}
		return err
	})
	if err != nil || policies != len(tried) {
		t.Errorf("%d policies, %d tried: %v", policies, len(tried), err)
	}
}

func TestTheIndexListsEveryExample(t *testing.T) {
	index, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	entries, err := Files.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(string(index), "]("+e.Name()) {
			t.Errorf("README.md does not list %s", e.Name())
		}
	}
}

// The README shows a policy as an indented block, as Markdown has it.
func TestTheReadmesPolicyIsValid(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, found := strings.Cut(string(text), "\n    apiVersion:")
	if !found {
		t.Fatal("README.md shows no policy")
	}
	block, _, _ = strings.Cut("apiVersion:"+block, "\n\n")
	p, err := policy.Parse("README.md", []byte(strings.ReplaceAll(block, "\n    ", "\n")+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	trial := policy.Trial{Host: "pypi.org", Proto: policy.TCP, Port: 443}
	if r, err := trial.Run(p, policy.Environment{}); err != nil || r.Verdict.Rule() != "egress[0] python" {
		t.Errorf("pypi.org is decided by %v: %v", r, err)
	}
}
