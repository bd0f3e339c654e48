package e2e

// The control commands of a running sandbox, its files, and its confinement.

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

func containsWord(text, word string) bool {
	return regexp.MustCompile(`(^|\W)` + regexp.QuoteMeta(word) + `($|\W)`).MatchString(text)
}

func TestWorkerIsConfined(t *testing.T) {
	area(t, "confined")
	w := newPair(t)
	for _, flags := range [][]string{nil, {rootInside}, {"-p", "9000:9000", "--publish-auto"}} {
		sb := w.host.sandbox(t, flags...)
		s := status(sb.worker())
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if strings.Trim(s[set], "0") != "" || s[set] == "" {
				t.Errorf("flags %v: %s of the worker is %q, not empty", flags, set, s[set])
			}
		}
		if s["NoNewPrivs"] != "1" || s["Seccomp"] != "2" {
			t.Errorf("flags %v: the worker has NoNewPrivs %s, Seccomp %s, not 1 and 2", flags, s["NoNewPrivs"], s["Seccomp"])
		}
		root, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/", sb.worker()))
		if err != nil || len(root) > 0 {
			t.Errorf("flags %v: the worker's root is not empty: %v %v", flags, root, err)
		}
		// This holds for every thread, not only the first.
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", sb.worker()))
		for _, task := range tasks {
			b, _ := os.ReadFile(task)
			if len(b) > 0 && (!strings.Contains(string(b), "Seccomp:\t2") || !strings.Contains(string(b), "NoNewPrivs:\t1") || !strings.Contains(string(b), "CapEff:\t0000000000000000")) {
				t.Errorf("flags %v: thread %s is not confined", flags, task)
			}
		}
	}
}

func TestControlSocketIsUnreachableInside(t *testing.T) {
	area(t, "control.hidden")
	w := newPair(t)
	for _, flags := range [][]string{nil, {rootInside}} {
		sb := w.host.sandbox(t, flags...)
		sockets := stateFiles()
		if len(sockets) == 0 {
			t.Fatal("the sandbox has no state files outside")
		}
		for _, f := range sockets {
			if r := run(t, sb, 5*time.Second, "test", "-e", f); r.status == 0 {
				t.Errorf("flags %v: %s is seen inside", flags, f)
			}
		}
		for _, argv := range [][]string{{"flows", sb.name}, {"policy", "show", sb.name}, {"stats", sb.name}, {"port", "ls", sb.name}} {
			if r := run(t, sb, 10*time.Second, append([]string{sluiceBin()}, argv...)...); r.status == 0 {
				t.Errorf("a control command works from inside\n%s", r)
			}
		}
	}
}

func TestPsListsSandboxes(t *testing.T) {
	area(t, "ps")
	w := newPair(t)
	a, b := w.host.sandbox(t), w.host.sandbox(t)
	r := w.host.sluiceOK(t, "ps")
	for _, sb := range []*sandbox{a, b} {
		if !containsWord(r.out, sb.name) || !containsWord(r.out, fmt.Sprint(sb.run.pid)) {
			t.Errorf("ps does not show %s of pid %d\n%s", sb.name, sb.run.pid, r)
		}
	}
	var list []map[string]any
	r = w.host.sluiceOK(t, "ps", "-o", "json")
	if err := json.Unmarshal([]byte(r.out), &list); err != nil || len(list) != 2 {
		t.Errorf("ps -o json is no list of two: %v\n%s", err, r)
	}
	t.Run("a name in use is refused", func(t *testing.T) {
		w.host.sluiceRun(t, "run", "--name", a.name, "--", "true").wantStatus(t, 125).wantMessage(t, a.name, "in use")
	})
	t.Run("a name that is not there", func(t *testing.T) {
		w.host.sluiceRun(t, "flows", "nobody").wantMessage(t, "nobody", "no such sandbox", a.name)
	})
	a.close(t)
	if r := w.host.sluiceOK(t, "ps"); containsWord(r.out, a.name) || !containsWord(r.out, b.name) {
		t.Errorf("ps after the first ended\n%s", r)
	}
	t.Run("with one sandbox its name can be left out", func(t *testing.T) {
		w.host.sluiceOK(t, "flows")
	})
}

