package gate

import (
	"strings"
	"testing"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/nat"
)

const (
	getOpen  = "GET /open/1 HTTP/1.1\r\nHost: a.example\r\n"
	postOpen = "POST /open/2 HTTP/1.1\r\nHost: a.example\r\n"
	offerH2C = getOpen + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
	takesUp  = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
)

// judged is a connection under twinRules whose first bytes were let pass.
type judged struct {
	*queueFlow
	gate   Gate
	passed strings.Builder
	last   Step // the last one that let nothing pass
}

func newJudged(t *testing.T, first string) *judged {
	t.Helper()
	j := newTwinJudge(t, twinRules, 8080)
	fl := j.begin()
	fl.pieces = [][]byte{[]byte(first)}
	began := j.shared.NewFirst()
	at, gone := began.Read(fl, false, false, false)
	if !at.Decide || gone != "" {
		t.Fatalf("%+v, %q of the first bytes", at, gone)
	}
	gate, allowed := j.open(fl, &began, at.Seen)
	if !allowed {
		t.Fatalf("%+v is refused", at.Seen)
	}
	return &judged{queueFlow: fl, gate: gate}
}

// says has the client send more, and takes the bytes that may pass.
func (j *judged) says(more string) {
	if more != "" {
		j.pieces = append(j.pieces, []byte(more))
	}
	for len(j.pieces) > 0 {
		g := j.gather()
		j.last = j.gate.Admit(g)
		if j.last.Pass == 0 || j.last.Abort != "" {
			return
		}
		j.gate.Passed(g, j.last.Pass)
		j.passed.Write(j.take(j.last.Pass))
	}
}

