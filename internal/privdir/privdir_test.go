package privdir

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

// stranger is the uid of another user, who made something first.
const stranger = 4242

func TestWhatCouldBeAnothersIsRefused(t *testing.T) {
	me := os.Geteuid()
	for _, row := range []struct {
		name string
		root bool                            // changing owners requires root
		make func(t *testing.T, base string) // base is ours, 0755, and the test asks for its child "dir"
		path string
		want string
	}{
		{"nothing is there", false, func(*testing.T, string) {}, "dir", ""},
		{"ours is there", false, func(t *testing.T, b string) { testutil.Must(t, os.Mkdir(b+"/dir", 0o700)) }, "dir", ""},
		{"another made it first", true, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/dir", 0o700))
			testutil.Must(t, os.Chown(b+"/dir", stranger, stranger))
		}, "dir", "belongs to uid 4242"},
		{"a link to ours", false, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/real", 0o700))
			testutil.Must(t, os.Symlink(b+"/real", b+"/dir"))
		}, "dir", "symbolic link"},
		{"a link to nowhere", false, func(t *testing.T, b string) { testutil.Must(t, os.Symlink(b+"/real", b+"/dir")) }, "dir", "symbolic link"},
		{"a file", false, func(t *testing.T, b string) { testutil.Must(t, os.WriteFile(b+"/dir", nil, 0o600)) }, "dir", "not a directory"},
		{"ours is open to the group", false, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/dir", 0o700))
			testutil.Must(t, os.Chmod(b+"/dir", 0o750))
		}, "dir", "chmod 700"},
		{"the parent is anybody's to write", false, func(t *testing.T, b string) { testutil.Must(t, os.Chmod(b, 0o777)) }, "dir", "can be replaced by others"},
		{"the parent is the group's to write", false, func(t *testing.T, b string) { testutil.Must(t, os.Chmod(b, 0o775)) }, "dir", "can be replaced by others"},
		{"the parent is anybody's, and sticky", false, func(t *testing.T, b string) { testutil.Must(t, os.Chmod(b, 0o777|os.ModeSticky)) }, "dir", ""},
		{"the parent is another's, and sticky", true, func(t *testing.T, b string) {
			testutil.Must(t, os.Chmod(b, 0o777|os.ModeSticky))
			testutil.Must(t, os.Chown(b, stranger, stranger))
		}, "dir", "can be replaced by uid 4242"},
		{"an ancestor is another's", true, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/up", 0o755))
			testutil.Must(t, os.Mkdir(b+"/up/mid", 0o755))
			testutil.Must(t, os.Chown(b+"/up", stranger, stranger))
		}, "up/mid/dir", "can be replaced by uid 4242"},
		{"an ancestor is anybody's to write", false, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/up", 0o755))
			testutil.Must(t, os.Mkdir(b+"/up/mid", 0o755))
			testutil.Must(t, os.Chmod(b+"/up", 0o777))
		}, "up/mid/dir", "can be replaced by others"},
		{"another's link on the way, to what is ours", true, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/real", 0o755))
			testutil.Must(t, os.Symlink(b+"/real", b+"/up"))
			testutil.Must(t, os.Lchown(b+"/up", stranger, stranger))
		}, "up/dir", "can be led elsewhere by uid 4242"},
		{"our own link on the way", false, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/real", 0o755))
			testutil.Must(t, os.Symlink("real", b+"/up"))
		}, "up/dir", ""},
		{"our own link to the root's way", false, func(t *testing.T, b string) {
			testutil.Must(t, os.Mkdir(b+"/real", 0o755))
			testutil.Must(t, os.Symlink(b+"/./real/../real", b+"/up"))
		}, "up/dir", ""},
		{"a link to itself on the way", false, func(t *testing.T, b string) { testutil.Must(t, os.Symlink("up", b+"/up")) }, "up/dir", "too many levels"},
		{"a file on the way", false, func(t *testing.T, b string) { testutil.Must(t, os.WriteFile(b+"/up", nil, 0o600)) }, "up/dir", "not a directory"},
		{"no parent", false, func(*testing.T, string) {}, "up/dir", "no such file"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.root && me != 0 {
				t.Skip("SKIP: only root gives files away")
			}
			base := filepath.Join(t.TempDir(), "base")
			testutil.Must(t, os.Mkdir(base, 0o755))
			testutil.Must(t, os.Chmod(base, 0o755))
			row.make(t, base)
			before := testutil.Descriptors(t, os.Getpid())
			err := Make(filepath.Join(base, row.path), me, 0o077)
			switch {
			case row.want == "" && err != nil, row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)):
				t.Errorf("got %v, want %q", err, row.want)
			}
			if after := testutil.Descriptors(t, os.Getpid()); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
			if row.want != "" {
				return
			}
			var st unix.Stat_t
			testutil.Must(t, unix.Stat(filepath.Join(base, row.path), &st))
			if st.Mode&0o777 != 0o700 || int(st.Uid) != me {
				t.Errorf("mode %o of uid %d", st.Mode, st.Uid)
			}
		})
	}
}

func TestMakeAllMakesTheWay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a/b/c")
	testutil.Must(t, MakeAll(path, os.Geteuid(), 0o022))
	testutil.Must(t, os.Chmod(path, 0o755))
	testutil.Must(t, MakeAll(path, os.Geteuid(), 0o022))
	testutil.Must(t, os.Chmod(path, 0o775))
	var mode *ModeError
	if err := MakeAll(path, os.Geteuid(), 0o022); !errors.As(err, &mode) || mode.Mode != 0o775 {
		t.Errorf("got %v", err)
	}
	for _, bad := range []string{"relative", "", "/", "/tmp/../x", "/tmp/x/"} {
		if err := MakeAll(bad, os.Geteuid(), 0o022); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
