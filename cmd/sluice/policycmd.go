package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
)

func policyCommand() *cli.Command {
	return &cli.Command{
		Name:        "policy",
		Usage:       "check, test, compare and suggest policy files; show or replace a sandbox's policy",
		UsageText:   "sluice policy check policy.yaml\nsluice policy test policy.yaml --to example.com:443\nsluice policy set NAME policy.yaml",
		Description: "sluice-policy(5) describes policy files.",
		Subcommands: slices.Concat([]*cli.Command{
			{
				Name: "check", Usage: "check policy files for errors", ArgsUsage: "FILE...",
				UsageText:   "sluice policy check policy.yaml",
				Description: "Prints every error with its file, line and column, and what was expected. - reads standard input.",
				Action:      policyCheck,
			},
			{
				Name: "show", Usage: "print the policy in force", ArgsUsage: "[NAME]",
				UsageText: "sluice policy show\nsluice policy show -o json NAME",
				Flags:     []cli.Flag{outputFlag("yaml", "json")}, BashComplete: completeNames, Action: policyShow,
			},
			{
				Name: "set", Usage: "replace the policy of a running sandbox", ArgsUsage: "[NAME] FILE",
				UsageText: "sluice policy set NAME policy.yaml",
				Description: "Flows that the new policy allows go on undisturbed; flows that it denies are cut. A file with\n" +
					"errors changes nothing. - reads standard input.\n\n" +
					"A stopped monitor is continued. One that cannot be is killed, which leaves the sandbox without\n" +
					"a network.",
				BashComplete: completeNames, Action: policySet,
			},
		}, policyTrialCommands(), policyCompareCommands()),
	}
}

// readPolicy reads a policy file and gives it the name name; the path - is standard input.
func readPolicy(path, name string) (policy.Document, error) {
	if path == "-" {
		return policy.ReadDocumentFrom(os.Stdin, "standard input")
	}
	return policy.ReadDocument(path, name)
}

func policyCheck(c *cli.Context) error {
	if c.NArg() == 0 {
		return errors.New("policy check: want a FILE")
	}
	var errs []error
	for _, path := range c.Args().Slice() {
		d, p, err := parsePolicy(path)
		if err == nil {
			_, err = policy.Compile(p, policy.Environment{})
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		_, _ = fmt.Fprintf(c.App.Writer, "%s: policy %q is right: %d egress and %d ingress rules, default %s\n",
			d.Name(), p.Metadata.Name, len(p.Spec.Egress), len(p.Spec.Ingress), p.Spec.DefaultAction)
	}
	return errors.Join(errs...)
}

func policyShow(c *cli.Context) error {
	client, err := onlyTarget(c)
	if err != nil {
		return err
	}
	var r api.PolicyResult
	if err := client.Call(c.Context, api.MethodPolicyShow, nil, &r); err != nil {
		return err
	}
	if c.String("output") == "json" {
		p, err := policy.Parse(r.Name, []byte(r.Source))
		if err != nil {
			return err
		}
		return printJSON(c.App.Writer, p)
	}
	_, err = fmt.Fprint(c.App.Writer, r.Source)
	return err
}

func policySet(c *cli.Context) error {
	args := c.Args().Slice()
	if len(args) != 1 && len(args) != 2 {
		return errors.New("policy set: want [NAME] FILE")
	}
	client, _, err := target(c, func(string) bool { return len(args) == 2 })
	if err != nil {
		return err
	}
	path := args[len(args)-1]
	d, err := readPolicy(path, filepath.Base(path))
	if err != nil {
		return err
	}
	return sandbox.SetPolicy(c.Context, client, api.PolicySetParams{Name: d.Name(), Source: d.Text()})
}
