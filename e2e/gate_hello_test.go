package e2e

// A server may ask a client for another ClientHello (HelloRetryRequest), and takes the name from
// it. nginx and OpenSSL serve any name that it has:
//
//	client ── hello for pypi.test, without a key for P-256 ──► server
//	       ◄─ HelloRetryRequest: P-256 ──
//	       ── hello for evil.test ──► the certificate of evil.test, which is much longer

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const (
	portNginx   = 8443
	portOpenSSL = 8445 // IPv6 has the next one

	// longCertificate is more than everything that a server sends with its short certificate.
	longCertificate = 8000
)

const helloSpec = `
defaultAction: reject
egress:
- name: index
  action: allow
  to: [{domain: pypi.test}]
  ports: [{protocol: TCP, port: 8443, endPort: 8446}]`

// helloServers start servers with a short certificate for pypi.test and a long one for evil.test,
// which require a key for P-256.
func helloServers(t *testing.T, in place) (dir string) {
	t.Helper()
	dir = t.TempDir()
	certificate(t, dir, "", webNames...)
	long := []string{"evil.test"}
	for i := range longCertificate / 40 {
		long = append(long, fmt.Sprintf("a-name-that-makes-it-long-%d.evil.test", i))
	}
	certificate(t, dir, "evil-", long...)
	pair := func(prefix string) string {
		return fmt.Sprintf("ssl_certificate %s/%scert.pem; ssl_certificate_key %[1]s/%[2]skey.pem;", dir, prefix)
	}
	nginxIn(t, in, dir, 8080, fmt.Sprintf(`listen 8443 ssl http2; listen [::]:8443 ssl http2; ssl_ecdh_curve prime256v1; ssl_protocols TLSv1.2 TLSv1.3; ssl_early_data on;
    server_name pypi.test; %s root %s/www;
  }
  server {
    listen 8443 ssl http2; listen [::]:8443 ssl http2; server_name evil.test; %s`, pair(""), dir, pair("evil-")))
	file := func(name string) string { return filepath.Join(dir, name) }
	for i, family := range []string{"-4", "-6"} {
		p := in.start(t, "openssl", "s_server", family, "-accept", fmt.Sprint(portOpenSSL+i), "-www", "-groups", "P-256", "-cert", file("cert.pem"), "-key", file("key.pem"),
			"-servername", "evil.test", "-cert2", file("evil-cert.pem"), "-key2", file("evil-key.pem"))
		p.waitText(t, "ACCEPT", 5*time.Second)
	}
	return dir
}

// retried is what `peer hellos` saw.
type retried struct {
	Asked    bool
	Received int
	Error    string
}

func hellos(t *testing.T, in place, first, second, to string) (seen retried, r result) {
	t.Helper()
	r = ok(t, in, 15*time.Second, peerBin(), "hellos", "-timeout", "8s", "-first", first, "-second", second, to)
	r.into(t, &seen)
	return seen, r
}

func TestGateJudgesASecondHello(t *testing.T) {
	area(t, "gate.hello", "curl", "nginx", "openssl")
	w := newWorld(t)
	w.zone(t, gateZone...)
	dir := helloServers(t, w.far)
	sb := w.host.sandbox(t, "--policy", policyFile(t, helloSpec))
	for i, f := range families {
		for _, server := range []struct {
			name string
			port int
		}{{"nginx", portNginx}, {"OpenSSL", portOpenSSL + i}} {
			t.Run(server.name+" by "+f.name, func(t *testing.T) {
				to := at(f.far, server.port)
				flag := map[string]string{"IPv4": "-4", "IPv6": "-6"}[f.name]
				ok(t, sb, 10*time.Second, "getent", "ahosts", "pypi.test") // this grants it
				// Without Sluice the attempt must succeed, or the test proves nothing.
				if seen, r := hellos(t, w.host, "pypi.test", "evil.test", to); !seen.Asked || seen.Received < longCertificate {
					t.Errorf("directly, the other certificate does not come\n%s", r)
				}
				before := sb.refusals(t)
				if seen, r := hellos(t, sb, "pypi.test", "evil.test", to); !seen.Asked || seen.Received > longCertificate/4 {
					t.Errorf("the other certificate comes, or nothing\n%s", r)
				}
				testutil.Within(t, 2*time.Second, func() (bool, string) {
					after := sb.refusals(t)
					return after["egress[0] index"] > before["egress[0] index"], fmt.Sprintf("no refusal: %v, before %v", after, before)
				})
				if seen, r := hellos(t, sb, "pypi.test", "pypi.test", to); !seen.Asked || seen.Received == 0 {
					t.Errorf("the same name is refused\n%s", r)
				}
				ok(t, sb, 15*time.Second, "curl", "-gsSk", flag, "-m", "8", "--http1.1", "--curves", "X25519:P-256", fmt.Sprintf("https://pypi.test:%d/", server.port)).wantOut(t, map[string]string{"nginx": "hello from nginx", "OpenSSL": "TLS_AES"}[server.name])
				sClient := func(flags ...string) result {
					return run(t, sb, 20*time.Second, append([]string{"openssl", "s_client", "-servername", "pypi.test", "-connect", to, "-CAfile", filepath.Join(dir, "cert.pem"), "-verify_return_error"}, flags...)...)
				}
				if r := sClient("-groups", "X25519:P-256", "-tls1_3"); !strings.Contains(r.out, "Verification: OK") {
					t.Errorf("s_client that is asked again\n%s", r)
				}
				if r := sClient("-groups", "P-256", "-tls1_2"); !strings.Contains(r.out, "Verification: OK") {
					t.Errorf("s_client of TLS 1.2\n%s", r)
				}
			})
		}
		t.Run("early data by "+f.name, func(t *testing.T) {
			to, scratch := at(f.far, portNginx), t.TempDir()
			session, request := filepath.Join(scratch, "session"), filepath.Join(scratch, "request")
			if err := os.WriteFile(request, []byte("GET / HTTP/1.0\r\nHost: pypi.test\r\n\r\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			client := func(flags ...string) result {
				argv := append([]string{"openssl", "s_client", "-tls1_3", "-groups", "P-256", "-servername", "pypi.test", "-connect", to, "-ign_eof"}, flags...)
				return run(t, sb, 20*time.Second, append([]string{"sh", "-c", `request=$0; exec "$@" <"$request"`, request}, argv...)...)
			}
			client("-sess_out", session).wantOut(t, "hello from nginx")
			client("-sess_in", session, "-early_data", request).wantOut(t, "Early data was accepted").wantOut(t, "hello from nginx")
		})
	}
}
