package e2e

// The servers of the clients that only `make clients` runs (aswithout_more_test.go). They run as
// the machine's root, as that does.

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// script runs a shell's script in far, in a new directory. $dir in it is the matrix's.
func (m *matrix) script(t *testing.T, text string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	ok(t, m.w.far, 60*time.Second, "env", "-C", dir, "dir="+m.dir, "bash", "-ec", text)
	return dir
}

// packages puts a package each for pip and npm among the files of nginxServer.
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
	m.daemon(t, 3306, "mariadbd", "--no-defaults", "--user=root", "--datadir="+file("data"), "--socket="+file("sock"), "--pid-file="+file("pid"), "--bind-address=*", "--port=3306",
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

// chronyd tells the time and leaves the machine's clock alone.
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
	eventually(t, 5*time.Second, func() (bool, string) {
		return strings.Contains(run(t, m.w.far, 5*time.Second, "cat", "/proc/net/udp6").out, ":0045 00"), "in.tftpd does not listen"
	})
}

func smtpd(t *testing.T, m *matrix) {
	m.daemon(t, 2525, py, "-m", "aiosmtpd", "-n", "-l", "0.0.0.0:2525", "--tlscert", filepath.Join(m.dir, "cert.pem"), "--tlskey", filepath.Join(m.dir, "key.pem"), "-c", "aiosmtpd.handlers.Sink")
}

// musl makes a program that asks musl for addresses, as getent asks glibc.
func musl(t *testing.T, m *matrix) {
	m.script(t, `
cat >getent.c <<'END'
#include <netdb.h>
#include <stdio.h>
int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all;
	int err = getaddrinfo(argv[1], "80", &hints, &all);
	if (err) return puts(gai_strerror(err)), 1;
	for (; all; all = all->ai_next) {
		char text[64];
		getnameinfo(all->ai_addr, all->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
		puts(text);
	}
}
END
musl-gcc -static -o "$dir/getent" getent.c`)
}
