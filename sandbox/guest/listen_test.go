package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	scripts["listening"] = driveListening
	scripts["sockets"] = driveSockets
}

// driveListening prints each change until CMD ends.
func driveListening(s scene) int {
	g, err := Start(s.ctx(), s.Config)
	must(err)
	must(g.Release())
	ctx, cancel := context.WithCancel(s.ctx())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for changes := range g.Listening(ctx) {
			for _, c := range changes {
				fmt.Println(c.Port, c.DualStack, c.Up)
			}
		}
	}()
	st, err := g.Wait()
	must(err)
	cancel()
	<-done
	must(g.Close())
	return st.Code
}

// listeners is CMD: a Python program that opens the sockets it reads and reports each.
const listeners = `
import socket, sys
held = {}
for line in sys.stdin:
    op, family, kind, host, port = line.split()
    key = line.split(None, 1)[1]
    if op == "close":
        held.pop(key).close()
        continue
    s = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    if family == "6":
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if op == "v6only" else 0)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((host, int(port)))
    if kind == "tcp" and op != "bind":
        s.listen()
    if op == "connect":
        s.connect((host, 9))
    held[key] = s
`

func TestListeningPortsAreFound(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		s := scene{UID: uid, Script: "listening", Config: baseConfig("python3", "-uc", listeners)}
		s.Config.Env = os.Environ()
		cmd := s.command(t)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = os.Stderr
		r, done := launchReading(t, cmd)
		lines := make(chan string, 64)
		go func() {
			sc := bufio.NewScanner(r)
			for sc.Scan() {
				lines <- sc.Text()
			}
			close(lines)
		}()
		for _, row := range []struct{ do, want string }{
			{"open 4 tcp 127.0.0.1 80", "tcp 127.0.0.1:80 false true"},
			{"open 6 tcp :: 8080", "tcp [::]:8080 true true"},
			{"v6only 6 tcp :: 8081", "tcp [::]:8081 false true"},
			{"open 4 udp 0.0.0.0 53", "udp 0.0.0.0:53 false true"},
			{"open 6 udp fd00::100 5353", "udp [fd00::100]:5353 false true"},
			{"close 4 tcp 127.0.0.1 80", "tcp 127.0.0.1:80 false false"},
			// None of these three waits for peers.
			{"bind 4 tcp 127.0.0.1 81\nconnect 4 udp 127.0.0.1 5000\nopen 4 udp 0.0.0.0 40000\nopen 4 tcp 10.0.2.100 82", "tcp 10.0.2.100:82 false true"},
			{"open 6 tcp ::ffff:10.0.2.100 83", "tcp 10.0.2.100:83 false true"},
		} {
			if _, err := io.WriteString(in, row.do+"\n"); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-lines:
				if got != row.want {
					t.Errorf("%s: got %q, want %q", row.do, got, row.want)
				}
			case <-time.After(15 * time.Second):
				t.Fatalf("%s: nothing found", row.do)
			}
		}
		in.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// driveSockets connects to a server on the guest's own loopback.
func driveSockets(s scene) int {
	g, err := Start(s.ctx(), s.Config)
	must(err)
	must(g.Release())
	for _, network := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
		f, err := g.Socket(network)
		must(err)
		if network == "tcp4" {
			c := connectWhenUp(g)
			b, err := io.ReadAll(c)
			must(err)
			fmt.Printf("%s", b)
		}
		f.Close()
	}
	if _, err := g.Socket("raw"); err == nil {
		fmt.Println("a raw socket was made")
	}
	must(g.Signal(unix.SIGTERM))
	_, err = g.Wait()
	must(err)
	must(g.Close())
	if _, err := g.Socket("tcp4"); !errors.Is(err, ErrStageGone) {
		fmt.Println("after Close:", err)
	}
	return 0
}

func connectWhenUp(g *Guest) net.Conn {
	for {
		f, err := g.Socket("tcp4")
		must(err)
		must(unix.SetNonblock(int(f.Fd()), false))
		err = unix.Connect(int(f.Fd()), &unix.SockaddrInet4{Port: 7777, Addr: [4]byte{127, 0, 0, 1}})
		if errors.Is(err, unix.ECONNREFUSED) {
			f.Close()
			continue
		}
		must(err)
		c, err := net.FileConn(f)
		must(err)
		f.Close()
		return c
	}
}

func TestSocketsReachTheGuestsLoopback(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		s := scene{UID: uid, Script: "sockets", Config: baseConfig("python3", "-c", `
import socket
s = socket.create_server(("127.0.0.1", 7777))
while True:
    c, a = s.accept()
    c.sendall(("from " + a[0]).encode())
    c.close()
`)}
		s.Config.Env = os.Environ()
		if got := play(t, s); got.code != 0 || got.stdout != "from 127.0.0.1" || got.stderr != "" {
			t.Errorf("%+v", got)
		}
	})
}

func TestParseDiagRefusesNonsense(t *testing.T) {
	header := func(n uint32, typ uint16, body ...byte) []byte {
		b := make([]byte, 16, 16+len(body))
		b[0], b[1] = byte(n), byte(n>>8)
		b[4], b[5] = byte(typ), byte(typ>>8)
		return append(b, body...)
	}
	for _, row := range []struct {
		name string
		b    []byte
		done bool
		err  string
	}{
		{"nothing", nil, false, ""},
		{"the end", header(16, unix.NLMSG_DONE), true, ""},
		{"longer than it is", header(99, unix.NLMSG_DONE), false, "malformed"},
		{"shorter than its header", header(8, unix.NLMSG_DONE), false, "malformed"},
		{"an error cut short", header(18, unix.NLMSG_ERROR, 0, 0), false, "malformed"},
		{"an error", header(20, unix.NLMSG_ERROR, 0xff, 0xff, 0xff, 0xff), false, "operation not permitted"},
		{"a family the kernel lacks", header(20, unix.NLMSG_ERROR, 0xfe, 0xff, 0xff, 0xff), true, ""},
		{"a socket cut short", header(18, sockDiagByFamily, 2, 10), false, "malformed"},
	} {
		t.Run(row.name, func(t *testing.T) {
			done, err := parseDiag(row.b, func(diagSocket) { t.Error("a socket was found") })
			if done != row.done || (err == nil) != (row.err == "") || (err != nil && !strings.Contains(err.Error(), row.err)) {
				t.Errorf("%v %v", done, err)
			}
		})
	}
}

func FuzzParseDiag(f *testing.F) {
	msg := make([]byte, 16+72+8)
	msg[0], msg[4], msg[16] = 96, sockDiagByFamily, unix.AF_INET6
	msg[88], msg[90], msg[92] = 5, inetDiagV6Only, 1
	f.Add(msg)
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseDiag(b, func(d diagSocket) {
			if !d.addr.IsValid() || d.addr.Is4In6() {
				t.Errorf("%+v", d)
			}
		})
	})
}
