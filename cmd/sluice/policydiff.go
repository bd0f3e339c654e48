package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
)

// policyCompareCommands returns the commands that compare policy files, and the one that makes a
// policy from a flow log.
func policyCompareCommands() []*cli.Command {
	return []*cli.Command{
		{
			Name: "diff", Usage: "print what a policy file opens and closes compared with another", ArgsUsage: "BEFORE AFTER",
			UsageText: "sluice policy diff old.yaml new.yaml",
			Description: "Compares decisions, not text: rules that are reordered or reworded make no difference while every\n" +
				"decision stays the same. The exit status is 0 if every decision does, and 1 if any differs.",
			Flags: []cli.Flag{podFlag(), outputFlag("text", "json")}, Action: policyDiff,
		},
		{
			Name: "suggest", Usage: "make a policy from a flow log: what passed passes again, and nothing else", ArgsUsage: "FLOWLOG",
			UsageText: "sluice policy suggest flows.json\nsluice flows --ended -o json | sluice policy suggest -",
			Description: "Reads the lines of --flow-log, or the output of `sluice flows --ended -o json`; - reads standard input.\n" +
				"To learn a policy, run with one in `mode: audit`, under which names are known. Comments at the top\n" +
				"list what rules cannot express.",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "name", Value: "suggested", Usage: "`NAME` of the policy"},
				outputFlag("yaml", "json"),
			},
			Action: policySuggest,
		},
	}
}

func policyDiff(c *cli.Context) error {
	if c.NArg() != 2 {
		return errors.New("policy diff: want BEFORE and AFTER, two policy files")
	}
	_, before, err := parsePolicy(c.Args().Get(0))
	if err != nil {
		return err
	}
	_, after, err := parsePolicy(c.Args().Get(1))
	if err != nil {
		return err
	}
	changes, err := policy.Diff(before, after, environment(c))
	if err != nil {
		return err
	}
	if c.String("output") == "json" {
		err = printJSON(c.App.Writer, nonNil(changes))
	} else {
		err = printChanges(c.App.Writer, changes)
	}
	if err == nil && len(changes) > 0 {
		return exitStatus(1)
	}
	return err
}

// mostExcepted bounds the exceptions that a line of text lists.
const mostExcepted = 8

func printChanges(w io.Writer, changes []policy.Change) error {
	if len(changes) == 0 {
		_, err := fmt.Fprintln(w, "nothing is decided otherwise")
		return err
	}
	t := newTable(w, "CHANGE", "DIRECTION", "TO", "PORTS", "BEFORE", "AFTER")
	for _, ch := range changes {
		to := strings.Join(ch.To, ", ")
		if n := len(ch.Except); n > 0 {
			var list []string
			for _, p := range ch.Except[:min(n, mostExcepted)] {
				list = append(list, p.String())
			}
			if n > mostExcepted {
				list = append(list, fmt.Sprintf("%d more", n-mostExcepted))
			}
			to += " except " + strings.Join(list, ", ")
		}
		t.row(string(ch.Kind), ch.Direction, to, strings.Join(ch.Ports, ", "), ch.Before, ch.After)
	}
	return t.flush()
}

// maxFlowLog bounds the size of a flow log that suggest reads, and maxFlowLines its records.
const (
	maxFlowLog   = 1 << 30
	maxFlowLines = 1 << 20
)

// observed returns the flow of a record, and false if the flow did not pass or the record is not of
// a flow.
func observed(r *api.FlowRecord) (policy.Observed, bool) {
	o := policy.Observed{Ingress: r.TrafficDirection == api.Ingress, Peer: r.IP.Destination, Said: r.SNI, ECH: r.ECH, Names: r.DestinationNames}
	if o.Ingress {
		o.Peer = r.IP.Source
	}
	if r.L7 != nil && r.L7.HTTP != nil {
		if u, err := url.Parse(r.L7.HTTP.URL); err == nil {
			o.Said = u.Hostname()
		}
	}
	l := &r.L4
	switch {
	case l.TCP != nil:
		o.Proto, o.Port = uint8(policy.TCP), l.TCP.Destination
	case l.UDP != nil:
		o.Proto, o.Port = uint8(policy.UDP), l.UDP.Destination
	case l.SCTP != nil:
		o.Proto, o.Port = uint8(policy.SCTP), l.SCTP.Destination
	case l.ICMPv4 != nil:
		o.Proto, o.ICMPType, o.ICMPCode = uint8(policy.ICMPv4), l.ICMPv4.Type, l.ICMPv4.Code
	case l.ICMPv6 != nil:
		o.Proto, o.ICMPType, o.ICMPCode = uint8(policy.ICMPv6), l.ICMPv6.Type, l.ICMPv6.Code
	default:
		o.Proto = l.Other
	}
	if o.Ingress && o.Port != 0 && r.ReplySource.IsValid() {
		o.Port = r.ReplySource.Port() // policy judges where a published port leads
	}
	question := r.L7 != nil && r.L7.DNS != nil // a question to the resolver, which the gate answers
	return o, (r.Verdict == api.VerdictForwarded || r.Verdict == api.VerdictAudit) && o.Proto != 0 && !question
}

// readFlows reads records, one after the other or in lists.
func readFlows(r io.Reader) ([]policy.Observed, error) {
	var out []policy.Observed
	d := json.NewDecoder(io.LimitReader(r, maxFlowLog))
	for {
		var raw json.RawMessage
		err := d.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the flow log: byte %d: %w", d.InputOffset(), err)
		}
		lines := make([]api.FlowRecord, 1)
		if raw[0] == '[' {
			err = json.Unmarshal(raw, &lines)
		} else {
			err = json.Unmarshal(raw, &lines[0])
		}
		if err != nil {
			return nil, fmt.Errorf("read the flow log: before byte %d: %w", d.InputOffset(), err)
		}
		for i := range lines {
			if o, ok := observed(&lines[i]); ok {
				out = append(out, o)
			}
		}
		if len(out) > maxFlowLines {
			return nil, fmt.Errorf("read the flow log: more than %d flows: take a part of it", maxFlowLines)
		}
	}
}

func policySuggest(c *cli.Context) error {
	if c.NArg() != 1 {
		return errors.New("policy suggest: want one FLOWLOG")
	}
	in := io.Reader(os.Stdin)
	if path := c.Args().First(); path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("read the flow log: %w", err)
		}
		defer f.Close()
		in = f
	}
	flows, err := readFlows(in)
	if err != nil {
		return err
	}
	if len(flows) == 0 {
		return errors.New("policy suggest: the log has no flow that passed: want the lines of --flow-log")
	}
	s, err := policy.Suggest(c.String("name"), flows)
	if err != nil {
		return err
	}
	if c.String("output") == "json" {
		return printJSON(c.App.Writer, s.Policy)
	}
	slices.Sort(s.Skipped)
	for _, why := range s.Skipped {
		if _, err := fmt.Fprintf(c.App.Writer, "# Not covered: %s\n", printable(why)); err != nil {
			return err
		}
	}
	text, err := s.Policy.YAML()
	if err != nil {
		return err
	}
	_, err = c.App.Writer.Write(text)
	return err
}
