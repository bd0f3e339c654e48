package e2e

// Attempts on bounded resources. An excess is refused and counted, existing flows stay, other
// sandboxes are served, and what is allowed works again right after.

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// works checks that an allowed connection succeeds.
func (sb *sandbox) works(t *testing.T, v6 bool) {
	t.Helper()
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		d, r := dial(t, sb, "-timeout", "5s", at(scene(v6), portWhoami))
		return d.Got != "", "what is allowed does not work\n" + r.String()
	})
}

func fullFlows(t *testing.T, h *hostile, v6 bool) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, sceneSpec+"\nlimits: {flows: 20}"))
	return sb.refused(t, "tableFull", func() {
		p := sb.start(t, peerBin(), "hold", "-count", "20", at(scene(v6), portEcho))
		p.waitText(t, `"held","open":20`, 20*time.Second)
		for range 3 {
			if d, r := dial(t, sb, "-timeout", "300ms", at(scene(v6), portWhoami)); d.Error == "" {
				t.Errorf("a full table takes one more\n%s", r)
			}
		}
		h.sb.asks(t, v6)
		p.write([]byte("echo\n"))
		p.waitText(t, `"echoed","open":20`, 20*time.Second)
		p.closeInput()
		p.wait(t, 10*time.Second)
		sb.works(t, v6)
	})
}

// asks checks that another sandbox is served while this one's tables are full.
func (sb *sandbox) asks(t *testing.T, v6 bool) {
	t.Helper()
	ok(t, sb, 10*time.Second, "curl", "-gsS", "-m", "8", pick(v6, "-4", "-6"), "http://pypi.test:8080/").wantOut(t, "hello from nginx")
}

func fullHalfOpen(t *testing.T, h *hostile, v6 bool) string {
	silent := pick(v6, silent4, silent6)
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, strings.Replace(sceneSpec, "to: [", "to: [{cidr: "+silent4+"/32}, {cidr: \""+silent6+"/128\"}, ", 1)+
		"\nlimits: {halfOpen: 10}"), "--sysctl", "nf_conntrack_tcp_timeout_syn_sent=2")
	held := sb.start(t, peerBin(), "hold", "-count", "5", at(scene(v6), portEcho))
	held.waitText(t, `"held","open":5`, 20*time.Second)
	why := sb.refused(t, "halfOpenLimit", func() {
		var flood []ipPacket
		for i := range 40 {
			flood = append(flood, ipPacket{dst: silent}.tcp(43000+i, 80, tcpSYN, ""))
		}
		sb.raw(t, flood...)
		h.sb.asks(t, v6)
		held.write([]byte("echo\n"))
		held.waitText(t, `"echoed","open":5`, 20*time.Second)
	})
	sb.works(t, v6)
	held.closeInput()
	held.wait(t, 10*time.Second)
	return why
}

// many is what `peer ask` saw.
type many struct {
	Sent  int
	Codes map[string]int
	Addrs int
}

func (sb *sandbox) many(t *testing.T, v6 bool, name string, flags ...string) (m many) {
	t.Helper()
	argv := append(append([]string{peerBin(), "ask"}, flags...), "-type", pick(v6, "A", "AAAA"), at(pick(v6, dns4, dns6), 53), name)
	ok(t, sb, 60*time.Second, argv...).into(t, &m)
	return m
}

// nameSpec allows names of a scene's own name server.
const nameSpec = `
defaultAction: reject
egress:
- name: names
  action: allow
  to: [{domain: held.test}, {domain: "*.held.test"}, {domain: pypi.test}]
  ports: [{protocol: TCP, port: 8080}]
limits: {dnsQueriesPerSecond: 100000}`

