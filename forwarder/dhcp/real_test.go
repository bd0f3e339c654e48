package dhcp

// Tests with real clients and a real kernel: a TAP device in a network namespace of its own, and a
// packet loop that acts as the link.
//
//	netns:  dhclient, udhcpc, kernel ── tap ══ link.serve ── Server
//
// A client's script writes its environment to a FIFO, so nothing on the system changes and no test
// waits by the clock.

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// link is the server's end of the guest's wire.
type link struct {
	s   *Server
	tap *os.File
}

// enterNamespace moves the test's thread to a new network namespace with a
// device tap0, which is up and served. The thread is never unlocked, so it dies
// with the test's goroutine, and the namespace with its last process.
func enterNamespace(t *testing.T, s *Server) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no TAP device: %v", err)
	}
	ifr, err := unix.NewIfreq("tap0")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		t.Skipf("no TAP device: %v", err)
	}
	l := &link{s: s, tap: os.NewFile(uintptr(fd), "tap")}
	served := make(chan struct{})
	go func() { defer close(served); l.serve() }()
	t.Cleanup(func() { l.tap.Close(); <-served })
	testutil.Run(t, "ip", "link", "set", "lo", "up")
	testutil.Run(t, "ip", "link", "set", "tap0", "address", guestMAC.String(), "mtu", "9000")
	testutil.Run(t, "ip", "link", "set", "tap0", "up")
}

// serve answers frames until the device is closed.
func (l *link) serve() {
	buf := make([]byte, 1<<16)
	for {
		n, err := l.tap.Read(buf)
		if err != nil {
			return
		}
		f := buf[:n]
		if len(f) < 14 {
			continue
		}
		var out []byte
		switch p := f[14:]; binary.BigEndian.Uint16(f[12:]) {
		case 0x0800:
			out = l.ipv4(p)
		case 0x86dd:
			out = l.ipv6(f[6:12], p)
		}
		if out != nil {
			l.tap.Write(out)
		}
	}
}

func (l *link) ipv4(p []byte) []byte {
	if len(p) < 28 || p[0] != 0x45 || p[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(p[22:]) != 67 {
		return nil
	}
	reply, broadcast, to := l.s.HandleV4(p[28:binary.BigEndian.Uint16(p[2:])])
	if reply == nil {
		return nil
	}
	dst := guestMAC
	if broadcast {
		dst = net.HardwareAddr{255, 255, 255, 255, 255, 255}
	}
	return frame4(dst, l.s.cfg.Gateway4, to, reply)
}

func frame4(mac net.HardwareAddr, from netip.Addr, to netip.AddrPort, payload []byte) []byte {
	out := slices.Concat(mac, gatewayMAC, []byte{8, 0})
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(payload)))
	ip = slices.Concat(ip, from.AsSlice(), to.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return slices.Concat(out, ip, udp(67, to.Port(), payload), payload)
}

func udp(src, dst uint16, payload []byte) []byte {
	var b []byte
	b = binary.BigEndian.AppendUint16(b, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(b, 0, 0)
}

func (l *link) ipv6(mac net.HardwareAddr, p []byte) []byte {
	if len(p) < 48 {
		return nil
	}
	from := netip.AddrFrom16([16]byte(p[8:24]))
	body := p[40:min(len(p), 40+int(binary.BigEndian.Uint16(p[4:])))]
	switch {
	case p[6] == unix.IPPROTO_ICMPV6 && ValidSolicitation(body, from, p[7]):
		return frame6(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, l.s.cfg.Gateway6, netip.MustParseAddr("ff02::1"), unix.IPPROTO_ICMPV6, l.s.RouterAdvertisement(), 2)
	case p[6] == unix.IPPROTO_UDP && len(body) >= 8 && binary.BigEndian.Uint16(body[2:]) == 547:
		if reply := l.s.HandleV6(body[8:], from); reply != nil {
			return frame6(mac, l.s.cfg.Gateway6, from, unix.IPPROTO_UDP, append(udp(547, 546, reply), reply...), 6)
		}
	}
	return nil
}

// frame6 builds a frame and fills in the checksum of body at sumAt.
func frame6(mac net.HardwareAddr, from, to netip.Addr, proto byte, body []byte, sumAt int) []byte {
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), binary.BigEndian.AppendUint32(nil, uint32(len(body))), []byte{0, 0, 0, proto}, body)
	binary.BigEndian.PutUint16(body[sumAt:], checksum(pseudo))
	ip := []byte{0x60, 0, 0, 0, 0, 0, proto, 255}
	binary.BigEndian.PutUint16(ip[4:], uint16(len(body)))
	return slices.Concat(mac, gatewayMAC, []byte{0x86, 0xdd}, ip, from.AsSlice(), to.AsSlice(), body)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// client runs a DHCP client, with SCRIPT and DIR in args replaced by a script and its directory. It
