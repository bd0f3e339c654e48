package sandbox

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/tun"
)

// A pod's names: the trusted server has the outside's address; the rogue one has another address
// there, which the pod chooses itself.
const (
	rogue4, rogue6 = "10.99.0.77", "fd99::77"

	podNames = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  egress:
  - {action: allow, to: [{domain: pypi.test}, {domain: "*.slow.test"}], ports: [{protocol: TCP, port: 8080}]}
`
)

// ungatedPolicy leaves names to the pod's own resolver, and opens no address.
const ungatedPolicy = `
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: ungated}
spec: {defaultAction: reject, dns: {names: ungated}}
`

// nameServer answers A with one address for any name, and records what it is asked. It is silent
// about names that end in slow.test.
type nameServer struct {
	mu    sync.Mutex
	asked []string
}

func (s *nameServer) questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func serveNames(t *testing.T, in namespace, answer string, addrs ...string) *nameServer {
	t.Helper()
	s := new(nameServer)
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		name := strings.ToLower(q.Question[0].Name)
		s.mu.Lock()
		s.asked = append(s.asked, name)
		s.mu.Unlock()
		if strings.HasSuffix(name, ".slow.test.") {
			return
		}
		m := new(dns.Msg)
		m.SetReply(q)
		if rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A " + answer); err == nil {
			m.Answer = append(m.Answer, rr)
		}
		_ = w.WriteMsg(m)
	})
	for _, a := range addrs {
		at := net.JoinHostPort(a, "53")
		for _, server := range []*dns.Server{{PacketConn: in.packet(at), Handler: handler}, {Listener: in.listen(at), Handler: handler}} {
			started := make(chan struct{})
			server.NotifyStartedFunc = func() { close(started) }
			go func() { _ = server.ActivateAndServe() }() // ends with Shutdown
			<-started
			t.Cleanup(func() { _ = server.Shutdown() })
		}
	}
	return s
}

// query asks a server from inside the pod, and returns the answer in one word.
func (p *pod) query(t *testing.T, network, server, name string) string {
	t.Helper()
	c, err := p.inside.dial(network, net.JoinHostPort(server, "53"))
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	co := &dns.Conn{Conn: c}
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), dns.TypeA)
	if err := co.WriteMsg(q); err != nil {
		return err.Error()
	}
	m, err := co.ReadMsg()
	if err != nil {
		return err.Error()
	}
	if len(m.Answer) == 1 {
		if a, ok := m.Answer[0].(*dns.A); ok {
			return a.A.String()
		}
	}
	return dns.RcodeToString[m.Rcode]
}

func newPodWithNames(t *testing.T) (p *pod, cfg AttachmentConfig, trusted, rogue *nameServer) {
	t.Helper()
	p = newPod(t, tun.TAP)
	p.outside.ip("addr add " + rogue4 + "/24 dev out0")
	p.outside.ip("addr add " + rogue6 + "/64 dev out0 nodad")
	trusted = serveNames(t, p.outside, "192.0.2.1", outside4, outside6)
	rogue = serveNames(t, p.outside, "192.0.2.66", rogue4, rogue6)
	cfg = p.config(t)
	cfg.Resolvers, cfg.ResolversNote = []netip.Addr{netip.MustParseAddr(outside4)}, "from the test"
	return p, cfg, trusted, rogue
}

func set(t *testing.T, client api.Client, name, source string) {
	t.Helper()
	call(t, client, api.MethodPolicySet, api.PolicySetParams{Name: name, Source: source}, nil)
}

func TestAPodsNamesAreAskedOfTrustedResolversOnly(t *testing.T) {
	p, cfg, trusted, rogue := newPodWithNames(t)
	_, client := attach(t, cfg)
	servers := map[string]string{outside4: "192.0.2.1", outside6: "192.0.2.1", rogue4: "192.0.2.66", rogue6: "192.0.2.66"}
	each := func(what string, want func(server string) string, name string) {
		t.Helper()
		for server := range servers {
			for _, network := range []string{"udp", "tcp"} {
				if got := p.query(t, network, server, name); got != want(server) {
					t.Errorf("%s: %s over %s is told %q about %s, want %q", what, server, network, got, name, want(server))
				}
			}
		}
	}
	always := func(s string) func(string) string { return func(string) string { return s } }
	own := func(server string) string { return servers[server] }

	each("no policy by name", own, "pypi.test")
	before := len(rogue.questions())
	// This socket is open when the policy comes: its next question is ours to answer.
	c, err := p.inside.dial("udp", net.JoinHostPort(rogue4, "53"))
	testutil.Must(t, err)
	defer c.Close()
	open := &dns.Conn{Conn: c}
	askOpen := func() string {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		q := new(dns.Msg)
		q.SetQuestion("evil.test.", dns.TypeA)
		testutil.Must(t, open.WriteMsg(q))
		m, err := open.ReadMsg()
		testutil.Must(t, err)
		return dns.RcodeToString[m.Rcode]
	}
	if got := askOpen(); got != "NOERROR" {
		t.Errorf("the rogue server says %s", got)
	}
	asked := len(trusted.questions())

	set(t, client, "names", podNames)
	if got := askOpen(); got != "NXDOMAIN" {
		t.Errorf("a socket of before the policy is told %s", got)
	}
	each("by name", always("192.0.2.1"), "pypi.test")
	each("by name", always("NXDOMAIN"), "evil.test")
	each("by name", always("NXDOMAIN"), "pypi.test.default.svc.cluster.local")
	if n := len(rogue.questions()); n != before+1 {
		t.Errorf("the rogue server was asked %q", rogue.questions()[before:])
	}
	for _, name := range trusted.questions()[asked:] {
		if name != "pypi.test." {
			t.Errorf("asked upstream: %s", name)
		}
	}

	// A restarted worker, and another binary, know whom to ask.
	var info api.Info
	call(t, client, api.MethodInfo, nil, &info)
	if len(info.Upstreams) != 1 || info.Upstreams[0] != outside4+":53" {
		t.Errorf("it says that it asks %v", info.Upstreams)
	}
	testutil.Must(t, syscall.Kill(info.WorkerPID, syscall.SIGKILL))
	isGone(t, info.WorkerPID)
	each("a new worker", always("192.0.2.1"), "pypi.test")
	call(t, client, api.MethodUpgrade, api.UpgradeParams{Binary: installed(t, 0o755)}, nil)
	each("another binary", always("192.0.2.1"), "pypi.test")
	each("another binary", always("NXDOMAIN"), "evil.test")
	if n := len(rogue.questions()); n != before+1 {
		t.Errorf("the rogue server was asked %q", rogue.questions()[before:])
	}

	set(t, client, "open", strings.Replace(podNames, "to: [{domain: pypi.test}, {domain: \"*.slow.test\"}], ports: [{protocol: TCP, port: 8080}]", "to: [{entity: world}]", 1))
	each("every name by the gate", always("192.0.2.1"), "evil.test")
	set(t, client, "ungated", strings.Replace(ungatedPolicy, "reject", "allow", 1))
	each("by address again", own, "evil.test")
	set(t, client, "closed, and ungated", ungatedPolicy)
	for _, network := range []string{"udp", "tcp"} {
		if got := p.query(t, network, outside4, "pypi.test"); !strings.Contains(got, "refused") && !strings.Contains(got, "denied") {
			t.Errorf("a policy without the gate or addresses: over %s it is told %q", network, got)
		}
	}
	set(t, client, "closed", closedPolicy)
	asked = len(trusted.questions())
	each("a policy without names or addresses", always("NXDOMAIN"), "pypi.test")
	if n := len(trusted.questions()); n != asked {
		t.Errorf("%d questions went out under a policy that allows none", n-asked)
	}
}

func TestAPodWithoutResolversHasNoNames(t *testing.T) {
	p, cfg, trusted, rogue := newPodWithNames(t)
	cfg.Resolvers, cfg.ResolversNote = nil, "nobody names one"
	_, client := attach(t, cfg)
	logs := func() string {
		var l api.LogsResult
		call(t, client, api.MethodLogs, nil, &l)
		return fmt.Sprint(l.Lines)
	}
	if got := p.query(t, "udp", rogue4, "pypi.test"); got != "192.0.2.66" || strings.Contains(logs(), "resolver") {
		t.Errorf("without a policy by name: %q; it says %s", got, logs())
	}
	asked := len(trusted.questions()) + len(rogue.questions())
	set(t, client, "names", podNames)
	for _, server := range []string{outside4, rogue6} {
		for name, want := range map[string]string{"pypi.test": "SERVFAIL", "evil.test": "NXDOMAIN"} {
			if got := p.query(t, "udp", server, name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	}
	if n := len(trusted.questions()) + len(rogue.questions()); n != asked {
		t.Errorf("%d questions went out", n-asked)
	}
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		said := logs()
		return strings.Contains(said, "no resolver is known that could be asked for the pod (nobody names one)"), "it says " + said
	})
}

// A hostile pod can make the worker hold a socket for each different question under way, and
// connections; both are bounded.
func TestAPodsQuestionsHoldFewSockets(t *testing.T) {
	p, cfg, trusted, _ := newPodWithNames(t)
	cfg.Policy = given(t, podNames)
	_, client := attach(t, cfg)
	var info api.Info
	call(t, client, api.MethodInfo, nil, &info)
	idle := testutil.Descriptors(t, info.WorkerPID)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	const names, streams = 120, 64 // per minute and pattern; connections
	p.inside.do(func() {
		for i := range 4 * streams {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(rogue4, "53"), 3*time.Second)
			if err == nil {
				conns = append(conns, c)
			}
			u, err := net.Dial("udp", net.JoinHostPort(rogue6, "53"))
			if err != nil {
				continue
			}
			conns = append(conns, u)
			for k := range 8 {
				q := new(dns.Msg)
				q.SetQuestion(fmt.Sprintf("n%d-%d.slow.test.", i, k%4), dns.TypeA)
				b, err := q.Pack()
				if err == nil {
					_, _ = u.Write(b)
				}
			}
		}
	})
	var stats struct{ Queries, RefusedTunnel, OverRate, StreamsRefused uint64 }
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		if n := testutil.Descriptors(t, info.WorkerPID) - idle; n > names+8 {
			t.Fatalf("%d descriptors more than when idle, for at most %d questions", n, names)
		}
		var all api.StatsResult
		call(t, client, api.MethodStats, nil, &all)
		testutil.Must(t, json.Unmarshal(all.Stats["dns"], &stats))
		return stats.RefusedTunnel+stats.OverRate > 0 && stats.StreamsRefused >= 3*streams, fmt.Sprintf("counted %+v", stats)
	})
	different := make(map[string]bool)
	for _, q := range trusted.questions() {
		different[q] = true
	}
	if len(different) == 0 || len(different) > names {
		t.Errorf("%d different names went out", len(different))
	}
	if got := p.query(t, "udp", outside4, "pypi.test"); got != "192.0.2.1" && got != "REFUSED" {
		t.Errorf("an allowed name meanwhile: %q", got)
	}
}