func TestPortsAtRunTime(t *testing.T) {
	area(t, "port")
	w := newWorld(t)
	sb := w.host.sandbox(t)
	serve(t, sb)
	reach := func(addr string, port int) bool {
		d, _ := dial(t, w.far, "-timeout", "2s", at(addr, port))
		return d.Error == "" && d.Got != ""
	}
	w.host.sluiceOK(t, "port", "add", sb.name, fmt.Sprintf("9005:%d", portWhoami))
	w.host.sluiceOK(t, "port", "add", sb.name, fmt.Sprintf("9005:%d/udp", portWhoami))
	if !reach(host4, 9005) || !reach(host6, 9005) {
		t.Error("a port added is not reachable")
	}
	if d, r := udp(t, w.far, "-text", "x", at(host4, 9005)); d.Received != 1 {
		t.Errorf("a UDP port added is not reachable\n%s", r)
	}
	ls := w.host.sluiceOK(t, "port", "ls", sb.name).wantOut(t, "9005")
	if !strings.Contains(ls.out, "udp") || !strings.Contains(ls.out, "tcp") {
		t.Errorf("port ls does not tell tcp and udp\n%s", ls)
	}
	w.host.sluiceRun(t, "port", "add", sb.name, fmt.Sprintf("9005:%d", portEcho)).wantMessage(t, "9005", "taken")
	w.host.sluiceOK(t, "port", "rm", sb.name, fmt.Sprintf("9005:%d", portWhoami))
	if reach(host4, 9005) {
		t.Error("a port removed is still reachable")
	}
	w.host.sluiceOK(t, "port", "rm", sb.name, fmt.Sprintf("9005:%d/udp", portWhoami))
	if r := w.host.sluiceOK(t, "port", "ls", sb.name); strings.Contains(r.out, "9005") {
		t.Errorf("port ls still shows a port removed\n%s", r)
	}
}

func TestPublishAutoFindsListeners(t *testing.T) {
	area(t, "publish.auto")
	w := newWorld(t)
	sb := w.host.sandbox(t, "--publish-auto")
	p := sb.start(t, peerBin(), "serve", "-base", "9200")
	p.waitText(t, `"listening"`, 5*time.Second)
	since := time.Now()
	for {
		d, r := dial(t, w.host, "-timeout", "1s", at("127.0.0.1", 9205))
		if d.Error == "" {
			break
		}
		if time.Since(since) > 2*time.Second {
			t.Fatalf("what listens inside is not forwarded\n%s", r)
		}
	}
	// The probe itself starts a process each time, which is part of the measure.
	if took := time.Since(since); took > 300*time.Millisecond {
		t.Errorf("found after %v, not within 200 ms", took)
	}
	p.signal(syscall.SIGKILL)
	p.wait(t, 5*time.Second)
	testutil.Within(t, 2*time.Second, func() (bool, string) {
		d, r := dial(t, w.host, "-timeout", "1s", at("127.0.0.1", 9205))
		return d.Error == "ECONNREFUSED", "a port whose listener ended is still forwarded\n" + r.String()
	})
	t.Run("without the ports of the host's services", func(t *testing.T) {
		h := w.host.start(t, peerBin(), "serve", "-base", "5436", "127.0.0.1") // 5436 to 5447, and not at ::1
		h.waitText(t, `"listening"`, 5*time.Second)
		sb := w.host.sandbox(t, "--publish-auto", rootInside)
		var inside []*proc
		for _, base := range []string{"5430", "78"} { // 5430 to 5441, 78 to 89
			p := sb.start(t, peerBin(), "serve", "-base", base)
			p.waitText(t, `"listening"`, 5*time.Second)
			inside = append(inside, p)
		}
		testutil.Within(t, 5*time.Second, func() (bool, string) {
			d, r := dial(t, w.host, "-timeout", "1s", at("127.0.0.1", 5435))
			return d.Error == "", "an ordinary port is not forwarded\n" + r.String()
		})
		for _, addr := range []string{"127.0.0.1", "::1"} {
			for _, port := range []int{80, 83, 5432, 5433} {
				if d, r := dial(t, w.host, "-timeout", "1s", at(addr, port)); d.Error != "ECONNREFUSED" {
					t.Errorf("the sandbox has the host's port %d\n%s", port, r)
				}
			}
		}
		if d, r := dial(t, w.host, "-timeout", "1s", at("::1", 5441)); d.Error != "ECONNREFUSED" {
			t.Errorf("the sandbox has ::1 of a service of the host's at 127.0.0.1\n%s", r)
		}
		w.host.sluiceOK(t, "logs", sb.name).wantOut(t, "publish it with -p 5432:5432")
		for _, p := range inside { // the ports go with them
			p.signal(syscall.SIGKILL)
			p.wait(t, 5*time.Second)
		}
	})
	t.Run("without busy polling", func(t *testing.T) {
		ticks := func() (sum int) {
			for _, pid := range append(descendants(sb.run.pid), sb.run.pid) {
				if f := stat(pid); len(f) > 12 {
					var u, s int
					fmt.Sscan(f[11], &u)
					fmt.Sscan(f[12], &s)
					sum += u + s
				}
			}
			return sum
		}
		before := ticks()
		time.Sleep(2 * time.Second) // part of the measure, not a wait
		if used := ticks() - before; used > 10 {
			t.Errorf("an idle sandbox with --publish-auto used %d ticks of 10 ms in 2 s", used)
		}
	})
}

