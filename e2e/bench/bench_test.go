package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestMedianOfSamples(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []float64
		want float64
	}{
		{"none", nil, 0},
		{"one", []float64{3}, 3},
		{"an odd number, unsorted", []float64{9, 1, 5}, 5},
		{"an even number is the middle pair's mean", []float64{4, 1, 2, 10}, 3},
	} {
		if got := median(c.in); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func sample(t *testing.T) *results {
	t.Helper()
	r := newResults(options{Short: true, Rounds: 1})
	for cell, by := range map[string]map[string]float64{
		"up/1/65520/v4":            {ours: 20, pasta: 5, slirp: 4},
		"up/1/1500/v4":             {ours: 17, pasta: 1},
		"tcp-rtt/v4/p50":           {ours: 80, pasta: 100, slirp: 70},
		"connect/v4/rate":          {ours: 900},
		"connect/v4/failed":        {ours: 0, pasta: 0},
		"idle/cpu":                 {ours: 0.1},
		"cost/connect/v4/rate":     {ours: 100, withRules: 98, withLog: 96},
		"cost/tls/up/8/65520/v4":   {ours: 20, withDomains: 19},
		"cost/tls/connect/v4/rate": {ours: 100, withDomains: 85},
		"up/8/65520/v4/fair":       {ours: 0.75, pasta: 0.5},
	} {
		r.Order = append(r.Order, cell)
		for candidate, v := range by {
			r.add(cell, candidate, v)
		}
	}
	return r
}

func TestVerdictsFollowTheTargets(t *testing.T) {
	r := sample(t)
	got := map[string]string{}
	for _, v := range judge(r) {
		got[v.Cell+" "+v.What] = v.Result
	}
	for _, c := range []struct{ why, target, want string }{
		{"the bound itself passes", "up/1/65520/v4 ÷ pasta", pass},
		{"too small a ratio fails", "up/1/1500/v4 ÷ pasta", fail},
		{"ours is held against ours at the large MTU", "up/1/1500/v4 ÷ at 65520", fail},
		{"a time passes when it is at most the bound", "tcp-rtt/v4/p50 ÷ pasta", pass},
		{"a time fails when it is more", "tcp-rtt/v4/p50 ÷ slirp4netns", fail},
		{"without the peer's figure nothing is claimed", "connect/v4/rate ÷ pasta", notMeasured},
		{"no failure passes", "connect/v4/failed failed", pass},
		{"a strict bound does not pass itself", "idle/cpu worker", fail},
		{"a variant is held against off", "cost/connect/v4/rate sluice+rules ÷ off", pass},
		{"each variant for itself", "cost/connect/v4/rate sluice+log ÷ off", fail},
		{"verified bulk is held against bulk that is not", "cost/tls/up/8/65520/v4 sluice+domains ÷ off", fail},
		{"verified connections may cost more", "cost/tls/connect/v4/rate sluice+domains ÷ off", pass},
	} {
		if got[c.target] != c.want {
			t.Errorf("%s: %s is %q, want %q", c.why, c.target, got[c.target], c.want)
		}
	}

	r.fail("tcp-rtt/v4", ours, errors.New("hung"))
	r.fail("up/1/65520/v4", pasta, errors.New("hung"))
	r.fail("connect/v4", ours, errAbsent)
	for _, v := range judge(r) {
		switch {
		case v.Cell == "tcp-rtt/v4/p50" && v.Result != failedRound:
			t.Errorf("one of our rounds hung, yet %s %s is %q", v.Cell, v.What, v.Result)
		case v.Cell == "up/1/65520/v4" && v.Result != pass:
			t.Errorf("a peer's failed round made %s %s %q", v.Cell, v.What, v.Result)
		case v.Cell == "connect/v4/failed" && v.Result != pass:
			t.Errorf("an absent candidate counted as a failure: %+v", v)
		}
	}
}

// A target on a cell that no probe measures would stay "not measured" for ever.
func TestEveryTargetHasAProbe(t *testing.T) {
	for _, short := range []bool{false, true} {
		var cells []string
		for _, p := range allProbes(short) {
			cells = append(cells, p.cells...)
		}
		for _, target := range targets(short) {
			if !slices.Contains(cells, target.cell) && !(short && strings.HasPrefix(target.cell, "connect-200000/")) {
				t.Errorf("short %v: no probe gives %s", short, target.cell)
			}
			if target.overCell != "" && !slices.Contains(cells, target.overCell) {
				t.Errorf("short %v: no probe gives %s, a divisor", short, target.overCell)
			}
		}
	}
}

func TestCellsAreChosenByPattern(t *testing.T) {
	names := func(pattern string) (out []string) {
		for _, p := range allProbes(true) {
			if p.matches(regexp.MustCompile(pattern)) {
				out = append(out, p.name)
			}
		}
		return out
	}
	if got, want := names("^up/1/"), []string{"up/1/65520/v4", "up/1/1500/v4"}; !slices.Equal(got, want) {
		t.Errorf("^up/1/ chose %v, want %v", got, want)
	}
	if got, want := names("p99$"), []string{"tcp-rtt/v4"}; !slices.Equal(got, want) {
		t.Errorf("p99$ chose %v, want %v", got, want)
	}
}

func TestTableAlignsAndTellsFailures(t *testing.T) {
	r := sample(t)
	r.fail("down/8/1500/v4", pasta, errors.New("no route"))
	var b bytes.Buffer
	if err := printTable(&b, r); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"up/1/65520/v4", "4.00", "pasta failed: no route: in down/8/1500/v4 (1 of 1 rounds)", "5 passed",
		"1 000 domains", "Jain's index"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
}

func TestChartIsWellFormed(t *testing.T) {
	r := sample(t)
	r.Versions["pasta"] = "<&>" // what a peer says of itself must not break the output
	path := filepath.Join(t.TempDir(), "chart.svg")
	if err := writeChart(path, r); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d, texts := xml.NewDecoder(bytes.NewReader(b)), ""
	for {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("not XML: %v\n%s", err, b)
		}
		if c, ok := tok.(xml.CharData); ok {
			texts += string(c)
		}
	}
	for _, want := range []string{"<&>", "up, 1 flow, MTU 65520", "TCP round trip, median"} {
		if !strings.Contains(texts, want) {
			t.Errorf("the chart lacks %q", want)
		}
	}
}

