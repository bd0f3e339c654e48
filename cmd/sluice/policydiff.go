package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"sluice/policy"
)

// policyCompareCommands compare policy files, and make one from a flow log.
func policyCompareCommands() []*cli.Command {
	return []*cli.Command{
		{
			Name: "diff", Usage: "say what a policy file opens and closes, compared with another", ArgsUsage: "BEFORE AFTER",
			Description: "Compares decisions, not text: rules that are put in another order or worded otherwise make no\n" +
				"difference if nothing is decided otherwise. The status is 0 if nothing is, and 1 if something is.",
			Flags: []cli.Flag{outputFlag("text", "json")}, Action: policyDiff,
		},
		{
			Name: "suggest", Usage: "make a policy from a flow log: what passed passes again, and nothing else", ArgsUsage: "FLOWLOG",
			Description: "Reads the lines of --flow-log, or the output of `sluice flows --ended -o json`; - reads standard input.\n" +
				"To learn a policy, run with one in `mode: audit` that has a rule by domain, so that names are known.\n" +
				"What can not be put into rules is told in comments at the top.",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "name", Value: "suggested", Usage: "the policy's `NAME`"},
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
	before, err := parsePolicy(c.Args().Get(0))
	if err != nil {
		return err
	}
	after, err := parsePolicy(c.Args().Get(1))
	if err != nil {
		return err
	}
	changes, err := policy.Diff(before, after, policy.Environment{})
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

// mostExcepted bounds how many exceptions a line of text lists.
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

// maxFlowLog bounds a flow log that suggest reads, and maxFlowLines its records.
const (
	maxFlowLog   = 1 << 30
	maxFlowLines = 1 << 20
)

// flowLine is what suggest wants of a record of the flow log.
type flowLine struct {
	Verdict   string `json:"verdict"`
	Direction string `json:"traffic_direction"`
	IP        struct {
		Source      netip.Addr `json:"source"`
		Destination netip.Addr `json:"destination"`
	} `json:"IP"`
	L4 struct {
		TCP    *ports    `json:"TCP"`
		UDP    *ports    `json:"UDP"`
		SCTP   *ports    `json:"SCTP"`
		ICMPv4 *icmpLine `json:"ICMPv4"`
		ICMPv6 *icmpLine `json:"ICMPv6"`
	} `json:"l4"`
	L7    json.RawMessage `json:"l7"`
	Names []string        `json:"destination_names"`
	SNI   string          `json:"sni"`
	ECH   bool            `json:"ech"`
}

type ports struct {
	Destination uint16 `json:"destination_port"`
}

type icmpLine struct {
	Type uint8 `json:"type"`
	Code uint8 `json:"code"`
}

// observed gives the flow of a record; none for what did not pass or is no flow.
func (l *flowLine) observed() (policy.Observed, bool) {
	o := policy.Observed{Ingress: l.Direction == "INGRESS", Peer: l.IP.Destination, Said: l.SNI, ECH: l.ECH, Names: l.Names}
	if o.Ingress {
		o.Peer = l.IP.Source
	}
	if l.Verdict != "FORWARDED" && l.Verdict != "AUDIT" {
		return o, false
	}
	for proto, p := range map[policy.Protocol]*ports{policy.TCP: l.L4.TCP, policy.UDP: l.L4.UDP, policy.SCTP: l.L4.SCTP} {
		if p != nil {
			o.Proto, o.Port = uint8(proto), p.Destination
		}
	}
	for proto, m := range map[policy.Protocol]*icmpLine{policy.ICMPv4: l.L4.ICMPv4, policy.ICMPv6: l.L4.ICMPv6} {
		if m != nil {
			o.Proto, o.ICMPType, o.ICMPCode = uint8(proto), m.Type, m.Code
		}
	}
	var l7 struct {
		DNS json.RawMessage `json:"dns"`
	}
	if l.L7 != nil && json.Unmarshal(l.L7, &l7) == nil && l7.DNS != nil {
		return o, false // a question to the resolver, which the gate answers
	}
	return o, o.Proto != 0
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
		lines := make([]flowLine, 1)
		if raw[0] == '[' {
			err = json.Unmarshal(raw, &lines)
		} else {
			err = json.Unmarshal(raw, &lines[0])
		}
		if err != nil {
			return nil, fmt.Errorf("read the flow log: before byte %d: %w", d.InputOffset(), err)
		}
		for i := range lines {
			if o, ok := lines[i].observed(); ok {
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
