package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cmd/internal/cmdline"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
)

func attachCommand() *cli.Command {
	return &cli.Command{
		Name:      "attach",
		Usage:     "give an existing network namespace a sandboxed network",
		ArgsUsage: "PID | --netns PATH",
		UsageText: `sluice attach 4711
sluice attach --netns /run/netns/box --policy policy.yaml
sluice attach --netns /run/netns/box --ready-fd 3 --exit-fd 4`,
		Description: `Puts a device into the network namespace of a process, or the one at a path. Serves it
until the namespace's process ends, the exit descriptor hangs up, or a signal arrives.

Without --policy the namespace reaches what a container's does: public and private
addresses, and the host's own.`,
		HideHelpCommand: true,
		Flags: slices.Concat(sandboxFlags("everything is open except the host's loopback, link-local and metadata addresses"),
			cmdline.InCategory(ofNetwork,
				&cli.BoolFlag{Name: "no-configure", Usage: "only make the device: its addresses come by DHCP and router advertisements, or by hand"},
			),
			cmdline.InCategory(ofProcess,
				&cli.StringFlag{Name: "netns", Usage: "`PATH` of the network namespace"},
				&cli.StringFlag{Name: "userns", Usage: "`PATH` of the user namespace to enter (default: the one that owns the network namespace)"},
				&cli.IntFlag{Name: "ready-fd", Value: -1, DefaultText: "none", Usage: "write 1 to descriptor `N` and close it when traffic flows"},
				&cli.IntFlag{Name: "exit-fd", Value: -1, DefaultText: "none", Usage: "end when descriptor `N` hangs up"},
			),
		),
		OnUsageError: usageError,
		Action: func(c *cli.Context) error {
			cfg, err := sandboxConfig(c, policy.Builtin{AllowPrivate: true, AllowHost: true})
			if err != nil {
				return err
			}
			t := guest.Target{NetNS: c.String("netns"), UserNS: c.String("userns")}
			switch {
			case c.NArg() > 1:
				return fmt.Errorf("attach: unexpected argument %q", c.Args().Get(1))
			case c.NArg() == 1 && t.NetNS != "":
				return errors.New("attach: give a PID or --netns, not both")
			case c.NArg() == 1:
				if t.PID, err = strconv.Atoi(c.Args().First()); err != nil || t.PID <= 0 {
					return fmt.Errorf("attach: %q is no PID", c.Args().First())
				}
			case t.NetNS == "":
				return errors.New("attach: give a PID or --netns PATH")
			}
			cfg.Start = attachTo(t)
			cfg.Guest.NoConfigure = c.Bool("no-configure")
			ready, err := descriptor(c, "ready-fd")
			if err != nil {
				return err
			}
			if ready != nil {
				cfg.Ready = func(api.Info) error {
					_, err := ready.Write([]byte("1"))
					return errors.Join(err, ready.Close())
				}
			}
			ctx := c.Context
			exit, err := descriptor(c, "exit-fd")
			if err != nil {
				return err
			}
			if exit != nil {
				var cancel context.CancelFunc
				ctx, cancel = context.WithCancel(ctx)
				defer cancel()
				// The command owns this goroutine, which ends with the process at the latest.
				go func() {
					waitHangup(exit)
					cancel()
				}()
			}
			return finish(sandbox.Run(ctx, cfg))
		},
	}
}

// descriptor takes over the caller's descriptor that a flag names.
func descriptor(c *cli.Context, flag string) (*os.File, error) {
	fd := c.Int(flag)
	if fd < 0 {
		return nil, nil
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || fd < 3 {
		return nil, fmt.Errorf("--%s: descriptor %d is not open, or standard input or output", flag, fd)
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), flag), nil
}

// waitHangup returns when the other end of f is closed. It ignores what is written to f until then.
func waitHangup(f *os.File) {
	b := make([]byte, 64)
	for {
		if n, err := f.Read(b); n == 0 || err != nil {
			return
		}
	}
}
