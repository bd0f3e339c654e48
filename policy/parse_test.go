package policy

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode"
)

const head = "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: t}\n" // lines 1 to 3

func TestParseNamesPlaceCauseAndCure(t *testing.T) {
	// rule puts one egress rule's fields on line 6, from column 5.
	rule := func(fields string) string {
		return head + "spec:\n  egress:\n  - {action: allow, " + fields + "}\n"
	}
	tests := []struct {
		name, file string
		want       []string // one error each: its place, and then parts of its text
	}{
		{"an empty file", "", []string{"f:1:1: the file is empty; expected a policy that starts with apiVersion"}},
		{"a file of comments", "# later\n", []string{"f:1:1: the file is empty"}},
		{"a null document", "---\n", []string{"f:2:1: the policy is empty; expected a mapping with apiVersion, kind"}},
		{"a list", "- a\n", []string{"f:1:1: the policy is a list"}},
		{"broken YAML", head + "spec: {\n", []string{"f:4:1: invalid YAML: did not find expected node content"}},
		{"a control character", "a: \x01", []string{"f:1:1: invalid YAML: control characters are not allowed"}},
		{"escapes for a terminal", head + "spec: {\"\\e[2J\\n\": 1, egress: !!int \"\\e\\n\"}\n", []string{`f:4:8: spec has no field "\x1b[2J\n"`, "f:4:30: egress is the number   ; expected"}},
		{"two documents", head + "spec: {}\n---\nkind: SandboxPolicy\n", []string{"f:5:1: a second YAML document starts here; expected one policy per file"}},
		{"another apiVersion", strings.Replace(head, "v1alpha1", "v1", 1) + "spec: {}\n", []string{`f:1:13: apiVersion is "sluice.dev/v1"; expected sluice.dev/v1alpha1`}},
		{"another kind", strings.Replace(head, "SandboxPolicy", "NetworkPolicy", 1) + "spec: {}\n", []string{`f:2:7: kind is "NetworkPolicy"; expected SandboxPolicy`}},
		{"nothing but a kind", "kind: SandboxPolicy\n", []string{"f:1:1: the policy lacks apiVersion", "f:1:1: the policy lacks metadata", "f:1:1: the policy lacks spec"}},
		{"a bad name", strings.Replace(head, "{name: t}", "{name: My_Policy}", 1) + "spec: {}\n", []string{`f:3:18: metadata.name is "My_Policy"; expected a name of lower-case letters`}},
		{"a name that is a number", strings.Replace(head, "{name: t}", "{name: 12}", 1) + "spec: {}\n", []string{"f:3:18: metadata.name is the number 12"}},

		{"an unknown field near a known one", head + "spec:\n  egres: []\n", []string{`f:5:3: spec has no field "egres"; did you mean egress?`}},
		{"a known field in the wrong case", head + "spec:\n  defaultaction: drop\n", []string{"did you mean defaultAction?"}},
		{"an unknown field near nothing", head + "spec:\n  podSelector: {}\n", []string{"f:5:3: spec has no field \"podSelector\"; expected one of mode, defaultAction, egress, ingress, dns, limits"}},
		{"a field given twice", head + "spec:\n  egress: []\n  egress: []\n", []string{"f:6:3: egress is given twice in spec, first on line 5"}},
		{"an alias", head + "spec:\n  egress: &e []\n  ingress: *e\n", []string{"f:6:12: ingress is an alias (*e), which policies do not support: write the value out"}},
		{"a merge key", head + "spec:\n  <<: {egress: []}\n", []string{`f:5:3: spec has no field "<<"`}},
		{"rules that are not a list", head + "spec:\n  egress: {action: allow}\n", []string{"f:5:11: egress is a mapping; expected a list of rules"}},
		{"a list with nothing in it", head + "spec:\n  egress:\n", []string{"egress is empty; expected a list of rules"}},
		{"a key that is a list", head + "spec:\n  ? [a]\n  : 1\n", []string{"f:5:5: spec has a list as a key"}},

		{"deny for an action", head + "spec: {defaultAction: deny}\n", []string{`f:4:23: defaultAction is "deny"; expected reject (refused at once) or drop (no answer)`}},
		{"a misspelt action", head + "spec: {defaultAction: Reject}\n", []string{"did you mean reject?"}},
		{"a rule without action", head + "spec:\n  egress:\n  - name: a\n", []string{"f:6:5: egress[0] lacks action; expected name, action, to, ports, icmp"}},
		{"two rules of one name", head + "spec:\n  egress:\n  - {name: a, action: allow}\n  - {name: a, action: drop}\n", []string{`f:7:12: egress[1] is named "a" like the rule on line 6`}},
		{"a rule name that is too long", rule("name: " + strings.Repeat("a", MaxRuleName+1)), []string{"at most 512"}},
		{"a rule name that ends in a slash", rule("name: a/"), []string{`egress[0].name is "a/"; expected a name of letters`}},
		{"a rule name with a space", rule("name: a b"), []string{`egress[0].name is "a b"; expected a name of letters`}},
		{"from in an egress rule", rule("from: [{entity: host}]"), []string{"f:6:21: egress[0] has from; expected to"}},
		{"to in an ingress rule", head + "spec:\n  ingress:\n  - {action: allow, to: [{entity: host}]}\n", []string{"f:6:21: ingress[0] has to; expected from"}},

		{"host bits", rule("to: [{cidr: 10.0.0.1/8}]"), []string{"f:6:33: cidr 10.0.0.1/8 has bits set after the prefix; expected 10.0.0.0/8 for the network, or 10.0.0.1/32 for the one address"}},
		{"a bare address", rule("to: [{cidr: 10.0.0.1}]"), []string{`cidr is "10.0.0.1", which is not a CIDR; expected 10.0.0.1/32 for the one address`}},
		{"a bare IPv6 address", rule("to: [{cidr: '2001:db8::1'}]"), []string{"expected 2001:db8::1/128 for the one address"}},
		{"a prefix too long", rule("to: [{cidr: 10.0.0.0/33}]"), []string{"expected a prefix length from 0 to 32 after the /"}},
		{"a name for a CIDR", rule("to: [{cidr: example.com}]"), []string{"expected a network such as 10.0.0.0/8"}},
		{"a CIDR with a zone", rule("to: [{cidr: 'fe80::1%eth0/64'}]"), []string{"which is not a CIDR"}},
		{"an address with a zone", rule("to: [{cidr: 'fe80::1%eth0'}]"), []string{"expected an address without a zone (%eth0)"}},
		{"IPv4 written as IPv6", rule("to: [{cidr: '::ffff:10.0.0.0/104'}]"), []string{"is IPv4 written as IPv6; expected 10.0.0.0/8"}},
		{"a mapped address", rule("to: [{cidr: '::ffff:10.0.0.1'}]"), []string{"expected 10.0.0.1/32"}},
		{"a number for a CIDR", rule("to: [{cidr: 10.0}]"), []string{"cidr is the number 10.0; expected a network"}},
		{"an exception outside", rule("to: [{cidr: 10.0.0.0/8, except: [11.0.0.0/16]}]"), []string{"f:6:54: except 11.0.0.0/16 is not a part of cidr 10.0.0.0/8"}},
		{"an exception of everything", rule("to: [{except: [10.0.0.0/8], cidr: 10.0.0.0/8}]"), []string{"f:6:36: except 10.0.0.0/8 is not a part of cidr"}},
		{"an exception without a CIDR", rule("to: [{except: [10.0.0.0/8]}]"), []string{"except without cidr"}},
		{"CIDR and entity", rule("to: [{cidr: 10.0.0.0/8, entity: host}]"), []string{"f:6:53: a peer has cidr and entity; expected one of them"}},
		{"an empty peer", rule("to: [{}]"), []string{"a peer in to is empty; expected cidr or entity"}},
		{"no peers", rule("to: []"), []string{"f:6:25: to is an empty list; expected at least one of {domain}, {cidr, except} or {entity} (leave to out to match all)"}},
		{"an unknown entity", rule("to: [{entity: metdata}]"), []string{`entity is "metdata"; did you mean metadata?`}},
		{"an allow rule for what is never open", rule("to: [{entity: host}, {cidr: 0.0.0.0/8}]"), []string{"f:6:42: cidr 0.0.0.0/8 can not be allowed: it is this-network, which is always refused"}},

		{"an inverted range", rule("ports: [{protocol: TCP, port: 90, endPort: 80}]"), []string{"f:6:64: endPort 80 is below port 90; expected port 80 and endPort 90"}},
		{"a range without a start", rule("ports: [{protocol: TCP, endPort: 80}]"), []string{"endPort without port"}},
		{"a port without a protocol", rule("ports: [{port: 80}]"), []string{"f:6:29: a port lacks protocol; expected TCP, UDP or SCTP beside port"}},
		{"a port of ICMP", rule("ports: [{protocol: ICMP, port: 80}]"), []string{"f:6:40: ICMP has no ports; expected TCP, UDP or SCTP beside port"}},
		{"a protocol in lower case", rule("ports: [{protocol: tcp}]"), []string{"did you mean TCP?"}},
		{"port 0", rule("ports: [{protocol: TCP, port: 0}]"), []string{"port is the number 0; expected a decimal number from 1 to 65535"}},
		{"a port too high", rule("ports: [{protocol: TCP, port: 70000}]"), []string{"port is the number 70000; expected"}},
		{"a quoted port", rule("ports: [{protocol: TCP, port: '80'}]"), []string{`port is the string "80"; expected a decimal number`}},
		{"an octal port", rule("ports: [{protocol: TCP, port: 0443}]"), []string{"port is the number 0443; expected a decimal number"}},
		{"a hexadecimal port", rule("ports: [{protocol: TCP, port: 0x50}]"), []string{"port is the number 0x50; expected a decimal number"}},
		{"no ports", rule("ports: []"), []string{"ports is an empty list"}},
		{"a port that is a number", rule("ports: [80]"), []string{"a port is the number 80; expected a mapping with protocol, port, endPort"}},
		{"an ICMP type without a family", rule("icmp: [{type: 8}]"), []string{"icmp lacks family"}},
		{"an ICMP code without a type", rule("icmp: [{family: IPv4, code: 1}]"), []string{"icmp code without type"}},
		{"an ICMP type too high", rule("icmp: [{family: IPv4, type: 256}]"), []string{"icmp type is the number 256; expected a decimal number from 0 to 255"}},

		{"a domain with a port", rule("to: [{domain: 'example.com:443'}]"), []string{`f:6:35: domain is "example.com:443": it has the character ':', which names do not have; expected a name such as example.com`}},
		{"an address for a domain", rule("to: [{domain: 10.0.0.1}]"), []string{`domain is "10.0.0.1": it is an address, not a name`}},
		{"an escaped domain", rule(`to: [{domain: 'a\.b'}]`), []string{"which names do not have"}},
		{"a star inside a label", rule("to: [{domain: 'www*.example.com'}]"), []string{"a * stands for one whole label and ** for one or more, only in front"}},
		{"a star alone", rule("to: [{domain: '**'}]"), []string{"a * stands for one whole label"}},
		{"an alias for a domain", rule("to: [{domain: *.example.com}]"), []string{"f:6:1: invalid YAML: did not find expected alphabetic or numeric character"}},
		{"domain and CIDR", rule("to: [{domain: a.test, cidr: 10.0.0.0/8}]"), []string{"f:6:35: a peer has domain and another; expected one of domain, cidr and entity"}},
		{"a domain in ingress", head + "spec:\n  ingress:\n  - {action: allow, from: [{domain: a.test}]}\n", []string{`a peer in from has no field "domain"; expected one of cidr, except, entity`}},
		{"a misspelt verify", rule("to: [{domain: a.test}], verify: grants"), []string{"f:6:53: verify is \"grants\"; did you mean grant?"}},
		{"a setting that is a boolean", rule("to: [{domain: a.test}], ech: true"), []string{"ech is the boolean true; expected one of refuse, allow"}},
		{"a setting without a domain", rule("to: [{entity: world}], missingName: allow"), []string{"f:6:5: verify, missingName, ech, quic and privateAddresses need a domain in to"}},
		{"a setting of a refusal", head + "spec:\n  egress:\n  - {action: drop, to: [{domain: a.test}], quic: refuse}\n", []string{"f:6:5: missingName, ech, quic and privateAddresses are for allow rules"}},
		{"requests without ports", rule("http: [{path: /a}]"), []string{"f:6:5: http is for allow rules in egress whose ports are all of TCP"}},
		{"requests of ingress", head + "spec:\n  ingress:\n  - {action: allow, http: [{path: /a}]}\n", []string{`ingress[0] has no field "http"`}},
		{"a method in lower case", rule("ports: [{protocol: TCP}], http: [{methods: [get]}]"), []string{`f:6:65: http method "get" is not upper-case letters and -; expected a method such as GET`}},
		{"a path that is none", rule("ports: [{protocol: TCP}], http: [{path: a}]"), []string{`path is "a"; expected a path such as /simple/requests/`}},
		{"a path that servers resolve", rule("ports: [{protocol: TCP}], http: [{path: /a/../b}]"), []string{"without segments such as .. that servers resolve"}},
		{"an unknown mode", head + "spec: {mode: audits}\n", []string{"f:4:14: mode is \"audits\"; did you mean audit?"}},
		{"names that are neither", head + "spec: {dns: {names: all}}\n", []string{`names is "all"; expected one of any, ungated`}},
		{"an unknown refusal", head + "spec: {dns: {refusal: servfail}}\n", []string{`refusal is "servfail"; expected one of nxdomain, refused, drop`}},
		{"an unknown query type", head + "spec: {dns: {types: [ANY]}}\n", []string{`f:4:22: a query type is "ANY"; expected one of A, AAAA`}},
		{"no query types", head + "spec: {dns: {types: []}}\n", []string{"types is an empty list"}},
		{"a TTL without a unit", head + "spec: {dns: {ttlFloor: 60}}\n", []string{"f:4:24: ttlFloor is the number 60; expected whole seconds, minutes or hours such as 60s, from 1s to 24h"}},
		{"a TTL of parts of a second", head + "spec: {dns: {ttlCap: 1500ms}}\n", []string{`ttlCap is the string "1500ms"`}},
		{"a TTL too long", head + "spec: {dns: {ttlCap: 25h}}\n", []string{`ttlCap is the string "25h"`}},
		{"a floor above the cap", head + "spec: {dns: {ttlFloor: 2m, ttlCap: 1m}}\n", []string{"f:4:13: ttlFloor 2m is above ttlCap 1m; expected it at or below"}},
		{"a label longer than DNS has", head + "spec: {dns: {maxLabelLength: 64}}\n", []string{"f:4:30: maxLabelLength is the number 64; expected a decimal number from 1 to 63"}},
		{"a part longer than names are", head + "spec: {dns: {maxWildcardLength: 0}}\n", []string{"maxWildcardLength is the number 0; expected a decimal number from 1 to 253"}},
		{"an entropy that no byte has", head + "spec: {dns: {maxWildcardEntropy: 8.1}}\n", []string{"maxWildcardEntropy is the number 8.1; expected bits in a byte such as 4.5, from 0.1 to 8"}},
		{"an entropy that is no number", head + "spec: {dns: {maxWildcardEntropy: .nan}}\n", []string{"maxWildcardEntropy is"}},
		{"more names than are remembered", head + "spec: {dns: {maxNamesPerMinute: 10001}}\n", []string{"maxNamesPerMinute is the number 10001; expected a decimal number from 1 to 10000"}},
		{"a rule limited to nothing", rule("limits: {flows: 0}"), []string{"flows is the number 0; expected a decimal number from 1 to"}},
		{"a limit that only the sandbox has", rule("limits: {halfOpen: 1}"), []string{`limits has no field "halfOpen"; expected one of flows, newFlowsPerSecond, egressBandwidth, ingressBandwidth, totalBytes`}},

		{"a bandwidth in powers of 1024", head + "spec: {limits: {egressBandwidth: 512Ki}}\n", []string{`f:4:34: egressBandwidth: "512Ki" is in powers of 1024; expected bits per second such as`}},
		{"a bandwidth without its unit", head + "spec: {limits: {egressBandwidth: 10}}\n", []string{`"10" is out of range; expected 1K to 1P bits per second`}},
		{"a bandwidth with a word", head + "spec: {limits: {ingressBandwidth: fast}}\n", []string{`"fast" is not a bandwidth`}},
		{"a bandwidth that is a list", head + "spec: {limits: {ingressBandwidth: [1M]}}\n", []string{`"a list" is not a bandwidth`}},
		{"an amount below one", head + "spec: {limits: {totalBytes: 0}}\n", []string{`totalBytes: "0" is not an amount of bytes; expected a number of at least 1`}},
		{"no flows at all", head + "spec: {limits: {flows: 0}}\n", []string{"flows is the number 0; expected a decimal number from 1 to"}},

		{"several mistakes, in order", head + "spec:\n  bad: 1\n  egress:\n  - {action: allow, to: [{cidr: 1.2.3.4}]}\n  defaultAction: x\n",
			[]string{"f:5:3: ", "f:7:33: ", "f:8:18: "}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Parse("f", []byte(tt.file))
			if err == nil || p != nil {
				t.Fatalf("parsed %+v without an error", p)
			}
			got := strings.Split(err.Error(), "\n")
			if len(got) != len(tt.want) {
				t.Fatalf("got %d errors, want %d:\n%v", len(got), len(tt.want), err)
			}
			for i, want := range tt.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("got  %s\nwant %s", got[i], want)
				}
			}
			var e *Error
			if !errors.As(err, &e) || e.File != "f" || e.Line < 1 || e.Col < 1 {
				t.Errorf("the error has no place: %#v", e)
			}
		})
	}
}

