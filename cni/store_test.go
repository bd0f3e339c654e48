package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice.dev/sluice/internal/testutil"
)

// Records say what DEL removes, as root: nobody else may have a hand in where they are.
func TestAStateDirectoryThatOthersCouldReplaceIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIP: only root gives files away")
	}
	const stranger = 4242
	for _, row := range []struct {
		name string
		make func(t *testing.T, base string) // base/state is asked for
		want string
	}{
		{"it is not there", func(*testing.T, string) {}, ""},
		{"it may be read", func(t *testing.T, b string) { testutil.Must(t, os.Mkdir(b+"/state", 0o755)) }, ""},
		{"another made it first", func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/state", 0o700))
			testutil.Must(t, os.Chown(b+"/state", stranger, stranger))
		}, "belongs to uid 4242"},
		{"it is a link", func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/real", 0o700))
			testutil.Must(t, os.Symlink(b+"/real", b+"/state"))
		}, "symbolic link"},
		{"its attachments are a link", func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/state", 0o700))
			testutil.Must(t, os.Symlink("/etc", b+"/state/attachments"))
		}, "symbolic link"},
		{"its namespaces are another's", func(t *testing.T, b string) {
			testutil.Must(t, os.MkdirAll(b+"/state/netns", 0o700))
			testutil.Must(t, os.Chown(b+"/state/netns", stranger, stranger))
		}, "belongs to uid 4242"},
		{"a group may write to it", func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/state", 0o700))
			testutil.Must(t, os.Chmod(b+"/state", 0o770))
		}, "chmod 700"},
		{"what it is in is another's", func(t *testing.T, b string) { testutil.Must(t, os.Chown(b, stranger, stranger)) }, "can be replaced by uid 4242"},
		{"what it is in is anybody's to write", func(t *testing.T, b string) { testutil.Must(t, os.Chmod(b, 0o777)) }, "can be replaced by others"},
	} {
		t.Run(row.name, func(t *testing.T) {
			base := filepath.Join(t.TempDir(), "base")
			testutil.Must(t, os.Mkdir(base, 0o755))
			row.make(t, base)
			_, err := openStore(filepath.Join(base, "state"))
			if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
				t.Errorf("got %v, want %q", err, row.want)
			}
		})
	}
}
