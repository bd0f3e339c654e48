package e2e

// The topologies use the addresses reserved for documentation, in namespaces that reach nothing
// else.
//
//	newWorld: a far network behind a router
//
//	  sandbox      host              router                         far
//	 ┌───────┐   ┌────────┐   ┌─────────────────┐              ┌───────────────┐
//	 │ guest │═══│ sluice │───│ r0           r1 │──────────────│ f0  servers   │
//	 └───────┘   └────────┘   └─────────────────┘              └───────────────┘
//	  10.0.2.100  192.0.2.2    192.0.2.1  198.51.100.1          198.51.100.10, .11
//	  fd00::…     2001:db8:1::2 2001:db8:1::1 2001:db8:2::1     2001:db8:2::10, ::11
//
//	 The router answers for networks that do not exist: 198.51.100.64/28 and
//	 2001:db8:64::/48 "host unreachable", .80/28 and 2001:db8:80::/48 silence,
//	 .96/28 and 2001:db8:96::/48 "prohibited".
//
//	newPair: a far network on the host's own link, for bulk
//
//	  sandbox      host                               far
//	 ┌───────┐   ┌────────┐                     ┌───────────────┐
//	 │ guest │═══│ sluice │─────────────────────│ f0  servers   │
//	 └───────┘   └────────┘                     └───────────────┘
//	              198.51.100.2                    198.51.100.10, .11
//	              2001:db8:2::2                   2001:db8:2::10, ::11

import (
	"fmt"
	"net"
	"strconv"
	"testing"
	"time"
)

const (
	host4, host6 = "192.0.2.2", "2001:db8:1::2" // newWorld's host
	pair4, pair6 = "198.51.100.2", "2001:db8:2::2"

	far4, far6       = "198.51.100.10", "2001:db8:2::10"
	other4, other6   = "198.51.100.11", "2001:db8:2::11" // far's second addresses: for rules
	noHost4, noHost6 = "198.51.100.65", "2001:db8:64::1"
	silent4, silent6 = "198.51.100.81", "2001:db8:80::1"
	closed4, closed6 = "198.51.100.97", "2001:db8:96::1"

	// serve's ports (e2e/peer/serve.go)
	base        = 7000
	portEcho    = base
	portDigest  = base + 1
	portGreet   = base + 2
	portReset   = base + 3
	portWatch   = base + 4
	portWhoami  = base + 5
	portOneByte = base + 6
	portXfer    = base + 7
	portHTTP    = base + 8
	portSource  = base + 9
	portInspect = base + 10
	portDrip    = base + 11

	portStill      = base + 12
	portStillBytes = base + 13
)

type world struct {
	host, router, far *netns // router is nil in a pair
}

func newWorld(t *testing.T) *world {
	t.Helper()
	leavesNothing(t)
	w := &world{newNetns(t, "host"), newNetns(t, "router"), newNetns(t, "far")}
	w.router.sysctl(t, "net.ipv4.ip_forward", "1")
	w.router.sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	// Answers to probes must not be rate-limited.
	w.router.sysctl(t, "net.ipv4.icmp_ratelimit", "0")
	w.router.sysctl(t, "net.ipv6.icmp.ratelimit", "0")
	w.far.sysctl(t, "net.ipv4.icmp_ratelimit", "0")
	w.far.sysctl(t, "net.ipv6.icmp.ratelimit", "0")
	w.router.ip(t, fmt.Sprintf(`
link add r0 type veth peer name h0 netns %d
link add r1 type veth peer name f0 netns %d
addr add 192.0.2.1/24 dev r0
addr add 2001:db8:1::1/64 dev r0 nodad
addr add 198.51.100.1/24 dev r1
addr add 2001:db8:2::1/64 dev r1 nodad
link set r0 up
link set r1 up
route add unreachable 198.51.100.64/28
route add blackhole 198.51.100.80/28
route add prohibit 198.51.100.96/28
route add unreachable 2001:db8:64::/48
route add blackhole 2001:db8:80::/48
route add prohibit 2001:db8:96::/48`, w.host.tid, w.far.tid))
	w.host.ip(t, `
addr add 192.0.2.2/24 dev h0
addr add 2001:db8:1::2/64 dev h0 nodad
link set h0 up
route add default via 192.0.2.1
route add ::/0 via 2001:db8:1::1`)
	w.far.ip(t, `
addr add 198.51.100.10/24 dev f0
addr add 198.51.100.11/24 dev f0
addr add 2001:db8:2::10/64 dev f0 nodad
addr add 2001:db8:2::11/64 dev f0 nodad preferred_lft 0
link set f0 up
route add default via 198.51.100.1
route add ::/0 via 2001:db8:2::1`)
	w.ready(t)
	return w
}

func newPair(t *testing.T) *world {
	t.Helper()
	leavesNothing(t)
	w := &world{host: newNetns(t, "host"), far: newNetns(t, "far")}
	w.host.ip(t, fmt.Sprintf(`
link add h0 type veth peer name f0 netns %d
addr add 198.51.100.2/24 dev h0
addr add 2001:db8:2::2/64 dev h0 nodad
link set h0 up
route add default via 198.51.100.10
route add ::/0 via 2001:db8:2::10`, w.far.tid))
	w.far.ip(t, `
addr add 198.51.100.10/24 dev f0
addr add 198.51.100.11/24 dev f0
addr add 2001:db8:2::10/64 dev f0 nodad
addr add 2001:db8:2::11/64 dev f0 nodad preferred_lft 0
link set f0 up`)
	w.ready(t)
	return w
}

// ready sets what a host of any distribution has, and proves that the far side answers without
// sluice: a broken topology must not look like a bug of sluice.
func (w *world) ready(t *testing.T) {
	t.Helper()
	w.host.sysctl(t, "net.ipv4.ping_group_range", pingGroups())
	for _, n := range []*netns{w.host, w.far} {
		// Loss-based control: bbr paces, which on two cores measures only timers. A namespace may
		// always choose reno, and others only where the machine allows it.
		if n.trySysctl("net.ipv4.tcp_congestion_control", "cubic") != nil {
			n.sysctl(t, "net.ipv4.tcp_congestion_control", "reno")
		}
	}
	w.host.file(t, "/etc/resolv.conf", "nameserver "+far4+"\n")
	w.host.file(t, "/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
	for _, a := range []string{far4, far6} {
		ok(t, w.host, 5*time.Second, "ping", "-c", "1", "-W", "4", a)
	}
}

// serve starts the far side's servers (e2e/peer/serve.go), here or in a sandbox.
func serve(t *testing.T, in place, args ...string) *proc {
	t.Helper()
	p := in.start(t, append([]string{peerBin(), "serve"}, args...)...)
	p.waitText(t, `"listening"`, 5*time.Second)
	return p
}

// nameServer starts far's DNS server; web.test. has both of far's addresses.
func (w *world) nameServer(t *testing.T, tag string, addrs ...string) *proc {
	t.Helper()
	args := append([]string{peerBin(), "dns", "-web", far4 + "," + far6, "-tag", tag}, addrs...)
	p := w.far.start(t, args...)
	p.waitText(t, `"listening"`, 5*time.Second)
	return p
}

func at(addr string, port int) string { return net.JoinHostPort(addr, strconv.Itoa(port)) }

func url(addr string, port int, path string) string { return "http://" + at(addr, port) + path }

// families are the rows of tests that ask the same of both families.
var families = []struct {
	name, far, other, host, noHost, silent, prohibited string
}{
	{"IPv4", far4, other4, host4, noHost4, silent4, closed4},
	{"IPv6", far6, other6, host6, noHost6, silent6, closed6},
}
