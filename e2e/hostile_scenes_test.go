package e2e

// Attempts on the memory of a flow: who let it in, where it leads, and who may answer it.

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

var hostileScenes = []attempt{
	{name: "an answer of TTL 0 that turns between check and dial", scene: flip},
	{name: "a connection's ports again, after the policy was replaced", scene: reuseTCP},
	{name: "a datagram's ports again, after the policy was replaced", scene: reuseUDP},
	{name: "a connection's ports again, for another name", scene: reuseName},
	{name: "a connection that outlives its rule", scene: outliveTCP},
	{name: "an endpoint that outlives its rule", scene: outliveUDP},
	{name: "a server that keeps an endpoint open", scene: refresh},
	{name: "strangers while an endpoint is bound", scene: strangers},
	{name: "more flows than the table holds", scene: fullFlows},
	{name: "more handshakes than may be under way", scene: fullHalfOpen},
	{name: "more questions than may be under way", scene: fullResolver},
	{name: "more DNS connections than are taken", scene: fullStreams},
	{name: "more names than are remembered", scene: fullGrants},
	{name: "questions that come too fast", scene: fastQuestions},
	{name: "names without end under a wildcard", scene: endlessNames},
	{name: "one question without end, whose answer cannot be kept", scene: endlessQuestions},
	{name: "an echo request with a payload, under a rule that allows echo", scene: echoPayload},
	{name: "100 000 forged answers of the resolver", scene: forgers},
	{name: "egress before there is a policy", scene: beforePolicy},
	{name: "egress while the worker is killed", scene: killedWorker},
	{name: "the control socket, and what else is ours", scene: ourOwn},
}

// sceneSpec allows everything at a scene's server; shutSpec is what remains of it after the policy
// was replaced.
const (
	sceneSpec = `
defaultAction: reject
egress:
- name: server
  action: allow
  to: [{cidr: ` + scene4 + `/32}, {cidr: "` + scene6 + `/128"}]
  ports: [{protocol: TCP}, {protocol: UDP}]`
	shutSpec = `
defaultAction: reject
egress:
- name: web
  action: allow
  to: [{cidr: ` + scene4 + `/32}, {cidr: "` + scene6 + `/128"}]
  ports: [{protocol: TCP, port: 8080}]`
)

func scene(v6 bool) string { return pick(v6, scene4, scene6) }

// arrived counts what came from the machine to a port of a scene's server; of TCP, only data.
func (h *hostile) arrived(v6 bool, port int) (n int) {
	for _, p := range h.watchers[left].since(0) {
		if p.dst.String() == scene(v6) && p.dport == port && (p.proto != protoTCP || p.payload > 0) {
			n++
		}
	}
	return n
}

// set replaces a sandbox's policy.
func (sb *sandbox) set(t *testing.T, spec string) {
	t.Helper()
	sb.host.sluiceOK(t, "policy", "set", sb.name, policyFile(t, spec))
}

// raw puts packets on the link.
func (sb *sandbox) raw(t *testing.T, packets ...ipPacket) {
	t.Helper()
	argv := []string{peerBin(), "raw"}
	for _, p := range packets {
		argv = append(argv, p.base64())
	}
	ok(t, sb, 10*time.Second, argv...)
}

// standing counts the sandbox's flows of a protocol to an address that are not closing.
func (sb *sandbox) standing(t *testing.T, proto, addr string) (n int) {
	t.Helper()
	for _, f := range sb.flows(t) {
		if f.proto == proto && f.orig.dst.String() == addr && (proto != "tcp" || f.state == "ESTABLISHED") {
			n++
		}
	}
	return n
}

// flip: the address that was judged is the one dialled, whatever the name server says by then.
func flip(t *testing.T, h *hostile, v6 bool) string {
	const name = "flip.files.test"
	qtype := pick(v6, "A", "AAAA")
	ask := func() string {
		return strings.TrimSpace(ok(t, h.sb, 10*time.Second, "dig", "+short", "+tries=1", name, qtype).out)
	}
	asked := func() int {
		return strings.Count(strings.ToLower(h.zone.result("").out), fmt.Sprintf(`"name":"%s.","type":"%s"`, name, strings.ToLower(qtype)))
	}
	to := pick(v6, far4, far6)
	turned := func(want string) { // once the cached answer has expired
		t.Helper()
		testutil.Within(t, 15*time.Second, func() (bool, string) {
			out := ask()
			return out == want, fmt.Sprintf("%s resolves to %q, want %q", name, out, want)
		})
	}
	turned(to)
	before := asked()
	ok(t, h.sb, 10*time.Second, "curl", "-gsS", "-m", "8", "--resolve", name+":8080:"+bracket(to), "http://"+name+":8080/").wantOut(t, "hello from nginx")
	if n := asked(); n != before {
		t.Errorf("the name was asked for again, %d times, to connect", n-before)
	}
	return h.sb.refused(t, "recordsRebound", func() { turned("") })
}

// reuseTCP: a verdict ends with its flow.
func reuseTCP(t *testing.T, h *hostile, v6 bool) string {
	const sport = 42001
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, sceneSpec))
	if d, r := dial(t, sb, "-port", strconv.Itoa(sport), at(scene(v6), portWhoami)); d.Got == "" {
		t.Fatalf("what is allowed does not work\n%s", r)
	}
	sb.set(t, shutSpec)
	before := h.arrived(v6, portWhoami)
	why := sb.refused(t, "default", func() {
		// For one second the end of the connection is still answered.
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			sb.raw(t, ipPacket{dst: scene(v6)}.tcp(sport, portWhoami, tcpPSH|tcpACK, "LEAK"), ipPacket{dst: scene(v6)}.tcp(sport, portWhoami, tcpSYN, "LEAK"))
			return sb.refusals(t)["default"] > 0, "a SYN with the ports of a connection that was is not refused"
		})
	})
	if n := h.arrived(v6, portWhoami); n != before {
		t.Errorf("%d segments got out by the verdict of a connection that was", n-before)
	}
	return why
}

