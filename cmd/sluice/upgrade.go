package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
)

// upgradeTimeout bounds the upgrade of one attachment: the end of the old worker and the start of
// the new one.
const upgradeTimeout = 30 * time.Second

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name:      "upgrade",
		Usage:     "have a new binary take over the attachments of running pods",
		ArgsUsage: "[NAME...]",
		UsageText: `# after a new binary was renamed into the place of the old one
sluice upgrade
sluice upgrade --binary /opt/cni/bin/sluice-cni NAME`,
		Description: `Replaces the binary behind the named attachments, or behind all of them, one at a time
and while their pods run. Devices, addresses, policy, flow log and flows from outside
stay; connections that a pod has opened to the outside are reset. An attachment that
fails to upgrade keeps the binary it had, and the command ends there.

Without --binary each attachment takes what is now at the path it was started from:
install the new binary there first, by renaming it into place.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "binary", Usage: "`PATH` of the new binary (the CNI plugin's, or sluice's own)"},
		},
		BashComplete: completeNames,
		Action:       upgrade,
	}
}

func upgrade(c *cli.Context) error {
	binary := c.String("binary")
	if binary != "" {
		var err error
		if binary, err = filepath.Abs(binary); err != nil {
			return err
		}
	}
	registry, err := sandbox.OpenRegistry()
	if err != nil {
		return err
	}
	names := c.Args().Slice()
	if len(names) == 0 {
		if names, err = attachments(c.Context, registry); err != nil {
			return err
		}
	}
	for i, name := range names {
		began := time.Now()
		before, after, err := upgradeOne(c.Context, registry, name, binary)
		if err != nil {
			err = fmt.Errorf("upgrade %s: %w", name, err)
			if rest := names[i+1:]; len(rest) > 0 {
				err = errors.Join(err, fmt.Errorf("not tried any more: %q", rest))
			}
			return err
		}
		_, _ = fmt.Fprintf(c.App.Writer, "%s: %s took over from %s in %s\n", name, after.Version, before.Version, time.Since(began).Round(time.Millisecond))
	}
	return nil
}

// attachments lists the running attachments, oldest first.
func attachments(ctx context.Context, registry *sandbox.Registry) ([]string, error) {
	states, err := registry.List()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, s := range states {
		if describe(ctx, registry, s).Attachment {
			out = append(out, s.Name)
		}
	}
	return slices.Clip(out), nil
}

func upgradeOne(ctx context.Context, registry *sandbox.Registry, name, binary string) (before, after api.Info, err error) {
	ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
	defer cancel()
	socket, err := registry.Socket(name)
	if err != nil {
		return before, after, err
	}
	client := api.Client{Path: socket}
	if err := client.Call(ctx, api.MethodInfo, nil, &before); err != nil {
		return before, after, err
	}
	err = client.Call(ctx, api.MethodUpgrade, api.UpgradeParams{Binary: binary}, &after)
	return before, after, err
}
