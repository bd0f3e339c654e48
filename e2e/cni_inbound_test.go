package e2e

// A pod may answer what begins outside. Nothing else lets it past its egress rules: not the rest of
// an exchange that it began itself, not a peer that continues after its flow was revoked, not a
// late resolver, not a client that may be none. Each attempt is made with packets of both sides,
// put on the link as they are, while every client may reach every port.

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

const (
	// One server may be reached, at two of its ports, and one name asked for.
	inboundOpen = `
defaultAction: drop
egress:
- {name: server, action: allow, to: [{cidr: 198.51.100.10/32}, {cidr: "2001:db8:2::10/128"}], ports: [{protocol: TCP, port: 7012}, {protocol: UDP, port: 7011}]}
` + inboundNames
	// The server may no longer be reached.
	inboundShut = `
defaultAction: drop
egress:
` + inboundNames
	inboundNames = `- {name: name, action: allow, to: [{domain: late.test}], ports: [{protocol: TCP, port: 7008}]}
ingress:
- {name: clients, action: allow}`

	// secretSize is the payload of the packets that must not leave; no other packet has this size.
	secretSize = 777
	podsOwn    = 5001 // the ports from which the pod and far begin
	clientPort = 6000
	metadata4  = "169.254.169.254"
	metadata6  = "fd00:ec2::254"
)

// outsider is a pod and its accomplice outside.
type outsider struct {
	n                *node
	p                *pod
	name             string // of the attachment
	open, shut       string // policy files
	pod, far         string // addresses
	gateway, nodeMAC string // next hops of the pod and of far
	watch            *watcher
	fences           int
}

func TestCNIInboundIsNoWayOut(t *testing.T) {
	cniArea(t, "cni.inbound", "bash", "dig")
	n := newNode(t)
	serve(t, n.far)
	n.far.ip(t, "addr add "+metadata4+"/32 dev f0\naddr add "+metadata6+"/128 dev f0 nodad preferred_lft 0")
	w := outsider{n: n, open: policyFile(t, inboundOpen), shut: policyFile(t, inboundShut), watch: n.far.watch(t, "f0"),
		nodeMAC: linkAddress(t, n, "link", "show", "h0")}
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			for _, row := range []struct {
				what string
				do   func(*outsider, *testing.T, bool)
			}{
				{"a download that the pod aborts", (*outsider).abortsDownload},
				{"a stream that is revoked", (*outsider).isRevoked},
				{"a resolver that is late", (*outsider).answersLate},
				{"a metadata service that sends first", (*outsider).isMetadata},
				{"what a client begins", (*outsider).isServed},
			} {
				t.Run(row.what, func(t *testing.T) {
					six := f.name == "IPv6"
					w := w
					w.far = f.far
					w.p = n.add(t, n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: true,
						sluice: map[string]any{"policy": w.open, "resolvers": []string{f.far}}}))
					serve(t, w.p)
					w.pod, w.name = w.p.addr(six), w.p.attachment(t).Name
					w.begins(t)
					w.gateway = linkAddress(t, w.p, pick(six, "-4", "-6"), "neigh", "show", "dev", "eth0")
					row.do(&w, t, six)
				})
			}
		})
	}
}

// linkAddress returns the first hardware address in the output of `ip -j`.
func linkAddress(t *testing.T, in place, args ...string) string {
	t.Helper()
	var links []struct{ Address, Lladdr string }
	ok(t, in, 5*time.Second, append([]string{"ip", "-j"}, args...)...).into(t, &links)
	for _, l := range links {
		if a := l.Address + l.Lladdr; a != "" {
			return a
		}
	}
	t.Fatalf("%s: ip %s gives no hardware address", in, strings.Join(args, " "))
	return ""
}

// says puts the pod's packets on its link; sent puts far's on far's.
func (w *outsider) says(t *testing.T, packets ...ipPacket) {
	t.Helper()
	putRaw(t, w.p, "eth0", w.gateway, packets)
}

func (w *outsider) sent(t *testing.T, packets ...ipPacket) {
	t.Helper()
	putRaw(t, w.n.far, "f0", w.nodeMAC, packets)
}

func putRaw(t *testing.T, in place, link, mac string, packets []ipPacket) {
	t.Helper()
	argv := []string{peerBin(), "raw", "-link", link, "-mac", mac}
	for _, p := range packets {
		argv = append(argv, p.base64())
	}
	ok(t, in, 10*time.Second, argv...)
}

func secret() string { return strings.Repeat("s", secretSize) }

// out returns the start of a packet from the pod, in that of one to it.
func (w *outsider) out(to string) ipPacket  { return ipPacket{src: w.pod, dst: to} }
func (w *outsider) in(from string) ipPacket { return ipPacket{src: from, dst: w.pod} }

