package dns

// With the real client (dig) and a real upstream (dnsmasq), over loopback.
//
//	dig ── udp, tcp ──► front (sockets of the test) ──► Resolver ──► dnsmasq

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
)

type hostDialer struct{}

func (hostDialer) Dial(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, server.String())
}

// front puts r behind loopback sockets. It returns their port, and counts of the datagrams received
// and sent.
func front(t *testing.T, r *Resolver) (port int, in, out *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in, out = new(atomic.Int64), new(atomic.Int64)
	port = l.Addr().(*net.TCPAddr).Port
	u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(func() { l.Close(); u.Close(); r.Close(); work.Wait() })
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() { r.ServeStream(context.Background(), c, func(policy.Outcome) {}) })
		}
	})
	work.Go(func() {
		buf := make([]byte, maxMessage)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			in.Add(1)
			r.ServePacket(context.Background(), buf[:n], from, func(b []byte, _ policy.Outcome) {
				if _, err := u.WriteToUDPAddrPort(b, from); err == nil {
					out.Add(1)
				}
			})
		}
	})
	return port, in, out
}

// freePort returns a port of 127.0.0.1 with no listener.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	return netip.MustParseAddrPort(probe.Addr().String())
}

// dnsmasq starts a dnsmasq on a free port of 127.0.0.1.
func dnsmasq(t *testing.T, conf ...string) netip.AddrPort {
	t.Helper()
	addr := freePort(t)
	return nameServer(t, addr, "dnsmasq", conf, func(file string) []string {
		return []string{"--keep-in-foreground", "--conf-file=" + file, "--no-resolv", "--no-hosts", "--bind-interfaces",
			"--listen-address=127.0.0.1", "--user=root", "--group=root", "--pid-file=", "--edns-packet-max=1232",
			"--port=" + strconv.Itoa(int(addr.Port()))}
	})
}

// unbound starts an unbound on a free port of 127.0.0.1 that serves the zone test and nothing else.
func unbound(t *testing.T, records ...string) netip.AddrPort {
	t.Helper()
	addr := freePort(t)
	conf := []string{
		"server:", `  chroot: ""`, `  username: ""`, `  pidfile: ""`, `  directory: "/"`, "  do-daemonize: no", "  use-syslog: no", "  interface: 127.0.0.1",
		"  port: " + strconv.Itoa(int(addr.Port())), "  module-config: iterator", "  local-zone: test. static",
	}
	for _, r := range records {
		conf = append(conf, fmt.Sprintf("  local-data: '%s'", r))
	}
	return nameServer(t, addr, "unbound", append(conf, "remote-control:", "  control-enable: no"), func(file string) []string { return []string{"-d", "-c", file} })
}

