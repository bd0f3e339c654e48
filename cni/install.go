package cni

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"sluice.dev/sluice/cni/conflist"
)

// Install adds Sluice to the end of a conflist, so that plugins before it find the main plugin's
// interface where they expect it. keys are further keys of its configuration, a JSON object;
// without any, a list that already has Sluice is left unchanged.
func Install(path string, keys []byte) error {
	return conflist.Add(path, keys, func(own json.RawMessage) error {
		_, err := loadConfig(own)
		return err
	})
}

// Uninstall removes Sluice from a conflist; it is no error if it is not in it.
func Uninstall(path string) error { return conflist.Remove(path) }

// InstallBinary copies the binary at path into dir in one step: running attachments keep theirs.
func InstallBinary(path, dir string) error {
	src, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("install the binary: %w", err)
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return fmt.Errorf("install the binary: %w", err)
	}
	to := filepath.Join(dir, conflist.PluginType)
	if there, err := os.Stat(to); err == nil && os.SameFile(fi, there) {
		return nil
	}
	if err := conflist.ReplaceFile(to, src, fi); err != nil {
		return fmt.Errorf("install the binary: %w", err)
	}
	return nil
}
