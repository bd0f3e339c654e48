package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/sandbox/api"
)

func statsCommand() *cli.Command {
	return &cli.Command{
		Name: "stats", Usage: "print the counters of a sandbox", ArgsUsage: "[NAME]",
		UsageText: "sluice stats\nsluice stats --all -o json NAME",
		Flags: []cli.Flag{
			outputFlag("table", "json"),
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "print counters that are 0, too"},
		},
		BashComplete: completeNames,
		Action: func(c *cli.Context) error {
			client, err := onlyTarget(c)
			if err != nil {
				return err
			}
			var r api.StatsResult
			if err := client.Call(c.Context, api.MethodStats, nil, &r); err != nil {
				return err
			}
			if c.String("output") == "json" {
				return printJSON(c.App.Writer, r.Stats)
			}
			t := newTable(c.App.Writer, "COUNTER", "VALUE")
			for _, part := range slices.Sorted(maps.Keys(r.Stats)) {
				flat := make(map[string]string)
				if err := flatten(part, r.Stats[part], flat); err != nil {
					return fmt.Errorf("stats: %w", err)
				}
				for _, name := range slices.Sorted(maps.Keys(flat)) {
					if v := flat[name]; v != "0" || c.Bool("all") {
						t.row(name, v)
					}
				}
			}
			return t.flush()
		},
	}
}

// flatten names nested counters by their path: link.dropped.rx-short-frame.
func flatten(prefix string, raw json.RawMessage, into map[string]string) error {
	if len(raw) == 0 || raw[0] != '{' {
		into[prefix] = string(raw)
		return nil
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	for k, v := range m {
		if err := flatten(prefix+"."+k, v, into); err != nil {
			return err
		}
	}
	return nil
}

func logsCommand() *cli.Command {
	return &cli.Command{
		Name: "logs", Usage: "print the sandbox's own log", ArgsUsage: "[NAME]",
		UsageText: "sluice logs\nsluice logs -f -n 20 NAME",
		Flags: []cli.Flag{
			outputFlag("text", "json"),
			&cli.IntFlag{Name: "tail", Aliases: []string{"n"}, Usage: "print only the last `LINES`"},
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "print new lines until interrupted"},
		},
		BashComplete: completeNames,
		Action:       logs,
	}
}

func logs(c *cli.Context) error {
	client, err := onlyTarget(c)
	if err != nil {
		return err
	}
	var r api.LogsResult
	s, err := client.Open(c.Context, api.MethodLogs, api.LogsParams{Last: max(c.Int("tail"), 0), Follow: c.Bool("follow")}, &r)
	if err != nil {
		return err
	}
	defer s.Close()
	show := func(l api.LogLine) error {
		if c.String("output") == "json" {
			return api.WriteLine(c.App.Writer, l)
		}
		_, err := fmt.Fprintf(c.App.Writer, "%s %-7s %s: %s\n", l.Time.Local().Format("2006-01-02 15:04:05.000"),
			printable(l.Level), printable(l.Source), printable(l.Text))
		return err
	}
	for _, l := range r.Lines {
		if err := show(l); err != nil {
			return err
		}
	}
	for c.Bool("follow") {
		var l api.LogLine
		if err := s.Next(&l); err != nil {
			if errors.Is(err, io.EOF) || c.Context.Err() != nil {
				return nil
			}
			return fmt.Errorf("follow the log: %w", err)
		}
		if err := show(l); err != nil {
			return err
		}
	}
	return nil
}