// begins starts an exchange of datagrams from far with a server of the pod. The exchange later
// shows that what the pod sent before has been dealt with.
func (w *outsider) begins(t *testing.T) {
	t.Helper()
	if d, r := udp(t, w.n.far, "-port", fmt.Sprint(clientPort), at(w.pod, portWhoami)); d.Got != at(w.far, clientPort) {
		t.Fatalf("a client's datagram is not answered\n%s", r)
	}
}

// fence waits until everything that the pod sent is dealt with: an answer in far's exchange, sent
// after it, has arrived.
func (w *outsider) fence(t *testing.T) {
	t.Helper()
	w.fences++
	size, from := secretSize+w.fences, w.watch.count()
	w.says(t, w.out(w.far).udp(portWhoami, clientPort, strings.Repeat("f", size)))
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		return w.came(from, func(p packet) bool { return p.proto == protoUDP && p.payload == size }) == 1, "the pod's answer to a client does not arrive"
	})
}

// came counts the pod's packets that far has seen since from.
func (w *outsider) came(from int, which func(packet) bool) (n int) {
	for _, p := range w.watch.since(from) {
		if p.src.String() == w.pod && which(p) {
			n++
		}
	}
	return n
}

func isSecret(p packet) bool { return p.payload == secretSize }

// keeps checks that no packet that leaks calls a leak leaves the pod during try.
func (w *outsider) keeps(t *testing.T, what string, leaks func(packet) bool, try func()) {
	t.Helper()
	from := w.watch.count()
	try()
	w.fence(t)
	if n := w.came(from, leaks); n > 0 {
		t.Errorf("%s: %d packets of the pod's arrived", what, n)
	}
}

// counts checks that try raises a counter of the worker by at least n.
func (w *outsider) counts(t *testing.T, counter string, n float64, try func()) {
	t.Helper()
	read := func() float64 {
		var v any
		w.n.sluiceJSON(t, &v, "stats", "-o", "json", w.name)
		f, _ := number(v, counter)
		return f
	}
	before := read()
	try()
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		now := read()
		return now >= before+n, fmt.Sprintf("%s was %v and is %v: it is to rise by %v", counter, before, now, n)
	})
}

// set puts a policy in force under which far's exchange goes on.
func (w *outsider) set(t *testing.T, file string) {
	t.Helper()
	w.n.sluice(t, "policy", "set", w.name, file)
	w.fence(t)
}

// source waits for a packet from the pod to a port of far's, and returns its source port, which is
// one of the worker's.
func (w *outsider) source(t *testing.T, from, proto, port int) (mapped int) {
	t.Helper()
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		return w.came(from, func(p packet) bool {
			if p.proto == proto && p.dport == port {
				mapped = p.sport
			}
			return mapped != 0
		}) > 0, fmt.Sprintf("nothing of the pod's arrives at port %d", port)
	})
	return mapped
}

// abortsDownload: packets in flight, or on the ports of a finished connection, begin nothing.
func (w *outsider) abortsDownload(t *testing.T, _ bool) {
	from := w.watch.count()
	dial(t, w.p, "-port", fmt.Sprint(podsOwn), "-send", "x", "-close", "reset", at(w.far, portStill))
	mapped := w.source(t, from, protoTCP, portStill)
	for _, when := range []string{"before a reload", "after it"} {
		for _, port := range []int{mapped, podsOwn} {
			w.counts(t, "inbound_tcp_stray", 3, func() {
				w.sent(t, w.in(w.far).tcp(portStill, port, tcpACK, "in flight"), w.in(w.far).tcp(portStill, port, tcpACK|tcpFIN, ""),
					w.in(w.far).tcp(portStill, port, tcpACK|tcpSYN, ""))
			})
			w.keeps(t, fmt.Sprintf("%s, from port %d", when, port), isSecret, func() {
				for _, to := range []int{portStill, portHTTP} {
					w.says(t, w.out(w.far).tcp(port, to, tcpACK, secret()), w.out(w.far).tcp(port, to, tcpACK|tcpPSH|tcpFIN, secret()))
				}
			})
		}
		w.counts(t, "inbound_rests", 1, func() { w.sent(t, w.in(w.far).tcp(portStill, mapped, tcpSYN, "")) })
		w.keeps(t, when+", once it was called back", isSecret, func() {
			w.says(t, w.out(w.far).tcp(mapped, portStill, tcpACK|tcpSYN, secret()), w.out(w.far).tcp(mapped, portStill, tcpACK, secret()))
		})
		w.set(t, w.shut)
	}
}

