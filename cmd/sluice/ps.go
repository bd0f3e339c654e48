package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
)

// psTimeout bounds how long ps waits for one sandbox.
const psTimeout = 2 * time.Second

func psCommand() *cli.Command {
	return &cli.Command{
		Name:      "ps",
		Usage:     "list the sandboxes that are running",
		UsageText: "sluice ps\nsluice ps -q",
		Description: "Lists this user's sandboxes, oldest first, and cleans up after those that were killed.\n" +
			"FLOWS is - while the worker is being restarted.",
		Flags: []cli.Flag{
			outputFlag("table", "json"),
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print only names"},
		},
		Action: ps,
	}
}

func ps(c *cli.Context) error {
	if c.NArg() > 0 {
		return fmt.Errorf("ps: unexpected argument %q", c.Args().First())
	}
	registry, err := sandbox.OpenRegistry()
	if err != nil {
		return err
	}
	states, err := registry.List()
	if err != nil {
		return err
	}
	infos := make([]api.Info, len(states))
	var wg sync.WaitGroup
	for i, s := range states {
		wg.Go(func() { infos[i] = describe(c.Context, registry, s) })
	}
	wg.Wait()
	out := c.App.Writer
	switch {
	case c.Bool("quiet"):
		for _, i := range infos {
			_, _ = fmt.Fprintln(out, i.Name)
		}
		return nil
	case c.String("output") == "json":
		return printJSON(out, infos)
	}
	t := newTable(out, "NAME", "PID", "COMMAND", "UPTIME", "FLOWS", "STATE")
	for _, i := range infos {
		flows := ""
		if i.Flows >= 0 {
			flows = strconv.Itoa(i.Flows)
		}
		state := string(i.State)
		if i.Restarts > 0 {
			state += fmt.Sprintf(" (%d restarts)", i.Restarts)
		}
		t.row(i.Name, strconv.Itoa(i.PID), shorten(strings.Join(i.Command, " "), 40), age(time.Since(i.Started)), flows, state)
	}
	return t.flush()
}

// describe asks a sandbox for its description; the state file describes one that does not answer.
func describe(ctx context.Context, registry *sandbox.Registry, s sandbox.State) api.Info {
	ctx, cancel := context.WithTimeout(ctx, psTimeout)
	defer cancel()
	var i api.Info
	socket, err := registry.Socket(s.Name)
	if err == nil {
		err = api.Client{Path: socket}.Call(ctx, api.MethodInfo, nil, &i)
	}
	if err == nil {
		return i
	}
	state := api.StateStarting
	if !errors.Is(err, api.ErrNotRunning) {
		state = "unresponsive"
	}
	return api.Info{Name: s.Name, PID: s.PID, Command: s.Command, Started: s.Started, Flows: -1, State: state}
}

func shorten(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
