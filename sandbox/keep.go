package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
)

// Keeps the policy and tunables that were set while an attachment ran, for the monitor that follows
// a killed one. The launcher names the file (AttachmentConfig.Keep) and removes it with the
// attachment.
//
// A policy is kept before the worker is told of it, so a killed monitor never leaves its successor
// an older policy than one that may have been in force. A tunable is kept once the worker has
// accepted it, and before the client is told.

// kept is the file's content. A field that was never set is absent, and the monitor's start value
// holds.
type kept struct {
	Policy     policy.Source     `json:"policy,omitzero"`
	Generation uint64            `json:"generation,omitempty"` // of Policy; 0 without one
	Sysctls    map[string]string `json:"sysctls,omitempty"`
}

// decodeKept decodes the file's content, which must not be empty or have unknown fields.
func decodeKept(b []byte) (kept, error) {
	var k kept
	if len(bytes.TrimSpace(b)) == 0 {
		return k, errors.New("the file is empty")
	}
	if err := api.DecodeStrict(b, &k); err != nil {
		return k, err
	}
	switch {
	case k.Policy.IsZero() && k.Generation != 0:
		return k, errors.New("a policy was set, which the file lacks")
	case !k.Policy.IsZero() && k.Generation == 0:
		return k, errors.New("a policy is there that was never set")
	case k.Policy.IsZero() && len(k.Sysctls) == 0:
		return k, errors.New("the file says nothing")
	}
	return k, nil
}

// readKept reads the file; the error is fs.ErrNotExist where nothing was ever kept.
func readKept(path string) (kept, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return kept{}, err
	}
	return decodeKept(b)
}

// write replaces the file in one step.
func (k kept) write(path string) error {
	b, err := json.Marshal(k)
	if err == nil {
		next := path + ".new"
		if err = os.WriteFile(next, b, 0o600); err == nil {
			err = os.Rename(next, path)
		}
		if err != nil {
			_ = os.Remove(next)
		}
	}
	if err != nil {
		return fmt.Errorf("keep the settings: %w", err)
	}
	return nil
}

// keepPolicy makes the next monitor start with a policy that the previous one, now gone, did not
// accept.
func keepPolicy(path string, d policy.Document) error {
	k, err := readKept(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the settings that were kept: %w", err)
	}
	if old, given := k.Policy.Document(); given && old == d {
		return nil // it was kept, but not in force yet
	}
	k.Policy, k.Generation = policy.Given(d), k.Generation+1
	return k.write(path)
}

// remember restores the kept settings when a monitor starts.
func (m *attachment) remember() error {
	if m.cfg.Keep == "" {
		return nil
	}
	k, err := readKept(m.cfg.Keep)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		// If the last setting is unknown, the pod must not get an older one.
		return fmt.Errorf("read the settings that were kept: %w: remove %s to start with those of the configuration", err, m.cfg.Keep)
	}
	if !k.Policy.IsZero() {
		m.rules.Policy = k.Policy
		m.log.Infof("monitor", "policy %s, which was set before, is in force", k.Policy.Name())
	}
	m.generation = k.Generation
	if k.Sysctls != nil {
		m.sysctls = k.Sysctls
	}
	return nil
}

// keep applies f to the kept settings in one step. Called with change held.
func (m *attachment) keep(f func(*kept)) error {
	if m.cfg.Keep == "" {
		return nil
	}
	k := kept{Generation: m.generation, Sysctls: m.sysctls}
	if m.generation > 0 {
		k.Policy = m.rules.Policy
	}
	f(&k)
	return k.write(m.cfg.Keep)
}