// isRevoked: a server that keeps streaming does not open the way again.
func (w *outsider) isRevoked(t *testing.T, _ bool) {
	from := w.watch.count()
	w.p.start(t, "bash", "-c", fmt.Sprintf("exec 3<>/dev/udp/%s/%d; while :; do printf %%0%dd 0 >&3; sleep 0.2; done", w.far, portDrip, secretSize))
	mapped := w.source(t, from, protoUDP, portDrip)
	w.set(t, w.shut)
	tries := func(what string) {
		t.Helper()
		w.keeps(t, what, isSecret, func() {
			// The server goes on, its peer socket is gone, and the pod's goes on too.
			w.counts(t, "inbound_rests", 10, func() {
				w.says(t, w.out(w.far).udp(mapped, portDrip, secret()), w.out(w.far).udp(mapped, portEcho, secret()))
			})
			w.says(t, w.out(w.far).udp(mapped, portDrip, secret()))
		})
	}
	tries("after a reload")
	worker := w.p.attachment(t).Worker
	kill(t, worker)
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		now := w.p.attachment(t).Worker
		return now != 0 && now != worker, "there is no new worker"
	})
	tries("with a new worker")
}

// answersLate: an answer that the worker no longer waits for is no client's question.
func (w *outsider) answersLate(t *testing.T, _ bool) {
	server := w.n.far.start(t, peerBin(), "dns", "-hold", "late.test.", "-record", "late.test. late.test. 30 A "+far4, w.far)
	server.waitText(t, `"listening"`, 5*time.Second)
	from := w.watch.count()
	if r := run(t, w.p, 40*time.Second, "dig", "+tries=1", "+time=30", "@"+w.far, "late.test"); !strings.Contains(r.out, "SERVFAIL") {
		t.Fatalf("a question that nobody answers\n%s", r)
	}
	mapped := w.source(t, from, protoUDP, 53)
	w.counts(t, "inbound_refused", 1, func() { server.write([]byte("answer\n")) })
	for _, when := range []string{"before a reload", "after it"} {
		toResolver := func(p packet) bool { return p.dport == 53 }
		w.keeps(t, when, toResolver, func() {
			w.sent(t, w.in(w.far).udp(53, mapped, "later"), w.in(w.far).tcp(53, mapped, tcpSYN, ""))
			w.says(t, w.out(w.far).udp(mapped, 53, secret()), w.out(w.far).tcp(mapped, 53, tcpACK, secret()))
			if r := run(t, w.p, 10*time.Second, "dig", "+tries=1", "+time=5", "@"+w.far, "evil.test"); !strings.Contains(r.out, "REFUSED") && !strings.Contains(r.out, "NXDOMAIN") {
				t.Errorf("%s: it was told something, or nothing\n%s", when, r)
			}
		})
		w.set(t, w.shut)
	}
	if asked := questions(server); strings.Contains(asked, "evil") {
		t.Errorf("the resolver was asked\n%s", asked)
	}
}

// isMetadata: a closed address is no client, even where everyone may be one.
func (w *outsider) isMetadata(t *testing.T, six bool) {
	service := pick(six, metadata4, metadata6)
	for _, when := range []string{"before a reload", "after it"} {
		w.keeps(t, when, func(p packet) bool { return p.dst.String() == service && !p.neighbour }, func() {
			w.counts(t, "inbound_refused", 3, func() {
				w.sent(t, w.in(service).udp(80, portEcho, secret()), w.in(service).tcp(80, portHTTP, tcpSYN, ""), w.in(service).echo("first"))
			})
			w.says(t, w.out(service).udp(portEcho, 80, secret()), w.out(service).tcp(portHTTP, 80, tcpACK|tcpSYN, ""),
				w.out(service).tcp(portHTTP, 80, tcpACK, secret()), w.out(service).tcp(podsOwn, 80, tcpSYN, ""), w.out(service).icmp(pick[byte](six, 0, 129), "first"))
		})
		w.set(t, w.shut)
	}
}

// isServed: what a client begins works in both directions and outlives a reload. It gives the pod
// no flow of its own.
func (w *outsider) isServed(t *testing.T, _ bool) {
	from := w.watch.count()
	held := w.n.far.start(t, peerBin(), "hold", "-count", "1", at(w.pod, portEcho))
	held.waitText(t, `"held","open":1`, 10*time.Second)
	var client int
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		w.came(from, func(p packet) bool {
			if p.proto == protoTCP && p.sport == portEcho {
				client = p.dport
			}
			return false
		})
		return client != 0, "the watch has not seen the pod's answer"
	})
	for i, when := range []string{"before a reload", "after it"} {
		leaks := func(p packet) bool {
			return isSecret(p) || p.proto == protoICMP || p.proto == protoICMPv6 && !p.neighbour
		}
		w.keeps(t, when, leaks, func() {
			w.counts(t, "tcp_refused_by_policy", 1, func() { w.says(t, w.out(w.far).tcp(portEcho, client, tcpSYN, secret())) })
			w.says(t, w.out(w.far).echo(secret()))
		})
		held.write([]byte("echo\n"))
		held.waitOutput(t, 10*time.Second, "an echo "+when, func(out string) bool { return strings.Count(out, `"echoed","open":1`) == i+1 })
		w.begins(t)
		ok(t, w.n.far, 10*time.Second, peerBin(), "get", url(w.pod, portHTTP, "/")).wantOut(t, "hello from peer")
		w.set(t, w.shut)
	}
	held.stop(t, syscall.SIGKILL)
}
