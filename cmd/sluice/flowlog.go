package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
)

func flowLogCommand() *cli.Command {
	return &cli.Command{
		Name: "flow-log", Usage: "tell sandboxes that their flow log was renamed",
		UsageText: "sluice flow-log reopen",
		Subcommands: []*cli.Command{{
			Name: "reopen", Usage: "open the flow log at its path again, and make it if it is gone", ArgsUsage: "[NAME...]",
			UsageText: "# in logrotate's postrotate\nsluice flow-log reopen",
			Description: "Without NAME, tells every sandbox whose flow log is a file. Sluice renames a full file itself; to leave\n" +
				"that to logrotate alone, run with --flow-log-max-size 0. With copytruncate the command is not needed.",
			BashComplete: completeNames,
			Action:       reopenFlowLogs,
		}},
	}
}

func reopenFlowLogs(c *cli.Context) error {
	registry, err := sandbox.OpenRegistry()
	if err != nil {
		return err
	}
	names := c.Args().Slice()
	if len(names) == 0 {
		all, err := registry.List()
		if err != nil {
			return err
		}
		for _, s := range all {
			names = append(names, s.Name)
		}
	}
	var errs []error
	for _, name := range names {
		var r api.FlowLogResult
		socket, err := registry.Socket(name)
		if err == nil {
			err = api.Client{Path: socket}.Call(c.Context, api.MethodFlowLogReopen, nil, &r)
		}
		var said *api.Error
		switch {
		case err == nil:
			_, _ = fmt.Fprintf(c.App.Writer, "%s: %s\n", name, r.File)
		case c.NArg() == 0 && (errors.As(err, &said) && said.Code == api.CodeInvalid || errors.Is(err, api.ErrNotRunning) || errors.Is(err, sandbox.ErrNoSandbox)):
			// The sandbox has no flow log, or has just ended.
		default:
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
