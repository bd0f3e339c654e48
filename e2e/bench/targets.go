package main

// Targets are what the project requires of its own figures, with the verdicts on them. A target
// without figures is "not measured", never a pass. One of ours that failed in any round fails,
// whatever the other rounds gave.

import (
	"fmt"
	"slices"
	"strings"
)

type verdict struct {
	Cell   string  `json:"cell"`
	What   string  `json:"what"` // such as "÷ pasta"
	Value  float64 `json:"value"`
	Target string  `json:"target"` // such as "≥ 4"
	Result string  `json:"result"`
}

const (
	pass        = "pass"
	fail        = "FAIL"
	failedRound = "FAIL, a round did not end well"
	notMeasured = "not measured"
)

// target is a bound on a figure, or on its ratio to another's.
type target struct {
	cell, candidate string
	overCell, over  string // the divisor's cell and candidate; over empty: the figure itself
	what            string
	most            bool // at most, not at least
	strict          bool // the bound itself does not pass
	bound           float64
	unit            string
}

func (t target) judge(r *results) verdict {
	sign := map[[2]bool]string{{false, false}: "≥", {true, false}: "≤", {true, true}: "<", {false, true}: ">"}[[2]bool{t.most, t.strict}]
	v := verdict{Cell: t.cell, What: t.what, Target: strings.TrimSpace(fmt.Sprintf("%s %v %s", sign, t.bound, t.unit)), Result: notMeasured}
	if r.failed(t.cell, t.candidate) {
		v.Result = failedRound
		return v
	}
	value, ok := r.median(t.cell, t.candidate)
	if ok && t.over != "" {
		var divisor float64
		divisor, ok = r.median(t.overCell, t.over)
		if ok = ok && divisor > 0; ok {
			value /= divisor
		}
	}
	if !ok {
		return v
	}
	v.Value, v.Result = value, fail
	switch {
	case value == t.bound && !t.strict, t.most && value < t.bound, !t.most && value > t.bound:
		v.Result = pass
	}
	return v
}

// over compares ours with a peer's figure of the same cell.
func over(cell, peer string, bound float64, most bool) target {
	return target{cell: cell, candidate: ours, overCell: cell, over: peer, what: "÷ " + peer, bound: bound, most: most}
}

func (t target) unlike(candidate, cell string) target {
	t.candidate, t.overCell = candidate, cell
	return t
}

func targets(short bool) []target {
	var ts []target
	families := []string{"v4", "v6"}
	if short {
		families = families[:1]
	}
	for _, fam := range families {
		for _, b := range []struct {
			dir   string
			flows int
			mtu   int
			bound float64
		}{
			{"up", 1, 65520, 4}, {"up", 8, 65520, 1.15}, {"down", 1, 65520, 1.1}, {"down", 8, 65520, 1.1},
			{"up", 1, 1500, 20}, {"up", 8, 1500, 20}, {"down", 1, 1500, 6}, {"down", 8, 1500, 6},
		} {
			cell := fmt.Sprintf("%s/%d/%d/%s", b.dir, b.flows, b.mtu, fam)
			ts = append(ts, over(cell, pasta, b.bound, false))
			if b.mtu == 1500 {
				t := over(cell, ours, 0.9, false).unlike(ours, strings.Replace(cell, "1500", "65520", 1))
				t.what = "÷ at 65520"
				ts = append(ts, t)
			}
		}
		for _, p := range []string{"/p50", "/p99"} {
			ts = append(ts, over("tcp-rtt/"+fam+p, pasta, 0.8, true), over("tcp-rtt/"+fam+p, slirp, 1, true))
		}
		ts = append(ts,
			over("connect/"+fam+"/rate", pasta, 1.3, false),
			target{cell: "connect/" + fam + "/failed", candidate: ours, what: "failed", most: true},
			over("udp-rtt/"+fam, pasta, 1.2, false),
			over("udp-64/"+fam+"/rate", pasta, 1.5, false),
			over("udp-1400/"+fam+"/rate", pasta, 1.5, false),
		)
	}
	ts = append(ts,
		target{cell: "connect-200000/v4/failed", candidate: ours, what: "failed", most: true},
		target{cell: "flows/bytes", candidate: ours, what: "a flow", most: true, bound: 12 << 10, unit: "bytes"},
		target{cell: "idle/private", candidate: ours, what: "worker", most: true, bound: 6, unit: "MiB"},
		target{cell: "idle/cpu", candidate: ours, what: "worker", most: true, strict: true, bound: 0.1, unit: "%"},
		target{cell: "idle/wakeups", candidate: ours, what: "worker", most: true, strict: true, bound: 5, unit: "/s"},
	)
	gate := over("dns/v4/rate", host, 0.8, false).unlike(withNames, "dns/v4/rate")
	gate.what = withNames + " ÷ the server itself"
	ts = append(ts, gate)
	for _, cell := range []string{"cost/up/8/65520/v4", "cost/down/8/65520/v4", "cost/connect/v4/rate"} {
		for _, variant := range []string{withRules, withLog} {
			t := over(cell, ours, 0.97, false).unlike(variant, cell)
			t.what = variant + " ÷ off"
			ts = append(ts, t)
		}
	}
	for _, speaks := range greetings(short) {
		for _, c := range []struct {
			cell  string
			bound float64
		}{{"up/8/65520/v4", 0.97}, {"down/8/65520/v4", 0.97}, {"connect/v4/rate", 0.85}} {
			cell := "cost/" + speaks + "/" + c.cell
			t := over(cell, ours, c.bound, false).unlike(withDomains, cell)
			t.what = withDomains + " ÷ off"
			ts = append(ts, t)
		}
	}
	return append(ts,
		target{cell: "start/true", candidate: ours, what: "whole", most: true, bound: 60, unit: "ms"},
		over("start/true", pasta, 1.2, true),
	)
}

// judge gives a verdict on each target whose cell the run was meant to measure.
func judge(r *results) (out []verdict) {
	for _, t := range targets(r.Short) {
		if slices.Contains(r.Order, t.cell) {
			out = append(out, t.judge(r))
		}
	}
	return out
}

// unit returns the unit of a cell by its name.
func unit(cell string) string {
	for _, u := range []struct{ part, unit string }{
		{"/loss", "%"}, {"/failed", ""}, {fairCell, ""}, {"connect", "/s"}, {"tcp-rtt", "µs"}, {"udp-", "/s"}, {"dns/", "/s"},
		{"idle/cpu", "%"}, {"idle/wakeups", "/s"}, {"idle/", "MiB"}, {"flows/bytes", "B/flow"}, {"start/", "ms"},
	} {
		if strings.Contains(cell, u.part) {
			return u.unit
		}
	}
	return "Gbit/s"
}
