package nat

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const liveEnv = "SLUICE_TEST_CONNTRACK_NETNS"

// TestAgainstTheKernelsConntrack makes real flows in a network namespace of its own,
// has conntrack(8) print them and compares each line with how we print the same
// flow.
//
//	this test ── unshare -n ──► the same test, in a netns:
//	                              lo 10.9.9.1 fd00:9::1, nft rule "ct state": tracking on
//	                              TCP, UDP, ping over lo;  conntrack -L, conntrack -E
func TestAgainstTheKernelsConntrack(t *testing.T) {
	if os.Getenv(liveEnv) != "" {
		liveConntrack(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root, to track connections in a network namespace")
	}
	for _, tool := range []string{"conntrack", "nft", "ip", "ping", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	cmd := exec.Command("unshare", "-n", os.Args[0], "-test.run=^TestAgainstTheKernelsConntrack$", "-test.v")
	cmd.Env = append(os.Environ(), liveEnv+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in the namespace: %v\n%s", err, out)
	}
}

func sh(t *testing.T, command string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", command).Output()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return string(out)
}

func liveConntrack(t *testing.T) {
	sh(t, `ip link set lo up && ip addr add 10.9.9.1/24 dev lo && ip addr add fd00:9::1/64 dev lo nodad &&
		nft 'table inet t { chain o { type filter hook output priority 0; tcp dport 9999 drop; ct state new,established,related accept; }; }'`)
	watch := exec.Command("conntrack", "-E")
	pipe, err := watch.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	events := make(chan string, 4096)
	go func() { // ends with the pipe, when watch is killed below
		defer close(events)
		for lines := bufio.NewScanner(pipe); lines.Scan(); {
			events <- lines.Text()
		}
	}()
	compared := map[string]int{}
	check := func(line string) {
		if strings.Contains(line, "[USERSPACE]") { // deleted by hand: not an end that we have
			return
		}
		line = useCount.ReplaceAllString(line, " use=1")
		compared[strings.Fields(line)[0]]++
		if got := reprint(t, line); got != line {
			t.Errorf("conntrack prints\n%q, we print\n%q", line, got)
		}
	}
	// One datagram after the other until the watcher shows one: then it watches.
	for seen := false; !seen; {
		say(t, "udp", "10.9.9.1:5")
		select {
		case line := <-events:
			check(line)
			seen = true
		default:
		}
	}
	for _, acct := range []string{"0", "1"} {
		if err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_acct", []byte(acct), 0); err != nil {
			t.Fatal(err)
		}
		defer makeFlows(t, "tcp4", "udp4", "10.9.9.1")()
		defer makeFlows(t, "tcp6", "udp6", "[fd00:9::1]")()
		sh(t, "ping -q -c1 10.9.9.1; ping -q -c1 fd00:9::1")
		for _, args := range []string{"-L", "-L -f ipv6", "-L -o extended", "-L -o id", "-L -o extended,id"} {
			for _, line := range strings.Split(strings.TrimSpace(sh(t, "conntrack "+args+" 2>&-")), "\n") {
				check(line)
			}
		}
	}
	sh(t, "conntrack -D -p udp --dport 5 2>&-")
	for line := range events {
		check(line)
		if strings.Contains(line, "DESTROY") && strings.Contains(line, "dport=5 ") {
			break
		}
	}
	_ = watch.Process.Kill()
	_ = watch.Wait()
	for _, kind := range []string{"tcp", "udp", "icmp", "icmpv6", "ipv4", "ipv6", "[NEW]", "[UPDATE]", "[DESTROY]"} {
		if compared[kind] == 0 {
			t.Errorf("no line of %s was compared: %v", kind, compared)
		}
	}
	t.Log("lines compared by first word:", compared)
}

func say(t *testing.T, network, addr string) {
	t.Helper()
	c, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "x")
	c.Close()
}

// makeFlows leaves TCP flows in several states and UDP flows with and without an
// answer behind, until the returned function is called.
func makeFlows(t *testing.T, tcp, udp, addr string) (done func()) {
	l, err := net.Listen(tcp, addr+":0")
	if err != nil {
		t.Fatal(err)
	}
	pair := func() (c, s *net.TCPConn) {
		conn, err := net.Dial(tcp, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return conn.(*net.TCPConn), far.(*net.TCPConn)
	}
	open, openFar := pair()
	fmt.Fprint(openFar, strings.Repeat("x", 5000))
	if _, err := io.ReadFull(open, make([]byte, 5000)); err != nil {
		t.Fatal(err)
	}
	half, halfFar := pair()
	half.CloseWrite()
	reset, resetFar := pair()
	reset.SetLinger(0)
	reset.Close()
	over, overFar := pair()
	over.Close()
	overFar.Close()
	if c, err := net.Dial(tcp, addr+":1"); err == nil { // refused
		c.Close()
	}
	server, err := net.ListenPacket(udp, addr+":0")
	if err != nil {
		t.Fatal(err)
	}
	say(t, udp, server.LocalAddr().String())
	client, err := net.Dial(udp, server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(client, "question")
	buf := make([]byte, 100)
	for {
		n, from, err := server.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		if string(buf[:n]) == "question" {
			if _, err := server.WriteTo([]byte("answer"), from); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if _, err := client.Read(buf); err != nil {
		t.Fatal(err)
	}
	return func() {
		for _, c := range []io.Closer{l, open, openFar, half, halfFar, resetFar, server, client} {
			c.Close()
		}
	}
}
