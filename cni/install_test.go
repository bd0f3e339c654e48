package cni

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice.dev/sluice/cni/conflist"
	"sluice.dev/sluice/internal/testutil"
)

const someList = `{
  "cniVersion": "1.0.0",
  "cniVersions": [
    "1.0.0",
    "1.1.0"
  ],
  "name": "main",
  "future": {
    "key": 1
  },
  "plugins": [
    {
      "type": "ptp",
      "unknown": 1.50
    },
    {
      "type": "portmap"
    }
  ]
}
`

func conflistFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "10-main.conflist")
	testutil.Must(t, os.WriteFile(path, []byte(text), 0o640))
	return path
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	testutil.Must(t, err)
	return string(b)
}

func TestInstallAndUninstallLeaveTheListAsItWas(t *testing.T) {
	path := conflistFile(t, someList)
	testutil.Must(t, Install(path, []byte(`{"mode": "tun"}`)))
	installed := contents(t, path)
	var l struct {
		DisableCheck bool
		Plugins      []map[string]any
	}
	testutil.Must(t, json.Unmarshal([]byte(installed), &l))
	if len(l.Plugins) != 3 || l.Plugins[2]["type"] != conflist.PluginType || l.Plugins[2]["mode"] != "tun" || !l.DisableCheck {
		t.Fatalf("installed as %s", installed)
	}
	if !strings.Contains(installed, `"unknown": 1.50`) {
		t.Error("the text of another plugin has changed")
	}
	testutil.Must(t, Install(path, nil)) // again, with nothing new to say
	if contents(t, path) != installed {
		t.Errorf("a second install changed the list to %s", contents(t, path))
	}
	testutil.Must(t, Install(path, []byte(`{"mode": "tap"}`)))
	if s := contents(t, path); strings.Contains(s, "tun") || strings.Count(s, conflist.PluginType) != 1 {
		t.Errorf("an install with other keys made %s", s)
	}
	testutil.Must(t, Uninstall(path))
	if contents(t, path) != someList {
		t.Errorf("after uninstall the list is %s", contents(t, path))
	}
	testutil.Must(t, Uninstall(path))
	fi, err := os.Stat(path)
	testutil.Must(t, err)
	if fi.Mode().Perm() != 0o640 {
		t.Errorf("the list's mode is %#o", fi.Mode().Perm())
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	testutil.Must(t, err)
	if len(entries) != 1 {
		t.Errorf("left beside the list: %v", entries)
	}
}

func TestInstallKeepsWhatOthersSwitchedOff(t *testing.T) {
	path := conflistFile(t, `{"name": "x", "cniVersion": "1.0.0", "disableCheck": true, "plugins": [{"type": "ptp"}]}`)
	testutil.Must(t, Install(path, nil))
	testutil.Must(t, Uninstall(path))
	if !strings.Contains(contents(t, path), `"disableCheck": true`) {
		t.Errorf("uninstall has taken away what it did not set: %s", contents(t, path))
	}
}

func TestBandwidthIsDeclaredByOne(t *testing.T) {
	for list, want := range map[string]bool{
		`{"name": "x", "plugins": [{"type": "ptp"}]}`:                        true,
		`{"name": "x", "plugins": [{"type": "ptp"}, {"type": "bandwidth"}]}`: false,
	} {
		path := conflistFile(t, list)
		testutil.Must(t, Install(path, nil))
		if got := strings.Contains(contents(t, path), `"bandwidth": true`); got != want {
			t.Errorf("installed into %s, sluice declares it: %v", list, got)
		}
	}
}

func TestInstallFollowsALink(t *testing.T) {
	path := conflistFile(t, someList)
	link := path + ".link"
	testutil.Must(t, os.Symlink(path, link))
	testutil.Must(t, Install(link, nil))
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Error("the link is none any more")
	}
	if !strings.Contains(contents(t, path), conflist.PluginType) {
		t.Error("what the link leads to was not changed")
	}
}

func TestInstallRefuses(t *testing.T) {
	for _, row := range []struct{ name, list, keys, says string }{
		{"what is no JSON", `{`, "", "not a network configuration list"},
		{"what is no object", `[]`, "", "want a JSON object"},
		{"a single configuration", `{"type": "ptp"}`, "", "no plugins"},
		{"a list without a main plugin", `{"plugins": []}`, "", "after a main plugin"},
		{"keys that are not ours", someList, `{"polcy": 1}`, "polcy"},
		{"keys that are the list's", someList, `{"name": "x"}`, "the list's"},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := conflistFile(t, row.list)
			if err := Install(path, []byte(row.keys)); err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("error %v, want one that says %q", err, row.says)
			}
			if contents(t, path) != row.list {
				t.Error("the list has changed")
			}
		})
	}
	if err := Install(filepath.Join(t.TempDir(), "none"), nil); err == nil {
		t.Error("a list that is not there is no error")
	}
}

func TestTheBinaryIsReplacedInOneStep(t *testing.T) {
	dir := t.TempDir()
	old, err := os.Create(filepath.Join(dir, conflist.PluginType))
	testutil.Must(t, err)
	defer old.Close()
	testutil.Must(t, InstallBinary("/proc/self/exe", dir))
	fi, err := os.Stat(filepath.Join(dir, conflist.PluginType))
	testutil.Must(t, err)
	if before, _ := old.Stat(); os.SameFile(before, fi) {
		t.Error("the old binary was written over")
	}
	if fi.Mode().Perm()&0o111 == 0 || fi.Size() == 0 {
		t.Errorf("the new binary has the mode %s and %d bytes", fi.Mode(), fi.Size())
	}
	testutil.Must(t, InstallBinary(filepath.Join(dir, conflist.PluginType), dir)) // itself
}
