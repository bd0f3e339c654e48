package e2e

// curl and nginx, in both directions.

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// nginxConf serves the files of its directory in plain on port 8080 and over TLS with HTTP/2 on
// 8443, and logs the client's address, request and status.
const nginxConf = `
daemon off;
%s
pid %[2]s/nginx.pid;
error_log stderr warn;
worker_processes 1;
events { worker_connections 512; }
http {
  log_format plain '$remote_addr $request_method $uri $status';
  access_log %[2]s/access.log plain;
  client_body_temp_path %[2]s/t1; proxy_temp_path %[2]s/t2; fastcgi_temp_path %[2]s/t3;
  uwsgi_temp_path %[2]s/t4; scgi_temp_path %[2]s/t5;
  server {
    listen %[3]d; listen [::]:%[3]d;
    %[4]s
    root %[2]s/www;
  }
}
`

// nginx starts a server in a place; dir gets www/ and access.log.
func nginx(t *testing.T, in place, port int, tls bool) (dir string) {
	t.Helper()
	dir, secure := t.TempDir(), ""
	if tls {
		certificate(t, dir, "", webNames...)
		secure = fmt.Sprintf("listen 8443 ssl http2; listen [::]:8443 ssl http2; ssl_certificate %s/cert.pem; ssl_certificate_key %[1]s/key.pem;", dir)
	}
	nginxIn(t, in, dir, port, secure)
	return dir
}

// nginxIn starts a server with additions to its server block.
func nginxIn(t *testing.T, in place, dir string, port int, secure string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "www"), 0o755); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dir, "www", "index.html"), []byte("hello from nginx\n"), 0o644)
	user := ""
	if privileged {
		user = "user root;"
	}
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, user, dir, port, secure), 0o644); err != nil {
		t.Fatal(err)
	}
	p := in.start(t, "nginx", "-p", dir, "-c", conf)
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		_, err := os.Stat(filepath.Join(dir, "nginx.pid"))
		return err == nil, "nginx does not start\n" + p.result("").String()
	})
	if t.Failed() {
		t.FailNow()
	}
}

// webNames are the names of the servers that every test knows.
var webNames = []string{"web.test", "pypi.test", "a.files.test", "git.test"}

// certificate puts a certificate for the names, and its key, into dir. The file names begin with
// prefix.
func certificate(t *testing.T, dir, prefix string, names ...string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: names, IPAddresses: []net.IP{net.ParseIP(far4), net.ParseIP(far6)},
		IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dir, prefix+"cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644)
	os.WriteFile(filepath.Join(dir, prefix+"key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func TestCurlSpeaksEveryHTTPToEveryFamily(t *testing.T) {
	area(t, "curl", "curl", "nginx")
	w := newWorld(t)
	dir := nginx(t, w.far, 8080, true)
	big := make([]byte, 8<<20)
	rand.Read(big)
	os.WriteFile(filepath.Join(dir, "www", "big"), big, 0o644)
	sb := w.host.sandbox(t)
	for _, f := range families {
		for _, row := range []struct {
			what, url, want string
			flags           []string
		}{
			{"HTTP/1.1 in plain", url(f.far, 8080, "/"), "hello from nginx\n1.1 200", nil},
			{"HTTP/1.1 over TLS", "https://" + at(f.far, 8443) + "/", "hello from nginx\n1.1 200", []string{"--http1.1"}},
			{"HTTP/2", "https://" + at(f.far, 8443) + "/", "hello from nginx\n2 200", []string{"--http2"}},
			{"a page that is not there", url(f.far, 8080, "/none"), "1.1 404", nil},
		} {
			t.Run(f.name+" "+row.what, func(t *testing.T) {
				argv := append([]string{"curl", "-gsS", "-m", "10", "--cacert", filepath.Join(dir, "cert.pem"), "-w", "%{http_version} %{http_code}"}, row.flags...)
				ok(t, sb, 15*time.Second, append(argv, row.url)...).wantOut(t, row.want)
			})
		}
		t.Run(f.name+" a big file, twenty times over one HTTP/2 connection", func(t *testing.T) {
			argv := []string{"curl", "-gsS", "-m", "30", "--http2", "-Z", "--cacert", filepath.Join(dir, "cert.pem")}
			for i := range 20 {
				argv = append(argv, "https://"+at(f.far, 8443)+"/big", "-o", filepath.Join(dir, fmt.Sprint("got", i)))
			}
			ok(t, sb, 40*time.Second, argv...)
			for i := range 20 {
				got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("got", i)))
				if err != nil || sha256.Sum256(got) != sha256.Sum256(big) {
					t.Errorf("copy %d differs: %d bytes of %d, %v", i, len(got), len(big), err)
				}
			}
		})
	}
}

func TestPublishedNginxLogsTheRealClient(t *testing.T) {
	area(t, "publish.nginx", "curl", "nginx")
	w := newWorld(t)
	sb := w.host.sandbox(t, "-p", "127.0.0.1:8080:8000", "-p", "8081:8000", "-p", "[::1]:8080:8000")
	dir := nginx(t, sb, 8000, false)
	for _, row := range []struct {
		what   string
		from   place
		url    string
		client string
	}{
		{"a client on the host's loopback", w.host, url("127.0.0.1", 8080, "/a"), "127.0.0.1 GET /a 200"},
		{"a client on the host's IPv6 loopback", w.host, url("::1", 8080, "/b"), "::1 GET /b 200"},
		{"a client from afar", w.far, url(host4, 8081, "/c"), far4 + " GET /c 200"},
		{"a client from afar over IPv6", w.far, url(host6, 8081, "/d"), far6 + " GET /d 200"},
		{"a client on the host's own address", w.host, url(host4, 8081, "/e"), host4 + " GET /e 200"},
	} {
		t.Run(row.what, func(t *testing.T) {
			path := row.url[strings.LastIndexByte(row.url, '/'):]
			os.WriteFile(filepath.Join(dir, "www", path), []byte("hello from inside\n"), 0o644)
			ok(t, row.from, 10*time.Second, "curl", "-gsS", "-m", "5", row.url).wantOut(t, "hello from inside")
			testutil.Within(t, 2*time.Second, func() (bool, string) {
				log, _ := os.ReadFile(filepath.Join(dir, "access.log"))
				return strings.Contains(string(log), row.client), fmt.Sprintf("no line %q in nginx's access log:\n%s", row.client, log)
			})
		})
	}
	t.Run("an address that is not published is refused", func(t *testing.T) {
		r := run(t, w.far, 10*time.Second, "curl", "-gsS", "-m", "5", url(host4, 8080, "/"))
		if r.status != 7 {
			t.Errorf("curl's status is %d, not 7 (could not connect)\n%s", r.status, r)
		}
	})
}
