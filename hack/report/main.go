// Command report makes test runs readable. It turns the JSON of `go test -json` into one line a
// test (all output for a failed one) and keeps what it saw. At the close it lists every skip with
// its reason, and checks that the runs covered the areas that the end-to-end suite promises to
// prove.
//
//	go test -json ./... | report -name unit -dir DIR     one run
//	report -close -areas FILE -modes root,user -dir DIR  the closing, fails if anything did
//
// gotestsum also prints tests and skips, but it looks at one run of one user at a time. Here three
// runs by different users must together have proved each area. A runner that keeps that list would
// replace this program.
//
// A test declares an area by the line "area NAME by TEST"; the file names each area and the runs it
// belongs to.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
)

// event is one line of test2json.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// outcome is what a run records for the closing.
type outcome struct {
	Name           string
	Passed, Failed int
	Skips          []skip
	Failures       []string
	Areas          map[string]string // area → pass, fail, or skip: reason
	Complete       bool              // every package ran to its end
}

type skip struct{ Test, Reason string }

func main() {
	name := flag.String("name", "", "the run's name")
	dir := flag.String("dir", "", "where outcomes are kept")
	verbose := flag.Bool("v", false, "a line for each test, not only for each package")
	closing := flag.Bool("close", false, "judge the runs kept")
	areas := flag.String("areas", "", "the file that lists the areas")
	modes := flag.String("modes", "", "the runs that areas are asked of")
	strict := flag.Bool("strict", false, "an area that was skipped fails too")
	flag.Parse()
	var err error
	if *closing {
		err = judge(os.Stdout, *dir, *areas, strings.Split(*modes, ","), *strict)
	} else {
		err = follow(os.Stdin, os.Stdout, *name, *dir, *verbose)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "report: %v\n", err)
		os.Exit(1)
	}
}

// test is a running test or subtest.
type test struct {
	output []string
}

func follow(in io.Reader, out io.Writer, name, dir string, verbose bool) error {
	o := outcome{Name: name, Areas: map[string]string{}, Complete: true}
	tests := map[string]*test{}
	running := map[string]bool{}
	areas := map[string][]string{} // test → areas
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintln(out, lines.Text())
			o.Complete = false
			continue
		}
		key := e.Package + "." + e.Test
		if tests[key] == nil {
			tests[key] = &test{}
		}
		switch e.Action {
		case "start":
			running[e.Package] = true
		case "output":
			if area, by, ok := strings.Cut(strings.TrimSpace(strings.TrimPrefix(e.Output, "area ")), " by "); ok && strings.HasPrefix(e.Output, "area ") {
				areas[e.Package+"."+by] = append(areas[e.Package+"."+by], area)
				continue
			}
			tests[key].output = append(tests[key].output, e.Output)
			if e.Test == "" && strings.Contains(e.Output, "[no test files]") {
				continue
			}
			if e.Test == "" && !strings.HasPrefix(e.Output, "PASS") {
				fmt.Fprint(out, e.Output)
			}
		case "pass", "fail", "skip":
			if e.Test == "" {
				delete(running, e.Package)
				if e.Action == "fail" {
					o.Failures = append(o.Failures, e.Package)
				}
				continue
			}
			o.count(e, tests[key].output)
			for _, area := range areas[key] {
				o.area(area, e.Action, reason(tests[key].output))
			}
			if e.Action == "fail" || verbose && !strings.Contains(e.Test, "/") {
				fmt.Fprintf(out, "%-5s %s (%.1fs)\n", e.Action, e.Test, e.Elapsed)
			}
			if e.Action == "fail" {
				fmt.Fprint(out, strings.Join(tests[key].output, ""))
			}
			delete(tests, key)
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	// A package that began and never ended crashed.
	for p := range running {
		o.Failures = append(o.Failures, p+" did not come to its end")
	}
	fmt.Fprintf(out, "%s: %d passed, %d failed, %d skipped\n", name, o.Passed, o.Failed, len(o.Skips))
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".json"), b, 0o644)
}

