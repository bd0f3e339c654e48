// Package sluice holds the tests of the repository's shape: which package may import
// which, and how long a file may be.
package sluice

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// maxLines is how long a file may be before it holds more than one thing.
const maxLines = 520

// allowed is the import table of the design: which of our packages each may import.
// A package that is not here fails the test, so that a new one is placed on purpose.
var allowed = map[string][]string{
	"tun":                       {},
	"nat":                       {},
	"policy":                    {},
	"privdir":                   {},
	"fswatch":                   {},
	"nldump":                    {},
	"forwarder":                 {"nat", "policy", "forwarder/seldom", "forwarder/sniff"},
	"forwarder/dns":             {"policy", "forwarder/seldom", "fswatch"},
	"forwarder/dhcp":            {},
	"forwarder/seldom":          {},
	"forwarder/sniff":           {},
	"forwarder/sandbox":         {"privdir", "nldump", "forwarder", "forwarder/dns", "forwarder/dhcp", "tun", "nat", "policy", "forwarder/sandbox/api", "forwarder/sandbox/confine", "forwarder/sandbox/fork", "forwarder/sandbox/guest"},
	"forwarder/sandbox/api":     {"nat", "policy"},
	"forwarder/sandbox/confine": {},
	"forwarder/sandbox/fork":    {},
	"forwarder/sandbox/guest":   {"tun", "fswatch", "forwarder/sandbox/confine", "forwarder/sandbox/fork"},
	"cni":                       {"tun", "policy", "privdir", "nldump"},
	"examples":                  {"policy"},
	"e2e":                       {"examples"},
	"cmd/internal/cmdline":      {},
	"cmd/internal/helptest":     {},
	"e2e/peer":                  {},
	"e2e/bench":                 {},
	"hack":                      {},
	"hack/man":                  {},
	"hack/report":               {},
}

// forTests are what only tests and their peer may import: they play a kubelet to a real
// containerd, a client of gRPC, or QUIC's ends, which is no business of the module's own programs.
var forTests = []string{"k8s.io/cri-api/", "google.golang.org/grpc", "golang.org/x/net/websocket", "golang.org/x/net/quic", "github.com/quic-go/"}

func isForTests(path string) bool {
	return slices.ContainsFunc(forTests, func(p string) bool { return strings.HasPrefix(path, p) })
}

// mayImport says whether the table lets one package import another. Commands wire
// everything; nothing imports a command, and only commands import what they share.
func mayImport(from, to string) (known, may bool) {
	if strings.HasPrefix(from, "cmd/") && !strings.HasPrefix(from, "cmd/internal/") {
		return true, (!strings.HasPrefix(to, "cmd/") || strings.HasPrefix(to, "cmd/internal/")) && !strings.HasPrefix(to, "e2e") && !strings.HasPrefix(to, "hack")
	}
	list, known := allowed[from]
	return known, slices.Contains(list, to)
}

func TestImportsFollowTheTable(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("listing the packages: %v\n%s", err, stderr.String())
	}
	seen := 0
	var forTestsUsed []string
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p struct {
			ImportPath                         string
			Imports, TestImports, XTestImports []string
		}
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		from := strings.TrimPrefix(p.ImportPath, "sluice/")
		if from == "sluice" {
			continue
		}
		seen++
		if known, _ := mayImport(from, ""); !known {
			t.Errorf("package %s is not in the import table: place it there on purpose", from)
			continue
		}
		if from == "e2e" || from == "forwarder" {
			forTestsUsed = append(forTestsUsed, p.TestImports...)
			p.TestImports = slices.DeleteFunc(slices.Clone(p.TestImports), isForTests)
		}
		if from == "e2e/peer" {
			p.Imports = slices.DeleteFunc(p.Imports, isForTests)
		}
		for _, path := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if isForTests(path) {
				t.Errorf("%s imports %s, which only tests of the forwarder, end-to-end tests and their peer may", from, path)
			}
			to, ours := strings.CutPrefix(path, "sluice/")
			if !ours || to == from {
				continue
			}
			if _, may := mayImport(from, to); !may {
				t.Errorf("%s imports %s, which the import table does not allow", from, to)
			}
		}
	}
	if seen < 3 {
		t.Errorf("only %d packages were looked at", seen)
	}
	if !slices.ContainsFunc(forTestsUsed, isForTests) {
		t.Errorf("nothing imports any of %q: take them out of the table", forTests)
	}
}

func TestFilesAreShort(t *testing.T) {
	seen := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "build" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen++
		if n := bytes.Count(b, []byte("\n")); n > maxLines {
			t.Errorf("%s has %d lines, more than %d: it holds more than one thing", path, n, maxLines)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 3 {
		t.Errorf("only %d files were looked at", seen)
	}
}