func fullResolver(t *testing.T, h *hostile, v6 bool) string {
	zone := h.w.zoneAt(t, scene(v6), append(recordFlags(gateZone), "-hold", "held.test.")...)
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, nameSpec), "--dns", scene(v6))
	return sb.refused(t, "overLimit", func() {
		testutil.Within(t, 20*time.Second, func() (bool, string) {
			m := sb.many(t, v6, "held.test", "-count", "1500", "-timeout", "200ms")
			return sb.tally(t)["dns overLimit"] > 0, fmt.Sprintf("no question is refused: %+v", m)
		})
		h.sb.asks(t, v6)
		zone.write([]byte("answer\n"))
		sb.asks(t, v6)
	})
}

func fullStreams(t *testing.T, h *hostile, v6 bool) string {
	return h.sb.refused(t, "streamsRefused", func() {
		p := h.sb.start(t, peerBin(), "hold", "-count", "80", "-timeout", "2s", at(pick(v6, dns4, dns6), 53))
		p.waitText(t, `"held"`, 20*time.Second)
		ok(t, h.sb, 10*time.Second, "dig", "+short", "+tries=1", "@"+pick(v6, dns4, dns6), "pypi.test").wantOut(t, far4)
		p.closeInput()
		p.wait(t, 10*time.Second)
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			r := run(t, h.sb, 10*time.Second, "dig", "+tcp", "+short", "+tries=1", "@"+pick(v6, dns4, dns6), "pypi.test")
			return strings.Contains(r.out, far4), "no question over TCP is answered\n" + r.String()
		})
	})
}

// fullGrants: a sandbox that asks for too much loses its own grants.
func fullGrants(t *testing.T, h *hostile, v6 bool) string {
	spec := "defaultAction: reject\ndns: {maxNamesPerMinute: 10000}\nlimits: {dnsQueriesPerSecond: 100000}\negress:\n- {name: flood, action: allow, to: [{domain: \"*.flood.test\"}]}\n- {name: index, action: allow, to: [{domain: pypi.test}], ports: [{protocol: TCP, port: 8080}]}"
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, spec))
	return sb.refused(t, "evicted", func() {
		// Each name has 64 addresses, the same for all names; 128 names are remembered for each
		// address.
		if m := sb.many(t, v6, "n%d.flood.test", "-count", "200", "-ahead", "16", "-timeout", "2s"); m.Addrs == 0 {
			t.Errorf("no name has an address: %+v", m)
		}
		h.sb.asks(t, v6)
		sb.asks(t, v6)
	})
}

func fastQuestions(t *testing.T, h *hostile, v6 bool) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, gateSpec+"\nlimits: {dnsQueriesPerSecond: 50}"))
	return sb.refused(t, "overRate", func() {
		if m := sb.many(t, v6, "pypi.test", "-count", "500", "-timeout", "500ms"); m.Codes["REFUSED"] == 0 {
			t.Errorf("500 questions at once, at a limit of 50 a second: %+v", m)
		}
		h.sb.asks(t, v6)
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			m := sb.many(t, v6, "pypi.test")
			return m.Addrs == 1, fmt.Sprintf("a question right after: %+v", m)
		})
	})
}

func endlessNames(t *testing.T, h *hostile, v6 bool) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, hostileSpec))
	return sb.refused(t, "refusedTunnel", func() {
		if m := sb.many(t, v6, "n%d.tunnel.test", "-count", "300", "-ahead", "16"); m.Codes["REFUSED"] != 300-120 {
			t.Errorf("of 300 names, 120 may be asked for in a minute: %+v", m)
		}
		sb.asks(t, v6)
	})
}

// endlessQuestions: an unreadable answer cannot be kept, so each question goes upstream, until
// there are too many.
func endlessQuestions(t *testing.T, h *hostile, v6 bool) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, hostileSpec))
	return sb.refused(t, "refusedTunnel", func() {
		if m := sb.many(t, v6, "loop.files.test", "-count", "300", "-ahead", "1"); m.Codes["REFUSED"] == 0 || m.Codes["NOERROR"] != 0 {
			t.Errorf("300 times the same question, and 240 may go upstream in a minute: %+v", m)
		}
		sb.asks(t, v6)
	})
}
