package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Main plugins that we run ourselves when sluice is not chained after one. They run in the uplink
// namespace, where their interface belongs: nothing has to be moved, and at CHECK and DEL they find
// what they made. The pod's namespace gets only our device.

// defaultDelegates run when there is neither a main plugin before us nor a `delegate`. The ranges
// are Sluice's own.
var defaultDelegates = delegates{
	json.RawMessage(`{
		"type": "ptp", "ipMasq": true,
		"capabilities": {"ips": true, "dns": true},
		"ipam": {
			"type": "host-local",
			"ranges": [[{"subnet": "10.212.0.0/16"}], [{"subnet": "fd73:6c75:6963:c1::/64"}]],
			"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
		}
	}`),
	json.RawMessage(`{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}`),
}

// chain is the delegates of one call, ready to be run.
type chain struct {
	plugins []delegate
	args    *skel.CmdArgs
	exec    invoke.Exec
	version string
}

type delegate struct {
	Type string
	conf map[string]json.RawMessage
}

// newChain completes the delegates' configurations as a runtime would: name, version,
// and the runtime's values for the capabilities that they declare.
func newChain(c *Config, args *skel.CmdArgs, exec invoke.Exec) (*chain, error) {
	list := c.Delegate
	if len(list) == 0 {
		list = defaultDelegates
	}
	var raw struct {
		RuntimeConfig map[string]json.RawMessage `json:"runtimeConfig"`
	}
	if err := json.Unmarshal(args.StdinData, &raw); err != nil {
		return nil, err
	}
	out := &chain{args: args, exec: exec, version: c.CNIVersion}
	for i, one := range list {
		d := delegate{conf: make(map[string]json.RawMessage)}
		var known struct {
			Type         string          `json:"type"`
			Capabilities map[string]bool `json:"capabilities"`
		}
		if err := errors.Join(json.Unmarshal(one, &d.conf), json.Unmarshal(one, &known)); err != nil || known.Type == "" {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("sluice: delegate %d", i+1), "want a plugin's configuration, with its type")
		}
		d.Type = known.Type
		d.conf["name"], _ = json.Marshal(c.Name)
		d.conf["cniVersion"], _ = json.Marshal(c.CNIVersion)
		given := make(map[string]json.RawMessage)
		for name, on := range known.Capabilities {
			if value, ok := raw.RuntimeConfig[name]; on && ok {
				given[name] = value
			}
		}
		if len(given) > 0 {
			d.conf["runtimeConfig"], _ = json.Marshal(given)
		}
		out.plugins = append(out.plugins, d)
	}
	return out, nil
}

// add runs the delegates in order, each with the result of the one before.
func (c *chain) add(ctx context.Context, netns string) (types.Result, error) {
	var result types.Result
	for _, d := range c.plugins {
		stdin, err := d.stdin(result)
		if err != nil {
			return nil, err
		}
		path, err := c.find(d.Type)
		if err != nil {
			return nil, err
		}
		next, err := invoke.ExecPluginWithResult(ctx, path, stdin, c.env("ADD", netns), c.exec)
		if err != nil {
			return nil, fmt.Errorf("the delegate %s: %w", d.Type, err)
		}
		result = next
	}
	return result, nil
}

// run runs DEL, CHECK, GC or STATUS of all delegates; DEL in reverse. CHECK and STATUS stop at the
// first error. The others go on, because each delegate cleans up after itself.
func (c *chain) run(ctx context.Context, verb, netns string, prev types.Result) error {
	list := slices.Clone(c.plugins)
	if verb == "DEL" {
		slices.Reverse(list)
	}
	var errs []error
	for _, d := range list {
		stdin, err := d.stdin(prev)
		if err == nil {
			var path string
			if path, err = c.find(d.Type); err == nil {
				err = invoke.ExecPluginWithoutResult(ctx, path, stdin, c.env(verb, netns), c.exec)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("the delegate %s: %w", d.Type, err))
			if verb == "CHECK" || verb == "STATUS" {
				break
			}
		}
	}
	return errors.Join(errs...)
}

func (d delegate) stdin(prev types.Result) ([]byte, error) {
	conf := make(map[string]any, len(d.conf)+1)
	for k, v := range d.conf {
		conf[k] = v
	}
	if prev != nil {
		conf["prevResult"] = prev
	}
	return json.Marshal(conf)
}

func (c *chain) find(plugin string) (string, error) {
	exec := c.exec
	if exec == nil {
		exec = &invoke.DefaultExec{RawExec: &invoke.RawExec{}}
	}
	path, err := exec.FindInPath(plugin, splitPath(c.args.Path))
	if err != nil {
		return "", fmt.Errorf("the delegate %s: %w", plugin, err)
	}
	return path, nil
}

func (c *chain) env(verb, netns string) *invoke.Args {
	return &invoke.Args{
		Command: verb, ContainerID: c.args.ContainerID, NetNS: netns, IfName: c.args.IfName,
		PluginArgsStr: c.args.Args, Path: c.args.Path,
	}
}

// withAttachments adds GC's list of valid attachments.
func (c *chain) withAttachments(valid []types.GCAttachment) {
	b, _ := json.Marshal(valid)
	for _, d := range c.plugins {
		d.conf["cni.dev/valid-attachments"] = b
	}
}

// inPod rewrites the delegates' result for the runtime: their interface is the pod's.
func inPod(r types.Result, uplinkNS, pod string) (*types100.Result, error) {
	out, err := types100.NewResultFromResult(r)
	if err != nil {
		return nil, fmt.Errorf("the delegates' result: %w", err)
	}
	for _, i := range out.Interfaces {
		if i.Sandbox == uplinkNS {
			i.Sandbox = pod
		}
	}
	return out, nil
}
