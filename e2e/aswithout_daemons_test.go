package e2e

// The servers for the clients that only `make clients` runs (aswithout_more_test.go). Like it, they
// run as the machine's root.

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// script runs a shell script in far, in a new directory. $dir in it is the matrix's directory.
func (m *matrix) script(t *testing.T, text string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	ok(t, m.w.far, 60*time.Second, "env", "-C", dir, "dir="+m.dir, "bash", "-ec", text)
	return dir
}

// packages puts one package each for pip and npm among the files of nginxServer.
func packages(t *testing.T, m *matrix) {
	www := filepath.Join(m.dir, "www")
	m.script(t, `
mkdir -p "$dir"/www/{simple/demo,packages,npm,package}; cd "$dir/www"
echo '<a href="/packages/demo-1.0-py3-none-any.whl">demo-1.0-py3-none-any.whl</a>' >simple/demo/index.html
echo '{"name": "demo", "version": "1.0.0"}' >package/package.json; echo 'module.exports = 42' >package/index.js
tar -czf npm/demo-1.0.0.tgz package
printf '{"name": "demo", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": {"name": "demo", "version": "1.0.0",
"dist": {"tarball": "https://web.test:8443/npm/demo-1.0.0.tgz", "shasum": "%s"}}}}' "$(sha1sum npm/demo-1.0.0.tgz | cut -d' ' -f1)" >npm/demo`)
	wheel(t, filepath.Join(www, "packages/demo-1.0-py3-none-any.whl"))
}

func postgres(t *testing.T, m *matrix) {
	as := []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"} // it refuses root
	bin := "/usr/lib/postgresql/15/bin/"
	dir := m.script(t, fmt.Sprintf(`
cp "$dir/cert.pem" "$dir/key.pem" .; chmod 700 .; chown 65534:65534 . *.pem
%s %sinitdb -D data -A trust -U tester
printf "ssl = on\nssl_cert_file = '$PWD/cert.pem'\nssl_key_file = '$PWD/key.pem'\nlisten_addresses = '*'\nunix_socket_directories = '$PWD'\n" >>data/postgresql.conf
printf "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n" >>data/pg_hba.conf`, strings.Join(as, " "), bin))
	m.daemon(t, 5432, append(as, bin+"postgres", "-D", filepath.Join(dir, "data"))...)
}

func mariadb(t *testing.T, m *matrix) {
	dir := m.script(t, `
mariadb-install-db --no-defaults --user=root --datadir="$PWD/data" --auth-root-authentication-method=normal --skip-test-db
echo "create user tester identified by 'secret';" >init.sql`)
	file := func(name string) string { return filepath.Join(dir, name) }
	m.daemon(t, 3306, "mariadbd", "--no-defaults", "--user=root", "--datadir="+file("data"), "--socket="+file("sock"), "--pid-file="+file("pid"), "--bind-address=*", "--port=3306", "--skip-name-resolve", // it would ask a nameserver that does not exist
		"--init-file="+file("init.sql"), "--ssl-cert="+filepath.Join(m.dir, "cert.pem"), "--ssl-key="+filepath.Join(m.dir, "key.pem"))
}

func redis(t *testing.T, m *matrix) {
	m.daemon(t, 6379, "redis-server", "--port", "6379", "--protected-mode", "no", "--bind", "0.0.0.0", "::", "--save", "", "--tls-port", "6380", "--tls-auth-clients", "no",
		"--tls-cert-file", filepath.Join(m.dir, "cert.pem"), "--tls-key-file", filepath.Join(m.dir, "key.pem"))
}

func slapd(t *testing.T, m *matrix) {
	dir := m.script(t, `
mkdir data
cat >conf <<-END
	include /etc/ldap/schema/core.schema
	pidfile $PWD/pid
	TLSCACertificateFile $dir/cert.pem
	TLSCertificateFile $dir/cert.pem
	TLSCertificateKeyFile $dir/key.pem
	moduleload /usr/lib/ldap/back_mdb
	database mdb
	suffix dc=test
	directory $PWD/data
END
printf 'dn: dc=test\nobjectClass: dcObject\nobjectClass: organization\no: tests\n' | slapadd -f conf`)
	m.daemon(t, 389, "slapd", "-d", "0", "-h", "ldap:///", "-f", filepath.Join(dir, "conf"))
}