func reuseUDP(t *testing.T, h *hostile, v6 bool) string {
	const sport = 42002
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, sceneSpec))
	if d, r := udp(t, sb, "-port", strconv.Itoa(sport), "-text", "x", at(scene(v6), portWhoami)); d.Got == "" {
		t.Fatalf("what is allowed does not work\n%s", r)
	}
	sb.set(t, shutSpec)
	before := h.arrived(v6, portWhoami)
	why := sb.refused(t, "default", func() {
		sb.raw(t, ipPacket{dst: scene(v6)}.udp(sport, portWhoami, "LEAK"))
	})
	if n := h.arrived(v6, portWhoami); n != before {
		t.Errorf("%d datagrams got out by the verdict of a flow that was", n-before)
	}
	return why
}

// reuseName: a verified name also ends with its flow.
func reuseName(t *testing.T, h *hostile, v6 bool) string {
	say := func(name string) dialed {
		d, _ := dial(t, h.sb, "-port", "42003", "-close", "no", "-timeout", "10s",
			"-send", "GET / HTTP/1.1\r\nHost: "+name+"\r\nConnection: close\r\n\r\n", at(pick(v6, far4, far6), 8080))
		return d
	}
	if d := say("pypi.test"); !strings.Contains(d.Got, "hello from nginx") {
		t.Fatalf("what is allowed does not work: %+v", d)
	}
	return h.sb.refused(t, "egress[0] index", func() {
		if d := say("evil.test"); strings.Contains(d.Got, "hello from nginx") {
			t.Errorf("another name passes with the ports of a connection that was: %+v", d)
		}
	})
}

func outliveTCP(t *testing.T, h *hostile, v6 bool) string { return outlive(t, h, v6, "tcp") }
func outliveUDP(t *testing.T, h *hostile, v6 bool) string { return outlive(t, h, v6, "udp") }

// outlive: a new policy cuts the flows that it refuses.
func outlive(t *testing.T, h *hostile, v6 bool, proto string) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, sceneSpec))
	p := sb.start(t, peerBin(), "hold", "-network", proto, "-count", "20", "-timeout", "2s", at(scene(v6), portEcho))
	p.waitText(t, `"held","open":20`, 10*time.Second)
	p.write([]byte("echo\n"))
	p.waitText(t, `"echoed","open":20`, 10*time.Second)
	sb.set(t, shutSpec)
	testutil.Within(t, time.Second, func() (bool, string) {
		n := sb.standing(t, proto, scene(v6))
		return n == 0, fmt.Sprintf("%d flows stand that the policy refuses by now", n)
	})
	before := h.arrived(v6, portEcho)
	why := sb.refused(t, "default", func() {
		p.write([]byte("echo\n"))
		p.waitText(t, `"echoed","open":0`, 20*time.Second)
		if proto == "tcp" {
			if d, r := dial(t, sb, "-timeout", "2s", at(scene(v6), portEcho)); d.Error == "" {
				t.Errorf("it connects again\n%s", r)
			}
		}
	})
	if n := h.arrived(v6, portEcho); n != before {
		t.Errorf("%d packets got out by a rule that was", n-before)
	}
	return why
}

// refresh: a peer that was once written to cannot keep the way in open.
func refresh(t *testing.T, h *hostile, v6 bool) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, sceneSpec), "--sysctl", "nf_conntrack_udp_timeout_inbound=1")
	return sb.refused(t, "timedOut", func() {
		p := sb.start(t, peerBin(), "mapping", at(scene(v6), portDrip))
		p.waitText(t, `"got"`, 10*time.Second)
		testutil.Within(t, 20*time.Second, func() (bool, string) {
			n := sb.standing(t, "udp", scene(v6))
			return n == 0, "the server's datagrams keep the flow"
		})
	})
}

// strangers: from the socket's first moment, only the peer that was written to is let in.
func strangers(t *testing.T, h *hostile, v6 bool) string {
	// There are few ports, so that each is knocked at all the time.
	const first, ports = 40000, 100
	h.w.host.sysctl(t, "net.ipv4.ip_local_port_range", fmt.Sprint(first, " ", first+ports-1))
	defer h.w.host.sysctl(t, "net.ipv4.ip_local_port_range", "32768 60999")
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, sceneSpec))
	return sb.refused(t, "udp_unsolicited", func() {
		f := h.forger(t, v6, at(pick(v6, second4, second6), portWhoami), "STRANGER", "-first", fmt.Sprint(first), "-ports", fmt.Sprint(ports))
		for range 20 {
			p := sb.start(t, peerBin(), "mapping", at(scene(v6), portWhoami))
			p.waitText(t, `"seen"`, 10*time.Second)
			p.closeInput()
			if r := p.wait(t, 10*time.Second); strings.Contains(r.out, "STRANGER") {
				t.Fatalf("a stranger's datagram is let in\n%s", r)
			}
		}
		f.closeInput()
		f.wait(t, 10*time.Second).wantStatus(t, 0)
	})
}
