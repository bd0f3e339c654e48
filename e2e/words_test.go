package e2e

// Every command and the log say the same about a flow, and it is true.

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const wordsSpec = `
defaultAction: reject
dns: {ttlFloor: 1s}
egress:
- name: web
  action: allow
  to: [{domain: "*.far.test"}]
  ports: [{protocol: TCP, port: 8080, endPort: 8099}]`

// wordsRecord holds the fields of a record that say how a flow ended or why it was refused.
type wordsRecord struct {
	Verdict, Rule, Tried, Reason string
	Drop                         string `json:"drop_reason_desc"`
	Rejected                     bool
	L4                           map[string]struct {
		Source      int `json:"source_port"`
		Destination int `json:"destination_port"`
	}
	L7 struct{ DNS struct{ Query string } }
}

func (r *wordsRecord) String() string {
	verdict := r.Verdict
	if r.Rejected {
		verdict = "REJECTED"
	}
	for proto, ports := range r.L4 {
		return strings.TrimSpace(fmt.Sprintf("%s %s %d %s %s", verdict, strings.ToLower(proto), ports.Destination, r.Reason, strings.TrimSuffix(r.L7.DNS.Query, ".")))
	}
	return verdict
}

func wordsIn(t *testing.T, records []wordsRecord) map[string]int {
	t.Helper()
	words := make(map[string]int)
	for i := range records {
		words[records[i].String()]++
	}
	return words
}

func TestEveryFlowIsToldOfTruly(t *testing.T) {
	area(t, "flowlog.words", "curl", "nginx", "dig", "nc")
	w := newWorld(t)
	zone := w.zone(t, "one.far.test. one.far.test. 3600 A "+far4, "short.far.test. short.far.test. 1 A "+other4)
	nginxIn(t, w.far, t.TempDir(), 8079, fmt.Sprintf("listen %s:8090;", far4))
	file := filepath.Join(w.host.dir, "flows.json")
	sb := w.host.sandbox(t, "--policy", policyFile(t, wordsSpec), "--flow-log", file)
	for _, step := range []struct {
		what, want string
		command    []string
	}{
		{"a page", "FORWARDED tcp 8090 closed", []string{"curl", "-gsS", "-m", "8", "-o", "/dev/null", "http://one.far.test:8090/"}},
		{"a name that no rule has", "REJECTED udp 53 policy evil.test", []string{"dig", "+tries=1", "+time=8", "evil.test"}},
		{"a type that the policy does not list", "REJECTED udp 53 policy one.far.test", []string{"dig", "+tries=1", "+time=8", "one.far.test", "TXT"}},
		{"a closed port", "VERDICT_UNKNOWN tcp 8091 refused", []string{"curl", "-gsS", "-m", "8", "http://one.far.test:8091/"}},
		{"a port that no rule has", "REJECTED tcp 7000 policy", []string{"curl", "-gsS", "-m", "8", "http://one.far.test:7000/"}},
		{"a client that leaves without a word", "VERDICT_UNKNOWN tcp 8090 closed", []string{"nc", "-N", "-w8", "one.far.test", "8090"}},
		{"a malformed head", "REJECTED tcp 8090 malformed", []string{"sh", "-c", `printf 'GET / HTTP/1.1\r\nHost: one.far.test\r\nHost: b.test\r\n\r\n' | nc -w8 one.far.test 8090`}},
		{"a head that is too long", "REJECTED tcp 8090 too-long", []string{"sh", "-c", `(printf 'GET / HTTP/1.1\r\nHost: one.far.test\r\nX: '; head -c 70000 /dev/zero | tr '\0' x) | nc -w8 one.far.test 8090`}},
		{"a head that ends early", "REJECTED tcp 8090 incomplete", []string{"sh", "-c", `printf 'GET / HTTP/1.1\r\nHost: one' | nc -N -w8 one.far.test 8090`}},
		{"another name", "REJECTED tcp 8090 name-mismatch", []string{"curl", "-gsS", "-m", "8", "-o", "/dev/null", "-H", "Host: evil.test", "http://one.far.test:8090/"}},
	} {
		t.Run(step.what, func(t *testing.T) {
			run(t, sb, 20*time.Second, step.command...)
			sb.wantTold(t, step.want)
		})
	}
	t.Run("an address whose grant ran out", func(t *testing.T) {
		ok(t, sb, 10*time.Second, "getent", "ahosts", "short.far.test")
		testutil.Within(t, 15*time.Second, func() (bool, string) {
			r := run(t, sb, 10*time.Second, "nc", "-z", "-w2", other4, "8090")
			words := sb.told(t)
			return words["REJECTED tcp 8090 grant-expired"] > 0, fmt.Sprintf("it is told as %v\n%s", words, r)
		})
	})
	t.Run("no upstream answers", func(t *testing.T) {
		zone.stop(t, syscall.SIGKILL)
		run(t, sb, 30*time.Second, "dig", "+tries=1", "+time=25", "gone.far.test")
		sb.wantTold(t, "ERROR udp 53 no-upstream")
		w.host.sluiceOK(t, "logs", sb.name).wantOut(t, "DNS servers give no answer")
	})
	ended := sb.told(t)
	sb.close(t)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var log []wordsRecord
	for line := range strings.Lines(string(b)) {
		var r wordsRecord
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if r.L7.DNS.Query == "" || r.Verdict != "FORWARDED" {
			log = append(log, r)
		}
	}
	if words := wordsIn(t, log); !maps.Equal(words, ended) {
		t.Errorf("`flows --ended` and the flow log do not agree:\n%v\n%v", sorted(ended), sorted(words))
	}
	t.Run("as a table at the end", func(t *testing.T) {
		r := w.host.sluiceRun(t, "run", "--policy", policyFile(t, wordsSpec), "--show-flows", "--", "getent", "hosts", "evil.test")
		if strings.Contains(r.err, "FORWARDED") || !strings.Contains(r.err, "REJECTED") || !strings.Contains(r.err, "evil.test") {
			t.Errorf("a refused question is not told of as one\n%s", r)
		}
	})
}

// told returns what `flows --ended` says.
func (sb *sandbox) told(t *testing.T) map[string]int {
	t.Helper()
	var records []wordsRecord
	r := sb.host.sluiceOK(t, "flows", "--ended", "-o", "json", sb.name)
	if err := json.Unmarshal([]byte(r.out), &records); err != nil {
		t.Fatalf("%v\n%s", err, r)
	}
	return wordsIn(t, records)
}

func (sb *sandbox) wantTold(t *testing.T, want string) {
	t.Helper()
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		words := sb.told(t)
		return words[want] > 0, fmt.Sprintf("nothing is told of as %q:\n%s", want, strings.Join(sorted(words), "\n"))
	})
}

func sorted(words map[string]int) []string { return slices.Sorted(maps.Keys(words)) }
