// Command sluice-cni is the CNI plugin: a runtime calls it with the verb in the environment and the
// configuration on standard input. When a person calls it, it installs itself into a network
// configuration list or says what it is.
//
// The binary is also the monitor and the worker of each attachment, so that one file
// is all a node needs.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/cmd/internal/cmdline"
	"sluice.dev/sluice/cni"
	"sluice.dev/sluice/sandbox"
)

func init() {
	// As in every plugin, only threads other than the main one change their namespace, so that
	// /proc/PID/ns/net stays the host's.
	if len(os.Args) == 1 {
		runtime.LockOSThread()
	}
}

func main() {
	sandbox.Init(cmdline.Version())
	if os.Getenv("CNI_COMMAND") != "" {
		plugin := &cni.Plugin{Launcher: launcher{}, Reached: reached}
		skel.PluginMainFuncs(plugin.Funcs(), cni.Versions, "sluice-cni "+cmdline.Version())
		return
	}
	if err := app().Run(os.Args); err != nil {
		fmt.Fprintf(os.Stderr, "sluice-cni: %v\n", err)
		os.Exit(1)
	}
}

func app() *cli.App {
	return &cli.App{
		Name:        "sluice-cni",
		Usage:       "put pods and containers behind sluice, as a CNI plugin",
		UsageText:   "sluice-cni install --conflist /etc/cni/net.d/10-main.conflist",
		Description: "A container runtime calls it without arguments, with CNI_COMMAND in the environment. People call it to install it.",
		Version:     cmdline.Version(),
		HideVersion: true,
		Suggest:     true,
		// For `sluice-cni completion`.
		EnableBashCompletion: true,
		ExitErrHandler:       func(*cli.Context, error) {},
		Commands: []*cli.Command{
			{
				Name: "install", Usage: "add sluice to a network configuration list",
				UsageText: `sluice-cni install --conflist /etc/cni/net.d/10-main.conflist
sluice-cni install --conflist FILE --config keys.json --bin-dir DIR`,
				Description: "Adds itself as the last plugin of the list, in one step; a list that has it stays as it is. Switches CHECK\n" +
					"off in the list, because plugins before sluice look in the container for what sluice has moved.",
				Flags: []cli.Flag{
					conflistFlag(),
					&cli.StringFlag{Name: "config", Usage: "`FILE` with the plugin's own configuration, as JSON"},
					&cli.StringFlag{Name: "bin-dir", Usage: "also copy this binary into `DIR`, in which the runtime looks for plugins"},
				},
				Action: func(c *cli.Context) error {
					if err := noArguments(c); err != nil {
						return err
					}
					return install(c.String("conflist"), c.String("config"), c.String("bin-dir"))
				},
			},
			{
				Name: "uninstall", Usage: "remove sluice from a network configuration list",
				UsageText:   "sluice-cni uninstall --conflist /etc/cni/net.d/10-main.conflist",
				Description: "Attached containers stay attached until the runtime deletes them: keep the binary until then.",
				Flags:       []cli.Flag{conflistFlag()},
				Action: func(c *cli.Context) error {
					if err := noArguments(c); err != nil {
						return err
					}
					return cni.Uninstall(c.String("conflist"))
				},
			},
			{
				Name: "version", Usage: "print the version", UsageText: "sluice-cni version",
				Action: func(c *cli.Context) error {
					fmt.Println(cmdline.Version())
					return nil
				},
			},
			cmdline.CompletionCommand("sluice-cni"),
			cmdline.ReferenceCommand(),
		},
	}
}

func conflistFlag() cli.Flag {
	return &cli.StringFlag{Name: "conflist", Required: true, Usage: "`FILE` that the runtime reads, such as /etc/cni/net.d/10-main.conflist (required)"}
}

func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("%s takes no arguments, only flags", c.Command.Name)
	}
	return nil
}

// install adds the plugin to a list. It copies the binary first, because a runtime follows its
// configuration at once.
func install(conflist, config, binDir string) error {
	var keys []byte
	if config != "" {
		var err error
		if keys, err = os.ReadFile(config); err != nil {
			return fmt.Errorf("read the plugin's configuration: %w", err)
		}
	}
	if binDir != "" {
		self, err := os.Executable()
		if err != nil {
			return errors.New("find this binary: it was deleted; start it from where it is now")
		}
		if err := cni.InstallBinary(self, binDir); err != nil {
			return err
		}
	}
	return cni.Install(conflist, keys)
}
