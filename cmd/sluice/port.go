package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
)

func portCommand() *cli.Command {
	const (
		spec   = "PORTS"
		syntax = "PORTS is written [IP:]HOST[-RANGE]:GUEST[-RANGE][/udp]."
	)
	return &cli.Command{
		Name:      "port",
		Usage:     "publish ports of a running sandbox, or withdraw them",
		UsageText: "sluice port add 8080:80\nsluice port ls",
		Subcommands: []*cli.Command{
			{
				Name: "add", Usage: "publish ports", ArgsUsage: "[NAME] " + spec + "...",
				UsageText:    "sluice port add 8080:80\nsluice port add NAME 127.0.0.1:5000-5009:5000-5009/udp",
				Description:  syntax + " Host port 0 lets the kernel pick one. Prints the ports that were opened.",
				BashComplete: completeNames,
				Action:       func(c *cli.Context) error { return changePorts(c, api.MethodPortsAdd) },
			},
			{
				Name: "rm", Usage: "withdraw ports", ArgsUsage: "[NAME] " + spec + "...",
				UsageText:    "sluice port rm NAME 8080:80",
				Description:  syntax + " Connections through the ports go on.",
				BashComplete: completeNames,
				Action:       func(c *cli.Context) error { return changePorts(c, api.MethodPortsRm) },
			},
			{
				Name: "ls", Usage: "list the published ports", ArgsUsage: "[NAME]",
				UsageText: "sluice port ls",
				Flags:     []cli.Flag{outputFlag("table", "json")}, BashComplete: completeNames, Action: listPorts,
			},
		},
	}
}

func changePorts(c *cli.Context, method string) error {
	client, specs, err := target(c, func(s string) bool { return !strings.Contains(s, ":") })
	if err != nil {
		return err
	}
	if len(specs) == 0 {
		return errors.New("want at least one port, for example 8080:80")
	}
	for _, s := range specs {
		if _, err := sandbox.ParsePort(s); err != nil {
			return err
		}
	}
	for _, s := range specs {
		var r api.PortsResult
		if err := client.Call(c.Context, method, api.PortsParams{Spec: s}, &r); err != nil {
			return err
		}
		if method == api.MethodPortsAdd {
			for _, p := range r.Ports {
				_, _ = fmt.Fprintln(c.App.Writer, sandbox.FormatPort(p))
			}
		}
	}
	return nil
}

func listPorts(c *cli.Context) error {
	client, err := onlyTarget(c)
	if err != nil {
		return err
	}
	var r api.PortsResult
	if err := client.Call(c.Context, api.MethodPorts, nil, &r); err != nil {
		return err
	}
	if c.String("output") == "json" {
		return printJSON(c.App.Writer, nonNil(r.Ports))
	}
	t := newTable(c.App.Writer, "PROTO", "HOST", "PORT", "SANDBOX", "MADE BY")
	for _, p := range r.Ports {
		host, by := "*", "hand"
		if p.HostIP.IsValid() {
			host = p.HostIP.String()
		}
		if p.Auto {
			by = "--publish-auto"
		}
		t.row(p.Proto, host, strconv.Itoa(int(p.HostPort)), strconv.Itoa(int(p.GuestPort)), by)
	}
	return t.flush()
}
