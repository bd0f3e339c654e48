package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The policy that an attachment starts with. Its text is only carried here; whoever
// launches the monitor knows what it means.

// closedPolicy is that of a pod without one under failClosed.
const closedPolicy = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: closed}
spec: {defaultAction: drop}
`

// maxPolicy bounds a policy's text, in bytes.
const maxPolicy = 1 << 20

// policyFor finds a pod's policy: its own, its namespace's, the configuration's. An
// empty text is the default of a pod without policies.
func (c *Config) policyFor(pod Pod) (name string, text []byte, err error) {
	if c.PolicyDir != "" && pod.Namespace != "" {
		for _, part := range []string{pod.Namespace, pod.Name} {
			if strings.ContainsRune(part, filepath.Separator) || strings.HasPrefix(part, ".") {
				return "", nil, fmt.Errorf("the pod's name %q/%q is none that policyDir can hold", pod.Namespace, pod.Name)
			}
		}
		paths := []string{filepath.Join(c.PolicyDir, pod.Namespace+".yaml")}
		if pod.Name != "" {
			paths = append([]string{filepath.Join(c.PolicyDir, pod.Namespace, pod.Name+".yaml")}, paths...)
		}
		for _, path := range paths {
			text, err := readPolicy(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return path, text, err
		}
	}
	switch {
	case c.Policy.Path != "":
		text, err := readPolicy(c.Policy.Path)
		return c.Policy.Path, text, err
	case c.Policy.Text != nil:
		return "policy of network " + c.Name, c.Policy.Text, nil
	case c.FailClosed:
		return "closed", []byte(closedPolicy), nil
	}
	return "", nil, nil
}

func readPolicy(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read the policy: %w", err)
	}
	if fi.Size() > maxPolicy {
		return nil, fmt.Errorf("read the policy: %s has %d bytes, more than %d", path, fi.Size(), maxPolicy)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the policy: %w", err)
	}
	return text, nil
}

// limits are the configuration's with the runtime's bandwidth, which goes first: it is
// this pod's own.
func (c *Config) limits() (json.RawMessage, error) {
	b := c.RuntimeConfig.Bandwidth
	if b == nil || b.EgressRate == 0 && b.IngressRate == 0 {
		return c.Limits, nil
	}
	all := make(map[string]json.RawMessage)
	if len(c.Limits) > 0 {
		if err := json.Unmarshal(c.Limits, &all); err != nil {
			return nil, fmt.Errorf("limits: want an object: %w", err)
		}
	}
	for name, rate := range map[string]uint64{"egressBandwidth": b.EgressRate, "ingressBandwidth": b.IngressRate} {
		if rate > 0 {
			all[name] = strconv.AppendQuote(nil, strconv.FormatUint(rate, 10))
		}
	}
	return json.Marshal(all)
}