func (o *outcome) count(e event, output []string) {
	switch e.Action {
	case "pass":
		o.Passed++
	case "fail":
		o.Failed++
		o.Failures = append(o.Failures, e.Test)
	case "skip":
		o.Skips = append(o.Skips, skip{e.Package + " " + e.Test, reason(output)})
	}
}

// area keeps the worst result of an area's tests.
func (o *outcome) area(name, action, why string) {
	if action == "skip" {
		action = "skip: " + why
	}
	if old, seen := o.Areas[name]; !seen || old == "pass" || action == "fail" {
		o.Areas[name] = action
	}
}

// reason returns why a test was skipped: the text after its file and line.
func reason(output []string) string {
	for _, line := range output {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") || line == "" {
			continue
		}
		if _, text, ok := strings.Cut(line, ": "); ok {
			return text
		}
		return line
	}
	return "no reason given"
}

func judge(out io.Writer, dir, areasFile string, modes []string, strict bool) error {
	outcomes := map[string]outcome{}
	for _, name := range append([]string{"unit"}, modes...) {
		b, err := os.ReadFile(filepath.Join(dir, name+".json"))
		if err != nil {
			return fmt.Errorf("run %s left no outcome: %w", name, err)
		}
		var o outcome
		if err := json.Unmarshal(b, &o); err != nil {
			return err
		}
		outcomes[name] = o
	}
	var faults []string
	if b, err := os.ReadFile(filepath.Join(dir, "failed")); err == nil {
		faults = append(faults, strings.Fields(string(b))...)
	}
	passed, failed, skipped := 0, 0, 0
	for _, name := range append([]string{"unit"}, modes...) {
		o := outcomes[name]
		passed, failed, skipped = passed+o.Passed, failed+o.Failed, skipped+len(o.Skips)
		if o.Passed == 0 {
			faults = append(faults, "run "+name+" passed no test")
		}
		for _, f := range o.Failures {
			faults = append(faults, name+": "+f)
		}
		for _, s := range o.Skips {
			fmt.Fprintf(out, "skipped (%s): %s: %s\n", name, s.Test, s.Reason)
		}
	}
	promised, err := readAreas(areasFile)
	if err != nil {
		return err
	}
	for _, mode := range modes {
		faults = append(faults, missing(promised, outcomes[mode], mode, strict)...)
	}
	for _, f := range faults {
		fmt.Fprintf(out, "FAIL %s\n", f)
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, max(failed, min(len(faults), 1)), skipped)
	if len(faults) > 0 {
		return fmt.Errorf("%d faults, named above", len(faults))
	}
	return nil
}

// missing names the areas that could have run in this mode and did not, and those that the list of
// areas lacks.
func missing(promised map[string][]string, o outcome, mode string, strict bool) (faults []string) {
	for area, runs := range promised {
		became, seen := o.Areas[area]
		switch {
		case !slices.Contains(runs, mode):
		case !seen:
			faults = append(faults, fmt.Sprintf("%s: area %s did not run", mode, area))
		case strict && strings.HasPrefix(became, "skip"):
			faults = append(faults, fmt.Sprintf("%s: area %s could have run: %s", mode, area, became))
		}
	}
	for area := range o.Areas {
		if promised[area] == nil {
			faults = append(faults, fmt.Sprintf("%s: area %s is not in the list of areas", mode, area))
		}
	}
	sort.Strings(faults)
	return faults
}

// readAreas reads lines of the form "NAME RUN[,RUN] what it proves"; # begins a comment.
func readAreas(path string) (map[string][]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the list of areas: %w", err)
	}
	areas := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) < 3 {
			return nil, fmt.Errorf("%s: %q: expected an area, its runs and what it proves", path, line)
		}
		areas[fields[0]] = strings.Split(fields[1], ",")
	}
	return areas, nil
}
