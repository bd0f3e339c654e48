package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"sluice.dev/sluice/cni/uplink"
)

// Versions are those of the CNI specification that the plugin speaks.
var Versions = version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")

// Plugin answers the verbs. Launcher is required.
type Plugin struct {
	Launcher Launcher
	// Exec runs delegates; nil is CNI's own.
	Exec invoke.Exec
	// Stderr receives messages that no verb's result can carry, and that runtimes log; nil is
	// os.Stderr.
	Stderr io.Writer
	// Reached, if set, is called after each step of ADD and DEL with its name from uplink/undo.go
	// and del.go. If it returns an error, the verb fails there. It is for tests.
	Reached func(step string) error
}

// verbTimeout bounds a verb; runtimes give up after a few minutes.
const verbTimeout = 60 * time.Second

// undoTimeout bounds the rollback of a failed verb, whose own time is over.
const undoTimeout = 20 * time.Second

// Funcs returns the verbs for skel.
func (p *Plugin) Funcs() skel.CNIFuncs {
	verb := func(f func(context.Context, *Config, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error {
			c, err := loadConfig(args.StdinData)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), verbTimeout)
			defer cancel()
			return f(ctx, c, args)
		}
	}
	return skel.CNIFuncs{
		Add: verb(func(ctx context.Context, c *Config, args *skel.CmdArgs) error {
			result, err := p.add(ctx, c, args)
			if err != nil {
				return err
			}
			return types.PrintResult(result, c.CNIVersion)
		}),
		Del:    verb(p.del),
		Check:  verb(p.check),
		GC:     verb(p.gc),
		Status: verb(p.status),
	}
}

func (p *Plugin) reached(step string) error {
	if p.Reached == nil {
		return nil
	}
	return p.Reached(step)
}

// resultOf decodes a recorded result in the version in which it was written.
func resultOf(raw json.RawMessage, cniVersion string) (types.Result, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var has struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(raw, &has); err == nil && has.CNIVersion != "" {
		cniVersion = has.CNIVersion
	}
	r, err := version.NewResult(cniVersion, raw)
	if err != nil {
		return nil, fmt.Errorf("the recorded result: %w", err)
	}
	return r, nil
}

// asResult returns a previous result in the version that delegates are given.
func asResult(r *types100.Result, cniVersion string) (types.Result, error) {
	if r == nil {
		return nil, nil
	}
	return r.GetAsVersion(cniVersion)
}

func splitPath(list string) []string { return filepath.SplitList(list) }

// sameAsOurs reports whether a namespace is the one that this process is in.
func sameAsOurs(netns string) (bool, error) {
	id, err := uplink.NetnsID(netns)
	if err != nil {
		return false, err
	}
	own, err := uplink.NetnsID("/proc/" + fmt.Sprint(os.Getpid()) + "/ns/net")
	return id == own, err
}
