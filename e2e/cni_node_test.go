package e2e

// A node of a cluster for the CNI tests: a namespace "host" on one link with "far". In it libcni,
// called by this process, runs the real plugins as a container runtime does. Pods are network
// namespaces bound in the node's own mount namespace.
//
//	  pod                    node                              far
//	 ┌──────┐  sluice-cni  ┌──────────────────────────┐      ┌─────────────────┐
//	 │ eth0 │══════════════│ veth… 10.88.0.0/16    h0 │──────│ f0              │
//	 └──────┘   ptp|bridge │       fd88::/64          │      │ routes to pods  │
//	                       └──────────────────────────┘      └─────────────────┘

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
)

const (
	debianPlugins = "/usr/lib/cni"
	cniState      = "/run/sluice-cni"
	cniNetwork    = "gated"
	pods4, pods6  = "10.88.0.0/16", "fd88::/64"
)

// cniArea is area for tests that need the plugin, the main plugins and root.
func cniArea(t *testing.T, name string, tools ...string) {
	t.Helper()
	area(t, name, append(tools, "nsenter", "unshare", "nft")...)
	asRoot(t, "a container runtime calls its plugins as root")
	for _, path := range []string{filepath.Join(debianPlugins, "ptp"), filepath.Join(os.Getenv("CNI_PLUGINS"), "cnitool"), os.Getenv("SLUICE_CNI_BIN"), os.Getenv("SLUICE_CNI_FAULTS_BIN")} {
		if unix.Access(path, unix.X_OK) != nil {
			t.Skipf("no program %q: `make test` installs containernetworking-plugins and builds the others (hack/cni-plugins.sh)", path)
		}
	}
}

type node struct {
	*netns
	far    *netns
	before string
	cache  string
	leases string
	varLib string   // what a runtime in the node sees as /var/lib (cni_runtime_test.go)
	bin    string   // directory of the plugin under test
	env    []string // additions to the plugins' environment
	// timed, if set, receives the duration of each call of the plugin under test.
	timed func(time.Duration)
	// killAfter, if set, receives the process of each call of the plugin under test.
	killAfter func(pid int)
}

func newNode(t *testing.T) *node {
	t.Helper()
	w := newPair(t)
	n := &node{netns: w.host, far: w.far, bin: filepath.Dir(os.Getenv("SLUICE_CNI_BIN"))}
	n.leases, n.cache = filepath.Join(n.dir, "leases"), filepath.Join(n.dir, "cache")
	n.sysctl(t, "net.ipv4.ip_forward", "1")
	n.sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	w.far.ip(t, "route add "+pods4+" via "+pair4+"\nroute add "+pods6+" via "+pair6)
	n.before = n.state(t)
	t.Cleanup(func() { n.clean(t) })
	return n
}

