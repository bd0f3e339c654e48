package e2e

// The servers of the matrix (aswithout_test.go) all run in far.

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// matrixZone is the zone of far's name server.
var matrixZone = slicesOf(
	named("web", far4, far6),
	named("four.web", far4), named("six.web", far6),
	named("half.web", far4, noHost6),       // the family tried first has no route
	named("other-half.web", noHost4, far6), // the other family has none
	named("late.web", far4, silent6),       // the family tried first never answers
	named("silent.web", silent4), named("gone.web", noHost4), named("closed.web", closed4),
	named("deb.web", far4), []string{"_http._tcp.deb.web.test. _http._tcp.deb.web.test. 300 SRV 0 0 8080 mirror.test."}, named("mirror", far4), // apt asks for SRV
	named("other", far4),                         // which no policy by domain allows
	named("several.web", noHost4, closed4, far4), // the first addresses lead nowhere
	[]string{"alias.web.test. alias.web.test. 300 CNAME web.test.", "alias.web.test. web.test. 300 A " + far4, "alias.web.test. web.test. 300 AAAA " + far6},
	[]string{"web.test. web.test. 300 MX 10 six.web.test.", `web.test. web.test. 300 TXT "v=spf1 -all"`},
	[]string{"_mongodb._tcp.db.web.test. _mongodb._tcp.db.web.test. 300 SRV 0 0 7000 four.web.test.", "_mongodb._tcp.db.web.test. _mongodb._tcp.db.web.test. 300 SRV 0 0 7000 six.web.test.",
		`db.web.test. db.web.test. 300 TXT "replicaSet=rs0&authSource=admin"`},
	[]string{"_any._tcp.web.test. _any._tcp.web.test. 300 SRV 0 0 8081 four.web.test."},
)

