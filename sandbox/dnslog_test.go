package sandbox

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/forwarder/dns"
	"sluice.dev/sluice/sandbox/api"
)

func TestQuestionsAreInTheFlowLog(t *testing.T) {
	var out bytes.Buffer
	l := testFlowLog(&out)
	l.Resolvers = []netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd00::3")}
	l.Policy = func() string { return "ci" }
	go l.Run()
	l.Asked(dns.Event{From: netip.MustParseAddrPort("10.0.2.100:4000"), Name: "pypi.test", Type: "A", Rule: "egress[0] index", Forwarded: true,
		Addrs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, Names: []string{"cdn.test"}, TTL: time.Minute})
	l.Asked(dns.Event{From: netip.MustParseAddrPort("[fd00::100]:4000"), Stream: true, Name: "evil.test", Type: "AAAA", Code: 3, Rule: "default"})
	l.Asked(dns.Event{From: netip.MustParseAddrPort("10.0.2.100:4000"), Name: "lost.test", Type: "A", Code: 2, Rule: "upstream", Failed: true, Reason: "i/o timeout"})
	l.Close()
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 {
		t.Fatalf("%d records:\n%s", len(lines), &out)
	}
	var allowed, refused, failed api.FlowRecord
	for i, r := range []*api.FlowRecord{&allowed, &refused, &failed} {
		if err := json.Unmarshal([]byte(lines[i]), r); err != nil {
			t.Fatal(err)
		}
	}
	want := &api.L7DNS{Query: "pypi.test.", IPs: []string{"198.51.100.1"}, TTL: 60, CNAMEs: []string{"cdn.test."}, Source: "proxy", QTypes: []string{"A"}}
	if !reflect.DeepEqual(allowed.L7.DNS, want) || allowed.Verdict != api.VerdictForwarded || allowed.Rule != "egress[0] index" || allowed.Policy != "ci" ||
		allowed.Destination().String() != "10.0.2.3:53" || allowed.L4.UDP == nil {
		t.Errorf("got %s", lines[0])
	}
	want = &api.L7DNS{Query: "evil.test.", RCode: 3, Source: "proxy", QTypes: []string{"AAAA"}}
	if !reflect.DeepEqual(refused.L7.DNS, want) || refused.Verdict != api.VerdictDropped || refused.DropReasonDesc != api.PolicyDenied || refused.Rule != "default" ||
		refused.Source().String() != "[fd00::100]:4000" || refused.Destination().String() != "[fd00::3]:53" || refused.L4.TCP == nil {
		t.Errorf("got %s", lines[1])
	}
	if failed.Verdict != api.VerdictError || failed.DropReasonDesc != "" || failed.Reason != "i/o timeout" || failed.L7.DNS.RCode != 2 {
		t.Errorf("a question that no upstream answered: %s", lines[2])
	}
	if ended, _ := l.Ended(); len(ended) != 2 || ended[0].L7.DNS.Query != "evil.test." || ended[1].L7.DNS.Query != "lost.test." {
		t.Errorf("among the flows are %v, want the two questions that had no answer", ended)
	}
}
