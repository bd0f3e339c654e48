package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/cmd/internal/cmdline"
	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
)

// clientCommands returns the commands that talk to running sandboxes.
func clientCommands() []*cli.Command {
	return []*cli.Command{
		psCommand(), flowsCommand(), flowLogCommand(), policyCommand(), portCommand(), captureCommand(), upgradeCommand(),
		statsCommand(), logsCommand(), sysctlCommand(), versionCommand(), cmdline.CompletionCommand("sluice"),
	}
}

// target finds the sandbox that a command is about: the one that the first argument names, or the
// only one running. It returns the arguments that follow. looksLikeName distinguishes a name from
// the command's own first argument.
func target(c *cli.Context, looksLikeName func(string) bool) (api.Client, []string, error) {
	registry, err := sandbox.OpenRegistry()
	if err != nil {
		return api.Client{}, nil, err
	}
	args := c.Args().Slice()
	var name string
	if len(args) > 0 && looksLikeName(args[0]) {
		name, args = args[0], args[1:]
	} else {
		all, err := registry.List()
		switch {
		case err != nil:
			return api.Client{}, nil, err
		case len(all) == 0:
			return api.Client{}, nil, errors.New("no sandbox is running: start one with `sluice run`")
		case len(all) > 1:
			return api.Client{}, nil, fmt.Errorf("%d sandboxes are running: name one of %s", len(all), names(all))
		}
		name = all[0].Name
	}
	socket, err := registry.Socket(name)
	if errors.Is(err, sandbox.ErrNoSandbox) {
		all, lerr := registry.List()
		if lerr == nil && len(all) > 0 {
			return api.Client{}, nil, fmt.Errorf("%w: there are %s", err, names(all))
		}
	}
	return api.Client{Path: socket}, args, err
}

func names(all []sandbox.State) string {
	out := make([]string, len(all))
	for i, s := range all {
		out[i] = s.Name
	}
	return strings.Join(out, ", ")
}

// anyName takes every first argument for a sandbox's name.
func anyName(string) bool { return true }

// onlyTarget is target for commands that take nothing but a name.
func onlyTarget(c *cli.Context) (api.Client, error) {
	client, rest, err := target(c, anyName)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%s: unexpected argument %q", c.Command.Name, rest[0])
	}
	return client, err
}

// completeNames offers the running sandboxes to the shell.
func completeNames(c *cli.Context) {
	if c.NArg() > 0 {
		return
	}
	registry, err := sandbox.OpenRegistry()
	if err != nil {
		return
	}
	all, err := registry.List()
	if err != nil {
		return
	}
	for _, s := range all {
		_, _ = fmt.Fprintln(c.App.Writer, s.Name)
	}
}

// flagsFirst moves the flags of the client commands in front of their arguments, so that `sluice
// flows NAME -o json` works: the flag package stops at the first argument. The commands that run
// another command are left alone, and nothing is moved past "--".
func flagsFirst(args []string) []string {
	if len(args) < 2 {
		return args
	}
	cmds, at := clientCommands(), 1
	var cmd *cli.Command
	for at < len(args) {
		next := find(cmds, args[at])
		if next == nil {
			break
		}
		cmd, cmds = next, next.Subcommands
		at++
	}
	if cmd == nil {
		return args
	}
	var flags, rest []string
	for i := at; i < len(args); i++ {
		a := args[i]
		// The library looks for the completion flag as the last word.
		if a == "--" || a == "--generate-bash-completion" {
			rest = append(rest, args[i:]...)
			break
		}
		if len(a) < 2 || a[0] != '-' {
			rest = append(rest, a)
			continue
		}
		flags = append(flags, a)
		if takesValue(cmd, strings.TrimLeft(a, "-")) && i+1 < len(args) {
			i++
			flags = append(flags, args[i])
		}
	}
	out := append([]string{}, args[:at]...)
	return append(append(out, flags...), rest...)
}

func find(cmds []*cli.Command, name string) *cli.Command {
	for _, c := range cmds {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

// takesValue reports whether the flag's value is the next argument.
func takesValue(cmd *cli.Command, name string) bool {
	for _, f := range cmd.Flags {
		for _, n := range f.Names() {
			if n != name {
				continue
			}
			doc, ok := f.(cli.DocGenerationFlag)
			return ok && doc.TakesValue()
		}
	}
	return false
}
