package e2e

// Attempts with an accomplice outside, on what exists before, beside and after a worker.

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sluice.dev/sluice/internal/testutil"
)

// forger starts a program outside that sends datagrams to the machine from a forged address.
func (h *hostile) forger(t *testing.T, v6 bool, from, payload string, flags ...string) *proc {
	t.Helper()
	var links []struct{ Address string }
	ok(t, h.w.host, 5*time.Second, "ip", "-j", "link", "show", "h0").into(t, &links)
	argv := append([]string{peerBin(), "forge", "-link", "r0", "-mac", links[0].Address, "-from", from, "-to", pick(v6, host4, host6),
		"-payload", base64.StdEncoding.EncodeToString([]byte(payload))}, flags...)
	p := h.w.router.start(t, argv...)
	p.waitText(t, `"forging"`, 10*time.Second)
	return p
}

// forgers: a hundred thousand answers race one that is held back until they are all sent.
// Everything in them is right except what cannot be known.
func forgers(t *testing.T, h *hostile, v6 bool) string {
	const first, ports, count = 40000, 64, 100_000
	const forgedA, forgedAAAA = "203.0.113.66", "2001:db8:666::1"
	h.w.host.sysctl(t, "net.ipv4.ip_local_port_range", fmt.Sprint(first, " ", first+ports-1))
	defer h.w.host.sysctl(t, "net.ipv4.ip_local_port_range", "32768 60999")
	h.w.host.file(t, "/etc/resolv.conf", "nameserver "+far4+"\noptions timeout:15\n")
	defer h.w.host.file(t, "/etc/resolv.conf", "nameserver "+far4+"\n")
	zone := h.w.zoneAt(t, scene(v6), append(recordFlags([]string{"held.test. held.test. 60 A " + far4, "held.test. held.test. 60 AAAA " + far6}), "-hold", "held.test.")...)
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, nameSpec), "--dns", scene(v6))
	forged := new(dns.Msg)
	forged.SetQuestion("held.test.", pick(v6, dns.TypeA, dns.TypeAAAA))
	forged.Response = true
	rr, err := dns.NewRR("held.test. 3600 " + pick(v6, "A "+forgedA, "AAAA "+forgedAAAA))
	if err != nil {
		t.Fatal(err)
	}
	forged.Answer = []dns.RR{rr}
	payload, err := forged.Pack()
	if err != nil {
		t.Fatal(err)
	}
	why := sb.refused(t, "upstreamIgnored", func() {
		p := sb.start(t, "dig", "+short", "+tries=1", "+time=20", "held.test", pick(v6, "A", "AAAA"))
		zone.waitText(t, `"asked"`, 10*time.Second)
		f := h.forger(t, v6, at(scene(v6), 53), string(payload), "-ids", "-first", fmt.Sprint(first), "-ports", fmt.Sprint(ports), "-count", fmt.Sprint(count))
		var sent struct{ Sent int }
		if f.wait(t, 60*time.Second).wantStatus(t, 0).into(t, &sent); sent.Sent != count {
			t.Errorf("%d forged answers were sent, not %d", sent.Sent, count)
		}
		zone.write([]byte("answer\n"))
		if out := strings.TrimSpace(p.wait(t, 30*time.Second).wantStatus(t, 0).out); out != pick(v6, far4, far6) {
			t.Errorf("after %d forged answers the true one is %q", count, out)
		}
	})
	sb.refused(t, "default", func() {
		if d, r := dial(t, sb, "-timeout", "5s", at(pick(v6, forgedA, forgedAAAA), 8080)); d.Error == "" {
			t.Errorf("a forged address is granted\n%s", r)
		}
	})
	return why
}

// doors returns what the scenes' policy refuses, for `peer knock`.
func doors(v6 bool) string {
	return fmt.Sprintf("tcp:%[1]s udp:%[2]s tcp:%[3]s tcp:%[4]s tcp:%[5]s", at(pick(v6, other4, other6), portWhoami), at(pick(v6, other4, other6), portEcho),
		at(pick(v6, "169.254.169.254", "fd00:ec2::254"), 80), at(pick(v6, host4, host6), portWhoami), at(pick(v6, other4, other6), 8080)) + "\n"
}

// shutDoors ends the knocking, and fails if a door opened.
func shutDoors(t *testing.T, knock *proc) {
	t.Helper()
	knock.closeInput()
	var total struct{ Tries, Entered map[string]int }
	knock.wait(t, 20*time.Second).wantStatus(t, 0).into(t, &total)
	for door, n := range total.Entered {
		if n > 0 {
			t.Errorf("%s was opened %d of %d times", door, n, total.Tries[door])
		}
	}
}

