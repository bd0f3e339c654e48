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

	"sluice.dev/sluice/policy"
)

// The policy that an attachment starts with. A file, directory or object named in the configuration
// counts as a given policy: if it is missing, empty or incompletely readable, ADD fails, whatever
// failClosed says. A pod is without a policy only if the configuration names none or policyDir has
// nothing for the pod.

// closedPolicy is the policy of a pod without one under failClosed.
const closedPolicy = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: closed}
spec: {defaultAction: drop}
`

// policyFor finds a pod's policy: its own, its namespace's, the configuration's, or the default for
// when none is given.
func (c *Config) policyFor(pod Pod) (policy.Source, error) {
	d, found, err := c.policyDocument(pod)
	switch {
	case err != nil:
		return policy.Source{}, err
	case found:
		return policy.Given(d), nil
	}
	return policy.NotGiven(policy.Builtin{Pod: true}), nil
}

// policyDocument finds the document that applies to a pod, if there is one.
func (c *Config) policyDocument(pod Pod) (d policy.Document, found bool, err error) {
	if c.PolicyDir != "" {
		if d, found, err := policyInDir(c.PolicyDir, pod); found || err != nil {
			return d, found, err
		}
	}
	switch {
	case c.Policy.Path != "":
		d, err = policy.ReadDocumentFile(c.Policy.Path)
	case c.Policy.Text != nil:
		d, err = policy.NewDocument("policy of network "+c.Name, c.Policy.Text)
	case c.FailClosed:
		d, err = policy.NewDocument("closed", []byte(closedPolicy))
	default:
		return policy.Document{}, false, nil
	}
	return d, err == nil, err
}

// policyInDir reads NAMESPACE/NAME.yaml or NAMESPACE.yaml. Only the last element of a path may be
// absent: a missing directory or a dangling link is an error, or else removing it would remove the
// policies with it.
func policyInDir(dir string, pod Pod) (d policy.Document, found bool, err error) {
	for _, part := range []string{pod.Namespace, pod.Name} {
		if strings.ContainsRune(part, filepath.Separator) || strings.HasPrefix(part, ".") {
			return d, false, fmt.Errorf("the pod's name %q/%q is none that policyDir can hold", pod.Namespace, pod.Name)
		}
	}
	if err := isDirectory(dir); err != nil {
		return d, false, fmt.Errorf("policyDir: %w", err)
	}
	if pod.Namespace == "" {
		return d, false, nil
	}
	paths := []string{filepath.Join(dir, pod.Namespace+".yaml")}
	own := filepath.Join(dir, pod.Namespace)
	if there, err := exists(own); err != nil {
		return d, false, fmt.Errorf("policyDir: %w", err)
	} else if there && pod.Name != "" {
		if err := isDirectory(own); err != nil {
			return d, false, fmt.Errorf("policyDir: %w", err)
		}
		paths = append([]string{filepath.Join(own, pod.Name+".yaml")}, paths...)
	}
	for _, path := range paths {
		there, err := exists(path)
		if err != nil {
			return d, false, fmt.Errorf("policyDir: %w", err)
		}
		if there {
			d, err := policy.ReadDocumentFile(path)
			return d, err == nil, err
		}
	}
	return d, false, nil
}

// exists reports whether there is anything at path, even a dangling link.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func isDirectory(path string) error {
	fi, err := os.Stat(path)
	if err == nil && !fi.IsDir() {
		err = fmt.Errorf("%s is not a directory", path)
	}
	return err
}

// limits returns the configuration's limits with the runtime's bandwidth, which takes precedence
// because it is specific to this pod.
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
