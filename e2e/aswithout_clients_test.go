package e2e

// The clients that install small (hack/deps.sh): rows of the matrix (aswithout_test.go).

const (
	everyForm = "web.test " + far4 + " " + far6
	py        = "/usr/bin/python3" // Debian's own, whatever else is on PATH
)

var smallClients = []client{
	{name: "curl, HTTP/1.1", needs: "curl", server: "web", to: everyForm,
		run:  `curl -fgsS --http1.1 -w '%{http_code} %{http_version} %{size_download}\n' -o f "http://$at:8081/bytes/300000"; sha256sum f`,
		says: "200 1.1 300000", differs: barred(22, "403")},
	{name: "curl, HTTP/2 over TLS", needs: "curl", server: "web", to: everyForm,
		run:  `curl -fgsS --cacert "$ca" -w '%{http_code} %{http_version} %{size_download}\n' -o f "https://$at:8444/bytes/3000000"; sha256sum f`,
		says: "200 2 3000000", differs: barred(35, "reset by peer")},
	{name: "wget over TLS", needs: "wget", server: "web",
		run:  `wget -q --ca-certificate="$ca" -O f "https://$at:8444/bytes/300000"; wc -c f; sha256sum f`,
		says: "300000 f"},
	{name: "Python urllib", needs: py, server: "web",
		run: py + ` -c '
import urllib.request, ssl, hashlib, sys
r = urllib.request.urlopen(sys.argv[1], context=ssl.create_default_context(cafile=sys.argv[2]))
b = r.read(); print(r.status, len(b), hashlib.sha256(b).hexdigest())' "https://$at:8444/gzip/50000" "$ca"`,
		says: "200 "},
	{name: "Go, HTTP/3", server: "web",
		run:  `"$peer" fetch -by http3 -ca "$ca" "https://$at:8444/bytes/300000"`,
		says: `"proto":"HTTP/3.0"`},
	{name: "git clone over https", needs: "git", server: "web",
		run:  `git -c http.sslCAInfo="$ca" clone -q "https://$at:8444/git/repo.git" r; wc -l r/data; git -C r log --format=%s`,
		says: "200000 r/data\none"},
	{name: "ssh", needs: "ssh sshd", server: "sshd", to: "web.test " + far4,
		run:  `echo in | $ssh "$user@$to" 'cat; echo out; echo err >&2; exit 7'`,
		says: "in\nout", status: 7},
	{name: "dig", needs: "dig",
		run:  `dig +noall +answer "$to" A; dig +short "$to" AAAA; dig +short "$to" MX; dig +short _http._tcp.web.test SRV; dig +tcp +short "$to" TXT`,
		says: "0 0 8081 four.web.test.", hide: `\d+\tIN`},
	{name: "getent, glibc", needs: "getent", to: "web.test alias.web.test four.web.test six.web.test",
		run: `getent ahosts "$to" | awk '{print $1, $2}' | sort; getent hosts "$to"`, says: "STREAM"},
	{name: "getent, the order of addresses", needs: "getent",
		run: `getent ahosts "$to" | head -n 1`, says: far6,
		differs: []difference{{says: far4, why: "inside, the IPv6 address is a unique local one, from which RFC 6724 prefers IPv4 to global IPv6"}}},
	{name: "nc, echo", needs: "nc", server: "serve", to: everyForm,
		run: `seq 30000 | nc -N "$to" 7000 | tail -n 1`, says: "30000"},
}
