package sandbox

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/flowlog"
)

// judged asks a policy about a flow to port 443 (80) of an address granted under pypi.example,
// after the flow has said what seen holds.
func judged(t *testing.T, mode string, port uint16, seen policy.Seen) forwarder.Refusal {
	t.Helper()
	text := `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: build}
spec:
  mode: ` + mode + `
  defaultAction: reject
  egress:
  - {name: pypi, action: allow, to: [{domain: pypi.example}], ports: [{protocol: TCP, port: 443}]}
  - {name: api, action: allow, to: [{domain: pypi.example}], ports: [{protocol: TCP, port: 80}], http: [{methods: [GET], path: "/simple/*"}]}
`
	p, err := policy.Parse("test.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.Compile(p, policy.Environment{})
	if err != nil {
		t.Fatal(err)
	}
	q := policy.Query{
		Proto: unix.IPPROTO_TCP, Src: netip.MustParseAddrPort("10.0.2.100:40000"),
		Dst: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.5"), port), Names: policy.NewNames(policy.NamesConfig{}), Now: epoch, Seen: seen,
	}
	if err := q.Names.Grant("pypi.example", []netip.Addr{q.Dst.Addr()}, time.Hour, epoch); err != nil {
		t.Fatal(err)
	}
	return forwarder.Refusal{Proto: q.Proto, Src: q.Src, Dst: q.Dst, Verdict: rules.Decide(q), Seen: seen, Reason: nat.ReasonPolicy, Told: true}
}

// TestRecordsInHubblesWords checks the JSON of each kind of record, which tools parse.
func TestRecordsInHubblesWords(t *testing.T) {
	end := func(about forwarder.About, reason nat.Reason) func(*flowlog.FlowLog) {
		return func(l *flowlog.FlowLog) {
			l.OnEvent(nat.Event{Type: nat.Destroy, Flow: nat.Flow{
				ID: 9, State: nat.TimeWait, Rule: about.Verdict.Rule(), Reason: reason, About: about,
				Orig:      nat.NewTuple(unix.IPPROTO_TCP, netip.MustParseAddrPort("10.0.2.100:40000"), netip.MustParseAddrPort("203.0.113.5:443")),
				Reply:     nat.NewTuple(unix.IPPROTO_TCP, netip.MustParseAddrPort("203.0.113.5:443"), netip.MustParseAddrPort("198.51.100.7:50000")),
				OrigBytes: 100, ReplyBytes: 200, Start: epoch.Add(-time.Second), End: epoch,
			}})
		}
	}
	refuse := func(r forwarder.Refusal) func(*flowlog.FlowLog) { return func(l *flowlog.FlowLog) { l.Refused(r) } }
	tls := func(name string) policy.Seen { return policy.Seen{Kind: policy.SeenTLS, Name: name} }
	get := policy.Seen{Kind: policy.SeenHTTP, Name: "pypi.example", Method: "GET", Path: "/admin"}
	good, other := judged(t, "enforce", 443, tls("pypi.example")), judged(t, "enforce", 443, policy.Seen{Kind: policy.SeenTLS, Name: "evil.example", ECH: true})
	audited := judged(t, "audit", 443, tls("evil.example"))
	pending := judged(t, "enforce", 443, policy.Seen{})
	full, inUse, hello := good, good, good
	full.Reason, full.Told = nat.ErrTableFull, false
	inUse.Reason, inUse.Told = nat.ErrExists, false
	hello.Because = policy.ReasonAnotherHello
	for _, row := range []struct {
		what string
		make func(*flowlog.FlowLog)
		want string // every field of it is in the record; null means absent
	}{
		{"a flow that was let through", end(forwarder.About{Verdict: good.Verdict, Seen: good.Seen}, "closed"), `{
			"time": "2026-01-02T03:04:05Z", "verdict": "FORWARDED", "drop_reason_desc": null, "Type": "L3_L4", "traffic_direction": "EGRESS",
			"IP": {"source": "10.0.2.100", "destination": "203.0.113.5", "ipVersion": "IPv4"}, "l4": {"TCP": {"source_port": 40000, "destination_port": 443}},
			"destination_names": ["pypi.example"], "sni": "pypi.example", "policy": "build", "rule": "egress[0] pypi", "reason": "closed", "tried": null,
			"bytes": 300, "duration_seconds": 1, "id": 9, "reply_destination": "198.51.100.7:50000", "state": "TIME_WAIT"}`},
		{"one with another name", refuse(other), `{
			"verdict": "DROPPED", "drop_reason_desc": "POLICY_DENIED", "rejected": true, "rule": "default", "tried": "egress[0] pypi", "reason": "name-mismatch",
			"sni": "evil.example", "ech": true, "destination_names": ["pypi.example"], "id": null, "reply_destination": null}`},
		{"one in audit mode", end(forwarder.About{Verdict: audited.Verdict, Seen: audited.Seen}, "closed"), `{
			"verdict": "AUDIT", "drop_reason_desc": null, "rule": "default", "tried": "egress[0] pypi", "sni": "evil.example"}`},
		{"one that ended before it said whom it wants", end(forwarder.About{Verdict: pending.Verdict}, nat.ReasonResetBySandbox), `{
			"verdict": "VERDICT_UNKNOWN", "drop_reason_desc": null, "rejected": null, "tried": "egress[0] pypi", "reason": "reset_by_sandbox", "sni": null,
			"state": "TIME_WAIT", "id": 9}`},
		{"one whose far side refused the connection before", end(forwarder.About{Verdict: pending.Verdict}, nat.ReasonRefused), `{
			"verdict": "VERDICT_UNKNOWN", "drop_reason_desc": null, "reason": "refused"}`},
		{"one that had to make room before", end(forwarder.About{Verdict: pending.Verdict}, nat.ReasonFirstBytesEvicted), `{
			"verdict": "DROPPED", "drop_reason_desc": "CT_MAP_INSERTION_FAILED", "reason": "first_bytes_evicted"}`},
		{"one that new rules cut before", end(forwarder.About{Verdict: pending.Verdict}, nat.ReasonPolicy), `{
			"verdict": "DROPPED", "drop_reason_desc": "POLICY_DENIED", "reason": "policy"}`},
		{"one that new rules cut later", end(forwarder.About{Verdict: good.Verdict, Seen: good.Seen}, nat.ReasonPolicy), `{
			"verdict": "FORWARDED", "drop_reason_desc": null, "reason": "policy"}`},
		{"one whose rule had no room when it had spoken", end(forwarder.About{Verdict: good.Verdict, Seen: good.Seen}, nat.ErrBudgetRate), `{
			"verdict": "DROPPED", "drop_reason_desc": "DROP_RATE_LIMITED", "rejected": null, "reason": "too many new flows per second by this rule", "rule": "egress[0] pypi"}`},
		{"one for which the table had no room", refuse(full), `{
			"verdict": "DROPPED", "drop_reason_desc": "CT_MAP_INSERTION_FAILED", "rejected": null, "reason": "flow table is full", "rule": "egress[0] pypi", "id": null, "state": null}`},
		{"one whose tuple was in use", refuse(inUse), `{
			"verdict": "DROPPED", "drop_reason_desc": "CT_MAP_INSERTION_FAILED", "reason": "flow exists already"}`},
		{"one without a host socket", end(forwarder.About{Verdict: good.Verdict}, nat.ReasonOutOfPorts), `{
			"verdict": "ERROR", "drop_reason_desc": null, "reason": "out_of_ports"}`},
		{"one with a second hello of another name, which a rule allows", refuse(hello), `{
			"verdict": "DROPPED", "drop_reason_desc": "POLICY_DENIED", "rejected": true, "rule": "egress[0] pypi", "reason": "another-hello"}`},
		{"one that carried refused questions", end(forwarder.About{Questions: policy.OutcomeRefused}, nat.ReasonAnswered), `{
			"verdict": "DROPPED", "drop_reason_desc": "POLICY_DENIED", "reason": "policy", "state": "TIME_WAIT"}`},
		{"one that carried questions which no upstream answered", end(forwarder.About{Questions: policy.OutcomeFailed}, nat.ReasonAnswered), `{
			"verdict": "ERROR", "drop_reason_desc": null, "reason": "no-upstream"}`},
		{"a request", refuse(judged(t, "enforce", 80, get)), `{
			"verdict": "DROPPED", "Type": "L7", "l7": {"type": "REQUEST", "http": {"method": "GET", "url": "http://pypi.example/admin"}}, "sni": null,
			"rule": "egress[1] api", "reason": "http-request"}`},
	} {
		t.Run(row.what, func(t *testing.T) {
			var out bytes.Buffer
			l := testFlowLog(&out)
			l.Policy = func() string { return "build" }
			l.Names = func(netip.Addr) []string { return []string{"pypi.example"} }
			row.make(l)
			drain(t, l, &out)
			var got, want map[string]any
			if err := json.Unmarshal([]byte(row.want), &want); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(out.Bytes(), &got); err != nil {
				t.Fatalf("%v: %s", err, out.String())
			}
			for k, v := range want {
				a, _ := json.Marshal(got[k])
				b, _ := json.Marshal(v)
				if !bytes.Equal(a, b) {
					t.Errorf("%s is %s, want %s", k, a, b)
				}
			}
		})
	}
}

// TestARefusalAfterTheFirstBytesIsToldOnce: its flow's end makes no second record.
func TestARefusalAfterTheFirstBytesIsToldOnce(t *testing.T) {
	var out bytes.Buffer
	l := testFlowLog(&out)
	r := judged(t, "enforce", 443, policy.Seen{Kind: policy.SeenTLS, Name: "evil.example"})
	l.Refused(r)
	l.OnEvent(nat.Event{Type: nat.Destroy, Flow: nat.Flow{Reason: "refused_by_policy", About: forwarder.About{Verdict: r.Verdict, Seen: r.Seen}}})
	drain(t, l, &out)
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Errorf("%d records: %s", n, out.String())
	}
}