// state returns everything on the node that attachments must give back: devices, rules, mounts,
// leases and records. A bridge stays by design, and so do portmap's chains.
func (n *node) state(t *testing.T) string {
	t.Helper()
	var lines []string
	for line := range strings.Lines(ok(t, n, 5*time.Second, "ip", "-o", "link").out) {
		if name := strings.Fields(line)[1]; !strings.HasPrefix(name, "cni0") {
			lines = append(lines, "device "+name)
		}
	}
	for line := range strings.Lines(ok(t, n, 5*time.Second, "nft", "list", "ruleset").out) {
		if strings.Contains(line, "10.88.") || strings.Contains(line, "fd88:") || strings.Contains(line, "CNI-DN-") || strings.Contains(line, "sluice") {
			lines = append(lines, "rule "+strings.TrimSpace(line))
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/mountinfo", n.tid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(line, " - nsfs ") {
			lines = append(lines, "mount "+f[4])
		}
	}
	for _, pattern := range []string{n.leases + "/*/[0-9a-f]*.*", n.leases + "/*/*:*", n.varLib + "/cni/results/*", cniState + "/*/*", "/run/sluice/*"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if !strings.HasPrefix(filepath.Base(f), ".") {
				lines = append(lines, "file "+f)
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// clean checks that no attachment has left anything. A monitor ends a moment after the DEL that
// told it to.
func (n *node) clean(t *testing.T) {
	t.Helper()
	testutil.Within(t, 5*time.Second, func() (bool, string) {
		now := n.state(t)
		return now == n.before, fmt.Sprintf("the node is not as it was before its pods: it had\n%s\nand has\n%s", n.before, now)
	})
}

// pluginPath returns where libcni and the delegating plugin look. The distribution's plugins do not
// speak 1.1.0; those built beside cnitool do.
func (n *node) pluginPath(ver string) []string {
	if ver == "1.1.0" {
		return []string{n.bin, os.Getenv("CNI_PLUGINS")}
	}
	return []string{n.bin, debianPlugins}
}

func (n *node) runtime(ver string) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.pluginPath(ver), n.cache, n)
}

// network describes a configuration list.
type network struct {
	version     string
	main        string   // ptp or bridge
	subnets     []string // of the pods
	alone       bool     // sluice delegates to the main plugin instead of following it
	bare        bool     // without sluice, for `sluice-cni install`
	portmap     bool
	portmapLast bool // portmap follows sluice
	sluice      map[string]any
	keys        map[string]any // for the main plugin's configuration, overriding the defaults
	before      map[string]any // a plugin between the main one and sluice
	after       map[string]any // a plugin after sluice
}

var dual = []string{pods4, pods6}

func (n *node) conflist(t *testing.T, w network) *libcni.NetworkConfigList {
	t.Helper()
	list, err := libcni.NetworkConfFromBytes(n.conflistJSON(t, w))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func (n *node) conflistJSON(t *testing.T, w network) []byte {
	t.Helper()
	var ranges, routes []any
	for _, s := range w.subnets {
		ranges = append(ranges, []any{map[string]any{"subnet": s}})
		routes = append(routes, map[string]any{"dst": map[bool]string{true: "::/0", false: "0.0.0.0/0"}[strings.Contains(s, ":")]})
	}
	main := map[string]any{
		"type": w.main, "capabilities": map[string]any{"ips": true},
		"ipam": map[string]any{"type": "host-local", "dataDir": n.leases, "ranges": ranges, "routes": routes},
	}
	if w.main == "bridge" {
		main["bridge"], main["isDefaultGateway"], main["hairpinMode"] = "cni0", true, true
		main["ipam"].(map[string]any)["routes"] = []any{}
	}
	maps.Copy(main, w.keys)
	mains := []any{main}
	if w.before != nil {
		mains = append(mains, w.before)
	}
	portmap := map[string]any{"type": "portmap", "capabilities": map[string]any{"portMappings": true}}
	if w.portmap && !w.portmapLast {
		mains = append(mains, portmap)
	}
	sluice := map[string]any{"type": "sluice-cni", "capabilities": map[string]any{"portMappings": w.alone, "ips": w.alone, "bandwidth": true}}
	maps.Copy(sluice, w.sluice)
	conf := map[string]any{"cniVersion": w.version, "name": cniNetwork}
	if w.bare {
		conf["plugins"] = mains
	} else if w.alone {
		sluice["delegate"] = mains
		conf["plugins"] = []any{sluice}
	} else {
		all := append(mains, sluice)
		if w.after != nil {
			all = append(all, w.after)
		}
		conf["plugins"] = all
		conf["disableCheck"] = true // as `sluice-cni install` does
	}
	if w.portmapLast {
		conf["plugins"] = append(conf["plugins"].([]any), portmap)
	}
	b, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pod is a network namespace that a runtime attaches.
type pod struct {
	n      *node
	id, ns string
	list   *libcni.NetworkConfigList
	rt     *libcni.RuntimeConf
	result *types100.Result
	raw    types.Result
	open   bool
}

var podCount atomic.Int64

// newPod makes the namespace, which ends with the test at the latest.
func (n *node) newPod(t *testing.T, list *libcni.NetworkConfigList) *pod {
	t.Helper()
	p := &pod{n: n, id: fmt.Sprintf("pod%d-%016x", podCount.Add(1), time.Now().UnixNano()), list: list, open: true}
	p.ns = filepath.Join(n.dir, p.id)
	if err := os.WriteFile(p.ns, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ok(t, n, 5*time.Second, "unshare", "--net="+p.ns, "sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; ip link set lo up")
	p.rt = &libcni.RuntimeConf{ContainerID: p.id, NetNS: p.ns, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", p.id}}}
	t.Cleanup(func() { p.close(t) })
	return p
}

// close removes the namespace, as a runtime has done before DEL if its container died.
func (p *pod) close(t *testing.T) {
	t.Helper()
	if !p.open {
		return
	}
	p.open = false
	var err error
	p.n.do(func() { err = unix.Unmount(p.ns, unix.MNT_DETACH) })
	if err != nil {
		t.Errorf("removing the pod's namespace: %v", err)
	}
	os.Remove(p.ns) // otherwise the main plugins' DEL fails on a plain file
}

func (p *pod) tryAdd() (err error) {
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	if p.raw, err = p.n.runtime(p.list.CNIVersion).AddNetworkList(ctx, p.list, p.rt); err != nil {
		return err
	}
	p.result, err = types100.NewResultFromResult(p.raw)
	return err
}

// add attaches the pod, and detaches it when the test ends.
func (n *node) add(t *testing.T, list *libcni.NetworkConfigList, caps ...map[string]any) *pod {
	t.Helper()
	p := n.newPod(t, list)
	for _, c := range caps {
		p.rt.CapabilityArgs = c
	}
	if err := p.tryAdd(); err != nil {
		t.Fatalf("ADD: %v", err)
	}
	t.Cleanup(func() {
		if err := p.del(); err != nil {
			t.Errorf("DEL: %v", err)
		}
	})
	return p
}

func (p *pod) del() error {
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	return p.n.runtime(p.list.CNIVersion).DelNetworkList(ctx, p.list, p.rt)
}

func (p *pod) check() error {
	ctx, stop := context.WithTimeout(context.Background(), 30*time.Second)
	defer stop()
	return p.n.runtime(p.list.CNIVersion).CheckNetworkList(ctx, p.list, p.rt)
}

// addr returns the pod's address of a family.
func (p *pod) addr(six bool) string {
	for _, ip := range p.result.IPs {
		if (ip.Address.IP.To4() == nil) == six {
			return ip.Address.IP.String()
		}
	}
	return ""
}

// gateway returns the node's address on the pod's side.
func (p *pod) gateway(six bool) string {
	for _, ip := range p.result.IPs {
		if (ip.Address.IP.To4() == nil) == six {
			return ip.Gateway.String()
		}
	}
	return ""
}

func (p *pod) addrs() (all []string) {
	for _, ip := range p.result.IPs {
		all = append(all, ip.Address.IP.String())
	}
	return all
}

func (p *pod) String() string { return p.id }

// configuration returns, for a reader, what the pod and its uplink namespace have of a network.
func (p *pod) configuration(t *testing.T) string {
	own, _, _ := strings.Cut(p.id, "-")
	uplinks, _ := filepath.Glob(cniState + "/netns/" + own + "_*")
	var all strings.Builder
	for _, what := range []string{"addr", "route show table all", "-6 route show table all", "rule", "-6 rule"} {
		fmt.Fprintf(&all, "pod: ip %s\n%s", what, run(t, p, 5*time.Second, append([]string{"ip", "-o"}, strings.Fields(what)...)...).out)
		for _, uplink := range uplinks {
			argv := append([]string{"nsenter", "--net=" + uplink, "ip", "-o"}, strings.Fields(what)...)
			fmt.Fprintf(&all, "uplink: ip %s\n%s", what, run(t, p.n, 5*time.Second, argv...).out)
		}
	}
	return all.String()
}

func (p *pod) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	return p.n.start(t, append([]string{"nsenter", "--net=" + p.ns, "--"}, argv...)...)
}

// ExecPlugin runs a plugin in the node's namespaces. With FindInPath and Decode it is the interface
// by which libcni calls plugins.
func (n *node) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path)
	var stdout, stderr bytes.Buffer
	cmd.Env = append(environ, n.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	if begun := time.Now(); n.timed != nil && filepath.Dir(path) == n.bin {
		defer func() { n.timed(time.Since(begun)) }()
	}
	var err error
	n.do(func() { err = cmd.Start() })
	if err != nil {
		return nil, err
	}
	if n.killAfter != nil && filepath.Dir(path) == n.bin {
		cmd.WaitDelay = 200 * time.Millisecond // its delegates may live on and hold its output
		go n.killAfter(cmd.Process.Pid)
	}
	if err := cmd.Wait(); err != nil {
		var told types.Error
		if json.Unmarshal(stdout.Bytes(), &told) == nil && told.Msg != "" {
			return nil, fmt.Errorf("%s: %w", filepath.Base(path), &told)
		}
		return nil, fmt.Errorf("%s: %w: %s%s", filepath.Base(path), err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func (n *node) FindInPath(plugin string, paths []string) (string, error) {
	for _, dir := range paths {
		if path := filepath.Join(dir, plugin); unix.Access(path, unix.X_OK) == nil {
			return path, nil
		}
	}
	return "", errors.New("no plugin " + plugin)
}

func (n *node) Decode(b []byte) (version.PluginInfo, error) {
	return (&version.PluginDecoder{}).Decode(b)
}

// sluice runs a control command, which finds attachments by the runtime directory.
func (n *node) sluice(t *testing.T, args ...string) result {
	t.Helper()
	return ok(t, n, 10*time.Second, append([]string{"env", "XDG_RUNTIME_DIR=/run", sluiceBin()}, args...)...)
}

func (n *node) sluiceJSON(t *testing.T, v any, args ...string) {
	t.Helper()
	r := n.sluice(t, args...)
	if err := json.Unmarshal([]byte(r.out), v); err != nil {
		t.Fatalf("%v\n%s", err, r)
	}
}