func mosquitto(t *testing.T, m *matrix) {
	m.daemon(t, 1883, "mosquitto", "-c", write(t, "mosquitto.conf", "listener 1883\nallow_anonymous true\nuser root\n"))
}

func snmpd(t *testing.T, m *matrix) {
	conf := write(t, "snmpd.conf", "rocommunity public\nrocommunity6 public\nsysName far\nsysLocation here\n")
	p := m.w.far.start(t, "env", "SNMP_PERSISTENT_DIR="+t.TempDir(), "snmpd", "-f", "-Le", "-C", "-c", conf, "udp:161,udp6:161")
	p.waitStream(t, &p.err, 10*time.Second, "snmpd's version", func(s string) bool { return strings.Contains(s, "NET-SNMP version") })
}

// chronyd serves the time and leaves the machine's clock alone.
func chronyd(t *testing.T, m *matrix) {
	dir := t.TempDir()
	p := m.w.far.start(t, "chronyd", "-d", "-x", "-u", "root", "-f", write(t, "chrony.conf", "local stratum 3\nallow\ncmdport 0\nbindcmdaddress /\npidfile "+dir+"/pid\n"))
	p.waitStream(t, &p.err, 10*time.Second, "chronyd's version", func(s string) bool { return strings.Contains(s, "starting") })
}

func vsftpd(t *testing.T, m *matrix) {
	empty := t.TempDir()
	if err := os.Chmod(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	m.daemon(t, 21, "vsftpd", write(t, "vsftpd.conf", fmt.Sprintf("background=NO\nlisten=NO\nlisten_ipv6=YES\nanonymous_enable=YES\nno_anon_password=YES\nanon_root=%s/www\nsecure_chroot_dir=%s\nseccomp_sandbox=NO\nconnect_from_port_20=YES\n", m.dir, empty)))
}

func tftpd(t *testing.T, m *matrix) {
	m.w.far.start(t, "in.tftpd", "-L", "-u", "root", "-s", filepath.Join(m.dir, "www"))
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		return strings.Contains(run(t, m.w.far, 5*time.Second, "cat", "/proc/net/udp6").out, ":0045 00"), "in.tftpd does not listen"
	})
}

func smtpd(t *testing.T, m *matrix) {
	m.daemon(t, 2525, py, "-m", "aiosmtpd", "-n", "-l", "0.0.0.0:2525", "--tlscert", filepath.Join(m.dir, "cert.pem"), "--tlskey", filepath.Join(m.dir, "key.pem"), "-c", "aiosmtpd.handlers.Sink")
}

// debs puts a repository for apt among the files of nginxServer.
func debs(t *testing.T, m *matrix) {
	m.script(t, `
mkdir -p demo/DEBIAN "$dir/www/debs"
printf 'Package: demo\nVersion: 1.0\nArchitecture: all\nMaintainer: t <t@t.test>\nDescription: a package\n' >demo/DEBIAN/control
dpkg-deb -b demo "$dir/www/debs/demo_1.0_all.deb"
cd "$dir/www/debs"
{ dpkg-deb -f demo_1.0_all.deb; echo "Filename: ./demo_1.0_all.deb"; echo "Size: $(stat -c %s demo_1.0_all.deb)"; echo "SHA256: $(sha256sum demo_1.0_all.deb | cut -d' ' -f1)"; } >Packages`)
}

