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

// What was changed in an attachment while it ran, for a monitor that comes after one
// that was killed: the policy and the tunables that were set. Whoever starts monitors
// names the file (AttachmentConfig.Keep) and removes it with the attachment.
//
// A policy is kept before the worker is told of it: once it may be in force anywhere, a
// monitor that is killed leaves it to its successor, and never an older one. A tunable is
// kept once the worker has taken it, and before the client is told.

// kept is the file's content. A field that was never set is missing, and what the
// monitor is started with holds.
type kept struct {
	Policy     policy.Source     `json:"policy,omitzero"`
	Generation uint64            `json:"generation,omitempty"` // of Policy; 0 without one
	Sysctls    map[string]string `json:"sysctls,omitempty"`
}

// decodeKept reads the file's content, which says something, and all that it says.
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

// keepPolicy has the next monitor start with a policy that the one before, which is gone,
// did not take.
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

// remember takes over what is kept, at the start of a monitor.
func (m *attachment) remember() error {
	if m.cfg.Keep == "" {
		return nil
	}
	k, err := readKept(m.cfg.Keep)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		// Not knowing what was set last, the pod must not get what was set before.
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

// keep has f make a change in what is kept, in one step. Called with change held.
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