func TestParseIsBounded(t *testing.T) {
	if _, err := Parse("f", make([]byte, MaxPolicyBytes+1)); err == nil || !strings.Contains(err.Error(), "f:1:1: the file has 4194305 bytes; expected at most 4194304") {
		t.Errorf("too large a file: %v", err)
	}
	_, err := Parse("f", []byte(head+"spec:\n  egress:\n"+strings.Repeat("  - {}\n", 1000)))
	if lines := strings.Split(err.Error(), "\n"); len(lines) != maxErrors+1 || !strings.Contains(lines[maxErrors], "more mistakes follow") {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
}

func TestParseDefaults(t *testing.T) {
	p, err := Parse("f", []byte(head+"spec: {}\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := &Policy{APIVersion: APIVersion, Kind: Kind, Metadata: Metadata{Name: "t"}, Spec: Spec{DefaultAction: Reject}}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, want %+v", p, want)
	}
}

func TestExamplesParseCompileAndPrintBack(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		p, err := Parse(f, data)
		if err != nil {
			t.Error(err)
			continue
		}
		if _, err := Compile(p, twinEnv); err != nil {
			t.Error(err)
		}
		printsBack(t, p)
	}
	for _, b := range []Builtin{{}, {AllowPrivate: true}, {AllowHost: true}, {Pod: true}} {
		printsBack(t, b.Policy())
	}
}