func sysctlCommand() *cli.Command {
	return &cli.Command{
		Name: "sysctl", Usage: "read or set tunables of a sandbox's flow table, memory budget and keepalive", ArgsUsage: "[NAME] [TUNABLE[=VALUE]...]",
		UsageText: "sluice sysctl\nsluice sysctl NAME nf_conntrack_max=1000\nsluice sysctl NAME 'net.ipv4.tcp_mem=32768 49152 65536'",
		Description: "Tunables have nf_conntrack's names and units. Without one, all are printed.\n\n" +
			"net.ipv4.tcp_mem is the budget for the sandbox's buffers: its low, pressure and high mark in pages of 4 KiB.\n\n" +
			"net.ipv4.tcp_keepalive_time, _intvl and _probes apply to new connections, on both sides of the sandbox: seconds\n" +
			"without traffic before the first probe, seconds between probes, and how many probes may go unanswered before\n" +
			"the far side counts as gone.",
		Flags: []cli.Flag{outputFlag("table", "json")}, BashComplete: completeNames,
		Action: sysctl,
	}
}

func sysctl(c *cli.Context) error {
	client, tunables, err := target(c, func(s string) bool {
		return !strings.ContainsAny(s, "=") && !strings.Contains(s, "nf_conntrack_") && !strings.Contains(s, "tcp_mem") && !strings.Contains(s, "tcp_keepalive_")
	})
	if err != nil {
		return err
	}
	if len(tunables) == 0 {
		tunables = []string{""}
	}
	all := make(map[string]string)
	for _, t := range tunables {
		name, value, set := strings.Cut(t, "=")
		method, p := api.MethodSysctl, api.SysctlParams{Name: strings.TrimSpace(name)}
		if set {
			method, p.Value = api.MethodSysctlSet, strings.TrimSpace(value)
		}
		var r api.SysctlResult
		if err := client.Call(c.Context, method, p, &r); err != nil {
			return err
		}
		maps.Copy(all, r.Values)
	}
	if c.String("output") == "json" {
		return printJSON(c.App.Writer, all)
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		_, _ = fmt.Fprintf(c.App.Writer, "%s = %s\n", printable(name), printable(all[name]))
	}
	return nil
}

func captureCommand() *cli.Command {
	return &cli.Command{
		Name: "capture", Usage: "write a sandbox's packets to a pcapng file", ArgsUsage: "[NAME]",
		UsageText: "sluice capture -w packets.pcapng\nsluice capture -w - | tshark -r -\n# only what was dropped, and why\nsluice capture --drops -w drops.pcapng NAME",
		Description: "Ends at an interrupt, or with the sandbox. Needs no privilege. Packets that the policy or the stack dropped\n" +
			"are on an interface of their own, with the reason as their comment.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "write", Aliases: []string{"w"}, Required: true, Usage: "write to `FILE`, - for standard output (required)"},
			&cli.IntFlag{Name: "snaplen", Aliases: []string{"s"}, Usage: "keep the first `BYTES` of each packet; 0 keeps all"},
			&cli.BoolFlag{Name: "drops", Usage: "write only packets that were dropped"},
		},
		BashComplete: completeNames,
		Action:       capture,
	}
}

func capture(c *cli.Context) error {
	client, err := onlyTarget(c)
	if err != nil {
		return err
	}
	out, path := os.Stdout, c.String("write")
	if path != "-" {
		if out, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return fmt.Errorf("capture: %w", err)
		}
		defer out.Close()
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(interrupted)
	s, err := client.Open(c.Context, api.MethodCapture, api.CaptureParams{SnapLen: c.Int("snaplen"), DropsOnly: c.Bool("drops")}, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	done := make(chan struct{})
	defer close(done)
	// Ends with the command.
	go func() {
		select {
		case <-interrupted:
			_ = s.CloseWrite() // the worker writes what it has, then closes
		case <-done:
		}
	}()
	n, err := io.Copy(out, s)
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("capture: the disk is full: %s holds the first %s; the sandbox goes on: %w", path, size(n), err)
	}
	if err == nil && path != "-" {
		err = out.Sync()
		_, _ = fmt.Fprintf(c.App.ErrWriter, "sluice: %s written to %s\n", size(n), path)
	}
	if err != nil && !errors.Is(err, syscall.EINVAL) { // a device cannot be synced
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}