// nameServer starts a program with a configuration file and waits until it listens.
func nameServer(t *testing.T, addr netip.AddrPort, program string, conf []string, args func(file string) []string) netip.AddrPort {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if path = "/usr/sbin/" + program; !exists(path) {
			t.Skip(program + " is not installed")
		}
	}
	file := filepath.Join(t.TempDir(), program+".conf")
	if err := os.WriteFile(file, []byte(strings.Join(conf, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args(file)...)
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("tcp", addr.String())
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not listen: %v\n%s", program, err, &out)
		}
		time.Sleep(10 * time.Millisecond) // it has no way to say that it listens
	}
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func dig(t *testing.T, port int, args ...string) string {
	t.Helper()
	cmd := exec.Command("dig", append([]string{"@127.0.0.1", "-p", strconv.Itoa(port), "+tries=3", "+time=2"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("dig %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestRealClientAndUpstream(t *testing.T) {
	if _, err := exec.LookPath("dig"); err != nil {
		t.Skip("dig is not installed")
	}
	var conf []string
	for i := range 30 {
		conf = append(conf, fmt.Sprintf("txt-record=big.test,%0200d", i))
	}
	for i := range 100 {
		conf = append(conf, fmt.Sprintf("address=/n%d.test/10.7.0.%d", i, i))
	}
	conf = append(conf, "host-record=both.test,10.7.1.1,fd07::1", "ptr-record=1.1.7.10.in-addr.arpa,both.test")
	up := dnsmasq(t, conf...)
	dead := netip.MustParseAddrPort("127.0.0.1:9") // refuses
	r := newResolver(t, Config{
		Dialer:    hostDialer{},
		Upstreams: Upstreams{Servers: []netip.AddrPort{dead, up}},
		Hosts:     map[string][]netip.Addr{"added": addrs("10.8.0.1", "fd08::1")},
	})
	port, in, out := front(t, r)
	has := func(args string, want ...string) {
		t.Helper()
		out := dig(t, port, strings.Fields(args)...)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("dig %s lacks %q:\n%s", args, w, out)
			}
		}
	}
	records := func(args string, want int) {
		t.Helper()
		if n := strings.Count(dig(t, port, strings.Fields(args)...), "IN\tTXT\t"); n != want {
			t.Errorf("dig %s: %d records, want %d", args, n, want)
		}
	}
	has("+short both.test A", "10.7.1.1\n")
	has("+short both.test AAAA", "fd07::1\n")
	has("+short +tcp both.test A", "10.7.1.1\n")
	has("+short +notcp +noedns both.test A", "10.7.1.1\n")
	has("+short -x 10.7.1.1", "both.test.\n")
	has("+short added A", "10.8.0.1\n")
	has("+short +tcp added AAAA", "fd08::1\n")
	has("+short -x 10.8.0.1", "added.\n")
	has("+short -x fd08::1", "added.\n")
	has("+short localhost AAAA", "::1\n")
	has("both.test A", "status: NOERROR", ";; flags: qr", "Query time")
	has("x.invalid A", "status: NXDOMAIN")
	has("CH TXT version.bind", "status: REFUSED")
	has("+opcode=UPDATE both.test SOA", "status: NOTIMP")
	has("+tcp +keepopen both.test A both.test AAAA added A", "10.7.1.1", "fd07::1", "10.8.0.1")

	has("+ignore big.test TXT", "flags: qr aa tc") // truthful
	has("+ignore +bufsize=4096 big.test TXT", " tc")
	records("+tcp big.test TXT", 30)
	records("big.test TXT", 30) // dig itself retries over TCP
	records("+ignore +bufsize=16384 big.test TXT", 30)
	records("+ignore +bufsize=4096 big.test TXT", 19)

	// dig binds its sockets with SO_REUSEPORT, so two digs may share a port and one may get the
	// other's answer. It may ask again, but we may lose nothing.
	t.Run("100 at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				args := []string{"+short", fmt.Sprintf("n%d.test", i)}
				if i%4 == 0 {
					args = append(args, "+tcp")
				}
				if out := dig(t, port, args...); !strings.HasSuffix(out, fmt.Sprintf("10.7.0.%d\n", i)) {
					t.Errorf("n%d.test: %q", i, out)
				}
			})
		}
		wg.Wait()
	})
	if in.Load() != out.Load() {
		t.Errorf("%d datagrams came in, %d went out", in.Load(), out.Load())
	}
	if s := r.Stats(); s.OverLimit != 0 || s.ServFail != 0 || s.UpstreamIgnored != 0 || s.StreamsRefused != 0 {
		t.Errorf("%+v", s)
	}
}

// 2000 queries from plain sockets: none lost, and nothing left behind.
func TestNothingIsLeftBehind(t *testing.T) {
	up := dnsmasq(t, "address=/test/10.7.0.1")
	before := testutil.Holds(t)
	before.Descriptors++ // the runtime's epoll may be new
	r, err := New(Config{Dialer: hostDialer{}, Upstreams: Upstreams{Servers: []netip.AddrPort{up}}})
	if err != nil {
		t.Fatal(err)
	}
	q := ask(t, "a.test", 1)
	var wg sync.WaitGroup
	var mu sync.Mutex
	codes := make(map[rcode]int)
	for range 100 {
		for range 20 {
			wg.Add(1)
			r.ServePacket(context.Background(), q, client, func(b []byte, _ policy.Outcome) {
				mu.Lock()
				defer mu.Unlock()
				codes[rcode(be16(b, 2)&maskRcode)]++
				wg.Done()
			})
		}
		wg.Wait()
	}
	if codes[rcodeSuccess] != 2000 {
		t.Errorf("answers by code: %v, %+v", codes, r.Stats())
	}
	r.Close()
	before.CheckReleased(t)
}

