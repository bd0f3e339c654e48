package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/sandbox/api"
)

func flowsCommand() *cli.Command {
	return &cli.Command{
		Name:      "flows",
		Usage:     "list the flows of a sandbox, or watch them",
		ArgsUsage: "[NAME]",
		UsageText: "sluice flows\nsluice flows --ended\nsluice flows -w -o json NAME",
		Description: "NAME may be left out while only one sandbox is running. -o json prints the flow log's records, with --watch\n" +
			"one event a line. -o conntrack prints what `conntrack -L` would, with --watch what `conntrack -E` would.",
		Flags: []cli.Flag{
			outputFlag("table", "json", "conntrack"),
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "print events until interrupted"},
			&cli.BoolFlag{Name: "ended", Usage: "list flows that are over or were refused"},
		},
		BashComplete: completeNames,
		Action:       flows,
	}
}

func flows(c *cli.Context) error {
	format := c.String("output")
	switch {
	case c.Bool("watch") && c.Bool("ended"):
		return errors.New("--watch and --ended exclude each other")
	case c.Bool("ended") && format == "conntrack":
		return errors.New("--ended: conntrack has no format for flows that are over; want -o table or json")
	}
	client, err := onlyTarget(c)
	if err != nil {
		return err
	}
	if c.Bool("watch") {
		return watchFlows(c, client, format)
	}
	var r api.FlowsResult
	if err := client.Call(c.Context, api.MethodFlows, api.FlowsParams{Ended: c.Bool("ended")}, &r); err != nil {
		return err
	}
	switch {
	case c.Bool("ended") && format == "json":
		return printJSON(c.App.Writer, nonNil(r.Ended))
	case c.Bool("ended"):
		return printEnded(c.App.Writer, r)
	}
	slices.SortFunc(r.Flows, func(a, b api.FlowRecord) int { return a.Start.Compare(b.Start) })
	switch format {
	case "json":
		return printJSON(c.App.Writer, nonNil(r.Flows))
	case "conntrack":
		flows := make([]nat.Flow, len(r.Flows))
		for i := range r.Flows {
			if flows[i], err = r.Flows[i].Flow(); err != nil {
				return fmt.Errorf("flows: %w", err)
			}
		}
		return nat.WriteConntrack(c.App.Writer, flows, nat.ConntrackOptions{})
	}
	t := newTable(c.App.Writer, "PROTO", "STATE", "SOURCE", "DESTINATION", "SENT", "RECEIVED", "AGE", "RULE", "NAMES")
	for i := range r.Flows {
		t.row(flowRow(&r.Flows[i])...)
	}
	return t.flush()
}

// nonNil makes JSON print [] for nothing.
func nonNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func flowRow(r *api.FlowRecord) []string {
	return []string{
		protoText(r.L4), r.State, endText(r.Source()), endText(r.Destination()),
		size(int64(r.Orig.Bytes)), size(int64(r.Reply.Bytes)), age(time.Duration(r.Duration * float64(time.Second))), r.Rule, strings.Join(r.DestinationNames, ","),
	}
}

// printEnded prints ended flows, for `flows --ended` and `run --show-flows`.
func printEnded(w io.Writer, r api.FlowsResult) error {
	t := newTable(w, "VERDICT", "PROTO", "SOURCE", "DESTINATION", "SENT", "RECEIVED", "DURATION", "RULE", "REASON", "NAMES")
	for _, e := range r.Ended {
		verdict := e.Verdict
		if e.Rejected {
			verdict = "REJECTED"
		}
		if e.Count > 1 {
			verdict += fmt.Sprintf(" ×%d", e.Count)
		}
		t.row(verdict, protoText(e.L4), endText(e.Source()), endText(e.Destination()), size(int64(e.Orig.Bytes)), size(int64(e.Reply.Bytes)),
			(time.Duration(e.Duration * float64(time.Second))).Round(time.Millisecond).String(), e.Rule, e.Reason, namesText(&e))
	}
	if err := t.flush(); err != nil {
		return err
	}
	if r.Dropped > 0 {
		_, err := fmt.Fprintf(w, "and %d before them\n", r.Dropped)
		return err
	}
	return nil
}

// namesText returns the name that a DNS question asked for, or else the names of the destination.
func namesText(r *api.FlowRecord) string {
	if r.L7 != nil && r.L7.DNS != nil {
		return strings.TrimSuffix(r.L7.DNS.Query, ".")
	}
	return strings.Join(r.DestinationNames, ",")
}

func endText(e netip.AddrPort) string {
	if e.Port() == 0 {
		return e.Addr().String()
	}
	return e.String()
}

func protoText(l api.L4) string {
	if p := l.Proto(); p != "" {
		return p
	}
	return fmt.Sprint(l.Other)
}

// watchFlows prints events until the sandbox ends or the user interrupts.
func watchFlows(c *cli.Context, client api.Client, format string) error {
	s, err := client.Open(c.Context, api.MethodFlowsWatch, nil, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	out := c.App.Writer
	lost := uint64(0)
	for {
		var e api.FlowEvent
		if err := s.Next(&e); err != nil {
			if errors.Is(err, io.EOF) || c.Context.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch the flows: %w", err)
		}
		if e.Lost > lost {
			_, _ = fmt.Fprintf(c.App.ErrWriter, "sluice: %d events were lost: this reader is too slow\n", e.Lost-lost)
			lost = e.Lost
		}
		switch format {
		case "json":
			err = api.WriteLine(out, e)
		case "conntrack":
			var f nat.Flow
			if f, err = e.Flow.Flow(); err == nil {
				err = nat.WriteConntrackEvent(out, nat.Event{Type: eventType(e.Type), Time: e.Time, Flow: f}, nat.ConntrackOptions{})
			}
		default:
			row := flowRow(&e.Flow)
			_, err = fmt.Fprintf(out, "%s %-7s %s\n", e.Time.Local().Format("15:04:05.000"), printable(e.Type), printable(strings.TrimRight(strings.Join(row, "  "), " ")))
		}
		if err != nil {
			return err
		}
	}
}

func eventType(name string) nat.EventType {
	for _, t := range []nat.EventType{nat.New, nat.Update} {
		if t.String() == name {
			return t
		}
	}
	return nat.Destroy
}
