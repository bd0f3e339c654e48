package e2e

// A parser of conntrack's text, written from conntrack(8) and the output of
// conntrack-tools 1.4, not from what sluice prints. A line of `conntrack -L`:
//
//	tcp      6 431999 ESTABLISHED src=A dst=B sport=1 dport=2 packets=3 bytes=4 src=B dst=A sport=2 dport=1 packets=5 bytes=6 [ASSURED] mark=0 use=1
//	udp      17 29 src=A dst=B sport=1 dport=2 [UNREPLIED] src=B dst=A sport=2 dport=1 mark=0 use=1
//	icmp     1 29 src=A dst=B type=8 code=0 id=9 src=B dst=A type=0 code=0 id=9 mark=0 use=1
//
// One of `conntrack -E` is headed by the event in brackets, right-aligned in nine
// columns, and a DESTROY event has no timeout:
//
//	    [NEW] tcp      6 120 SYN_SENT src=…
//	 [UPDATE] tcp      6 60 SYN_RECV src=…
//	[DESTROY] tcp      6 src=…

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

type ctSide struct {
	src, dst       netip.Addr
	sport, dport   int
	kind, code, id int // ICMP
	packets, bytes int64
}

type ctFlow struct {
	event              string
	proto              string
	number             int
	timeout            int // -1 without
	state              string
	orig, reply        ctSide
	unreplied, assured bool
	mark, use          int
	line               string
}

var (
	ctHead     = regexp.MustCompile(`^( {4}\[NEW\] | \[UPDATE\] |\[DESTROY\] )?(\S+) +([0-9]+) (.*)$`)
	ctNames    = map[string]int{"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}
	ctStates   = strings.Fields("NONE SYN_SENT SYN_RECV ESTABLISHED FIN_WAIT CLOSE_WAIT LAST_ACK TIME_WAIT CLOSE SYN_SENT2")
	ctTrailers = map[string]bool{"mark": true, "use": true, "secctx": true, "zone": true, "delta-time": true, "id": true}
)

func parseConntrack(text string) (flows []ctFlow, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			return nil, fmt.Errorf("conntrack prints no empty lines")
		}
		f, err := parseConntrackLine(line)
		if err != nil {
			return nil, fmt.Errorf("not a line of conntrack: %q: %w", line, err)
		}
		flows = append(flows, f)
	}
	return flows, nil
}

func parseConntrackLine(line string) (f ctFlow, err error) {
	f.line, f.timeout = line, -1
	m := ctHead.FindStringSubmatch(line)
	if m == nil {
		return f, fmt.Errorf("no protocol name and number at its head")
	}
	f.event, f.proto = strings.Trim(m[1], " []"), m[2]
	if f.number, err = strconv.Atoi(m[3]); err != nil {
		return f, err
	}
	if n, known := ctNames[f.proto]; known && n != f.number {
		return f, fmt.Errorf("%s is protocol %d, not %d", f.proto, n, f.number)
	}
	// `%-8s %u `: the name fills eight columns.
	if want := fmt.Sprintf("%s%-8s %d ", m[1], f.proto, f.number); !strings.HasPrefix(line, want) {
		return f, fmt.Errorf("columns: does not begin %q", want)
	}
	words := strings.Split(m[4], " ")
	next := func() string {
		if len(words) == 0 {
			return ""
		}
		w := words[0]
		words = words[1:]
		return w
	}
	peek := func() string {
		if len(words) == 0 {
			return ""
		}
		return words[0]
	}
	if n, err := strconv.Atoi(peek()); err == nil {
		f.timeout = n
		next()
	} else if f.event != "DESTROY" {
		return f, fmt.Errorf("no timeout")
	}
	if f.proto == "tcp" && !strings.Contains(peek(), "=") {
		f.state = next()
		if !contains(ctStates, f.state) {
			return f, fmt.Errorf("%q is no state of nf_conntrack_tcp", f.state)
		}
	} else if f.proto == "tcp" && f.event != "DESTROY" {
		return f, fmt.Errorf("tcp without a state")
	}
	if words, err = parseSide(&f.orig, f.proto, words); err != nil {
		return f, fmt.Errorf("original direction: %w", err)
	}
	if peek() == "[UNREPLIED]" {
		f.unreplied = true
		next()
	}
	if words, err = parseSide(&f.reply, f.proto, words); err != nil {
		return f, fmt.Errorf("reply direction: %w", err)
	}
	if peek() == "[ASSURED]" {
		f.assured = true
		next()
	}
	for len(words) > 0 {
		w := next()
		k, v, found := strings.Cut(w, "=")
		if !found || !ctTrailers[k] {
			return f, fmt.Errorf("%q is not known at the end", w)
		}
		n, err := strconv.Atoi(v)
		switch {
		case err != nil && (k == "mark" || k == "use"):
			return f, err
		case k == "mark":
			f.mark = n
		case k == "use":
			f.use = n
		}
	}
	if f.event == "" && f.use == 0 {
		return f, fmt.Errorf("conntrack -L ends with mark= use=")
	}
	return f, nil
}

