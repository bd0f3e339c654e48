package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/policy"
)

// policyTrialCommands returns the commands that judge a flow by a policy file without starting one.
func policyTrialCommands() []*cli.Command {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "to", Usage: "destination, `HOST:PORT`; for icmp HOST; with --from the sandbox's PORT"},
		&cli.StringFlag{Name: "from", Usage: "ask about a client of a published port instead, at `ADDRESS`"},
		&cli.StringFlag{Name: "proto", Value: "tcp", Usage: "`PROTOCOL`: tcp, udp, sctp, icmp or icmpv6 (an echo request)"},
		&cli.StringFlag{Name: "address", Usage: "`ADDRESS` that the host resolves to (default: a public one that no rule names)"},
		&cli.StringFlag{Name: "said", Usage: "`NAME` in the first bytes (SNI, Host), empty for none (default: the host's)"},
		&cli.StringFlag{Name: "method", Usage: "`METHOD` of the request, where requests are judged (default: GET)"},
		&cli.StringFlag{Name: "path", Usage: "`PATH` of the request (default: /)"},
		podFlag(),
		outputFlag("text", "json"),
	}
	return []*cli.Command{
		{
			Name: "test", Usage: "report whether a policy file would allow a flow", ArgsUsage: "FILE --to HOST:PORT",
			UsageText: "sluice policy test policy.yaml --to example.com:443\nsluice policy test policy.yaml --to :80 --from 192.0.2.7",
			Description: "Prints the decision and the rule that makes it. Resolves nothing and sends nothing. The exit status\n" +
				"is 0 if the flow would pass and 1 if not. The command knows neither this host's addresses nor a sandbox's.",
			Flags: flags, Action: func(c *cli.Context) error { return policyTrial(c, false) },
		},
		{
			Name: "explain", Usage: "print why a policy file would allow a flow or not", ArgsUsage: "FILE --to HOST:PORT",
			UsageText:   "sluice policy explain policy.yaml --to example.com:443",
			Description: "Prints what `sluice policy test` does, each rule that was tried, and why it did not match. The exit status is 0 either way.",
			Flags:       flags, Action: func(c *cli.Context) error { return policyTrial(c, true) },
		},
	}
}

// podFlag makes a command judge a policy file as a pod's.
func podFlag() cli.Flag {
	return &cli.BoolFlag{Name: "pod", Usage: "judge as in a pod, where a policy with egress rules and without ingress rules leaves ingress open"}
}

func environment(c *cli.Context) policy.Environment {
	return policy.Environment{OpenIngress: c.Bool("pod")}
}

// trialJSON is what test and explain print with -o json.
type trialJSON struct {
	Allowed bool          `json:"allowed"`
	Action  string        `json:"action"`           // allow, reject or drop; nxdomain, refused or drop for a name that may not be asked for
	Rule    string        `json:"rule"`             // the rule or default that decides
	Tried   string        `json:"tried,omitempty"`  // the rule that would match if not for Reason
	Reason  policy.Reason `json:"reason,omitempty"` // as in the flow log
	Audited bool          `json:"audited,omitempty"`
	Asked   *bool         `json:"mayBeAsked,omitempty"` // whether the resolver may be asked for the name
	Target  string        `json:"target,omitempty"`
	Assumed []string      `json:"assumed,omitempty"`
	Steps   []policy.Step `json:"steps,omitempty"` // of explain only
}

func policyTrial(c *cli.Context, explain bool) error {
	if c.NArg() != 1 {
		return fmt.Errorf("policy %s: want one FILE", c.Command.Name)
	}
	_, p, err := parsePolicy(c.Args().First())
	if err != nil {
		return err
	}
	t, err := trialOf(c)
	if err != nil {
		return fmt.Errorf("policy %s: %w", c.Command.Name, err)
	}
	r, err := t.Run(p, environment(c))
	if err != nil {
		return fmt.Errorf("policy %s: %w", c.Command.Name, err)
	}
	out := trialResult(r)
	if explain {
		out.Steps = r.Steps
	}
	if c.String("output") == "json" {
		err = printJSON(c.App.Writer, out)
	} else {
		err = printTrial(c.App.Writer, out)
	}
	if err == nil && !explain && !out.Allowed {
		return exitStatus(1)
	}
	return err
}

