package e2e

// The clients with small packages (hack/deps.sh): rows of the matrix (aswithout_test.go).

const (
	everyForm = "web.test " + far4 + " " + far6
	py        = "/usr/bin/python3" // Debian's own, whatever else is on PATH
)

var smallClients = []client{
	// HTTP
	{name: "curl, HTTP/1.1", needs: "curl", server: "web", to: everyForm,
		run:  `curl -fgsS --http1.1 -w '%{http_code} %{http_version} %{size_download}\n' -o f "http://$at:8081/bytes/300000"; sha256sum f`,
		says: "200 1.1 300000", differs: barred(22, "403")},
	{name: "curl, HTTP/2 over TLS", needs: "curl", server: "web", to: everyForm,
		run:  `curl -fgsS --cacert "$ca" -w '%{http_code} %{http_version} %{size_download}\n' -o f "https://$at:8444/bytes/3000000"; sha256sum f`,
		says: "200 2 3000000", differs: barred(35, "reset by peer")},
	{name: "curl, an offer of HTTP/2 that the server leaves", needs: "curl", server: "web",
		run:  `curl -fgsS --http2 -w '%{http_code} %{http_version} %{size_download}\n' -o f "http://$at:8081/bytes/300000" -o g "http://$at:8081/bytes/1000"; sha256sum f g`,
		says: "200 1.1 300000\n200 1.1 1000"},
	{name: "curl, HTTP/2 in clear text", needs: "curl", server: "web",
		run:  `curl -fgsS --http2-prior-knowledge -w '%{http_code} %{http_version} %{size_download}\n' -o f "http://$at:8081/chunked/300000"; sha256sum f`,
		says: "200 2 300000"},
	{name: "curl, many requests on one connection", needs: "curl", server: "web",
		run: `curl -sSL -D headers --compressed -u user:secret -w '%{http_code} %{num_connects}\n' "http://$at:8081/"{move,gzip/50,early,events,login,status/503,chunked/30000} | sha256sum
grep -ai -e ^HTTP -e ^location -e ^link -e ^trailer headers`,
		says: "HTTP/1.1 103 Early Hints"},
	{name: "curl, uploads", needs: "curl", server: "web",
		run: `seq 200000 >f; wc -c <f; sha256sum <f
curl -fsS -T f "http://$at:8081/digest"; curl -fsS --cacert "$ca" -T f "https://$at:8444/digest"; curl -fsS -T - "http://$at:8081/digest" <f; curl -fsS -d @f "http://$at:8081/digest"`,
		says: "1288895"},
	{name: "curl, the rest of a file", needs: "curl", server: "nginx",
		run:  `seq 5 >f; curl -fsS -C - -o f --cacert "$ca" "https://$at:8443/numbers"; tail -n 1 f; sha256sum f`,
		says: "\n100000\n"},
	{name: "curl, a closed port", needs: "curl", to: everyForm,
		run: `curl -gsS "http://$at:8999/"`, status: 7, hide: `after \d+ ms`},
	{name: "curl, one family that leads nowhere", needs: "curl", server: "web", to: "half.web.test other-half.web.test late.web.test",
		run: `curl -fsS --cacert "$ca" -w '%{remote_ip}\n' "https://$to:8444/"`, says: "hello from peer"},
	{name: "curl, a name that is none", needs: "curl", to: "no.web.test",
		run: `curl -sS "http://$to:8081/"`, status: 6},
	{name: "wget", needs: "wget", server: "nginx",
		run:  `wget -q --ca-certificate="$ca" -O f "https://$at:8443/numbers"; wget -q -O - "http://$at:8080/numbers" | cmp - f; tail -n 1 f`,
		says: "100000"},
	{name: "busybox wget", needs: "busybox", server: "nginx",
		run: `busybox wget -q -O - "http://$at:8080/numbers" | tail -n 1`, says: "100000"},
	{name: "Python urllib", needs: py, server: "web",
		run: py + ` -c '
import urllib.request, ssl, hashlib, sys
r = urllib.request.urlopen(sys.argv[1], context=ssl.create_default_context(cafile=sys.argv[2]))
b = r.read(); print(r.status, len(b), hashlib.sha256(b).hexdigest())' "https://$at:8444/bytes/50000" "$ca"`,
		says: "200 50000"},
	{name: "Python http.client, one connection", needs: py, server: "web",
		run: py + ` -c '
import http.client, sys
c = http.client.HTTPConnection(sys.argv[1], 8081)
for path in "/bytes/10", "/events", "/chunked/30", "/status/404":
    c.request("GET", path); r = c.getresponse(); print(r.status, r.read())
c.request("POST", "/digest", body=iter([b"x" * 1000] * 100), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}); print(c.getresponse().read())' "$to"`,
		says: "404"},
	{name: "Python asyncio, a port that is closed", needs: py, to: "web.test",
		run: py + ` -c '
import asyncio, re, sys
async def main():
    try:
        await asyncio.open_connection(sys.argv[1], 8999, happy_eyeballs_delay=0.25)
    except OSError as e:
        print(re.findall("Errno [0-9]+", str(e)))
asyncio.run(main())' "$to"`, says: "Errno 111"},
	{name: "Perl HTTP::Tiny", needs: "perl", server: "web",
		run: `perl -MHTTP::Tiny -e '
my $h = HTTP::Tiny->new;
for my $path ("bytes/1000", "move", "chunked/50000") { my $r = $h->get("http://$ARGV[0]:8081/$path"); print "$r->{status} ", length $r->{content}, "\n" }
print $h->put("http://$ARGV[0]:8081/digest", {content => "x" x 100000})->{content}' "$to"`,
		says: "200 50000"},
	{name: "Go, HTTP/1.1", server: "web", to: everyForm,
		run:  `"$peer" fetch "http://$at:8081/chunked/300000"; "$peer" fetch -upload 3000000 -ca "$ca" "https://$at:8444/digest"`,
		says: `"X-Size":["300000"]`, differs: barred(0, `"status":403`)},
	{name: "Go, HTTP/2", server: "web",
		run:  `"$peer" fetch -by http2 "http://$at:8081/chunked/300000"; "$peer" fetch -by http2 -upload 3000000 -ca "$ca" "https://$at:8444/digest"`,
		says: `"X-Size":["300000"]`},
	{name: "Go, HTTP/3", server: "web",
		run:  `"$peer" fetch -by http3 -ca "$ca" "https://$at:8444/bytes/300000"; "$peer" fetch -by http3 -ca "$ca" -upload 300000 "https://$at:8444/digest"`,
		says: `"proto":"HTTP/3.0"`},
	{name: "Go, WebSockets", server: "web",
		run:  `"$peer" fetch -by ws "ws://$at:8081/ws"; "$peer" fetch -by ws -ca "$ca" "wss://$at:8444/ws"`,
		says: `"bytes":70252`},
	{name: "Go, gRPC", server: "web",
		run:  `"$peer" fetch -by grpc "http://$at:8082"; "$peer" fetch -by grpc -ca "$ca" "https://$at:8445"`,
		says: "SERVING NotFound SERVING"},
	{name: "Go, a family that leads nowhere", server: "web", to: "half.web.test other-half.web.test late.web.test",
		run: `"$peer" fetch "http://$to:8081/"; "$peer" fetch -ca "$ca" "https://$to:8444/"`, says: `"status":200`},
	{name: "Go, a closed port", to: everyForm,
		run: `"$peer" fetch "http://$at:8999/"`, says: "ECONNREFUSED"},
	{name: "openssl s_client", needs: "openssl", server: "web",
		run:  `printf 'GET / HTTP/1.0\r\n\r\n' | openssl s_client -quiet -verify_quiet -verify_return_error -CAfile "$ca" -servername "$to" -connect "$at:8444"`,
		says: "hello from peer", hide: `Date: .*`},

	// git, and what runs over ssh
	{name: "git over https", needs: "git", server: "web",
		run: `export GIT_SSL_CAINFO="$ca"; git clone -q "https://$at:8444/git/repo.git" r; cd r; wc -l data
git checkout -q -b "b$$"; git -c user.name=t -c user.email=t@t.test commit -q --allow-empty -m two; git push -q origin HEAD; git ls-remote --heads origin | grep -c "b$$"`,
		says: "200000 data\n1"},
	{name: "git over its own protocol", needs: "git", server: "web", to: "web.test " + far4,
		run: `git clone -q "git://$at/repo.git" r; wc -l r/data`, says: "200000 r/data"},
	{name: "git over ssh", needs: "git ssh sshd", server: "web sshd",
		run: `export GIT_SSH_COMMAND=$ssh; git clone -q "ssh://$user@$at$repo" r; wc -l r/data; git -C r ls-remote origin main`, says: "200000 r/data"},
	{name: "ssh", needs: "ssh sshd", server: "sshd", to: "web.test " + far4,
		run:  `echo in | $ssh "$user@$to" 'cat; echo out; echo err >&2; exit 7'`,
		says: "in\nout", status: 7},
	{name: "sftp", needs: "sftp sshd", server: "sshd",
		run: `seq 100000 >f; printf '%s\n' "put f $PWD/g" "get $PWD/g h" | $sftp -b - "$user@$to" >/dev/null; cmp f h; sha256sum h`, says: "h"},
	{name: "rsync over ssh", needs: "rsync ssh sshd", server: "sshd",
		run: `seq 100000 >f; rsync -e "$ssh" f "$user@$to:$PWD/g"; echo more >>f; rsync -e "$ssh" --no-whole-file -c f "$user@$to:$PWD/g"; cmp f g; wc -l g`, says: "100001 g"},
	{name: "rsync's own protocol", needs: "rsync", server: "nginx rsyncd",
		run: `rsync -t "rsync://$at/www/numbers" f; tail -n 1 f; rsync "rsync://$at/"`, says: "100000\nwww"},

	// names
	{name: "dig", needs: "dig",
		run:  `dig +noall +answer "$to" A; dig +short "$to" AAAA; dig +short "$to" MX; dig +short _any._tcp.web.test SRV; dig +tcp +short "$to" TXT`,
		says: "0 0 8081 four.web.test.", hide: `\d+\tIN`},
	{name: "dig, what MongoDB's drivers ask", needs: "dig", to: "db.web.test",
		run:  `dig +short "_mongodb._tcp.$to" SRV | sort; dig +short "$to" TXT`,
		says: "0 0 7000 four.web.test.\n0 0 7000 six.web.test.\n\"replicaSet=rs0"},
	{name: "dig, what there is not", needs: "dig", to: "no.web.test six.web.test",
		run: `dig "$to" A | grep -o 'status: [A-Z]*, \|ANSWER: .,'`, says: "ANSWER: 0,"},
	{name: "drill", needs: "drill",
		run: `drill -Q "$to" A; drill -Q alias.web.test AAAA; drill -t -Q "$to" MX`, says: "six.web.test."},
	{name: "getent, glibc", needs: "getent",
		run: `for to in web.test alias.web.test four.web.test six.web.test; do getent ahosts "$to" | awk '{print $1, $2}' | sort; getent hosts "$to"; done`, says: "STREAM"},
	{name: "getent, the order of addresses", needs: "getent",
		run: `getent ahosts "$to" | head -n 1`, says: far6,
		differs: []difference{{says: far4, why: "inside, the IPv6 address is a unique local one, from which RFC 6724 prefers IPv4 to global IPv6"}}},
	{name: "getent, a name that is none", needs: "getent", to: "no.web.test", run: `getent ahosts "$to"`, status: 2},
	{name: "getent, musl", needs: "ld-musl-config tcc", server: "musl",
		run: `for to in web.test alias.web.test four.web.test six.web.test no.web.test no.other.test; do export to; tell /lib/ld-musl-*.so.1 "$dir/getent" | sort; done`, says: "$ /lib/ld-musl"},

	// everything else
	{name: "ping", needs: "ping", to: everyForm,
		run: `ping -q -c 2 -i 0.2 -s 1000 "$to"`, says: "2 packets transmitted, 2 received", hide: `PING .*|time .*|rtt .*`},
	{name: "nc, TCP", needs: "nc", server: "serve", to: everyForm,
		run: `seq 30000 | nc -N "$to" 7000 | tail -n 1`, says: "30000"},
	{name: "nc, UDP", needs: "nc", server: "serve", to: everyForm,
		run: `echo hello | nc -u -W 1 "$to" 7000`, says: "hello"},
	{name: "nc -z", needs: "nc", server: "serve", to: everyForm,
		run: `nc -zv "$to" 7000`, says: "succeeded", hide: `\(.*?\)|Connection to \S+`},
	{name: "nc -z, closed ports", needs: "nc", to: everyForm,
		run: `for port in 7999 8999; do nc -zv "$to" $port || echo "status $?"; done`, says: "refused", hide: `\(.*?\)`},
	{name: "socat, TCP", needs: "socat", server: "serve",
		run: `seq 30000 | socat -t 10 - "TCP:$to:7000" | tail -n 1`, says: "30000"},
	{name: "socat, TLS", needs: "socat", server: "web",
		run: `printf 'GET / HTTP/1.0\r\n\r\n' | socat -t 5 - "OPENSSL:$to:8444,cafile=$ca,snihost=$to" | tail -n 1`, says: "hello from peer"},
	{name: "bash's own /dev/tcp and /dev/udp", server: "serve",
		run: `exec 3<>"/dev/tcp/$to/7005" 4<>"/dev/udp/$to/7000"; cat <&3; echo; echo hello >&4; head -n 1 <&4`, says: "hello", hide: `[\d.:a-f\[\]]+:\d+`},
}
