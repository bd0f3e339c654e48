package e2e

// iperf3 in every direction; the flow table must count what iperf3 moved.

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// iperfReport is the part of `iperf3 -J` that the tests read.
type iperfReport struct {
	Error string
	Start struct {
		Connected []struct {
			LocalPort int `json:"local_port"`
		}
	}
	End struct {
		SumSent     iperfSum `json:"sum_sent"`
		SumReceived iperfSum `json:"sum_received"`
		Sum         iperfSum // UDP
	}
}

type iperfSum struct {
	Bytes         int64
	BitsPerSecond float64 `json:"bits_per_second"`
	LostPercent   float64 `json:"lost_percent"`
	Packets       int64
}

func iperf(t *testing.T, in place, args ...string) (rep iperfReport, r result) {
	t.Helper()
	// A server that is still finishing with the previous client is busy for a moment.
	for range 20 {
		r = run(t, in, 60*time.Second, append([]string{"iperf3", "-J"}, args...)...)
		rep = iperfReport{}
		if err := json.Unmarshal([]byte(r.out), &rep); err != nil {
			t.Fatalf("iperf3's report: %v\n%s", err, r)
		}
		// Between two tests the server closes its listener for a moment, and with it the
		// connections waiting there.
		if !strings.Contains(rep.Error, "busy") && !strings.Contains(rep.Error, "unable to connect to server") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if r.status != 0 || rep.Error != "" {
		t.Fatalf("iperf3 failed: %s\n%s", rep.Error, r)
	}
	return rep, r
}

func iperfServer(t *testing.T, in place) *proc {
	t.Helper()
	p := in.start(t, "iperf3", "-s", "--forceflush")
	p.waitText(t, "Server listening", 5*time.Second)
	return p
}

func TestIperfBothWays(t *testing.T) {
	area(t, "iperf3", "iperf3")
	w := newPair(t)
	iperfServer(t, w.far)
	sb := w.host.sandbox(t)
	for _, f := range families {
		for _, row := range []struct {
			what string
			args string
			udp  bool
		}{
			{"TCP up", "-n 200M", false},
			{"TCP down", "-n 200M -R", false},
			{"TCP up, eight streams", "-n 200M -P 8", false},
			{"TCP down, eight streams", "-n 200M -P 8 -R", false},
			{"TCP both ways at once", "-t 1 --bidir", false},
			{"UDP up", "-u -b 50M -t 1", true},
			{"UDP down", "-u -b 50M -t 1 -R", true},
		} {
			t.Run(f.name+" "+row.what, func(t *testing.T) {
				rep, r := iperf(t, sb, append(strings.Fields(row.args), "-c", f.far)...)
				switch {
				case row.udp && (rep.End.Sum.Packets == 0 || rep.End.Sum.LostPercent > 5):
					t.Errorf("%.1f %% of %d datagrams lost\n%s", rep.End.Sum.LostPercent, rep.End.Sum.Packets, r)
				case !row.udp && rep.End.SumReceived.Bytes == 0:
					t.Errorf("nothing received\n%s", r)
				}
				if !row.udp {
					t.Logf("%.2f Gbit/s", rep.End.SumReceived.BitsPerSecond/1e9)
				}
			})
		}
	}
	t.Run("into a published port", func(t *testing.T) {
		inside := w.host.sandbox(t, "-p", "5301:5201", "-p", "5301:5201/udp")
		iperfServer(t, inside)
		for _, args := range []string{"-n 100M", "-n 100M -R", "-u -b 50M -t 1", "-u -b 50M -t 1 -R"} {
			rep, r := iperf(t, w.far, append(strings.Fields(args), "-p", "5301", "-c", pair4)...)
			if rep.End.Sum.LostPercent > 5 {
				t.Errorf("iperf3 %s: %.1f %% lost\n%s", args, rep.End.Sum.LostPercent, r)
			}
		}
	})
}

func TestQueuesComeWithBulkAndGo(t *testing.T) {
	area(t, "queues", "iperf3", "ip")
	if runtime.NumCPU() < 2 {
		t.Skip("SKIP: one processor has one queue")
	}
	w := newPair(t)
	iperfServer(t, w.far)
	sb := w.host.sandbox(t)
	attached := func(want string) func() (bool, string) {
		return func() (bool, string) {
			link := ok(t, sb, 5*time.Second, "ip", "-d", "link", "show", "tap0").out
			return strings.Contains(link, "numqueues "+want+" "), link
		}
	}
	testutil.Within(t, time.Second, attached("1"))
	for range 2 {
		bulk := sb.start(t, "iperf3", "-c", far4, "-P", "8", "-t", "2")
		testutil.Within(t, 5*time.Second, attached("2"))
		<-bulk.done
		testutil.Within(t, 15*time.Second, attached("1"))
	}
}

func TestConntrackCountsWhatIperfMoved(t *testing.T) {
	area(t, "conntrack", "iperf3")
	w := newPair(t)
	iperfServer(t, w.far)
	sb := w.host.sandbox(t)
	events := w.host.sluice(t, "flows", "-w", "-o", "conntrack", sb.name)
	t.Cleanup(func() { events.signal(15) })
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		udp(t, sb, "-timeout", "200ms", at(far4, 9))
		r := events.result("")
		return strings.Contains(r.out, "[NEW]"), "flows -w tells nothing\n" + r.String()
	})
	for _, row := range []struct {
		what, args string
		down       bool
	}{
		{"up over IPv4", "-n 50M -c " + far4, false},
		{"down over IPv4", "-n 50M -R -c " + far4, true},
		{"up over IPv6", "-n 50M -c " + far6, false},
		{"down over IPv6", "-n 50M -R -c " + far6, true},
	} {
		t.Run(row.what, func(t *testing.T) {
			rep, r := iperf(t, sb, strings.Fields(row.args)...)
			if len(rep.Start.Connected) != 1 {
				t.Fatalf("iperf3 does not tell its port\n%s", r)
			}
			port := rep.Start.Connected[0].LocalPort
			var f ctFlow
			events.waitOutput(t, 10*time.Second, fmt.Sprintf("DESTROY event of port %d", port), func(out string) bool {
				out = out[:strings.LastIndexByte(out, '\n')+1] // whole lines
				flows, err := parseConntrack(out)
				if err != nil {
					t.Fatalf("flows -w -o conntrack: %v", err)
				}
				for _, g := range flows {
					if g.event == "DESTROY" && g.proto == "tcp" && g.orig.sport == port && g.orig.dport == 5201 {
						f = g
					}
				}
				return f.event != ""
			})
			t.Logf("%s", f.line)
			data, acks, moved := f.orig, f.reply, rep.End.SumReceived.Bytes
			if row.down {
				data, acks = f.reply, f.orig
			}
			// iperf3 may close while some of what it sent is under way and uncounted, so its
			// sender's count is the upper bound.
			header := int64(40)
			if strings.Contains(row.what, "IPv6") {
				header = 60
			}
			least := moved + header*data.packets
			most := max(rep.End.SumSent.Bytes, moved) + 37 + (header+40)*data.packets + 1<<10
			if row.down {
				most += 8 << 20 // in the far kernel's buffers and ours when the client closes
			}
			if data.bytes < least || data.bytes > most || data.packets == 0 {
				t.Errorf("iperf3 moved %d bytes, the table counts %d in %d packets: not within %d … %d\n%s", moved, data.bytes, data.packets, least, most, f.line)
			}
			if acks.packets == 0 || acks.bytes < 20*acks.packets || acks.bytes > moved/10 {
				t.Errorf("the other direction counts %d bytes in %d packets\n%s", acks.bytes, acks.packets, f.line)
			}
			if !f.assured || f.unreplied {
				t.Errorf("a flow that moved data both ways is not ASSURED\n%s", f.line)
			}
		})
	}
	t.Run("a live flow stands in the table as conntrack -L has it", func(t *testing.T) {
		p := sb.start(t, "iperf3", "-J", "-t", "3", "-c", far4)
		testutil.Within(t, 3*time.Second, func() (bool, string) {
			flows := sb.flows(t)
			for _, f := range flows {
				if f.proto == "tcp" && f.orig.dport == 5201 && f.state == "ESTABLISHED" && f.assured && f.orig.bytes > 1<<20 &&
					f.orig.src.String() == "10.0.2.100" && f.orig.dst.String() == far4 && f.reply.src.String() == far4 &&
					f.timeout > 431000 && f.timeout <= 432000 {
					return true, ""
				}
			}
			var lines []string
			for _, f := range flows {
				lines = append(lines, f.line)
			}
			return false, "no ESTABLISHED [ASSURED] flow with bytes to port 5201 in\n" + strings.Join(lines, "\n")
		})
		p.wait(t, 20*time.Second).wantStatus(t, 0)
	})
	t.Run("JSON and table name the same flows", func(t *testing.T) {
		h := sb.start(t, peerBin(), "hold", "-count", "3", at(far4, 5201))
		h.waitText(t, `"held"`, 5*time.Second)
		r := w.host.sluiceOK(t, "flows", "-o", "json", sb.name)
		var v any
		if err := json.Unmarshal([]byte(r.out), &v); err != nil {
			t.Errorf("flows -o json is not JSON: %v\n%s", err, r)
		}
		table := w.host.sluiceOK(t, "flows", sb.name)
		n := 0
		for _, f := range sb.flows(t) {
			if f.proto != "tcp" || f.orig.dport != 5201 {
				continue
			}
			n++
			port := strconv.Itoa(f.orig.sport)
			if !strings.Contains(r.out, port) || !strings.Contains(table.out, port) {
				t.Errorf("the flow from port %s is missing in JSON or table\n%s\n%s", port, r, table)
			}
		}
		if n != 3 {
			t.Errorf("%d flows to port 5201, not 3\n%s", n, table)
		}
		h.closeInput()
		h.wait(t, 5*time.Second)
	})
}
