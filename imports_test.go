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

// module is the path by which others import us.
const module = "sluice.dev/sluice"

// maxLines is how long a file may be before it holds more than one thing.
const maxLines = 520

// allowed is the import table of the design: which of our packages each may import.
// A package that is not here fails the test, so that a new one is placed on purpose.
var allowed = map[string][]string{
	"cmd/internal/cmdline":  {},
	"cmd/internal/helptest": {},

	"tun": {},

	"nat": {},

	"policy":      {"internal/prefix"},
	"policy/kube": {"internal/prefix", "policy"},

	"internal/fswatch": {},
	"internal/nldump":  {},
	"internal/prefix":  {},
	"internal/privdir": {},

	"internal/testutil": {},

	"forwarder/dhcp":                {},
	"forwarder/internal/count":      {},
	"forwarder/internal/engine":     {},
	"forwarder/internal/netstack":   {},
	"forwarder/internal/seldom":     {},
	"forwarder/sniff":               {},
	"forwarder/dns":                 {"forwarder/internal/seldom", "policy"},
	"forwarder/internal/firstbytes": {"forwarder/internal/count", "forwarder/internal/engine", "forwarder/sniff", "nat", "policy"},
	"forwarder/internal/onlink":     {"policy"},
	"forwarder/dns/resolvconf":      {"forwarder/dns", "internal/fswatch"},
	"forwarder/internal/packet":     {"forwarder/internal/count", "forwarder/internal/onlink"},
	"forwarder/internal/hostsock":   {"forwarder/internal/count", "forwarder/internal/packet", "nat", "policy"},
	"forwarder/internal/admit":      {"forwarder/internal/count", "forwarder/internal/engine", "forwarder/internal/hostsock", "forwarder/internal/netstack", "forwarder/internal/packet", "nat", "policy"},
	"forwarder/internal/gate":       {"forwarder/internal/admit", "forwarder/internal/count", "forwarder/internal/firstbytes", "forwarder/internal/gatetest", "forwarder/sniff", "nat", "policy"},
	"forwarder/internal/gatetest":   {},
	"forwarder/internal/inbound":    {"forwarder/internal/admit", "forwarder/internal/onlink", "forwarder/internal/packet", "nat", "policy"},
	"forwarder/internal/tcpmem":     {"forwarder/internal/admit", "forwarder/internal/netstack"},
	"forwarder/internal/tcpflow":    {"forwarder/internal/admit", "forwarder/internal/engine", "forwarder/internal/firstbytes", "forwarder/internal/gate", "forwarder/internal/hostsock", "forwarder/internal/netstack", "forwarder/internal/onlink", "forwarder/internal/packet", "forwarder/internal/seldom", "forwarder/internal/tcpmem", "nat", "policy"},
	"forwarder/internal/datagram":   {"forwarder/internal/admit", "forwarder/internal/count", "forwarder/internal/engine", "forwarder/internal/firstbytes", "forwarder/internal/hostsock", "forwarder/internal/onlink", "forwarder/internal/packet", "forwarder/internal/tcpflow", "forwarder/sniff", "nat", "policy"},
	"forwarder/internal/ingress":    {"forwarder/internal/admit", "forwarder/internal/engine", "forwarder/internal/hostsock", "forwarder/internal/packet", "forwarder/internal/tcpflow", "nat", "policy"},
	"forwarder/internal/link":       {"forwarder/internal/admit", "forwarder/internal/datagram", "forwarder/internal/inbound", "forwarder/internal/netstack", "forwarder/internal/onlink", "forwarder/internal/packet", "forwarder/internal/tcpflow"},

	"forwarder": {"forwarder/internal/admit", "forwarder/internal/count", "forwarder/internal/datagram", "forwarder/internal/engine", "forwarder/internal/firstbytes", "forwarder/internal/gatetest", "forwarder/internal/hostsock", "forwarder/internal/inbound", "forwarder/internal/ingress", "forwarder/internal/link", "forwarder/internal/netstack", "forwarder/internal/onlink", "forwarder/internal/packet", "forwarder/internal/tcpflow", "forwarder/internal/tcpmem", "forwarder/sniff", "nat", "policy"},

	"sandbox/internal/confine":  {},
	"sandbox/internal/console":  {},
	"sandbox/internal/cover":    {},
	"sandbox/internal/explain":  {},
	"sandbox/internal/fork":     {},
	"sandbox/internal/idmap":    {},
	"sandbox/api":               {"nat", "policy"},
	"sandbox/guest":             {"internal/fswatch", "sandbox/internal/confine", "sandbox/internal/console", "sandbox/internal/cover", "sandbox/internal/explain", "sandbox/internal/fork", "sandbox/internal/idmap", "tun"},
	"sandbox/internal/registry": {"internal/privdir"},
	"sandbox/internal/channel":  {"forwarder/dns", "policy", "sandbox/api", "tun"},
	"sandbox/internal/host":     {"forwarder/dns", "internal/nldump", "policy", "sandbox/guest", "sandbox/internal/registry"},
	"sandbox/internal/logring":  {"sandbox/api"},
	"sandbox/internal/ports":    {"sandbox/api", "sandbox/internal/logring"},
	"sandbox/internal/process":  {"policy", "sandbox/internal/channel", "sandbox/internal/fork", "sandbox/internal/logring"},
	"sandbox/internal/flowlog":  {"forwarder", "forwarder/dns", "nat", "policy", "sandbox/api", "sandbox/internal/channel", "sandbox/internal/logring", "sandbox/internal/registry"},
	"sandbox/internal/worker":   {"forwarder", "forwarder/dhcp", "forwarder/dns", "nat", "policy", "sandbox/api", "sandbox/internal/channel", "sandbox/internal/confine", "sandbox/internal/flowlog", "tun"},

	"sandbox": {"forwarder", "forwarder/dns", "forwarder/dns/resolvconf", "nat", "policy", "sandbox/api", "sandbox/guest", "sandbox/internal/channel", "sandbox/internal/confine", "sandbox/internal/console", "sandbox/internal/flowlog", "sandbox/internal/fork", "sandbox/internal/host", "sandbox/internal/logring", "sandbox/internal/ports", "sandbox/internal/process", "sandbox/internal/registry", "sandbox/internal/worker", "tun"},

	"cni/conflist": {},
	"cni/uplink":   {"internal/nldump", "tun"},

	"cni": {"cni/conflist", "cni/uplink", "internal/privdir", "policy", "tun"},

	"e2e/bench": {"forwarder/sniff"},
	"e2e/peer":  {},
	"e2e":       {"examples"},

	"e2e/kube":         {"e2e/kube/cluster"},
	"e2e/kube/cluster": {},
	"e2e/kube/ctl":     {"e2e/kube/cluster"},
	"e2e/kube/pid1":    {},

	"examples":       {"policy"},
	"examples/embed": {"policy", "sandbox", "sandbox/api", "sandbox/guest"},

	"hack":        {},
	"hack/man":    {},
	"hack/report": {},
}