// returns the environment of the first run of the script for one of the reasons.
func client(t *testing.T, reasons []string, name string, args ...string) map[string]string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	dir := t.TempDir()
	fifo, script := filepath.Join(dir, "fifo"), filepath.Join(dir, "script")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	words, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer words.Close()
	body := "#!/bin/sh\n{ echo \"reason=${reason:-$1}\"; env; echo END; } > " + fifo + "\n"
	if err := os.WriteFile(script, []byte(body), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range args {
		args[i] = strings.NewReplacer("SCRIPT", script, "DIR", dir).Replace(args[i])
	}
	cmd := exec.Command(path, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	words.SetReadDeadline(time.Now().Add(30 * time.Second))
	env := make(map[string]string)
	lines := bufio.NewScanner(words)
	for lines.Scan() {
		if k, v, ok := strings.Cut(lines.Text(), "="); ok {
			if _, had := env[k]; !had {
				env[k] = v
			}
		} else if lines.Text() == "END" {
			if slices.Contains(reasons, env["reason"]) {
				return env
			}
			clear(env)
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	t.Fatalf("%s has not come to %v: %v\n%s", name, reasons, lines.Err(), &out)
	return nil
}

func expect(t *testing.T, env map[string]string, want map[string]string) {
	t.Helper()
	for k, v := range want {
		if env[k] != v {
			t.Errorf("%s is %q, want %q", k, env[k], v)
		}
	}
	if t.Failed() {
		t.Log(env)
	}
}

func TestRealClientsV4(t *testing.T) {
	enterNamespace(t, newServer(t))
	expect(t, client(t, []string{"bound"}, "busybox", "udhcpc", "-i", "tap0", "-f", "-n", "-q", "-s", "SCRIPT", "-O", "search", "-O", "mtu"),
		map[string]string{"ip": "10.0.2.100", "mask": "24", "router": "10.0.2.2", "dns": "10.0.2.3", "mtu": "65520",
			"domain": "a.example", "search": "a.example b.example", "serverid": "10.0.2.2", "hostname": "box", "lease": "86400"})
	conf := filepath.Join(t.TempDir(), "dhclient.conf")
	os.WriteFile(conf, []byte("request subnet-mask, routers, domain-name-servers, domain-search, interface-mtu, host-name;\n"), 0o644)
	expect(t, client(t, []string{"BOUND"}, "dhclient", "-4", "-d", "-1", "-cf", conf, "-sf", "SCRIPT", "-lf", "DIR/lease", "-pf", "DIR/pid", "tap0"),
		map[string]string{"new_ip_address": "10.0.2.100", "new_subnet_mask": "255.255.255.0", "new_routers": "10.0.2.2",
			"new_domain_name_servers": "10.0.2.3", "new_domain_search": "a.example. b.example.", "new_interface_mtu": "65520", "new_host_name": "box"})
}

func TestRealClientV6(t *testing.T) {
	enterNamespace(t, newServer(t))
	testutil.Run(t, "ip", "addr", "add", "fe80::100/64", "dev", "tap0", "nodad")
	conf := filepath.Join(t.TempDir(), "dhclient.conf")
	os.WriteFile(conf, []byte("also request dhcp6.name-servers, dhcp6.domain-search;\n"), 0o644)
	expect(t, client(t, []string{"BOUND6"}, "dhclient", "-6", "-d", "-1", "-cf", conf, "-sf", "SCRIPT", "-lf", "DIR/lease", "-pf", "DIR/pid", "tap0"),
		map[string]string{"new_ip6_address": "fd00:a::64", "new_dhcp6_name_servers": "fd00:a::3", "new_dhcp6_domain_search": "a.example. b.example."})
}

// The kernel solicits on its own when the device comes up.
func TestRealKernelTakesAdvertisement(t *testing.T) {
	enterNamespace(t, newServer(t, func(c *Config) { c.MTU = 8000 }))
	want := []string{"default via fe80::2 dev tap0 proto ra", "fd00:a::/64 dev tap0 proto kernel", "fd00:a::ff:fe00:164/64 scope global", "mtu 8000"}
	testutil.Within(t, 20*time.Second, func() (bool, string) { // the kernel's own delays: DAD, RS
		have := testutil.Run(t, "ip", "-6", "route") + testutil.Run(t, "ip", "-6", "addr", "show", "dev", "tap0") +
			"mtu " + readFile(t, "/proc/sys/net/ipv6/conf/tap0/mtu")
		missing := slices.DeleteFunc(slices.Clone(want), func(w string) bool { return strings.Contains(have, w) })
		return len(missing) == 0, fmt.Sprintf("missing %q in\n%s", missing, have)
	})
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// tshark reads the options that no client here reads (RDNSS, DNSSL), and reports malformed ones.
func TestTsharkReadsAdvertisement(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("tshark is not installed")
	}
	s := newServer(t)
	f := frame6(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, s.cfg.Gateway6, netip.MustParseAddr("ff02::1"), unix.IPPROTO_ICMPV6, s.RouterAdvertisement(), 2)
	file := []byte{0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	file = binary.LittleEndian.AppendUint32(file, uint32(len(f)))
	file = binary.LittleEndian.AppendUint32(file, uint32(len(f)))
	path := filepath.Join(t.TempDir(), "ra.pcap")
	if err := os.WriteFile(path, append(file, f...), 0o644); err != nil {
		t.Fatal(err)
	}
	out := testutil.Run(t, tshark, "-r", path, "-V")
	for _, w := range []string{
		"[Checksum Status: Good]", "Router lifetime (s): 65535", "Cur hop limit: 64", "Managed address configuration: Set",
		"Prefix: fd00:a::", "Autonomous address-configuration flag(A): Set", "Valid Lifetime: Infinity (4294967295)",
		"MTU: 65520", "Link-layer address: 02:00:00:00:01:02", "Recursive DNS Servers: fd00:a::3",
		"Domain Names: a.example\n", "Domain Names: b.example\n",
	} {
		if !strings.Contains(out, w) {
			t.Errorf("no %q", w)
		}
	}
	if strings.Contains(out, "Malformed") || strings.Contains(out, "Expert Info (Error") {
		t.Error("malformed")
	}
	if t.Failed() {
		t.Log(out)
	}
}
