package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"sluice/forwarder/sandbox/api"
	"sluice/policy"
)

func policyCommand() *cli.Command {
	return &cli.Command{
		Name:  "policy",
		Usage: "check, test, compare and suggest policy files; show or replace a sandbox's policy",
		Subcommands: slices.Concat([]*cli.Command{
			{
				Name: "check", Usage: "say whether policy files are right", ArgsUsage: "FILE...",
				Description: "Prints every error with file, line and column, and what was expected. - reads standard input.",
				Action:      policyCheck,
			},
			{
				Name: "show", Usage: "print the policy in force", ArgsUsage: "[NAME]",
				Flags: []cli.Flag{outputFlag("yaml", "json")}, BashComplete: completeNames, Action: policyShow,
			},
			{
				Name: "set", Usage: "replace the policy of a running sandbox", ArgsUsage: "[NAME] FILE",
				Description: "Flows that the new policy allows go on undisturbed; those that it denies are cut.\n" +
					"A file with errors changes nothing. - reads standard input.",
				BashComplete: completeNames, Action: policySet,
			},
		}, policyTrialCommands(), policyCompareCommands()),
	}
}

// maxPolicy bounds a policy file: what one request can carry.
const maxPolicy = api.MaxRequest / 2

// readPolicy reads a policy file; - is standard input.
func readPolicy(path string) (name string, data []byte, err error) {
	var r io.Reader = os.Stdin
	name = "standard input"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", nil, fmt.Errorf("read the policy: %w", err)
		}
		defer f.Close()
		r, name = f, filepath.Base(path)
	}
	data, err = io.ReadAll(io.LimitReader(r, maxPolicy+1))
	if err != nil {
		return "", nil, fmt.Errorf("read the policy: %w", err)
	}
	if len(data) > maxPolicy {
		return "", nil, fmt.Errorf("read the policy: %s is larger than %d bytes", name, maxPolicy)
	}
	return name, data, nil
}

func policyCheck(c *cli.Context) error {
	if c.NArg() == 0 {
		return errors.New("policy check: want a FILE")
	}
	var errs []error
	for _, path := range c.Args().Slice() {
		name, data, err := readPolicy(path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if path != "-" {
			name = path // as the caller wrote it, so that editors find the place
		}
		p, err := policy.Parse(name, data)
		if err == nil {
			_, err = policy.Compile(p, policy.Environment{})
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		_, _ = fmt.Fprintf(c.App.Writer, "%s: policy %q is right: %d egress and %d ingress rules, default %s\n",
			name, p.Metadata.Name, len(p.Spec.Egress), len(p.Spec.Ingress), p.Spec.DefaultAction)
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
	name, data, err := readPolicy(args[len(args)-1])
	if err != nil {
		return err
	}
	return client.Call(c.Context, api.MethodPolicySet, api.PolicySetParams{Name: name, Source: string(data)}, nil)
}