// forTests are what only tests and their peer may import: they play a kubelet to a real
// containerd, a client of gRPC, or QUIC's ends, which is no business of the module's own programs.
var forTests = []string{"k8s.io/cri-api/", "google.golang.org/grpc", "golang.org/x/net/websocket", "golang.org/x/net/quic", "github.com/quic-go/"}

// helpers are our packages that import "testing": any test may import them, and no other code.
var helpers = []string{"cmd/internal/helptest", "forwarder/internal/gatetest", "internal/testutil"}

func isHelper(path string) bool {
	return slices.Contains(helpers, strings.TrimPrefix(path, module+"/"))
}

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
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		if from == module {
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
		for _, path := range p.Imports {
			if isHelper(path) {
				t.Errorf("%s imports %s outside of its tests", from, path)
			}
			if path == "testing" && !slices.Contains(helpers, from) {
				t.Errorf("%s imports testing and is not among the helpers of tests", from)
			}
		}
		p.TestImports, p.XTestImports = slices.DeleteFunc(p.TestImports, isHelper), slices.DeleteFunc(p.XTestImports, isHelper)
		for _, path := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if isForTests(path) {
				t.Errorf("%s imports %s, which only tests of the forwarder, end-to-end tests and their peer may", from, path)
			}
			to, ours := strings.CutPrefix(path, module+"/")
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

// Kubernetes' types would weigh on every worker and on each call of the CNI plugin.
func TestWorkersAndThePluginKnowNoKubernetes(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "./cmd/sluice", "./cmd/sluice-cni").Output()
	if err != nil {
		t.Fatalf("listing what the binaries are made of: %v", err)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, module+"/policy") {
		t.Errorf("the binaries are made of %d packages, and policy is none of them", len(deps))
	}
	for _, path := range deps {
		if strings.HasPrefix(path, "k8s.io/") || strings.HasPrefix(path, "sigs.k8s.io/") || path == module+"/policy/kube" {
			t.Errorf("sluice or sluice-cni depends on %s", path)
		}
	}
}
