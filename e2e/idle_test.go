package e2e

// Connections on which nothing moves: the client is gone, or the far side is. Each is tried direct
// and in a sandbox at once, so that the silence is the same for both.

import (
	"fmt"
	"maps"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// probing holds the settings by which a sandbox probes its idle connections each second.
var probing = []string{
	"--sysctl", "net.ipv4.tcp_keepalive_time=1", "--sysctl", "net.ipv4.tcp_keepalive_intvl=1", "--sysctl", "net.ipv4.tcp_keepalive_probes=3",
}

const portSilent = 7100

// silentServer says nothing. A client's first line is its name and what the server does once the
// client has half-closed: "waits", or "writes" when it is told to.
const silentServer = `
import errno, select, socket, sys, threading
told = threading.Event()
mouth = threading.Lock()
def say(*words): # a line at a time
    with mouth:
        print(*words, flush=True)
def serve(c):
    name, what = c.makefile().readline().split()
    say(name, "came")
    try:
        while c.recv(4096):
            pass
        say(name, "half-closed")
        if what == "writes":
            told.wait()
            c.send(b"x")
        p = select.poll()
        p.register(c, 0) # that is, errors alone
        p.poll()
        e = c.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError as failed:
        e = failed.errno
    say(name, "ended by", errno.errorcode.get(e, e))
l = socket.create_server(("::", 7100), family=socket.AF_INET6, dualstack_ipv6=True)
say("listening")
threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
`

// leaving is a client that half-closes, and resets its connection when its input ends.
const leaving = `
import socket, struct, sys
s = socket.create_connection((sys.argv[1], 7100))
s.sendall((sys.argv[2] + "\n").encode())
s.shutdown(socket.SHUT_WR)
sys.stdin.readline()
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
`

func TestAClientThatIsGoneIsToldToASilentServer(t *testing.T) {
	area(t, "idle.client", "python3", "nc")
	w := newPair(t)
	server := w.far.start(t, "python3", "-c", silentServer)
	server.waitText(t, "listening", 30*time.Second)
	places := map[string]place{"direct": w.host, "sluice": w.host.sandbox(t, probing...)}
	for _, row := range []struct {
		what, does string
		leave      func(p *proc)
	}{
		{"killed, and the server writes", "writes", func(p *proc) { p.signal(syscall.SIGKILL) }},
		{"reset behind its half-close", "waits", func(p *proc) { p.closeInput() }},
	} {
		t.Run(row.what, func(t *testing.T) {
			clients := make(map[string]*proc)
			for where, at := range places {
				for _, f := range families {
					name := where + "-" + f.name + "-" + row.does
					if row.does == "writes" {
						clients[name] = at.start(t, "sh", "-c", fmt.Sprintf("printf '%s writes\\n' | exec nc -N %s %d", name, f.far, portSilent))
					} else {
						clients[name] = at.start(t, "python3", "-c", leaving, f.far, name+" "+row.does)
					}
				}
			}
			for name := range clients {
				server.waitText(t, name+" half-closed", 30*time.Second)
			}
			for _, p := range clients {
				row.leave(p)
				<-p.done
			}
			if row.does == "writes" {
				server.write([]byte("\n"))
			}
			for name := range clients {
				server.waitText(t, name+" ended by EPIPE", 20*time.Second)
			}
		})
	}
}

// idleClient connects and asks its kernel to probe each second, unless it has a third argument. It
// sends each line that it is given, and prints how its connection ended.
const idleClient = `
import errno, select, socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
for option, value in (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3):
    s.setsockopt(socket.IPPROTO_TCP, option, value)
s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, len(sys.argv) < 4)
try:
    while True:
        for ready in select.select([s, sys.stdin], [], [])[0]:
            line = ready.recv(100) if ready is s else sys.stdin.readline().encode()
            if not line:
                sys.exit(0)
            if ready is s:
                print("got", line.decode().strip(), flush=True)
            else:
                s.sendall(line)
except OSError as e:
    print("ended by", errno.errorcode[e.errno], flush=True)
`

// idle starts an idleClient of portEcho at each place and over each family.
func (w *world) idle(t *testing.T) map[string]*proc {
	t.Helper()
	serve(t, w.far)
	clients := make(map[string]*proc)
	for where, at := range map[string]place{"direct": w.host, "sluice": w.host.sandbox(t, probing...)} {
		for _, f := range families {
			p := at.start(t, "python3", "-c", idleClient, f.far, fmt.Sprint(portEcho))
			p.write([]byte("before\n"))
			p.waitText(t, "got before", 30*time.Second)
			clients[where+" "+f.name] = p
		}
	}
	return clients
}

// TestAFarSideThatIsGoneIsNoticed has the router swallow what goes to the far side. Sluice reports
// that by a reset, within time + probes x interval.
func TestAFarSideThatIsGoneIsNoticed(t *testing.T) {
	area(t, "idle.server", "python3")
	w := newWorld(t)
	clients := w.idle(t)
	w.router.ip(t, "route add blackhole "+far4+"/32\nroute add blackhole "+far6+"/128")
	for who, p := range clients {
		want := "ended by ETIMEDOUT"
		if strings.HasPrefix(who, "sluice") {
			want = "ended by ECONNRESET"
		}
		p.waitText(t, want, 30*time.Second)
	}
}

// TestProbesKeepIdleConnectionsKnownToAForgetfulRouter has the router forget a connection that is
// idle for 3 s, and drop the packets of unknown connections. Where an application's own kernel
// would probe, Sluice does: the far side of a connection of the sandbox, and the client of a
// published port.
func TestProbesKeepIdleConnectionsKnownToAForgetfulRouter(t *testing.T) {
	area(t, "idle.router", "python3", "socat", "nft", "conntrack")
	w := newWorld(t)
	rules := w.router.start(t, "nft", "table inet forgetful { chain c { type filter hook forward priority 0; ct state invalid drop; }; }")
	if r := rules.wait(t, 10*time.Second); r.status != 0 {
		t.Skipf("SKIP: no connection tracking here\n%s", r)
	}
	w.router.sysctl(t, "net.netfilter.nf_conntrack_tcp_timeout_established", "3")
	w.router.sysctl(t, "net.netfilter.nf_conntrack_tcp_loose", "0") // the middle of a connection does not begin one
	serve(t, w.far)
	sb := w.host.sandbox(t, append([]string{"-p", "9001:9001"}, probing...)...)
	// The servers' own kernels probe each second.
	for in, port := range map[place]string{w.host: "9000", sb: "9001"} {
		p := in.start(t, "socat", "-d", "-d", "TCP6-LISTEN:"+port+",ipv6only=0,reuseaddr,fork,keepalive,keepidle=1,keepintvl=1", "EXEC:cat")
		p.waitStream(t, &p.err, 10*time.Second, "listening socat", func(s string) bool { return strings.Contains(s, "listening on") })
	}
	clients := make(map[string]*proc)
	start := func(who string, from place, to ...string) *proc {
		p := from.start(t, append([]string{"python3", "-c", idleClient}, to...)...)
		p.write([]byte("before\n"))
		p.waitText(t, "got before", 30*time.Second)
		clients[who] = p
		return p
	}
	for _, f := range families {
		start("direct "+f.name, w.host, f.far, fmt.Sprint(portEcho))
		start("sluice "+f.name, sb, f.far, fmt.Sprint(portEcho))
		start("to a direct server "+f.name, w.far, f.host, "9000", "unprobed")
		start("to a published server "+f.name, w.far, f.host, "9001", "unprobed")
	}
	probed := maps.Clone(clients)
	forgotten := start("unprobed", w.host, other4, fmt.Sprint(portEcho), "unprobed")
	testutil.Within(t, 20*time.Second, func() (bool, string) {
		known := ok(t, w.router, 5*time.Second, "conntrack", "-L", "-p", "tcp", "-d", other4).out
		return known == "", "the router still knows " + known
	})
	for _, p := range clients {
		p.write([]byte("after\n"))
	}
	for who, p := range probed {
		t.Log(who)
		p.waitText(t, "got after", 10*time.Second)
	}
	for _, p := range probed {
		p.closeInput() // while the router knows the connections; it drops the end of unknown ones
		p.wait(t, 10*time.Second)
	}
	if r := forgotten.result("still running"); strings.Contains(r.out, "got after") {
		t.Errorf("the router remembers a connection that nothing probes\n%s", r)
	}
}
