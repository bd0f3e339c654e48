package guest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/cover"
	"sluice.dev/sluice/sandbox/internal/explain"
)

// cover makes the mounts that CMD cannot undo, and returns how many sockets they hide.
func (s *stage) cover() (int, error) {
	cfg := &s.spec.Config
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("making the mounts private: %w", explain.ExplainInside(err))
	}
	c := &cover.Coverer{Allowed: cfg.AllowSockets, Left: cover.MaxCopied}
	for _, dir := range cfg.WithoutSockets {
		if err := c.Replace(dir); err != nil {
			return 0, fmt.Errorf("covering the host's sockets in %s: %w", dir, err)
		}
	}
	for _, path := range cfg.HideSockets {
		if err := c.HideFile(path); err != nil {
			return 0, fmt.Errorf("covering the socket %s: %w", path, err)
		}
	}
	for _, dir := range cfg.HideDirs {
		if err := cover.Hide(dir); err != nil {
			return 0, fmt.Errorf("hiding %s: %w", dir, err)
		}
	}
	for _, path := range cfg.ReadOnly {
		if err := cover.ReadOnly(path); err != nil {
			return 0, fmt.Errorf("making %s read-only: %w", path, err)
		}
	}
	return c.Sockets, nil
}
