// Command sluice gives a command or a container a network whose every byte passes
// a gate: see `sluice --help`.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/cmd/internal/cmdline"
	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/guest"
)

// exitStatus carries CMD's status through the command line library.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() {
	sandbox.Init(cmdline.Version())
	os.Exit(run(context.Background(), os.Args))
}

func run(ctx context.Context, args []string) int {
	err := app().RunContext(ctx, flagsFirst(args))
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(os.Stderr, "sluice: %s\n", strings.TrimRight(line, "\n"))
	}
	var own ownFailure
	if errors.As(err, &own) {
		return own.status
	}
	return guest.StatusOurs
}

// ownFailure is an error of run or attach, with its exit status.
type ownFailure struct {
	error
	status int
}

func (f ownFailure) Unwrap() error { return f.error }

func app() *cli.App {
	return &cli.App{
		Name:                 "sluice",
		Usage:                "run commands and containers in a network whose every byte passes a policy",
		Version:              cmdline.Version(),
		HideVersion:          true, // there is a version command
		EnableBashCompletion: true,
		Suggest:              true,
		UsageText:            "sluice run -- curl https://example.com\nsluice run --policy policy.yaml -- ./agent\nsluice flows",
		Description:          "Each command has a manual page, such as sluice-run(1). sluice-policy(5) describes policy files.",
		Commands:             append([]*cli.Command{runCommand(), attachCommand(), cmdline.ReferenceCommand()}, clientCommands()...),
		// Errors are printed once, by run.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   usageError,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("there is no command %q: see `sluice --help`", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
}

// usageError names the help to read instead of printing all of it.
func usageError(c *cli.Context, err error, _ bool) error {
	return fmt.Errorf("%w: see `%s --help`", err, c.Command.HelpName)
}
