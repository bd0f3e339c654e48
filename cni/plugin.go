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
	// Stderr is for what no verb's result can say, and runtimes log; nil is os.Stderr.
	Stderr io.Writer
	// Reached, if set, is told each step of ADD and DEL once it is done, by its name in
	// uplink/undo.go and del.go; with an error the verb fails there. It is for tests.
	Reached func(step string) error
}

// verbTimeout bounds a verb; runtimes give up after minutes at the latest.
const verbTimeout = 60 * time.Second

// undoTimeout bounds what is done after a verb has failed, its own time being over.
const undoTimeout = 20 * time.Second

// Funcs are the verbs for skel.
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

// resultOf reads a recorded result back, in the version that it was written in.
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

// asResult is a previous result in the version that delegates are told.
func asResult(r *types100.Result, cniVersion string) (types.Result, error) {
	if r == nil {
		return nil, nil
	}
	return r.GetAsVersion(cniVersion)
}

func splitPath(list string) []string { return filepath.SplitList(list) }

// sameAsOurs says whether a namespace is the one that this process is in.
func sameAsOurs(netns string) (bool, error) {
	id, err := uplink.NetnsID(netns)
	if err != nil {
		return false, err
	}
	own, err := uplink.NetnsID("/proc/" + fmt.Sprint(os.Getpid()) + "/ns/net")
	return id == own, err
}
