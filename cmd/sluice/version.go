package main

import (
	"fmt"
	"runtime"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/cmd/internal/cmdline"
)

func versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Usage: "print the version",
		UsageText: "sluice version -o json",
		Flags:     []cli.Flag{outputFlag("text", "json")},
		Action: func(c *cli.Context) error {
			if c.String("output") == "json" {
				return printJSON(c.App.Writer, map[string]string{"version": cmdline.Version(), "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
			}
			_, err := fmt.Fprintf(c.App.Writer, "sluice %s (%s, %s/%s)\n", cmdline.Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
