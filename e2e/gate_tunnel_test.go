package e2e

// Real tunnels through a name server, under a policy that allows their zone by a wildcard, with all
// types. Their far end is the sandbox's upstream itself, which is as good as their own zone can be.

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// tunnelSpec allows everything that a policy can allow.
const tunnelSpec = `
defaultAction: reject
dns: {types: [A, AAAA, CNAME, HTTPS, SVCB, SRV, PTR, MX, NS, SOA, TXT, CAA, NAPTR]}
egress:
- {action: allow, to: [{domain: tunnel.test}, {domain: "**.tunnel.test"}]}`

// The bytes per second that a pattern lets through, out and in (forwarder/dns, tunnel.go).
const tunnelOut, tunnelIn = 200, 512

func TestATunnelOverDNSIsNarrow(t *testing.T) {
	area(t, "gate.tunnel", "iodine", "iodined", "ping")
	asRoot(t, "iodined serves uid 0 only")
	w := newWorld(t)
	iodined := w.far.start(t, "iodined", "-f", "-c", "-D", "-P", "secret", "-l", far4, "10.77.0.1/24", "tunnel.test")
	says := func(p *proc, text string, within time.Duration) { // it prints on standard error
		t.Helper()
		testutil.Within(t, within, func() (bool, string) {
			r := p.result("").String()
			return strings.Contains(r, text), "it does not say " + text + "\n" + r
		})
	}
	says(iodined, "Listening to dns", 10*time.Second)
	client := func(sb *sandbox, options ...string) *proc {
		return sb.start(t, append(append([]string{"iodine", "-f", "-r", "-P", "secret"}, options...), dns4, "tunnel.test")...)
	}
	carried := func(sb *sandbox) int {
		// 64 bytes a packet, each way, for ten seconds.
		r := run(t, sb, 30*time.Second, "ping", "-i", "0.2", "-c", "50", "-s", "36", "-W", "1", "10.77.0.1")
		n := 0
		for f := range strings.SplitSeq(r.out, ", ") {
			if count, ok := strings.CutSuffix(f, " received"); ok {
				n, _ = strconv.Atoi(count)
			}
		}
		return n * 64 / 10
	}
	t.Run("without a policy it works", func(t *testing.T) {
		sb := w.host.sandbox(t, rootInside)
		p := client(sb, "-T", "CNAME", "-M", "100", "-m", "100", "-L", "0", "-I", "1")
		says(p, "Connection setup complete", 60*time.Second)
		if n := carried(sb); n == 0 {
			t.Error("the tunnel carries nothing")
		}
	})
	for _, options := range []string{"-T CNAME -O Base32 -M 100 -m 100 -L 0 -I 1", "-T TXT -O Base32 -M 80 -m 100 -L 0 -I 1"} {
		t.Run(options, func(t *testing.T) {
			sb := w.host.sandbox(t, rootInside, "--policy", policyFile(t, tunnelSpec))
			p := client(sb, strings.Fields(options)...)
			testutil.Within(t, 90*time.Second, func() (bool, string) {
				s := sb.tally(t)
				return s["dns refusedTunnel"] > 0, fmt.Sprintf("no question is refused\n%s", p.result(""))
			})
			if n := carried(sb); n > min(tunnelOut, tunnelIn) {
				t.Errorf("it carries %d bytes a second each way", n)
			} else {
				t.Logf("it carries %d bytes a second each way", n)
			}
		})
	}
}

// TestAStreamOverDNSIsNarrow runs a stream through dns2tcp, in TXT and in KEY records.
func TestAStreamOverDNSIsNarrow(t *testing.T) {
	area(t, "gate.stream", "dns2tcpc", "dns2tcpd", "nc", "timeout")
	w := newWorld(t)
	serve(t, w.far)
	conf := filepath.Join(t.TempDir(), "dns2tcpd.conf")
	text := fmt.Sprintf("listen = %s\nport = 53\ndomain = tunnel.test\nkey = secret\nresources = echo:127.0.0.1:%d\n", far4, portEcho)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	w.far.start(t, "dns2tcpd", "-F", "-f", conf)
	const seconds = 4
	// carried returns how much of an echoed stream of zeros comes back.
	carried := func(sb *sandbox, kind string) int {
		sb.start(t, "dns2tcpc", "-T", kind, "-z", "tunnel.test", "-k", "secret", "-r", "echo", "-l", "2222", dns4)
		script := fmt.Sprintf("for i in 1 2 3 4 5 6 7 8 9 10; do nc -z 127.0.0.1 2222 && break; sleep 0.3; done; timeout %d nc 127.0.0.1 2222 </dev/zero | wc -c", seconds)
		r := ok(t, sb, 3*seconds*time.Second, "sh", "-c", script)
		n, err := strconv.Atoi(strings.TrimSpace(r.out))
		if err != nil {
			t.Fatalf("%v\n%s", err, r)
		}
		return n
	}
	for _, kind := range []string{"TXT", "KEY"} {
		t.Run(kind, func(t *testing.T) {
			if n := carried(w.host.sandbox(t, rootInside), kind); n < tunnelOut*seconds {
				t.Errorf("without a policy it carries %d bytes in %d s: this proves nothing", n, seconds)
			}
			n := carried(w.host.sandbox(t, rootInside, "--policy", policyFile(t, tunnelSpec)), kind)
			if n > tunnelOut*seconds {
				t.Errorf("it carries %d bytes in %d s", n, seconds)
			}
			t.Logf("it carries %d bytes in %d s", n, seconds)
		})
	}
}