// TestABodyThatCannotBeReadIsAnswered has a client send content in malformed chunks.
func TestABodyThatCannotBeReadIsAnswered(t *testing.T) {
	for _, row := range []struct {
		what, answer string // answer: what the server has sent before
		reset        bool
	}{
		{"no answer", "", false},
		{"a 100", "HTTP/1.1 100 Continue\r\n\r\n", false},
		{"an answer that has begun", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", true},
		{"an answer's first byte", "H", true},
		{"an answer that is over", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true},
	} {
		t.Run(row.what, func(t *testing.T) {
			head := postOpen + "Transfer-Encoding: chunked\r\n\r\n"
			j := newJudged(t, head+"5\r\nhello\r\n")
			j.says("")
			if _, end := j.comesDown(j.gate, []byte(row.answer)); end != nil {
				t.Fatalf("it ends by %+v", end)
			}
			j.says("zz\r\nGET /secret HTTP/1.1\r\nHost: b.example\r\n\r\n")
			if j.last.Abort != "" || j.last.Refusing != nat.ReasonMalformedRequest {
				t.Fatalf("the step is %+v", j.last)
			}
			if got, want := j.passed.String(), head+"5\r\nhello\r\n"; got != want {
				t.Errorf("%q passed, want %q", got, want)
			}
			want := Ending{Answer: firstbytes.BadRequest(sniff.ErrMalformed), Why: nat.ReasonMalformedRequest}
			if row.reset {
				want = Ending{Reset: true, Why: nat.ReasonMalformedRequest}
			}
			heard, end := j.comesDown(j.gate, []byte("late"))
			if end == nil || *end != want || len(heard) > 0 {
				t.Errorf("the client hears %q, and the end is %+v, want %+v", heard, end, want)
			}
			j.says("0\r\n\r\n")
			if heard, _ := j.comesDown(j.gate, nil); len(heard) > 0 || j.last.Pass > 0 {
				t.Errorf("afterwards %q, %+v", heard, j.last)
			}
		})
	}
}

// TestASwitchToHTTP2IsFollowed has a server accept an offer of h2c.
func TestASwitchToHTTP2IsFollowed(t *testing.T) {
	say := func() *gatetest.Spoken { return gatetest.NewSpoken() }
	request := func(path, host string) string { return say().Request(3, "GET", path, host).String() }
	settings := sniff.EmptySettings
	for _, row := range []struct {
		what, first, answer, then string
		passes                    bool       // all of then
		why                       nat.Reason // of a refusal
	}{
		{"a request that is allowed", offerH2C, takesUp + settings, request("/open/3", "a.example"), true, ""},
		{"the preface alone", offerH2C, takesUp, say().String(), true, ""},
		{"another path", offerH2C, takesUp + settings, request("/secret", "a.example"), false, nat.ReasonRefusedByPolicy},
		{"another host", offerH2C, takesUp, request("/open/3", "b.example"), false, nat.ReasonRefusedByPolicy},
		{"HTTP/1 again", offerH2C, takesUp, getOpen + "\r\n", false, nat.ReasonMalformedRequest},
		{"another preface", offerH2C, takesUp, strings.Replace(say().String(), "SM", "SX", 1), false, nat.ReasonMalformedRequest},
		{"content of the request that was sent", offerH2C, takesUp, say().Data(1, true, "hello").String(), false, nat.ReasonMalformedRequest},
		{"fields of it", offerH2C, takesUp, say().Raw(1, 5, 1, string(say().Fields("x", "y"))).String(), false, nat.ReasonMalformedRequest},
		{"its reset", offerH2C, takesUp, say().Raw(3, 0, 1, "\x00\x00\x00\x08").String(), true, ""},
		{"what was not taken up", offerH2C, strings.Replace(takesUp, "h2c", "h2", 1), say().String(), false, nat.ReasonUnreadableAnswer},
		{"what was not offered", getOpen + "\r\n", takesUp, say().String(), false, nat.ReasonUnreadableAnswer},
	} {
		for _, piece := range []int{1 << 20, 1} {
			j := newJudged(t, row.first)
			j.says("")
			if got := j.passed.String(); got != row.first {
				t.Fatalf("%s: %q passed of the offer", row.what, got)
			}
			j.passed.Reset()
			j.says(row.then[:1]) // too early: it waits
			if j.passed.Len() > 0 || j.last != (Step{}) {
				t.Fatalf("%s: before the answer %q passes, %+v", row.what, j.passed.String(), j.last)
			}
			for p := row.answer; p != ""; p = p[min(piece, len(p)):] {
				heard, _ := j.comesDown(j.gate, []byte(p[:min(piece, len(p))]))
				if string(heard) != p[:min(piece, len(p))] {
					t.Fatalf("%s: the client hears %q", row.what, heard)
				}
			}
			if j.again == 0 {
				t.Fatalf("%s: nobody looks at what waits", row.what)
			}
			j.says("")
			for p := row.then[1:]; p != "" && j.last.Refusing == "" && j.last.End == nil; p = p[min(piece, len(p)):] {
				j.says(p[:min(piece, len(p))])
			}
			why := j.last.Refusing
			if j.last.End != nil {
				why = j.last.End.Why
			}
			if passed := j.passed.String() == row.then; passed != row.passes || why != row.why {
				t.Errorf("%s, in pieces of %d: %q passed, want all: %v; %+v, want %q", row.what, piece, j.passed.String(), row.passes, j.last, row.why)
			}
			if strings.Contains(j.passed.String(), "secret") || strings.Contains(j.passed.String(), "b.example") {
				t.Errorf("%s: %q passed", row.what, j.passed.String())
			}
			if row.why == nat.ReasonRefusedByPolicy {
				_, end := j.comesDown(j.gate, nil)
				begun := strings.HasSuffix(row.answer, settings)
				if end == nil || !strings.Contains(end.Answer, "Refused by the sandbox's network policy") || strings.HasPrefix(end.Answer, settings) == begun {
					t.Errorf("%s: the client hears %+v", row.what, end)
				}
			}
		}
	}
}

// TestRequestsUnderWayBehindASwitch checks which requests are judged again under new rules.
func TestRequestsUnderWayBehindASwitch(t *testing.T) {
	j := newJudged(t, offerH2C)
	j.says("")
	paths := func() (all []string) {
		for _, seen := range j.gate.UnderWay() {
			all = append(all, seen.Path)
		}
		return all
	}
	hears := func(what string, p []byte, want int) {
		t.Helper()
		if _, end := j.comesDown(j.gate, p); end != nil || len(paths()) != want {
			t.Errorf("%s: %q are under way, want %d; the end is %+v", what, paths(), want, end)
		}
	}
	hears("before the switch", nil, 1)
	hears("behind it", []byte(takesUp+sniff.EmptySettings), 1)
	j.says(gatetest.NewSpoken().Request(3, "GET", "/open/3", "a.example").String())
	hears("with one more", nil, 2)
	hears("the first is answered", firstbytes.Frame2(1, 5, 1, []byte{0x88}), 1)
	hears("both are", firstbytes.Frame2(1, 5, 3, []byte{0x88}), 0)
}
