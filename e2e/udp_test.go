package e2e

// UDP: sizes, many peers, published ports, and the answers that only an error queue reports.

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestUDPEchoesEverySize(t *testing.T) {
	area(t, "udp")
	w := newWorld(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	for _, f := range families {
		most := map[string]int{"IPv4": 65507, "IPv6": 65487}[f.name]
		for _, size := range []int{1, 512, 1472, 1473, 9000, 30000, most} {
			t.Run(fmt.Sprintf("%s %d bytes", f.name, size), func(t *testing.T) {
				d, r := udp(t, sb, "-size", strconv.Itoa(size), "-count", "20", at(f.far, portEcho))
				if d.Received != 20 || d.Wrong != 0 {
					t.Errorf("%d of 20 datagrams came back, %d changed\n%s", d.Received, d.Wrong, r)
				}
			})
		}
		t.Run(f.name+" two hundred answers to one question", func(t *testing.T) {
			d, r := udp(t, sb, "-text", "200", "-expect", "200", at(f.far, portSource))
			if d.Received < 190 {
				t.Errorf("%d of 200 datagrams came\n%s", d.Received, r)
			}
		})
		t.Run(f.name+" a closed port refuses", func(t *testing.T) {
			d, r := udp(t, sb, "-timeout", "3s", at(f.far, 1))
			if d.Error != "ECONNREFUSED" {
				t.Errorf("the error is %q, not ECONNREFUSED\n%s", d.Error, r)
			}
		})
		t.Run(f.name+" an absent host is unreachable", func(t *testing.T) {
			d, r := udp(t, sb, "-timeout", "3s", at(f.noHost, 1))
			if d.Error != "EHOSTUNREACH" && d.Error != "ENETUNREACH" {
				t.Errorf("the error is %q, not EHOSTUNREACH or ENETUNREACH\n%s", d.Error, r)
			}
		})
		t.Run(f.name+" TTL and DSCP are carried", func(t *testing.T) {
			d, r := udp(t, sb, "-ttl", "33", "-tos", "184", "-text", "x", at(f.far, portInspect))
			var n, ttl, dscp int
			fmt.Sscanf(d.Got, "len=%d ttl=%d dscp=%d", &n, &ttl, &dscp)
			// One router lies between; sluice may count as another.
			if ttl != 32 && ttl != 31 || dscp != 46 {
				t.Errorf("sent with TTL 33, DSCP 46, arrived as %q\n%s", d.Got, r)
			}
		})
	}
}

func TestPublishedUDPPortsKeepTheClient(t *testing.T) {
	area(t, "publish.udp")
	w := newWorld(t)
	sb := w.host.sandbox(t, "-p", fmt.Sprintf("%d-%d:%d-%d/udp", 9000, 9005, portEcho, portEcho+5))
	serve(t, sb)
	for _, row := range []struct {
		what string
		from place
		to   string
		seen string // with the client's own port if possible
	}{
		{"from afar", w.far, host4, far4},
		{"from afar over IPv6", w.far, host6, far6},
		// A loopback address cannot come out of a device: such a client appears as the gateway.
		{"from the host's loopback", w.host, "127.0.0.1", "10.0.2.2"},
	} {
		t.Run(row.what, func(t *testing.T) {
			d, r := udp(t, row.from, "-text", "who", at(row.to, 9005))
			if want := at(row.seen, portOf(d.Local)); d.Got != want {
				t.Errorf("inside, the client was %q, not %q\n%s", d.Got, want, r)
			}
			d, r = udp(t, row.from, "-size", "20000", "-count", "10", at(row.to, 9000))
			if d.Received != 10 || d.Wrong != 0 {
				t.Errorf("%d of 10 datagrams of 20 000 bytes came back, %d changed\n%s", d.Received, d.Wrong, r)
			}
		})
	}
}

func portOf(addr string) int {
	n, _ := strconv.Atoi(addr[strings.LastIndexByte(addr, ':')+1:])
	return n
}

func TestUDPMappingAndFiltering(t *testing.T) {
	area(t, "udp.mapping")
	w := newWorld(t)
	serve(t, w.far)
	sb := w.host.sandbox(t)
	p := sb.start(t, peerBin(), "mapping", at(far4, portWhoami), at(other4, portWhoami))
	out := p.waitText(t, `"seen"`, 10*time.Second)
	var m struct{ Seen []string }
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatalf("%v\n%s", err, p.result("still running"))
	}
	if len(m.Seen) != 2 || m.Seen[0] != m.Seen[1] {
		t.Fatalf("one socket is seen from two ports (RFC 4787, REQ-1): %q", m.Seen)
	}
	// First a peer that was never addressed, then one that was, from another port.
	udp(t, w.router, "-timeout", "200ms", "-text", "stranger", m.Seen[0])
	udp(t, w.far, "-timeout", "200ms", "-text", "friend", m.Seen[0])
	p.waitText(t, "friend", 5*time.Second)
	if r := p.result("still running"); strings.Contains(r.out, "stranger") {
		t.Errorf("a datagram of a peer that was never addressed came in\n%s", r)
	}
	p.closeInput()
	p.wait(t, 5*time.Second)
}

// TestUDPToPort53IsJudgedByWhatItIs sends traffic that is not DNS to the port of DNS, as tunnels
// and games do where nothing else gets out.
func TestUDPToPort53IsJudgedByWhatItIs(t *testing.T) {
	area(t, "udp.port53", "dig")
	w := newWorld(t)
	serve(t, w.far, "-base", "44", far4)   // its source of datagrams is at port 53
	serve(t, w.far, "-base", "48", other4) // and so is the service that says which port it sees
	w.nameServer(t, "dns", far6)
	sb := w.host.sandbox(t)
	for _, in := range []place{w.host, sb} {
		d, r := udp(t, in, "-text", "100", "-expect", "100", at(far4, 53))
		if d.Received != 100 {
			t.Errorf("%d of 100 answers came\n%s", d.Received, r)
		}
		p := in.start(t, peerBin(), "mapping", at(other4, 53), at(other4, 53), at(other4, 53))
		out := p.waitText(t, `"seen"`, 10*time.Second)
		var m struct{ Seen []string }
		if err := json.Unmarshal([]byte(out), &m); err != nil {
			t.Fatalf("%v\n%s", err, p.result("still running"))
		}
		if len(m.Seen) != 3 || m.Seen[0] != m.Seen[1] || m.Seen[0] != m.Seen[2] {
			t.Errorf("one socket is seen from several ports: %q\n%s", m.Seen, p.result("still running"))
		}
		p.closeInput()
		p.wait(t, 5*time.Second)
	}
	ok(t, sb, 10*time.Second, "dig", "@"+far6, "+short", "tag.test", "TXT").wantOut(t, "dns")
	for _, f := range sb.flows(t) {
		if strings.Contains(fmt.Sprint(f), far6) && strings.Contains(fmt.Sprint(f), "dport=53") {
			t.Errorf("a flow of a question that was answered stays: %v", f)
		}
	}
}