// parseSide takes the words of one direction, in conntrack's own order.
func parseSide(s *ctSide, proto string, words []string) ([]string, error) {
	keys := []string{"src", "dst"}
	switch proto {
	case "tcp", "udp", "udplite", "sctp", "dccp":
		keys = append(keys, "sport", "dport")
	case "icmp", "icmpv6":
		keys = append(keys, "type", "code", "id")
	}
	if len(words) > len(keys) && strings.HasPrefix(words[len(keys)], "packets=") {
		keys = append(keys, "packets", "bytes")
	}
	for _, key := range keys {
		if len(words) == 0 {
			return nil, fmt.Errorf("ends before %s=", key)
		}
		value, found := strings.CutPrefix(words[0], key+"=")
		if !found {
			return nil, fmt.Errorf("%q where %s= belongs", words[0], key)
		}
		words = words[1:]
		var err error
		var n int64
		switch key {
		case "src":
			s.src, err = netip.ParseAddr(value)
		case "dst":
			s.dst, err = netip.ParseAddr(value)
		default:
			n, err = strconv.ParseInt(value, 10, 64)
		}
		if err != nil || n < 0 {
			return nil, fmt.Errorf("%s=%s: %v", key, value, err)
		}
		switch key {
		case "sport":
			s.sport = int(n)
		case "dport":
			s.dport = int(n)
		case "type":
			s.kind = int(n)
		case "code":
			s.code = int(n)
		case "id":
			s.id = int(n)
		case "packets":
			s.packets = n
		case "bytes":
			s.bytes = n
		}
	}
	return words, nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// TestConntrackParser checks the parser against lines that conntrack-tools printed.
func TestConntrackParser(t *testing.T) {
	for _, line := range []string{
		"tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=10.0.0.2 sport=48884 dport=22 src=10.0.0.2 dst=10.0.0.1 sport=22 dport=48884 [ASSURED] mark=0 use=1",
		"tcp      6 119 SYN_SENT src=10.0.0.1 dst=10.0.0.2 sport=48884 dport=22 packets=1 bytes=60 [UNREPLIED] src=10.0.0.2 dst=10.0.0.1 sport=22 dport=48884 packets=0 bytes=0 mark=0 use=1",
		"udp      17 29 src=fe80::1 dst=ff02::fb sport=5353 dport=5353 [UNREPLIED] src=ff02::fb dst=fe80::1 sport=5353 dport=5353 mark=0 use=1",
		"icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=9 src=10.0.0.2 dst=10.0.0.1 type=0 code=0 id=9 mark=0 use=2",
		"icmpv6   58 29 src=::1 dst=::1 type=128 code=0 id=9 src=::1 dst=::1 type=129 code=0 id=9 mark=0 use=1",
		"unknown  47 599 src=10.0.0.1 dst=10.0.0.2 [UNREPLIED] src=10.0.0.2 dst=10.0.0.1 mark=0 use=1",
		"    [NEW] udp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 [UNREPLIED] src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1",
		" [UPDATE] tcp      6 60 SYN_RECV src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1",
		"[DESTROY] tcp      6 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 packets=5 bytes=500 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 packets=4 bytes=400 [ASSURED]",
	} {
		if _, err := parseConntrack(line + "\n"); err != nil {
			t.Errorf("a true line is refused: %v", err)
		}
	}
	for what, line := range map[string]string{
		"name and number differ":       "tcp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 mark=0 use=1",
		"a state that does not exist":  "tcp      6 30 OPEN src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 mark=0 use=1",
		"one direction only":           "udp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 mark=0 use=1",
		"columns not padded":           "udp 17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 mark=0 use=1",
		"bytes without packets":        "udp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 bytes=4 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 mark=0 use=1",
		"a table entry without use":    "udp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1",
		"a timeout that is no number":  "udp      17 soon src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 mark=0 use=1",
		"words after the known ones":   "udp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 mark=0 use=1 rule=x",
		"an event in the wrong column": "[NEW] udp      17 30 src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1",
	} {
		if _, err := parseConntrack(line + "\n"); err == nil {
			t.Errorf("%s: accepted: %q", what, line)
		}
	}
}
