package main

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"time"
)

const congestion = "cubic"

// options of a run; the supervisor hands them to it in the environment, as JSON.
type options struct {
	Short  bool
	Cells  string
	Rounds int
	Budget time.Duration
	Sluice string
	Pasta  string // paths of the peers, empty: not found
	Slirp  string
	JSON   string
	Chart  string

	UID   int    // of every candidate
	Dir   string // temporary, readable by UID
	Notes []string
}

func main() {
	err := func() error {
		if os.Getenv(insideEnv) != "" {
			return inside()
		}
		if len(os.Args) > 1 {
			switch os.Args[1] {
			case "serve":
				return serve()
			case "agent":
				return agent()
			case "hold":
				return hold()
			}
		}
		return command(os.Args[1:])
	}()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func command(args []string) error {
	var o options
	fs := flag.NewFlagSet("bench", flag.ExitOnError)
	fs.BoolVar(&o.Short, "short", false, "two minutes: fewer cells, short windows, two rounds")
	fs.StringVar(&o.Cells, "cells", "", "only cells that match this `REGEXP`; names are as in the table: up/8/65520/v4")
	fs.IntVar(&o.Rounds, "rounds", 0, "rounds (default 5, short 2)")
	fs.DurationVar(&o.Budget, "budget", 0, "begin no measurement after this `TIME` but a cell's first (default 45m, short 110s)")
	fs.StringVar(&o.Sluice, "sluice", "build/sluice", "the sluice `BINARY`")
	fs.StringVar(&o.Pasta, "pasta", "", "the pasta `BINARY` (default: on PATH)")
	fs.StringVar(&o.Slirp, "slirp4netns", "", "the slirp4netns `BINARY` (default: on PATH)")
	fs.StringVar(&o.JSON, "json", "build/bench.json", "write results to `FILE`")
	fs.StringVar(&o.Chart, "svg", "", "write a chart to `FILE`")
	redraw := fs.String("redraw", "", "measure nothing: print the table, and draw the chart, of this results `FILE`")
	_ = fs.Parse(args) // exits on error
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if *redraw != "" {
		return redrawResults(*redraw, o.Chart)
	}
	if _, err := regexp.Compile(o.Cells); err != nil {
		return fmt.Errorf("-cells: %w", err)
	}
	if o.Rounds == 0 {
		o.Rounds = 5
		if o.Short {
			o.Rounds = 2
		}
	}
	if o.Budget == 0 {
		o.Budget = 45 * time.Minute
		if o.Short {
			o.Budget = 110 * time.Second
		}
	}
	return supervise(o)
}
