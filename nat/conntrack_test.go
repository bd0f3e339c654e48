package nat

import (
	"bufio"
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// reprint has this package print what a real line says.
func reprint(t *testing.T, line string) string {
	t.Helper()
	p, err := parseConntrack(line)
	if err != nil {
		t.Fatalf("%s\nis not understood: %v", line, err)
	}
	var out bytes.Buffer
	opt := ConntrackOptions{NoCounters: !p.Counters, Extended: p.Extended, ID: p.ID}
	switch p.Event {
	case "":
		err = WriteConntrack(&out, []Flow{p.Flow}, opt)
	default:
		typ := map[string]EventType{"NEW": New, "UPDATE": Update, "DESTROY": Destroy}[p.Event]
		err = WriteConntrackEvent(&out, Event{Type: typ, Flow: p.Flow}, opt)
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// TestLinesAreThoseOfConntrack prints anew what the real tool printed.
func TestLinesAreThoseOfConntrack(t *testing.T) {
	f, err := os.Open("testdata/conntrack.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		n++
		if got := reprint(t, line); got != line {
			t.Errorf("conntrack printed\n%q, we print\n%q", line, got)
		}
	}
	if n < 100 {
		t.Errorf("only %d lines were compared", n)
	}
}

// TestTableInConntracksWords goes from a live table to text and back.
func TestTableInConntracksWords(t *testing.T) {
	clock := newFakeClock()
	table := NewTable(Config{Now: clock.now})
	events, cancel := table.Subscribe(100)
	defer cancel()
	tcp := acquire(t, table, Spec{Orig: tuple(6, "10.0.2.100:40000", "192.0.2.1:80")})
	tcp.SetReply(tuple(6, "192.0.2.1:80", "198.51.100.7:51234"))
	tcp.Account(Original, 1, 60)
	tcp.SetState(Established)
	tcp.Account(Reply, 3, 4000)
	ping := acquire(t, table, Spec{Orig: tuple(58, "[fd00::2]:9", "[2001:db8::1]:32768")})
	ping.Account(Original, 1, 104)
	gre := acquire(t, table, Spec{Orig: tuple(47, "10.0.2.100:0", "192.0.2.1:0")})
	clock.advance(1500 * time.Millisecond)

	var out bytes.Buffer
	if err := WriteConntrack(&out, table.List(), ConntrackOptions{}); err != nil {
		t.Fatal(err)
	}
	want := "" +
		"tcp      6 431998 ESTABLISHED src=10.0.2.100 dst=192.0.2.1 sport=40000 dport=80 packets=1 bytes=60 src=192.0.2.1 dst=198.51.100.7 sport=80 dport=51234 packets=3 bytes=4000 [ASSURED] mark=0 use=1\n" +
		"icmpv6   58 28 src=fd00::2 dst=2001:db8::1 type=128 code=0 id=9 packets=1 bytes=104 [UNREPLIED] src=2001:db8::1 dst=fd00::2 type=129 code=0 id=9 packets=0 bytes=0 mark=0 use=1\n" +
		"unknown  47 598 src=10.0.2.100 dst=192.0.2.1 packets=0 bytes=0 [UNREPLIED] src=192.0.2.1 dst=10.0.2.100 packets=0 bytes=0 mark=0 use=1\n"
	if out.String() != want {
		t.Errorf("the table is printed as\n%s, want\n%s", &out, want)
	}
	for i, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		p, err := parseConntrack(line)
		if err != nil {
			t.Fatal(err)
		}
		f := table.List()[i]
		if p.Flow.Orig != f.Orig || p.Flow.Reply != f.Reply || p.Flow.OrigBytes != f.OrigBytes || p.Flow.ReplyPackets != f.ReplyPackets ||
			p.Flow.Assured != f.Assured || p.Flow.SeenReply != f.SeenReply {
			t.Errorf("%s\nis read as %+v, was %+v", line, p.Flow, f)
		}
	}
	out.Reset()
	gre.Release("done")
	clock.advance(time.Hour)
	table.Expire(clock.t)
	for len(events) > 0 {
		if err := WriteConntrackEvent(&out, <-events, ConntrackOptions{Timestamp: true}); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{
		"[1700000000.000000]\t    [NEW] tcp      6 120 SYN_SENT src=10.0.2.100 dst=192.0.2.1 sport=40000 dport=80 [UNREPLIED] src=192.0.2.1 dst=10.0.2.100 sport=80 dport=40000\n",
		"[1700000000.000000]\t [UPDATE] tcp      6 432000 ESTABLISHED src=10.0.2.100 dst=192.0.2.1 sport=40000 dport=80 src=192.0.2.1 dst=198.51.100.7 sport=80 dport=51234 [ASSURED]\n",
		"[1700000001.500000]\t[DESTROY] unknown  47 598 src=",
		"\t[DESTROY] icmpv6   58 src=fd00::2 dst=2001:db8::1 type=128 code=0 id=9 packets=1 bytes=104 [UNREPLIED] src=2001:db8::1 dst=fd00::2 type=129 code=0 id=9 packets=0 bytes=0\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("events are printed as\n%s, without\n%s", &out, want)
		}
	}
}

// useCount is how many hold the kernel's entry at the moment: not ours to know.
var useCount = regexp.MustCompile(` use=\d+`)