// beforePolicy: a network that exists before its policy leads nowhere.
func beforePolicy(t *testing.T, h *hostile, v6 bool) string {
	c := container(t, h.w.host)
	enter := []string{"nsenter", "-t", fmt.Sprint(c.pid), "-n", "-m"}
	if !privileged {
		enter = append(enter, "-U", "--preserve-credentials")
	}
	knock := h.w.host.startPlain(t, slices.Concat(enter, []string{"--", peerBin(), "knock", "-pause", "1ms"})...)
	knock.write([]byte(doors(v6)))
	knock.waitText(t, `"knocking"`, 10*time.Second)
	sb := &sandbox{host: h.w.host, name: "early" + pick(v6, "4", "6")}
	sb.run = h.w.host.sluice(t, "attach", "--name", sb.name, "--policy", policyFile(t, gateSpec), fmt.Sprint(c.pid))
	testutil.Within(t, 20*time.Second, func() (bool, string) {
		r := inContainer(t, h.w.host, c.pid, "dig", "+short", "+time=1", "+tries=1", "@"+pick(v6, dns4, dns6), "pypi.test", pick(v6, "A", "AAAA"))
		return strings.Contains(r.out, pick(v6, far4, far6)), "no service\n" + r.String() + sb.run.result("").String()
	})
	why := sb.refused(t, "default", func() {})
	if r := inContainer(t, h.w.host, c.pid, "curl", "-gsS", "-m", "8", "--resolve", "pypi.test:8080:"+bracket(pick(v6, far4, far6)), "http://pypi.test:8080/"); !strings.Contains(r.out, "hello from nginx") {
		t.Errorf("what is allowed does not work\n%s", r)
	}
	shutDoors(t, knock)
	c.signal(syscall.SIGKILL)
	<-c.done
	sb.run.wait(t, 10*time.Second)
	return why
}

// killedWorker: while no worker handles packets, none passes. Afterwards names are granted as
// before, to clients that remember an address.
func killedWorker(t *testing.T, h *hostile, v6 bool) string {
	sb := h.w.host.sandbox(t, rootInside, "--policy", policyFile(t, gateSpec))
	sb.asks(t, v6)
	knock := sb.start(t, peerBin(), "knock", "-pause", "1ms")
	knock.write([]byte(doors(v6)))
	knock.waitText(t, `"knocking"`, 10*time.Second)
	var why string
	for range 3 {
		old := sb.worker()
		syscall.Kill(old, syscall.SIGKILL)
		sb.waitWorker(t, old, 10*time.Second)
		// The worker's counters start from zero.
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			return sb.refusals(t)["default"] > 0, "nothing is refused by the new worker"
		})
		why = sb.refused(t, "default", func() {})
		r := run(t, sb, 20*time.Second, "curl", "-gsS", "-m", "10", "--resolve", "pypi.test:8080:"+bracket(pick(v6, far4, far6)), "http://pypi.test:8080/")
		if !strings.Contains(r.out, "hello from nginx") {
			t.Errorf("an address that was granted before is refused by the next worker\n%s", r)
		}
	}
	shutDoors(t, knock)
	return why
}

// ourOwn: a sandbox cannot see the processes that serve it. Nothing counts this, because no process
// of ours is asked.
func ourOwn(t *testing.T, h *hostile, _ bool) string {
	sb := h.sb
	for _, f := range stateFiles() {
		for _, path := range []string{f, fmt.Sprintf("/proc/%d/root%s", sb.run.pid, f), fmt.Sprintf("/proc/%d/cwd/%s", sb.run.pid, filepath.Base(f))} {
			if r := run(t, sb, 5*time.Second, "test", "-e", path); r.status == 0 {
				t.Errorf("%s is seen inside", path)
			}
		}
	}
	for _, pid := range append(descendants(sb.run.pid), sb.run.pid) {
		if inside(t, sb, pid) {
			continue
		}
		for _, what := range []string{"readlink /proc/%d/fd/*", "cat /proc/%d/environ", "head -c 1 /proc/%d/mem", "ls /proc/%d/root/", "cat /proc/%d/maps"} {
			script := fmt.Sprintf(what, pid)
			if r := run(t, sb, 5*time.Second, "sh", "-c", script); r.status == 0 && r.out != "" {
				t.Errorf("a process of ours shows itself inside\n%s", r)
			}
		}
	}
	r := ok(t, sb, 5*time.Second, "cat", "/proc/net/unix")
	for line := range strings.Lines(r.out) {
		if f := strings.Fields(line); len(f) > 7 && strings.HasPrefix(f[7], "@") {
			t.Errorf("an abstract socket inside: %s", line)
		}
	}
	r = h.w.host.sluiceRun(t, "run", "--", "ls", "/proc/self/fd").wantStatus(t, 0)
	if got := strings.Fields(r.out); !slices.Equal(got, []string{"0", "1", "2", "3"}) { // 3 is the directory
		t.Errorf("a command inherits descriptors\n%s", r)
	}
	for _, argv := range [][]string{{"flows", sb.name}, {"policy", "set", sb.name, policyFile(t, "defaultAction: allow")}, {"stats", sb.name}} {
		if r := run(t, sb, 10*time.Second, append([]string{sluiceBin()}, argv...)...); r.status == 0 {
			t.Errorf("a control command works from inside\n%s", r)
		}
	}
	return "out of reach"
}

// inside reports whether a process is in the sandbox's network.
func inside(t *testing.T, sb *sandbox, pid int) bool {
	t.Helper()
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return true // the process is gone
	}
	theirs := strings.TrimSpace(ok(t, sb, 5*time.Second, "readlink", "/proc/self/ns/net").out)
	return own == theirs
}
