package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/registry"
)

func testRegistry(t *testing.T) *registry.Registry {
	t.Helper()
	dir := testutil.ShortDir(t)
	r, err := registry.OpenIn(filepath.Join(dir, "sluice"), os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestNameIsHeldUntilItIsGivenBack(t *testing.T) {
	r := testRegistry(t)
	d, err := r.Claim("web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Claim("web"); !errors.Is(err, registry.ErrNameInUse) || !strings.Contains(err.Error(), `"web"`) {
		t.Errorf("second claim: %v, want ErrNameInUse with the name", err)
	}
	if err := d.WriteState(registry.State{Name: "web", PID: 42, Started: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	if all, err := r.List(); err != nil || len(all) != 1 || all[0].PID != 42 {
		t.Errorf("List: %+v, %v", all, err)
	}
	if s, err := r.Socket("web"); err != nil || s != d.Socket() {
		t.Errorf("Socket: %q, %v", s, err)
	}
	if err := d.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Socket("web"); !errors.Is(err, registry.ErrNoSandbox) {
		t.Errorf("Socket after Remove: %v, want ErrNoSandbox", err)
	}
	d, err = r.Claim("web")
	if err != nil {
		t.Fatalf("claim after Remove: %v", err)
	}
	d.Remove()
}

// leaveStale leaves what a killed monitor leaves: everything but the lock.
func leaveStale(t *testing.T, r *registry.Registry, name string) string {
	t.Helper()
	d, err := r.Claim(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteState(registry.State{Name: name, PID: 1}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.Socket(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d.Lock.Close() // as the kernel does
	return d.Path()
}

func TestRemainsOfAKilledSandboxAreCleanedUp(t *testing.T) {
	t.Run("by ps", func(t *testing.T) {
		r := testRegistry(t)
		path := leaveStale(t, r, "dead")
		if all, err := r.List(); err != nil || len(all) != 0 {
			t.Errorf("List: %v, %v; want none", all, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	})
	t.Run("by a run of that name", func(t *testing.T) {
		r := testRegistry(t)
		leaveStale(t, r, "dead")
		d, err := r.Claim("dead")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Remove()
		if _, err := os.Lstat(d.Socket()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the dead sandbox's socket is still there: %v", err)
		}
	})
}

// Claimers and cleaners run at once: a name never has two owners, and no owner loses its directory.
func TestClaimAndCleanUpDoNotDestroyEachOther(t *testing.T) {
	r := testRegistry(t)
	var owner sync.Mutex
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				if i%4 == 0 {
					if _, err := r.List(); err != nil {
						t.Error(err)
					}
					continue
				}
				d, err := r.Claim("hot")
				if errors.Is(err, registry.ErrNameInUse) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if !owner.TryLock() {
					t.Error("two owners of one name")
					return
				}
				if err := d.WriteState(registry.State{Name: fmt.Sprint(i)}); err != nil {
					t.Errorf("an owner lost its directory: %v", err)
				}
				owner.Unlock()
				if i%2 == 0 {
					d.Lock.Close() // killed
				} else if err := d.Remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestUnsafeRuntimeDirectoriesAreRefused(t *testing.T) {
	uid := os.Geteuid()
	for _, row := range []struct {
		name string
		make func(t *testing.T, path string) int // returns the uid to check for
		want string
	}{
		{"a symbolic link", func(t *testing.T, path string) int {
			testutil.Must(t, os.Mkdir(path+".real", 0o700))
			testutil.Must(t, os.Symlink(path+".real", path))
			return uid
		}, "symbolic link"},
		{"a file", func(t *testing.T, path string) int {
			testutil.Must(t, os.WriteFile(path, nil, 0o600))
			return uid
		}, "not a directory"},
		{"someone else's directory", func(t *testing.T, path string) int {
			if uid != 0 {
				t.Skip("SKIP: only root gives a directory away")
			}
			testutil.Must(t, os.Mkdir(path, 0o700))
			testutil.Must(t, os.Chown(path, 4242, 4242))
			return uid
		}, "belongs to uid 4242, not to 0: set XDG_RUNTIME_DIR to a directory of your own"},
		{"a link of someone else's on the way", func(t *testing.T, path string) int {
			if uid != 0 {
				t.Skip("SKIP: only root gives a link away")
			}
			up := filepath.Dir(path)
			testutil.Must(t, os.Rename(up, up+".real"))
			t.Cleanup(func() { _ = os.RemoveAll(up + ".real") })
			testutil.Must(t, os.Symlink(up+".real", up))
			testutil.Must(t, os.Lchown(up, 4242, 4242))
			return uid
		}, "can be led elsewhere by uid 4242"},
		{"a directory open to others", func(t *testing.T, path string) int {
			testutil.Must(t, os.Mkdir(path, 0o700))
			testutil.Must(t, os.Chmod(path, 0o750))
			return uid
		}, "chmod 700"},
		{"a parent that others can write to", func(t *testing.T, path string) int {
			testutil.Must(t, os.Chmod(filepath.Dir(path), 0o777))
			return uid
		}, "can be replaced by others"},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sluice")
			as := row.make(t, path)
			if _, err := registry.OpenIn(path, as); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got %v, want an error with %q", err, row.want)
			}
		})
	}
}

func TestSymlinkForASandboxIsRefused(t *testing.T) {
	r := testRegistry(t)
	victim := t.TempDir()
	testutil.Must(t, os.WriteFile(filepath.Join(victim, registry.LockFile), []byte("precious"), 0o600))
	testutil.Must(t, os.Symlink(victim, filepath.Join(r.Path, "trap")))
	if _, err := r.Claim("trap"); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("Claim: %v", err)
	}
	if _, err := r.Socket("trap"); err == nil {
		t.Error("Socket followed a symbolic link")
	}
	if all, err := r.List(); err != nil || len(all) != 0 {
		t.Errorf("List: %v, %v", all, err)
	}
	d, err := r.Claim("real")
	testutil.Must(t, err)
	defer d.Remove()
	testutil.Must(t, d.Lock.Close())
	testutil.Must(t, os.Remove(filepath.Join(d.Root, registry.LockFile)))
	testutil.Must(t, os.Symlink(filepath.Join(victim, registry.LockFile), filepath.Join(d.Root, registry.LockFile)))
	if _, err := r.Claim("real"); err == nil {
		t.Error("a lock file that is a symbolic link was followed")
	}
	if b, err := os.ReadFile(filepath.Join(victim, registry.LockFile)); err != nil || string(b) != "precious" {
		t.Errorf("the victim's file is %q, %v", b, err)
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "web-1": true, "A.b_c": true, strings.Repeat("x", registry.MaxNameLen): true,
		"": false, ".": false, "..": false, "-x": false, "a/b": false, "a b": false, "ä": false,
		"a\x00": false, strings.Repeat("x", registry.MaxNameLen+1): false, "_x": false,
	} {
		if err := registry.CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v, want ok=%v", name, err, ok)
		}
	}
	r := testRegistry(t)
	d, name, err := r.ClaimGenerated()
	testutil.Must(t, err)
	defer d.Remove()
	if registry.CheckName(name) != nil || !strings.Contains(name, "-") {
		t.Errorf("generated %q", name)
	}
}

func TestSocketPathThatIsTooLongIsExplained(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 90))
	r, err := registry.OpenIn(dir, os.Geteuid())
	testutil.Must(t, err)
	if _, err := r.Claim("x"); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("got %v, want the cure", err)
	}
}

func TestRuntimeDirPassesOverOneThatIsNotOurs(t *testing.T) {
	mine := t.TempDir()
	for _, row := range []struct {
		uid       int
		xdg, want string
	}{
		{os.Geteuid(), mine, filepath.Join(mine, "sluice")},
		{os.Geteuid() + 7, mine, fmt.Sprintf("/tmp/sluice-%d", os.Geteuid()+7)},
		{0, "", "/run/sluice"},
		{0, "relative", "/run/sluice"},
		{1000, filepath.Join(mine, "missing"), "/tmp/sluice-1000"},
	} {
		if got := registry.RuntimeDir(row.uid, row.xdg); got != row.want {
			t.Errorf("uid %d, XDG_RUNTIME_DIR=%q: got %s, want %s", row.uid, row.xdg, got, row.want)
		}
	}
}

func TestRootFindsWhatNoSessionHasStarted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has a directory beside its session's")
	}
	system, session := testRegistry(t), testRegistry(t)
	claim := func(r *registry.Registry, name string, age time.Duration) {
		d, err := r.Claim(name)
		testutil.Must(t, err)
		testutil.Must(t, d.WriteState(registry.State{Name: name, PID: os.Getpid(), Started: time.Now().Add(-age)}))
		t.Cleanup(func() { testutil.Must(t, d.Remove()) })
	}
	claim(session, "mine", time.Hour)
	claim(system, "pod", 2*time.Hour)
	claim(system, "younger-pod", time.Minute)
	r, err := registry.OpenBoth(session.Path, system.Path, 0)
	testutil.Must(t, err)
	all, err := r.List()
	testutil.Must(t, err)
	var names []string
	for _, s := range all {
		names = append(names, s.Name)
	}
	if strings.Join(names, " ") != "pod mine younger-pod" {
		t.Errorf("it lists %q", names)
	}
	for name, dir := range map[string]string{"mine": session.Path, "pod": system.Path} {
		if got, err := r.Socket(name); err != nil || got != filepath.Join(dir, name, registry.SocketFile) {
			t.Errorf("%s is at %s, %v", name, got, err)
		}
	}
	if _, err := r.Socket("nobody"); !errors.Is(err, registry.ErrNoSandbox) {
		t.Errorf("nobody: %v", err)
	}
	if r, err = registry.OpenBoth(session.Path, filepath.Join(system.Path, "none"), 0); err != nil || r.System != nil {
		t.Errorf("without a system directory: %v, %v", r, err)
	}
}
