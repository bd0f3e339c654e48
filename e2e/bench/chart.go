package main

// The chart has bars of sluice and the other user-mode networks, in groups. Each group shows its
// number and the range of the rounds. Throughputs share a scale; every other group has its own. It
// is plain SVG on a white ground, so that it reads in any theme.

import (
	"fmt"
	"html"
	"os"
	"strings"
)

type chartBar struct{ name, colour string }

var chartBars = []chartBar{{ours, "#1769aa"}, {pasta, "#e39a33"}, {slirp, "#9aa3ad"}}

type chartGroup struct{ label, cell string }

type chartPanel struct {
	title  string
	shared bool // one scale for all groups
	groups []chartGroup
}

var chartPanels = []chartPanel{
	{"TCP throughput, Gbit/s (more is better)", true, []chartGroup{
		{"up, 1 flow, MTU 65520", "up/1/65520/v4"},
		{"up, 8 flows, MTU 65520", "up/8/65520/v4"},
		{"down, 1 flow, MTU 65520", "down/1/65520/v4"},
		{"down, 8 flows, MTU 65520", "down/8/65520/v4"},
		{"up, 1 flow, MTU 1500", "up/1/1500/v4"},
		{"up, 8 flows, MTU 1500", "up/8/1500/v4"},
		{"down, 1 flow, MTU 1500", "down/1/1500/v4"},
		{"down, 8 flows, MTU 1500", "down/8/1500/v4"},
	}},
	{"Latency (less is better)", false, []chartGroup{
		{"TCP round trip, median, µs", "tcp-rtt/v4/p50"},
		{"TCP round trip, 99 %, µs", "tcp-rtt/v4/p99"},
		{"run true, whole, ms", "start/true"},
	}},
	{"Rates per second (more is better)", false, []chartGroup{
		{"connect + byte + close", "connect/v4/rate"},
		{"UDP round trips", "udp-rtt/v4"},
		{"UDP echo, 64 bytes", "udp-64/v4/rate"},
		{"UDP echo, 1400 bytes", "udp-1400/v4/rate"},
	}},
}

const (
	chartWidth  = 820
	chartLeft   = 200 // where bars begin
	chartRight  = 740 // where the longest ends
	barHeight   = 11
	barStep     = 13
	groupGap    = 9
	panelTop    = 34
	chartTop    = 44
	chartBottom = 40
)

func writeChart(path string, r *results) error {
	var b strings.Builder
	y := chartTop
	for _, p := range chartPanels {
		y = drawPanel(&b, r, p, y)
	}
	y += chartBottom
	text := func(x, y int, style, s string) {
		fmt.Fprintf(&b, `<text x="%d" y="%d" %s>%s</text>`+"\n", x, y, style, html.EscapeString(s))
	}
	x := chartLeft
	for _, c := range chartBars {
		fmt.Fprintf(&b, `<rect x="%d" y="18" width="12" height="12" fill="%s"/>`+"\n", x, c.colour)
		label := strings.TrimSpace(c.name + " " + version(r, c.name))
		text(x+17, 28, "", label)
		x += 45 + 7*len(label)
	}
	text(12, y-22, `class="small"`, fmt.Sprintf("medians of %d rounds in alternation, lines: lowest to highest; %d processors (%s), Linux %s, IPv4",
		r.Rounds, r.Processors, r.Versions["processor"], r.Versions["kernel"]))
	text(12, y-8, `class="small"`, "far side on the host's loopback, "+congestion+"; again by: make bench")
	head := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="system-ui,sans-serif" font-size="12" fill="#222">
<style>.small{font-size:10px;fill:#666}.title{font-weight:600;font-size:13px}.left{text-anchor:end}</style>
<rect width="100%%" height="100%%" fill="#fff"/>
`, chartWidth, y, chartWidth, y)
	return os.WriteFile(path, []byte(head+b.String()+"</svg>\n"), 0o644)
}

// drawPanel draws the groups that have figures below y, and returns where it ended.
func drawPanel(b *strings.Builder, r *results, p chartPanel, y int) int {
	var groups []chartGroup
	var top float64
	for _, g := range p.groups {
		if t := highest(r, g.cell); t > 0 {
			groups, top = append(groups, g), max(top, t)
		}
	}
	if len(groups) == 0 {
		return y
	}
	y += panelTop
	fmt.Fprintf(b, `<text x="12" y="%d" class="title">%s</text>`+"\n", y-12, html.EscapeString(p.title))
	for _, g := range groups {
		scale := float64(chartRight-chartLeft) / top
		if !p.shared {
			scale = float64(chartRight-chartLeft) / highest(r, g.cell)
		}
		fmt.Fprintf(b, `<text x="%d" y="%d" class="left">%s</text>`+"\n", chartLeft-8, y+barStep+barHeight-1, html.EscapeString(g.label))
		for i, c := range chartBars {
			s, top := r.Cells[g.cell][c.name], y+i*barStep
			if s == nil {
				fmt.Fprintf(b, `<text x="%d" y="%d" class="small">not measured</text>`+"\n", chartLeft+4, top+barHeight-2)
				continue
			}
			at := func(v float64) float64 { return chartLeft + v*scale }
			fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", chartLeft, top, max(1, s.Median*scale), barHeight, c.colour)
			fmt.Fprintf(b, `<path d="M%.1f %.1fH%.1f" stroke="#222" stroke-width="1"/>`+"\n", at(s.Low), float64(top)+barHeight/2.0, at(s.High))
			fmt.Fprintf(b, `<text x="%.1f" y="%d" font-size="10">%s</text>`+"\n", at(max(s.High, s.Median))+4, top+barHeight-2, grouped(s.Median))
		}
		y += len(chartBars)*barStep + groupGap
	}
	return y
}

func highest(r *results, cell string) (top float64) {
	for _, c := range chartBars {
		if s := r.Cells[cell][c.name]; s != nil {
			top = max(top, s.High)
		}
	}
	return top
}

// version returns a candidate's own version string, without what follows.
func version(r *results, name string) string {
	v, _, _ := strings.Cut(strings.TrimPrefix(r.Versions[name], "version "), " ")
	return v
}

// grouped separates thousands by a thin space.
func grouped(v float64) string {
	s := number(v)
	if v < 10_000 {
		return s
	}
	return s[:len(s)-3] + "\u2009" + s[len(s)-3:]
}
