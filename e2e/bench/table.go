package main

// The table has a line per cell: medians with their spread, ours ÷ pasta's, and the verdicts.

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

func printTable(w io.Writer, r *results) error {
	var b strings.Builder
	b.WriteString("\n")
	for _, k := range slices.Sorted(maps.Keys(r.Versions)) {
		fmt.Fprintf(&b, "%-12s %s\n", k, r.Versions[k])
	}
	fmt.Fprintf(&b, "%d processors, %d rounds, %.0f s; medians, ± half of the range in %%\n", r.Processors, r.Rounds, r.Seconds)

	columns := []string{ours, pasta, slirp, veth, host}
	rows := [][]string{append(append([]string{"cell", "unit"}, columns...), "÷ pasta", "÷ slirp")}
	fair := [][]string{append([]string{"between flows, Jain's index"}, columns...)}
	for _, cell := range r.Order {
		if strings.HasPrefix(cell, "cost/") {
			continue
		}
		var row []string
		for _, c := range columns {
			row = append(row, figure(r.Cells[cell][c]))
		}
		if strings.HasSuffix(cell, fairCell) {
			fair = append(fair, append([]string{cell}, row...))
			continue
		}
		row = append(append([]string{cell, unit(cell)}, row...), ratio(r, cell, ours, pasta), ratio(r, cell, ours, slirp))
		rows = append(rows, row)
	}
	writeBlock(&b, rows, 2)
	writeBlock(&b, fair, 1)

	rows = [][]string{{"cell", "unit", "off", "10 000 rules", "flow log", "1 000 domains", "rules ÷ off", "log ÷ off", "domains ÷ off"}}
	for _, cell := range r.Order {
		if strings.HasPrefix(cell, "cost/") {
			s := r.Cells[cell]
			rows = append(rows, []string{cell, unit(cell), figure(s[ours]), figure(s[withRules]), figure(s[withLog]), figure(s[withDomains]),
				ratio(r, cell, withRules, ours), ratio(r, cell, withLog, ours), ratio(r, cell, withDomains, ours)})
		}
	}
	writeBlock(&b, rows, 2)
	rows = [][]string{{"cell", "unit", "through the gate", "the server itself", "gate ÷ server"}}
	for _, cell := range r.Order {
		if strings.HasPrefix(cell, "dns/") {
			rows = append(rows, []string{cell, unit(cell), figure(r.Cells[cell][withNames]), figure(r.Cells[cell][host]), ratio(r, cell, withNames, host)})
		}
	}
	writeBlock(&b, rows, 2)
	if s := r.Cells["start/true"][pastaConfigured]; s != nil {
		fmt.Fprintf(&b, "\nstart/true of %s, which also sets up the network as sluice does: %s ms\n", pastaConfigured, figure(s))
	}

	rows = [][]string{{"target", "of", "asked", "got", ""}}
	passed, judged := 0, 0
	for _, v := range judge(r) {
		got := "-"
		if v.Result != notMeasured {
			if v.Result != failedRound {
				got = number(v.Value)
			}
			if judged++; v.Result == pass {
				passed++
			}
		}
		rows = append(rows, []string{v.Cell, v.What, v.Target, got, v.Result})
	}
	b.WriteString("\n")
	writeRows(&b, rows, 3)
	fmt.Fprintf(&b, "\n%d of %d targets measured, %d passed\n", judged, len(rows)-1, passed)

	for _, n := range append(r.failures(), r.Notes...) {
		fmt.Fprintf(&b, "- %s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func figure(s *series) string {
	if s == nil {
		return "-"
	}
	if s.Median == 0 || len(s.Samples) < 2 {
		return number(s.Median)
	}
	return fmt.Sprintf("%s ±%.0f", number(s.Median), (s.High-s.Low)/2/s.Median*100)
}

func ratio(r *results, cell, a, b string) string {
	x, ok1 := r.median(cell, a)
	y, ok2 := r.median(cell, b)
	if !ok1 || !ok2 || y <= 0 {
		return "-"
	}
	return number(x / y)
}

// number shows three significant digits.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// writeBlock writes rows, if any, below a blank line and their heading.
func writeBlock(b *strings.Builder, rows [][]string, left int) {
	if len(rows) > 1 {
		b.WriteString("\n")
		writeRows(b, rows, left)
	}
}

// writeRows aligns columns: the first left ones to the left, the others to the right.
func writeRows(b *strings.Builder, rows [][]string, left int) {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, c := range row {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, c := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if i < left {
				line.WriteString(c + pad + "  ")
			} else {
				line.WriteString(pad + c + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}
