package e2e

// The verbs as runtimes call them: by libcni in every version of the specification, in every
// family, chained and delegating, and by cnitool.

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

func TestCNIInEveryVersionAndFamily(t *testing.T) {
	cniArea(t, "cni.versions")
	n := newNode(t)
	serve(t, n.far)
	for _, ver := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, row := range []struct {
			name, main string
			alone      bool
			subnets    []string
		}{
			{"IPv4 after ptp", "ptp", false, []string{pods4}},
			{"IPv6 after bridge", "bridge", false, []string{pods6}},
			{"dual stack by ptp", "ptp", true, dual},
		} {
			t.Run(ver+" "+row.name, func(t *testing.T) {
				list := n.conflist(t, network{version: ver, main: row.main, alone: row.alone, subnets: row.subnets})
				ctx := t.Context()
				if _, err := n.runtime(ver).ValidateNetworkList(ctx, list); err != nil {
					t.Fatalf("VERSION: %v", err)
				}
				p := n.add(t, list)
				if p.raw.Version() != ver {
					t.Errorf("the result is of version %s", p.raw.Version())
				}
				if len(p.addrs()) != len(row.subnets) {
					t.Fatalf("addresses %q for %q", p.addrs(), row.subnets)
				}
				for _, a := range p.addrs() {
					to := map[bool]string{true: far6, false: far4}[strings.Contains(a, ":")]
					d, r := dial(t, p, at(to, portWhoami))
					if host, _, _ := strings.Cut(d.Got, "]"); !strings.HasPrefix(strings.Trim(host, "["), a) {
						t.Errorf("far saw %q, not the pod's %s\n%s", d.Got, a, r)
					}
				}
				if ver != "0.3.1" { // it has no CHECK
					if err := p.check(); err != nil {
						t.Errorf("CHECK: %v", err)
					}
				}
				if err := p.tryAdd(); err == nil {
					t.Error("a second ADD of the same container succeeds")
				}
				if ver == "1.1.0" {
					if err := n.runtime(ver).GetStatusNetworkList(ctx, list); err != nil {
						t.Errorf("STATUS: %v", err)
					}
					keep := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: p.id, IfName: "eth0"}}}
					if err := n.runtime(ver).GCNetworkList(ctx, list, keep); err != nil {
						t.Errorf("GC: %v", err)
					}
					dial(t, p, at(map[bool]string{true: far6, false: far4}[len(row.subnets) == 1 && row.subnets[0] == pods6], portWhoami))
				}
				if err := p.del(); err != nil {
					t.Fatalf("DEL: %v", err)
				}
				if err := p.del(); err != nil {
					t.Errorf("DEL again: %v", err)
				}
				p.close(t)
				n.clean(t)
			})
		}
	}
}

func TestCNITool(t *testing.T) {
	cniArea(t, "cni.cnitool")
	n := newNode(t)
	serve(t, n.far)
	list := n.conflistJSON(t, network{version: "1.1.0", main: "bridge", alone: true, subnets: dual})
	conf := filepath.Join(n.dir, "net.d")
	if err := os.MkdirAll(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "10-gated.conflist"), list, 0o644); err != nil {
		t.Fatal(err)
	}
	p := n.newPod(t, nil)
	tool := func(verb string) result {
		t.Helper()
		return run(t, n, 20*time.Second, "env", "NETCONFPATH="+conf, "CNI_PATH="+strings.Join(n.pluginPath("1.1.0"), ":"),
			filepath.Join(os.Getenv("CNI_PLUGINS"), "cnitool"), verb, cniNetwork, p.ns)
	}
	var added struct {
		CNIVersion string
		IPs        []struct{ Address string }
		Interfaces []struct{ Name, Sandbox string }
	}
	r := tool("add").wantStatus(t, 0)
	if err := json.Unmarshal([]byte(r.out), &added); err != nil || added.CNIVersion != "1.1.0" || len(added.IPs) != 2 {
		t.Fatalf("cnitool's result: %v\n%s", err, r)
	}
	if !slices.ContainsFunc(added.Interfaces, func(i struct{ Name, Sandbox string }) bool { return i.Name == "eth0" && i.Sandbox == p.ns }) {
		t.Errorf("the result does not name the pod's eth0\n%s", r)
	}
	dial(t, p, at(far4, portWhoami))
	for _, verb := range []string{"check", "status", "gc", "del", "del"} {
		tool(verb).wantStatus(t, 0)
		if verb == "gc" { // it names no container
			n.goneFor(t, p)
		}
	}
	p.close(t)
}

// goneFor checks that the pod reaches nothing.
func (n *node) goneFor(t *testing.T, p *pod) {
	t.Helper()
	if d, r := dial(t, p, "-timeout", "500ms", at(far4, portWhoami)); d.Error == "" {
		t.Errorf("the pod has a network\n%s", r)
	}
}

// gc runs only the plugin's GC, not the DELs that libcni makes from its own cache.
func (n *node) gc(ctx context.Context, list *libcni.NetworkConfigList, valid ...*pod) error {
	var args libcni.GCArgs
	for _, p := range valid {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: p.id, IfName: "eth0"})
	}
	runtime := libcni.NewCNIConfigWithCacheDir(n.pluginPath("1.1.0"), filepath.Join(n.dir, "no-cache"), n)
	return runtime.GCNetworkList(ctx, list, &args)
}