// everything has each field that is about names and requests.
const everything = `spec:
  mode: audit
  defaultAction: drop
  egress:
  - {name: a, action: allow, to: [{domain: '*.Example.com.'}, {domain: bücher.example}], verify: strict, missingName: allow, ech: allow, quic: refuse, privateAddresses: allow, limits: {flows: 1, totalBytes: 1Gi}}
  - {action: drop, to: [{domain: '**.example.com'}], verify: grant}
  - {action: allow, ports: [{protocol: TCP, port: 80}], http: [{methods: [GET, M-SEARCH], path: /a/*}, {path: '*'}]}
  dns: {names: any, refusal: refused, types: [A, TXT, A], ttlFloor: 90s, ttlCap: 2h, maxLabelLength: 20, maxWildcardLength: 40, maxWildcardEntropy: 3.75, maxNamesPerMinute: 7}
  limits: {halfOpen: 5, dnsQueriesPerSecond: 7}
`

func TestNamesAndRequestsParseAndPrintBack(t *testing.T) {
	p, err := Parse("f", []byte(head+everything))
	if err != nil {
		t.Fatal(err)
	}
	want := Spec{Mode: Audit, DefaultAction: Drop, Egress: []Rule{
		{Name: "a", Action: Allow, To: []Peer{{Domain: "*.example.com"}, {Domain: "xn--bcher-kva.example"}}, Verify: VerifyRuleStrict, MissingName: SettingAllow, ECH: SettingAllow,
			QUIC: SettingRefuse, PrivateAddresses: SettingAllow, Limits: RuleLimits{Flows: 1, TotalBytes: 1 << 30}},
		{Action: Drop, To: []Peer{{Domain: "**.example.com"}}, Verify: VerifyRuleGrant},
		{Action: Allow, Ports: []Port{{Protocol: TCP, Port: 80}}, HTTP: []HTTPMatch{{Methods: []string{"GET", "M-SEARCH"}, Path: "/a/*"}, {Path: "*"}}},
	}, DNS: DNS{NamesAny, RefuseREFUSED, []string{"A", "TXT"}, Duration(90 * time.Second), Duration(2 * time.Hour), 20, 40, 3.75, 7}, Limits: Limits{HalfOpen: 5, DNSQueriesPerSecond: 7}}
	if !reflect.DeepEqual(p.Spec, want) {
		t.Errorf("got  %+v\nwant %+v", p.Spec, want)
	}
	printsBack(t, p)
	if got := maps.Collect(mustCompile(t, p, here).RuleLimits())["egress[0] a"]; got != want.Egress[0].Limits {
		t.Errorf("the rule's limits: %+v", got)
	}
}