func slicesOf(lists ...[]string) (all []string) {
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// named returns the address records of a name in test.
func named(name string, addrs ...string) (records []string) {
	for _, a := range addrs {
		kind := "A"
		if strings.Contains(a, ":") {
			kind = "AAAA"
		}
		records = append(records, fmt.Sprintf("%[1]s.test. %[1]s.test. 300 %s %s", name, kind, a))
	}
	return records
}

// settings writes the file with the variables of a row's script.
func (m *matrix) settings(t *testing.T) string {
	t.Helper()
	path := filepath.Join(m.dir, "settings")
	ssh := strings.Join(m.ssh, " ")
	text := fmt.Sprintf("tell() { echo \"$ $1\"; \"$@\" 2>&1 || echo \"status $?\"; }\npeer=%q dir=%s ca=%[2]s/cert.pem repo=%[2]s/git/repo.git user=%s ssh=%q sftp=%q\n",
		peerBin(), m.dir, sshUser(), ssh, strings.Replace(ssh, "ssh -F none -p", "sftp -F none -P", 1))
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func sshUser() string {
	if privileged {
		return "root"
	}
	return "tester"
}

// servers holds the rows' servers by name, and the preparations for rows. Those of large clients
// are in aswithout_daemons_test.go.
var servers = map[string]func(*testing.T, *matrix){
	"serve": func(t *testing.T, m *matrix) { serve(t, m.w.far) },
	"web":   webServer, "nginx": nginxServer, "sshd": sshd, "rsyncd": rsyncd, "musl": musl,

	"packages": packages, "postgres": postgres, "mariadb": mariadb, "redis": redis, "slapd": slapd, "mosquitto": mosquitto,
	"snmpd": snmpd, "chronyd": chronyd, "vsftpd": vsftpd, "tftpd": tftpd, "smtpd": smtpd,
	"debs": debs, "crates": crates, "java": java, "rtsp": rtsp,
}

func webServer(t *testing.T, m *matrix) {
	git := filepath.Join(m.dir, "git")
	ok(t, m.w.far, 30*time.Second, "sh", "-ec", `
mkdir "$0"; cd "$0"
git init -q -b main work; cd work
seq 200000 >data; git add data
git -c user.name=t -c user.email=t@t.test commit -q -m one
git clone -q --bare . ../repo.git; git -C ../repo.git config http.receivepack true`, git)
	p := m.w.far.start(t, peerBin(), "web", "-cert", filepath.Join(m.dir, "cert.pem"), "-key", filepath.Join(m.dir, "key.pem"), "-git", git)
	p.waitText(t, `"listening"`, 5*time.Second)
	daemon := m.w.far.start(t, "git", "daemon", "--export-all", "--reuseaddr", "--base-path="+git, "--verbose")
	daemon.waitStream(t, &daemon.err, 5*time.Second, "ready git daemon", func(s string) bool { return strings.Contains(s, "Ready to rumble") })
}

func nginxServer(t *testing.T, m *matrix) {
	pair := fmt.Sprintf("ssl_certificate %s/cert.pem; ssl_certificate_key %[1]s/key.pem;", m.dir)
	nginxIn(t, m.w.far, m.dir, 8080, "listen 8443 ssl http2; listen [::]:8443 ssl http2; "+pair)
	var numbers strings.Builder
	for i := range 100000 {
		fmt.Fprintln(&numbers, i+1)
	}
	if err := os.WriteFile(filepath.Join(m.dir, "www", "numbers"), []byte(numbers.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// sshd serves the repository of webServer.
func sshd(t *testing.T, m *matrix) {
	if privileged { // whose shell and start-up files may be anything
		users, err := os.ReadFile("/etc/passwd")
		if err != nil {
			t.Fatal(err)
		}
		m.w.far.file(t, "/etc/passwd", regexp.MustCompile(`(?m)^root:.*`).ReplaceAllString(string(users), "root:x:0:0:root:"+os.Getenv("HOME")+":/bin/sh"))
	}
	m.ssh = sshServer(t, m.w)
}

// rsyncd serves the files of nginxServer.
func rsyncd(t *testing.T, m *matrix) {
	m.daemon(t, 873, "rsync", "--daemon", "--no-detach", "--log-file=/dev/stderr", "--config="+write(t, "rsyncd.conf", "reverse lookup = no\n[www]\npath = "+filepath.Join(m.dir, "www")+"\nuse chroot = no\nread only = yes\n"))
}

// musl builds a program that asks musl for the addresses of the name in $to, as getent asks glibc.
// musl's headers would bring in all of gcc.
func musl(t *testing.T, m *matrix) {
	m.script(t, `
cat >getent.c <<'END'
struct addrinfo { int flags, family, socktype, protocol; unsigned addrlen; void *addr; char *name; struct addrinfo *next; };
int getaddrinfo(const char *, const char *, const struct addrinfo *, struct addrinfo **);
int getnameinfo(const void *, unsigned, char *, unsigned, char *, unsigned, int);
const char *gai_strerror(int), *getenv(const char *);
int puts(const char *);
void exit(int);
void start(void) {
	struct addrinfo hints = {.socktype = 1}, *all;
	int err = getaddrinfo(getenv("to"), "80", &hints, &all);
	if (err) { puts(gai_strerror(err)); exit(1); }
	for (; all; all = all->next) {
		char text[64];
		getnameinfo(all->addr, all->addrlen, text, sizeof text, 0, 0, 1);
		puts(text);
	}
	exit(0);
}
#ifdef __x86_64__ /* whose functions expect of the stack what a call makes of it */
__asm__(".globl _start\n_start: and $-16, %rsp\n call start");
#else
void _start(void) { start(); }
#endif
END
ln -s /lib/ld-musl-*.so.1 libc.so
tcc -nostdinc -nostdlib -o "$dir/getent" getent.c -L. -lc`)
}

// daemon starts a server in far and waits until it listens on a TCP port.
func (m *matrix) daemon(t *testing.T, port int, argv ...string) {
	t.Helper()
	p := m.w.far.start(t, argv...)
	listens := fmt.Sprintf(":%04X 00", port) // local port and the remote end of a listener
	testutil.Within(t, 20*time.Second, func() (bool, string) {
		r := run(t, m.w.far, 5*time.Second, "cat", "/proc/net/tcp", "/proc/net/tcp6")
		return strings.Contains(r.out, listens), fmt.Sprintf("%s does not listen on port %d\n%s", argv[0], port, p.result(""))
	})
	if t.Failed() {
		t.FailNow()
	}
}
