package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/cmd/internal/helptest"
)

func TestHelp(t *testing.T) {
	helptest.Check(t, app)
}

func TestFlagsOfRunAndAttachAreGrouped(t *testing.T) {
	for _, c := range []*cli.Command{runCommand(), attachCommand()} {
		var seen []string
		for _, f := range c.Flags {
			category := f.(cli.CategorizableFlag).GetCategory()
			if category == "" {
				t.Errorf("%s --%s is in no category", c.Name, f.Names()[0])
			}
			seen = append(seen, category)
		}
		for _, want := range []string{ofNetwork, ofPolicy, ofNames, ofLogs, ofProcess} {
			if !slices.Contains(seen, want) {
				t.Errorf("%s has no flags about %s", c.Name, want)
			}
		}
	}
}

// The first argument is COMMAND, even if the library has a command of that name.
func TestACommandNamedHelpIsRun(t *testing.T) {
	for _, word := range []string{"help", "h"} {
		a := app()
		for _, c := range a.Commands {
			if c.Name == "run" {
				c.Action = func(c *cli.Context) error {
					_, err := c.App.Writer.Write([]byte("runs " + strings.Join(c.Args().Slice(), " ")))
					return err
				}
			}
		}
		if got := helptest.Run(t, a, "run", "--", word, "me"); got != "runs "+word+" me" {
			t.Errorf("sluice run -- %s me: %s", word, got)
		}
	}
}