// parsePolicy reads and parses a policy file; - is standard input. It names the file as the caller
// wrote it, so that editors find the place of an error.
func parsePolicy(path string) (policy.Document, *policy.Policy, error) {
	d, err := readPolicy(path, path)
	if err != nil {
		return d, nil, err
	}
	p, err := d.Policy()
	return d, p, err
}

func trialOf(c *cli.Context) (policy.Trial, error) {
	var t policy.Trial
	var err error
	switch proto := c.String("proto"); proto {
	case "tcp":
		t.Proto = policy.TCP
	case "udp":
		t.Proto = policy.UDP
	case "sctp":
		t.Proto = policy.SCTP
	case "icmp":
		t.Proto, t.ICMPType = policy.ICMPv4, 8
	case "icmpv6":
		t.Proto, t.ICMPType = policy.ICMPv6, 128
	default:
		return t, fmt.Errorf("--proto %s: want tcp, udp, sctp, icmp or icmpv6", proto)
	}
	for name, dst := range map[string]*netip.Addr{"from": &t.Client, "address": &t.Address} {
		if s := c.String(name); s != "" {
			if *dst, err = netip.ParseAddr(s); err != nil {
				return t, fmt.Errorf("--%s %s: want an address", name, s)
			}
		}
	}
	if c.IsSet("said") {
		said := c.String("said")
		t.Said = &said
	}
	t.Method, t.Path = c.String("method"), c.String("path")

	var port string
	to := c.String("to")
	icmp := t.Proto == policy.ICMPv4 || t.Proto == policy.ICMPv6
	switch {
	case to == "" && !(icmp && t.Client.IsValid()):
		return t, errors.New("want --to HOST:PORT")
	case icmp:
		t.Host = strings.Trim(to, "[]")
		return t, nil
	case t.Client.IsValid():
		port = strings.TrimPrefix(to, ":")
	default:
		if t.Host, port, err = net.SplitHostPort(to); err != nil {
			return t, fmt.Errorf("--to %s: want HOST:PORT, as example.com:443 or [2001:db8::1]:443", to)
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return t, fmt.Errorf("--to %s: the port is a number from 1 to 65535", to)
	}
	t.Port = uint16(n)
	return t, nil
}

func trialResult(r *policy.TrialResult) trialJSON {
	v := r.Verdict
	out := trialJSON{Allowed: r.Allowed(), Action: v.Action().String(), Rule: v.Rule(), Tried: v.Tried(), Reason: v.Reason(), Audited: v.Audited(), Assumed: r.Assumed}
	if r.Name != nil {
		out.Asked = &r.Name.Allowed
		if !r.Name.Allowed {
			out.Action, out.Rule = string(r.Name.Refusal), r.Name.Rule
		}
	}
	if v.Allowed() {
		out.Target = v.Target().String()
	}
	return out
}

func printTrial(w io.Writer, r trialJSON) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s by %s", r.Action, r.Rule)
	switch {
	case r.Asked != nil && !*r.Asked:
		b.WriteString(": the name may not be asked")
	case r.Audited:
		b.WriteString(", only because the policy is in audit mode")
	}
	if r.Reason != "" {
		fmt.Fprintf(&b, " (%s: %s)", r.Tried, r.Reason)
	}
	b.WriteByte('\n')
	for _, a := range r.Assumed {
		fmt.Fprintf(&b, "assumed: %s\n", printable(a))
	}
	if _, err := io.WriteString(w, b.String()); err != nil || r.Steps == nil {
		return err
	}
	t := newTable(w, "RULE", "ACTION", "DECIDES", "WHY")
	for _, s := range r.Steps {
		t.row(s.Rule, s.Action.String(), map[bool]string{true: "yes", false: "no"}[s.Decides], s.Why)
	}
	return t.flush()
}
