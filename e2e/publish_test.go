package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestClientsFindAPublishedServerOfEitherFamily uses a port that is published on both families
// while the server inside listens on one. Without Sluice, a client of localhost moves on from the
// family that refuses it to the other.
func TestClientsFindAPublishedServerOfEitherFamily(t *testing.T) {
	area(t, "publish.family", "curl", "python3")
	w := newWorld(t)
	sb := w.host.sandbox(t, "-p", "9154:9154", "-p", "9156:9156")
	for _, s := range []struct {
		port int
		bind string
	}{{9154, "0.0.0.0"}, {9156, "::"}} {
		// Unless told otherwise, http.server takes IPv4 on :: too.
		program := fmt.Sprintf(`import http.server, socket, sys
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in %[1]q else socket.AF_INET
    def server_bind(self):
        if self.address_family == socket.AF_INET6: self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"served\n")
    def log_message(self, *a): pass
s = Server((%[1]q, %[2]d), Handler); s.server_name = "x"; s.server_port = %[2]d
print("serving", flush=True); s.serve_forever()`, s.bind, s.port)
		sb.start(t, "python3", "-c", program).waitText(t, "serving", 10*time.Second)
		for _, row := range []struct {
			from place
			host string
		}{{w.host, "localhost"}, {w.host, "127.0.0.1"}, {w.host, "::1"}, {w.far, host4}, {w.far, host6}} {
			t.Run(fmt.Sprintf("server on %s, client asks %s", s.bind, row.host), func(t *testing.T) {
				r := run(t, row.from, 15*time.Second, "curl", "-gsS", "-m", "10", url(row.host, s.port, "/"))
				if r.status != 0 || !strings.Contains(r.out, "served") {
					t.Errorf("curl got no page\n%s", r)
				}
			})
		}
	}
}

// TestDatagramsFindAPublishedServerOfEitherFamily is the same over UDP, where nothing can refuse a
// client, which asks only once.
func TestDatagramsFindAPublishedServerOfEitherFamily(t *testing.T) {
	area(t, "publish.family", "dig", "nc")
	w := newWorld(t)
	sb := w.host.sandbox(t, "-p", "9158:9158/udp", "-p", "9160:9160/udp")
	for _, s := range []struct {
		port int
		bind string
	}{{9158, "0.0.0.0"}, {9160, "::"}} {
		program := fmt.Sprintf(`import socket
s = socket.socket(socket.AF_INET6 if ":" in %[1]q else socket.AF_INET, socket.SOCK_DGRAM)
if s.family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
s.bind((%[1]q, %[2]d))
print("serving", flush=True)
while True:
    q, client = s.recvfrom(4096)
    s.sendto(b"served\n" if q == b"hello\n" else q[:2] + bytes([q[2] | 0x80]) + q[3:], client)`, s.bind, s.port)
		sb.start(t, "python3", "-c", program).waitText(t, "serving", 10*time.Second)
		for _, row := range []struct {
			from place
			host string
		}{{w.host, "127.0.0.1"}, {w.host, "::1"}, {w.far, host4}, {w.far, host6}} {
			t.Run(fmt.Sprintf("server on %s, client asks %s", s.bind, row.host), func(t *testing.T) {
				r := run(t, row.from, 15*time.Second, "dig", "@"+row.host, "-p", fmt.Sprint(s.port), "+tries=1", "+time=5", "web.test")
				if r.status != 0 || !strings.Contains(r.out, "NOERROR") {
					t.Errorf("dig got no answer\n%s", r)
				}
				p := row.from.start(t, "nc", "-u", row.host, fmt.Sprint(s.port))
				p.write([]byte("hello\n"))
				p.waitText(t, "served", 5*time.Second)
			})
		}
	}
}