func TestCaptureIsReadByTsharkAndTcpdump(t *testing.T) {
	area(t, "capture", "tshark", "tcpdump")
	w := newPair(t)
	serve(t, w.far)
	for _, link := range []string{"tap", "tun"} {
		t.Run(link, func(t *testing.T) {
			sb := w.host.sandbox(t, "--link", link, "--policy", policyFile(t, fmt.Sprintf("defaultAction: drop\negress:\n- action: allow\n  to: [{cidr: %s/32}, {cidr: \"%s/128\"}]", far4, far6)))
			file := filepath.Join(t.TempDir(), "capture.pcapng")
			p := w.host.sluice(t, "capture", "-w", file, sb.name)
			testutil.Within(t, 5*time.Second, func() (bool, string) {
				_, err := os.Stat(file)
				return err == nil, "the capture does not begin\n" + p.result("").String()
			})
			time.Sleep(100 * time.Millisecond) // a capture starts at no moment visible from outside
			for _, f := range families {
				dial(t, sb, "-send-bytes", "100000", at(f.far, portDigest))
				udp(t, sb, at(f.far, portEcho))
				dial(t, sb, "-timeout", "300ms", at(f.other, portDigest))
			}
			p.stop(t, syscall.SIGINT).wantStatus(t, 0)
			for _, row := range []struct{ filter, what string }{
				{"tcp.port == 7001 && ip.dst == " + far4, "TCP over IPv4"},
				{"tcp.port == 7001 && ipv6.dst == " + far6, "TCP over IPv6"},
				{"udp.port == 7000", "UDP"},
				{"frame.comment", "a dropped packet with its reason"},
			} {
				r := ok(t, w.far, 20*time.Second, "tshark", "-n", "-r", file, "-Y", row.filter)
				if strings.TrimSpace(r.out) == "" {
					all := ok(t, w.far, 20*time.Second, "tshark", "-n", "-r", file)
					t.Errorf("no packet of %s in the capture\n%s", row.what, all)
				}
			}
			for _, row := range []struct{ filter, what string }{
				{"tcp port 7001 and dst host " + far4, "TCP over IPv4"},
				{"tcp port 7001 and dst host " + far6, "TCP over IPv6"},
				{"dst host " + families[0].other, "a dropped packet over IPv4"},
				{"dst host " + families[1].other, "a dropped packet over IPv6"},
			} {
				if r := ok(t, w.far, 20*time.Second, "tcpdump", "-n", "-r", file, row.filter); strings.TrimSpace(r.out) == "" {
					t.Errorf("tcpdump reads no packet of %s\n%s", row.what, r)
				}
			}
			r := ok(t, w.far, 20*time.Second, "tshark", "-n", "-r", file, "-Y", "_ws.malformed || tcp.checksum.status == 0", "-o", "tcp.check_checksum:FALSE")
			if strings.TrimSpace(r.out) != "" {
				t.Errorf("tshark finds malformed packets\n%s", r)
			}
		})
	}
}

// flowRecord is one line of --flow-log.
func TestFlowLogHasOneRecordForEachFlow(t *testing.T) {
	area(t, "flowlog")
	w := newPair(t)
	serve(t, w.far)
	file := filepath.Join(w.host.dir, "flows.json")
	sb := w.host.sandbox(t, "--flow-log", file)
	for range 5 {
		dial(t, sb, "-send-bytes", "1000", at(far4, portDigest))
	}
	udp(t, sb, at(far6, portEcho))
	sb.close(t)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tcp, udps := 0, 0
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var v map[string]any
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			t.Errorf("a record is not JSON: %v: %s", err, lines.Text())
		}
		if !strings.Contains(lines.Text(), "reason") || !strings.Contains(lines.Text(), "rule") {
			t.Errorf("a record has no reason or no rule: %s", lines.Text())
		}
		if containsWord(lines.Text(), fmt.Sprint(portDigest)) {
			tcp++
		}
		if containsWord(lines.Text(), fmt.Sprint(portEcho)) {
			udps++
		}
	}
	if tcp != 5 || udps != 1 {
		all, _ := os.ReadFile(file)
		t.Errorf("%d TCP and %d UDP records, not 5 and 1:\n%s", tcp, udps, all)
	}
	t.Run("to standard output", func(t *testing.T) {
		r := w.host.sluiceOK(t, "run", "--flow-log", "-", "--", peerBin(), "dial", at(far4, portWhoami))
		if !containsWord(r.out+r.err, fmt.Sprint(portWhoami)) {
			t.Errorf("no record\n%s", r)
		}
	})
}

func TestLogsAndStats(t *testing.T) {
	area(t, "logs")
	w := newPair(t)
	sb := w.host.sandbox(t)
	old := sb.worker()
	syscall.Kill(old, syscall.SIGKILL)
	sb.waitWorker(t, old, 2*time.Second)
	testutil.Within(t, 2*time.Second, func() (bool, string) {
		r := w.host.sluiceOK(t, "logs", sb.name)
		return strings.Contains(r.out, "worker"), "the logs do not tell of the worker's death\n" + r.String()
	})
	w.host.sluiceOK(t, "stats", sb.name)
}