func TestTurnsGoThereAndBack(t *testing.T) {
	p := probe{candidates: []string{"a", "b", "c"}, turns: 2}
	for round, want := range []string{"abccba", "bcaacb", "cabbac", "abccba"} {
		if got := strings.Join(p.order(round), ""); got != want {
			t.Errorf("round %d: %s, want %s", round, got, want)
		}
	}
	if p.turns = 0; len(p.order(1)) != 3 {
		t.Errorf("without turns: %v", p.order(1))
	}
}

func TestFairnessOfFlows(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []int64
		want float64
	}{
		{"all alike", []int64{7, 7, 7, 7}, 1},
		{"one has everything", []int64{0, 9, 0, 0}, 0.25},
		{"one has twice the other's", []int64{1, 2}, 0.9},
		{"nobody has anything", []int64{0, 0}, 0},
	} {
		if got := jain(c.in); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestHeaderSurvivesTheWire(t *testing.T) {
	h := header{mode: 'U', start: 1<<40 + 1, end: -1, id: 1 << 63}
	b := h.bytes()
	if len(b) != headerLen {
		t.Fatalf("%d bytes, want %d", len(b), headerLen)
	}
	if got := parseHeader(b); got != h {
		t.Errorf("%+v, want %+v", got, h)
	}
}

func TestEndedProcessIsNoUsage(t *testing.T) {
	if _, err := procUsage(1 << 30); err == nil {
		t.Error("a process that cannot exist has a usage")
	}
	u, err := procUsage(os.Getpid())
	if err != nil || u.cpu == 0 || u.switches == 0 {
		t.Errorf("our own: %+v, %v", u, err)
	}
}