// Real servers' answers look the same through the gate as directly: dig cannot tell one from the
// other.
func TestRealAnswersThroughTheGate(t *testing.T) {
	for _, program := range []string{"dig", "drill"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(program + " is not installed")
		}
	}
	unboundZone := []string{
		"MixedDomain.test. 300 MX 10 MailHost.MixedDomain.test.", "MixedDomain.test. 300 MX 20 backup.test.", "MixedDomain.test. 300 NS MixedDomain.test.",
		"_svc._tcp.MixedDomain.test. 300 SRV 1 2 3 node.MixedDomain.test.", "7.2.0.192.in-addr.test. 300 PTR host.MixedDomain.test.",
		"MixedDomain.test. 300 SOA ns.MixedDomain.test. admin.MixedDomain.test. 1 2 3 4 5", "MixedDomain.test. 300 A 198.51.100.1",
	}
	for _, up := range []struct {
		name   string
		server netip.AddrPort
	}{
		{"unbound", unbound(t, unboundZone...)},
		{"dnsmasq", dnsmasq(t, "mx-host=mixeddomain.test,mailhost.mixeddomain.test,10", "srv-host=_svc._tcp.mixeddomain.test,node.mixeddomain.test,3,1,2",
			"host-record=mixeddomain.test,198.51.100.1", "ptr-record=7.2.0.192.in-addr.test,host.mixeddomain.test", "local=/test/")},
	} {
		t.Run(up.name, func(t *testing.T) {
			rules := compile(t, strings.Replace(gatedPolicy, "*.files.test", "**.test", 1)+"  dns: {types: [A, AAAA, MX, NS, SRV, PTR, SOA]}\n")
			r := newResolver(t, Config{Dialer: hostDialer{}, Upstreams: Upstreams{Servers: []netip.AddrPort{up.server}},
				Rules: func() *policy.Rules { return rules }, Names: policy.NewNames(policy.NamesConfig{})})
			port, _, _ := front(t, r)
			records := func(out string) (lines []string) {
				for line := range strings.Lines(out) {
					if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, ";") {
						f := strings.Fields(line)
						f[1] = "TTL"
						lines = append(lines, strings.Join(f, " "))
					}
				}
				slices.Sort(lines)
				return lines
			}
			questions := []string{"mixeddomain.test MX", "mixeddomain.test NS", "_svc._tcp.mixeddomain.test SRV", "7.2.0.192.in-addr.test PTR",
				"mixeddomain.test SOA", "mixeddomain.test A", "mixeddomain.test AAAA", "none.test A"}
			if up.name == "unbound" {
				questions = append(questions, "MIXEDDOMAIN.test MX") // it answers in the question's letters
			}
			args := append([]string{"+noall", "+answer"}, strings.Fields(strings.Join(questions, " "))...)
			direct, through := records(dig(t, int(up.server.Port()), args...)), records(dig(t, port, args...))
			again := records(dig(t, port, append([]string{"+tcp"}, args...)...)) // from the cache
			asked := len(direct)
			if !slices.Equal(direct, through) || !slices.Equal(direct, again) {
				t.Errorf("directly\n%q\nthrough the gate\n%q\nagain\n%q", direct, through, again)
			}
			drill := func(port uint16) []string {
				out, err := exec.Command("drill", "@127.0.0.1", "-p", strconv.Itoa(int(port)), "-Q", "mixeddomain.test", "MX").CombinedOutput()
				if err != nil {
					t.Errorf("drill: %v\n%s", err, out)
				}
				lines := strings.Split(strings.TrimSpace(string(out)), "\n")
				slices.Sort(lines)
				return lines
			}
			if direct, through := drill(up.server.Port()), drill(uint16(port)); !slices.Equal(direct, through) {
				t.Errorf("drill: directly %q, through the gate %q", direct, through)
			}
			if asked < 4 {
				t.Errorf("there were only %d records", asked)
			}
		})
	}
}
