package e2e

// Clients whose servers are down, silent, unreachable or nameless: rows of the matrix
// (aswithout_test.go). A client's message and exit status decide what a person or a script does
// next. "tell" (settings) puts both into the output.

// changing matches what varies in clients' messages: clocks, process ids, pointers, and the name
// server's address.
const changing = `after \d+ ms|socat\[\d+\]|\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d|[0-9A-F]{16}|on \S+:53|0x[0-9a-f]+`

var smallFailures = []client{
	{name: "a closed port", needs: "wget busybox git ssh rsync socat", to: "four.web.test",
		run: `tell wget -nv -t 1 -O - "http://$to:8999/"
tell busybox wget -O - "http://$to:8999/"
tell git ls-remote "git://$to:7999/r.git"
tell ssh -F none -p 7999 "$to"
tell rsync "rsync://$to:7999/www/"
tell socat -u "TCP:$to:7999" -`,
		says: "wget: can't connect to remote host", hide: changing},
	{name: "a name that is none, or is not allowed", needs: "curl wget busybox ssh nc ping", to: "no.web.test no.other.test",
		run: `tell curl -sS "http://$to:8081/"
tell wget -nv -t 1 -O - "http://$to:8081/"
tell busybox wget -O - "http://$to:8081/"
tell "$peer" fetch "http://$to:8081/"
tell ssh -F none "$to"
tell nc -z "$to" 7000
tell ping -c 1 "$to"`,
		says: "wget: bad address", hide: changing},
	{name: "a name that there is, and that is not allowed", needs: "curl getent", server: "web", to: "other.test",
		run: `getent ahosts "$to" | awk '{print $1}' | sort -u; curl -sS "http://$to:8081/"`, says: "hello from peer",
		differs: []difference{{by: "domain", status: 2, says: "stdout:\n\n", why: "a policy by domain knows no other names"}}},
}

// failing holds clients of databases, other languages and packages: each goes to the host $to, at
// TCP and HTTP ports on which no server listens.
const failing = `
tell ` + py + ` -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1])' "http://$to:8999/" |& tail -n 2
tell ` + py + ` -c 'import sys, requests; requests.get(sys.argv[1])' "http://$to:8999/" |& tail -n 2
tell ` + py + ` -c 'import sys, httpx; httpx.get(sys.argv[1])' "http://$to:8999/" |& tail -n 4
tell perl -MHTTP::Tiny -e 'print HTTP::Tiny->new->get($ARGV[0])->{content}' "http://$to:8999/"
tell perl -MLWP::UserAgent -e 'print LWP::UserAgent->new->get($ARGV[0])->status_line' "http://$to:8999/"
tell ruby -rnet/http -e 'begin; Net::HTTP.get(ARGV[0], "/", 8999); rescue => e; puts e.class, e.message; end' "$to"
tell php -r 'file_get_contents("http://$argv[1]:8999/");' "$to"
tell node -e 'fetch("http://"+process.argv[1]+":8999/").catch(e => console.log(e.cause.code))' "$to"
tell git ls-remote "https://$to:8999/r.git"
tell openssl s_client -connect "$to:8999"
tell psql -AtX "host=$to port=7999 user=tester dbname=postgres" -c 'select 1'
tell mysql --no-defaults --protocol=tcp -h "$to" -P 7999 -u tester -e 'select 1'
tell redis-cli -h "$to" -p 7999 ping
tell mosquitto_pub -h "$to" -p 7999 -t t -m m
tell ldapsearch -x -H "ldap://$to:7999" -b dc=test
tell lftp -e 'set net:max-retries 1; ls; exit' -p 7999 "$to"
tell grpcurl -plaintext -connect-timeout 5 "$to:8999" list
tell http --ignore-stdin "http://$to:8999/"
tell swaks --server "$to:7999" --ehlo client.test --from a@web.test --to b@web.test`

var moreFailures = []client{
	{name: "closed ports, many clients", needs: failingNeed, to: "four.web.test", run: failing, says: "ECONNREFUSED", hide: changing},
	{name: "names that are none, many clients", needs: failingNeed, to: "no.web.test no.other.test", run: failing, says: "ENOTFOUND", hide: changing},
	{name: "hosts that are silent", needs: "curl wget nc " + py, to: "silent.web.test", run: unanswered, says: "status 28", hide: changing},
	// The kernel may miss the first ICMP errors, which arrive while it still holds the socket, so
	// the row waits for them.
	{name: "hosts that are unreachable", needs: "curl wget nc " + py, to: "gone.web.test closed.web.test", run: "long=30\n" + unanswered, says: "status 7", hide: changing},
}

const unanswered = `: ${long:=2}
tell curl -sS --connect-timeout $long "http://$to:8081/"
tell wget -nv -t 1 -T $long -O - "http://$to:8081/"
tell nc -zv -w $long "$to" 7000
tell ` + py + ` -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2]))' "http://$to:8081/" $long |& tail -n 2`

const failingNeed = "ruby php node git openssl psql mysql redis-cli mosquitto_pub ldapsearch lftp grpcurl http swaks /usr/share/perl5/LWP.pm " + dist + "requests/__init__.py " + dist + "httpx/__init__.py"
