package main

// Results: samples by cell and candidate, and what is required of them.

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// fairCell ends the name of a cell with Jain's index of a bulk cell's flows.
const fairCell = "/fair"

type series struct {
	Median  float64   `json:"median"`
	Low     float64   `json:"low"`
	High    float64   `json:"high"`
	Samples []float64 `json:"samples"`
}

// failure is why a probe gave no figures for a candidate.
type failure struct {
	Reason string `json:"reason"` // the first
	Times  int    `json:"times"`
}

type results struct {
	Short      bool                          `json:"short"`
	Rounds     int                           `json:"rounds"`
	Seconds    float64                       `json:"seconds"`
	Processors int                           `json:"processors"`
	Versions   map[string]string             `json:"versions"`
	Cells      map[string]map[string]*series `json:"cells"`              // cell, candidate
	Order      []string                      `json:"order"`              // of cells
	Failures   map[string]*failure           `json:"failures,omitempty"` // by probe and candidate
	Notes      []string                      `json:"notes"`
	Verdicts   []verdict                     `json:"verdicts"`
}

func newResults(o options) *results {
	return &results{Short: o.Short, Rounds: o.Rounds, Versions: map[string]string{}, Cells: map[string]map[string]*series{}, Failures: map[string]*failure{}}
}

func (r *results) add(cell, candidate string, v float64) {
	if r.Cells[cell] == nil {
		r.Cells[cell] = map[string]*series{}
	}
	s := r.Cells[cell][candidate]
	if s == nil {
		s = &series{}
		r.Cells[cell][candidate] = s
	}
	s.Samples = append(s.Samples, v)
	s.Median, s.Low, s.High = median(s.Samples), slices.Min(s.Samples), slices.Max(s.Samples)
}

// fail counts a probe that gave nothing for a candidate. A peer that is not installed is reported
// once, elsewhere.
func (r *results) fail(probe, candidate string, err error) {
	if errors.Is(err, errAbsent) {
		return
	}
	key := probe + " " + candidate
	if r.Failures[key] == nil {
		r.Failures[key] = &failure{Reason: err.Error()}
	}
	r.Failures[key].Times++
}

// failed reports whether the probe of a cell ever failed with a candidate.
func (r *results) failed(cell, candidate string) bool {
	for key := range r.Failures {
		probe, c, _ := strings.Cut(key, " ")
		if c == candidate && (cell == probe || strings.HasPrefix(cell, probe+"/")) {
			return true
		}
	}
	return false
}

func (r *results) median(cell, candidate string) (float64, bool) {
	s := r.Cells[cell][candidate]
	if s == nil {
		return 0, false
	}
	return s.Median, true
}

func (r *results) writeJSON(path string) error {
	r.Verdicts = judge(r)
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func redrawResults(path, chart string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	r := &results{}
	if err := json.Unmarshal(b, r); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if chart != "" {
		if err := writeChart(chart, r); err != nil {
			return err
		}
	}
	return printTable(os.Stdout, r)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// jain returns the fairness index of flows by their bytes (Jain, Chiu, Hawe 1984): 1 if all have
// the same, 1/n if one of n has everything, 0 if none has anything.
func jain(flows []int64) float64 {
	var sum, squares float64
	for _, n := range flows {
		sum += float64(n)
		squares += float64(n) * float64(n)
	}
	if squares == 0 {
		return 0
	}
	return sum * sum / squares / float64(len(flows))
}

// failures returns sorted lines; a candidate's equal reasons appear once.
func (r *results) failures() []string {
	by := map[string][]string{}
	for key, f := range r.Failures {
		cell, candidate, _ := strings.Cut(key, " ")
		k := candidate + " failed: " + f.Reason
		by[k] = append(by[k], fmt.Sprintf("%s (%d of %d rounds)", cell, f.Times, r.Rounds))
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(by)) {
		slices.Sort(by[k])
		out = append(out, fmt.Sprintf("%s: in %s", k, strings.Join(by[k], ", ")))
	}
	return out
}