// printsBack holds that a policy's YAML and JSON are read back to the same value.
func printsBack(t *testing.T, p *Policy) {
	t.Helper()
	text, err := p.YAML()
	if err != nil {
		t.Fatal(err)
	}
	q, err := Parse("printed", text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if !reflect.DeepEqual(p, q) {
		t.Fatalf("got %+v, want %+v from\n%s", q, p, text)
	}
	if text, err = json.Marshal(p); err != nil {
		t.Fatal(err)
	}
	q = new(Policy)
	if err := json.Unmarshal(text, q); err != nil || !reflect.DeepEqual(p, q) {
		t.Fatalf("%v: got %+v, want %+v from %s", err, q, p, text)
	}
}

func TestQuantities(t *testing.T) {
	tests := []struct {
		in        string
		bandwidth Bandwidth
		bytes     Bytes // 0: refused
		prints    string
	}{
		{"10M", 10e6, 10e6, "10M"},
		{"1G", 1e9, 1e9, "1G"},
		{"1.5G", 15e8, 15e8, "1500M"},
		{"1500", 1500, 1500, "1500"},
		{"512k", 512e3, 512e3, "512K"},
		{"512Ki", 0, 512 << 10, "512Ki"},
		{"1.5Ki", 0, 1536, "1536"},
		{"1P", 1e15, 1e15, "1P"},
		{"2P", 0, 2e15, "2P"},
		{"1", 0, 1, "1"},
		{"8191Pi", 0, 8191 << 50, "8191Pi"},
		{"8192Pi", 0, 0, ""},
		{"999999999999999999P", 0, 0, ""},
		{"1.0005K", 0, 0, ""},
		{"1e6", 0, 0, ""},
		{"0x10", 0, 0, ""},
		{"-1M", 0, 0, ""},
		{"+1M", 0, 0, ""},
		{"1_000", 0, 0, ""},
		{".5M", 0, 0, ""},
		{"5.M", 0, 0, ""},
		{"1 M", 0, 0, ""},
		{"M", 0, 0, ""},
		{"", 0, 0, ""},
		{"10Mbit", 0, 0, ""},
		{"NaN", 0, 0, ""},
	}
	for _, tt := range tests {
		bw, err := parseBandwidth(tt.in)
		if bw != tt.bandwidth || (err == nil) != (tt.bandwidth != 0) {
			t.Errorf("bandwidth %q: got %d, %v; want %d", tt.in, bw, err, tt.bandwidth)
		}
		b, err := parseBytes(tt.in)
		if b != tt.bytes || (err == nil) != (tt.bytes != 0) {
			t.Errorf("bytes %q: got %d, %v; want %d", tt.in, b, err, tt.bytes)
		}
		if tt.bytes != 0 && b.String() != tt.prints {
			t.Errorf("bytes %q prints %s, want %s", tt.in, b, tt.prints)
		}
	}
}

// FuzzParse: no input panics, every mistake has a place, and what is accepted
// compiles and prints back to itself.
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.yaml")
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(head + "spec: {egress: [{name: '12', action: drop, to: [{cidr: '::/0', except: ['::1/128']}]}]}"))
	f.Add([]byte(head + "spec:\n  egress: &a [*a]\n---\n"))
	f.Add([]byte(head + everything))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse("f", data)
		if err != nil {
			for _, line := range strings.Split(err.Error(), "\n") {
				if !strings.HasPrefix(line, "f:") || strings.ContainsFunc(line, unicode.IsControl) {
					t.Fatalf("%q in %q", line, err)
				}
			}
			return
		}
		if _, err := Compile(p, twinEnv); err != nil && !errors.Is(err, ErrTooManyRanges) && !errors.Is(err, ErrTooManyPieces) {
			t.Fatal(err)
		}
		printsBack(t, p)
	})
}