// crates makes a registry for cargo, with its index in a repository of webServer and its files in
// nginxServer's, and another repository to depend on.
func crates(t *testing.T, m *matrix) {
	m.script(t, `
crate() { mkdir -p "$1/src"; printf '[package]\nname = "%s"\nversion = "1.0.0"\n' "${1%-*}" >"$1/Cargo.toml"; echo "pub fn answer() -> u32 { $2 }" >"$1/src/lib.rs"; }
publish() { git -C "$1" init -q -b main; git -C "$1" add .; git -C "$1" -c user.name=t -c user.email=t@t.test commit -q -m one; git clone -q --bare "$1" "$dir/git/$2.git"; }
crate demo-1.0.0 42; mkdir -p "$dir/www/crates/demo"; tar -czf "$dir/www/crates/demo/1.0.0" demo-1.0.0
mkdir -p index/de/mo; echo '{"dl": "https://web.test:8443/crates/{crate}/{version}"}' >index/config.json
printf '{"name": "demo", "vers": "1.0.0", "deps": [], "cksum": "%s", "features": {}, "yanked": false}\n' "$(sha256sum "$dir/www/crates/demo/1.0.0" | cut -d' ' -f1)" >index/de/mo/demo
publish index index
crate dep-1.0.0 43; publish dep-1.0.0 dep`)
}

// java builds a program that fetches with Java's two clients.
func java(t *testing.T, m *matrix) {
	m.script(t, `
cat >Fetch.java <<'END'
import java.io.FileInputStream;
import java.net.HttpURLConnection;
import java.net.URI;
import java.net.URL;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

public class Fetch {
	public static void main(String[] args) throws Exception {
		KeyStore known = KeyStore.getInstance(KeyStore.getDefaultType());
		known.load(null);
		known.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(new FileInputStream(args[1])));
		TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
		trust.init(known);
		SSLContext tls = SSLContext.getInstance("TLS");
		tls.init(null, trust.getTrustManagers(), null);
		HttpsURLConnection.setDefaultSSLSocketFactory(tls.getSocketFactory());
		String[] paths = {"bytes/100000", "chunked/30000", "move", "status/404"};
		for (String base : new String[] {"http://" + args[0] + ":8081/", "https://" + args[0] + ":8444/"}) {
			String scheme = base.split(":")[0];
			for (String path : paths) {
				HttpURLConnection c = (HttpURLConnection) new URL(base + path).openConnection();
				int status = c.getResponseCode();
				System.out.println("URL " + scheme + " " + status + " " + (status < 400 ? c.getInputStream() : c.getErrorStream()).readAllBytes().length);
			}
			for (HttpClient.Version version : HttpClient.Version.values()) {
				HttpClient client = HttpClient.newBuilder().version(version).followRedirects(HttpClient.Redirect.NORMAL).sslContext(tls).build();
				for (String path : paths) {
					var answer = client.send(HttpRequest.newBuilder(URI.create(base + path)).build(), BodyHandlers.ofByteArray());
					System.out.println(version + " " + scheme + " " + answer.version() + " " + answer.statusCode() + " " + answer.body().length);
				}
				var post = HttpRequest.newBuilder(URI.create(base + "digest")).POST(HttpRequest.BodyPublishers.ofByteArray(new byte[300000])).build();
				System.out.println(client.send(post, BodyHandlers.ofString()).body());
			}
		}
	}
}
END
mkdir "$dir/java"; javac -d "$dir/java" Fetch.java`)
}

// rtsp plays a tone by RTSP.
func rtsp(t *testing.T, m *matrix) {
	const begin = `
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
`
	known := filepath.Join(m.dir, "gstreamer")
	m.script(t, "export GST_REGISTRY="+known+"; "+py+" -c '"+begin+"'") // it examines all its plugins once
	m.daemon(t, 7554, "env", "GST_REGISTRY="+known, py, write(t, "rtsp.py", begin+`
server = GstRtspServer.RTSPServer(address="::", service="7554")
factory = GstRtspServer.RTSPMediaFactory(launch="( audiotestsrc is-live=true ! audio/x-raw,rate=8000,channels=1 ! rtpL16pay name=pay0 pt=96 )")
server.get_mount_points().add_factory("/tone", factory)
server.attach(None)
GLib.MainLoop().run()`))
}
