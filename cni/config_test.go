package cni

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/tun"
)

// conf is a configuration with the given members.
func conf(members string) []byte {
	text := `{"cniVersion": "1.0.0", "name": "net", "type": "sluice-cni"`
	if members != "" {
		text += ", " + members
	}
	return []byte(text + "}")
}

func TestConfigurationIsDecodedStrictly(t *testing.T) {
	for _, row := range []struct{ name, members, says string }{
		{"a key that is not ours", `"polcy": "/etc/x.yaml"`, "polcy"},
		{"a key of select that is not ours", `"select": {"namespace": ["a"]}`, "namespace"},
		{"a capability that nobody declared", `"runtimeConfig": {"teleport": true}`, "teleport"},
		{"a relative policy", `"policy": "x.yaml"`, "absolute path"},
		{"a policy that is null", `"policy": null`, "policy"},
		{"a policy without a name", `"policy": ""`, "policy"},
		{"a policyDir that is null", `"policyDir": null`, "policyDir is null"},
		{"a policyDir without a name", `"policyDir": ""`, "policyDir is"},
		{"a failClosed that is null, in other letters", `"failclosed": null`, "failclosed is null"},
		{"a policy that is a number", `"policy": 3`, "want a policy"},
		{"a relative policyDir", `"policyDir": "policies"`, "policyDir"},
		{"a relative stateDir", `"stateDir": "state"`, "stateDir"},
		{"a relative flowLog", `"flowLog": "-"`, "flowLog"},
		{"bounds of no flow log", `"flowLogMaxFiles": 2`, "flowLog"},
		{"a size that is no string", `"flowLog": "/f", "flowLogMaxSize": 5`, "flowLogMaxSize"},
		{"an unknown mode", `"mode": "veth"`, "want tap or tun"},
		{"an MTU that is a word", `"mtu": "big"`, "auto"},
		{"an MTU too small for IPv6", `"mtu": 576`, "1280"},
		{"a pattern that is none", `"select": {"namespaces": ["["]}`, "pattern"},
		{"a previous result of another version", `"prevResult": {"cniVersion": "9.9.9"}`, "prevResult"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := loadConfig(conf(row.members)); err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("error %v, want one that says %q", err, row.says)
			}
		})
	}
}

func TestConfigurationIsDecoded(t *testing.T) {
	c, err := loadConfig(conf(`"mode": "tun", "mtu": 9000, "policy": {"kind": "SandboxPolicy"}, "delegate": [{"type": "a"}, {"type": "b"}],
		"capabilities": {"bandwidth": true}, "args": {"cni": {"labels": []}},
		"runtimeConfig": {"cgroupPath": "/pod", "io.kubernetes.cri.pod-annotations": {"a": "b"}, "portMappings": [{"hostPort": 1}]},
		"cni.dev/attachments": [{"containerID": "x", "ifname": "eth0"}]`))
	testutil.Must(t, err)
	if c.kind != tun.TUN || c.MTU != 9000 || string(c.Policy.Text) != `{"kind": "SandboxPolicy"}` || len(c.Delegate) != 2 {
		t.Errorf("decoded as %+v", c)
	}
	if c.RuntimeConfig.Annotations["a"] != "b" || c.RuntimeConfig.CgroupPath != "/pod" {
		t.Errorf("the runtime's configuration: %+v", c.RuntimeConfig)
	}
	if len(c.ValidAttachments) != 1 || c.ValidAttachments[0].ContainerID != "x" {
		t.Errorf("the valid attachments: %v", c.ValidAttachments)
	}
	c, err = loadConfig(conf(`"delegate": {"type": "a"}, "mtu": "auto", "policy": "/p.yaml"`))
	testutil.Must(t, err)
	if len(c.Delegate) != 1 || c.MTU != 0 || c.Policy.Path != "/p.yaml" || c.StateDir != DefaultStateDir || c.kind != tun.TAP {
		t.Errorf("decoded as %+v", c)
	}
}

func TestSelector(t *testing.T) {
	pod := Pod{Namespace: "team-a", Name: "web", annotations: map[string]string{"sluice.dev/gate": "on"}}
	for _, row := range []struct {
		name string
		s    Selector
		want bool
	}{
		{"nothing given selects all", Selector{}, true},
		{"the namespace", Selector{Namespaces: []string{"x", "team-a"}}, true},
		{"a pattern of the namespace", Selector{Namespaces: []string{"team-*"}}, true},
		{"another namespace", Selector{Namespaces: []string{"kube-*"}}, false},
		{"all namespaces but this", Selector{NotNamespaces: []string{"team-*"}}, false},
		{"all namespaces but another", Selector{NotNamespaces: []string{"kube-system"}}, true},
		{"the annotation's value", Selector{Annotations: map[string]string{"sluice.dev/gate": "on"}}, true},
		{"any value of the annotation", Selector{Annotations: map[string]string{"sluice.dev/gate": "*"}}, true},
		{"another value", Selector{Annotations: map[string]string{"sluice.dev/gate": "off"}}, false},
		{"an annotation that it has not", Selector{Annotations: map[string]string{"other": "*"}}, false},
		{"an annotation that excludes it", Selector{NotAnnotations: map[string]string{"sluice.dev/gate": "*"}}, false},
		{"one that would exclude others", Selector{NotAnnotations: map[string]string{"other": "*"}}, true},
		{"all conditions must hold", Selector{Namespaces: []string{"team-a"}, Annotations: map[string]string{"other": "*"}}, false},
	} {
		if got := row.s.matches(pod); got != row.want {
			t.Errorf("%s: %v", row.name, got)
		}
	}
}

func TestPodOf(t *testing.T) {
	got := podOf("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;K8S_POD_UID=u-1;OTHER=x", nil)
	if want := (Pod{Namespace: "ns", Name: "web", UID: "u-1"}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}

// policyNamed is a policy's text.
func policyNamed(name string) string {
	return "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: " + name + "}\nspec: {}\n"
}

func TestThePolicyOfAPod(t *testing.T) {
	dir := t.TempDir()
	testutil.Must(t, os.MkdirAll(filepath.Join(dir, "a"), 0o700))
	for _, name := range []string{"a/web", "a", "net"} {
		testutil.Must(t, os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(policyNamed(strings.ReplaceAll(name, "/", "-"))), 0o600))
	}
	const inline = `{"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": {"name": "inline"}, "spec": {}}`
	for _, row := range []struct {
		name string
		c    Config
		pod  Pod
		want string
	}{
		{"its own", Config{PolicyDir: dir}, Pod{Namespace: "a", Name: "web"}, "a-web"},
		{"its namespace's", Config{PolicyDir: dir}, Pod{Namespace: "a", Name: "db"}, "a"},
		{"the configuration's file", Config{PolicyDir: dir, Policy: policySource{Path: dir + "/net.yaml"}}, Pod{Namespace: "b", Name: "web"}, "net"},
		{"the configuration's text", Config{Policy: policySource{Text: []byte(inline)}}, Pod{}, "inline"},
		{"none, and closed then", Config{PolicyDir: dir, FailClosed: true}, Pod{Namespace: "b"}, "closed"},
	} {
		s, err := row.c.policyFor(row.pod)
		if _, given := s.Document(); err != nil || !given {
			t.Errorf("%s: %v, %v", row.name, s, err)
			continue
		}
		if p, err := s.Policy(); err != nil || p.Metadata.Name != row.want {
			t.Errorf("%s: %v, %v", row.name, p, err)
		}
	}
	none, err := (&Config{PolicyDir: dir}).policyFor(Pod{Namespace: "b"})
	if b, ok := none.Builtin(); err != nil || !ok || !b.Pod {
		t.Errorf("none: %v, %v", none, err)
	}
	for _, pod := range []Pod{{Namespace: "..", Name: "x"}, {Namespace: "a", Name: "../a"}, {Namespace: "a/b"}} {
		if _, err := (&Config{PolicyDir: dir}).policyFor(pod); err == nil {
			t.Errorf("the pod %+v has a policy outside its directory", pod)
		}
	}
}

// A policy that is named and cannot be read whole is an error, whatever failClosed says and
// whatever else could be had in its place.
func TestAPolicyThatCannotBeReadIsAnError(t *testing.T) {
	whole := policyNamed("whole")
	dir := t.TempDir()
	for name, text := range map[string]string{
		"empty": "", "comments": "# nothing\n", "marker": "---\n", "null": "null\n", "mapping": "{}\n",
		"cut": whole[:len(whole)-12], "cut-in-a-line": strings.TrimSuffix(whole, "spec: {}\n") + "spec:\n  defaultAction: drop",
		"not-utf8": whole + "# \xff\n", "zero": whole + "# \x00\n", "bom": "\ufeff" + whole, "two": whole + "---\n" + whole,
	} {
		testutil.Must(t, os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o600))
	}
	big, err := os.Create(filepath.Join(dir, "100MiB.yaml"))
	testutil.Must(t, err)
	testutil.Must(t, big.Truncate(100<<20))
	testutil.Must(t, big.Close())
	testutil.Must(t, os.Mkdir(filepath.Join(dir, "directory.yaml"), 0o700))
	testutil.Must(t, unix.Mkfifo(filepath.Join(dir, "fifo.yaml"), 0o600))
	testutil.Must(t, os.Symlink("nowhere", filepath.Join(dir, "dangling.yaml")))
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	testutil.Must(t, err)
	other := filepath.Join(t.TempDir(), "other.yaml")
	testutil.Must(t, os.WriteFile(other, []byte(whole), 0o600))
	check := func(what string, c Config, pod Pod) {
		t.Helper()
		for _, closed := range []bool{false, true} {
			c.FailClosed = closed
			if s, err := c.policyFor(pod); err == nil || !s.IsZero() {
				t.Errorf("%s, failClosed %v: %v, %v", what, closed, s, err)
			}
		}
	}
	for _, path := range append(files, filepath.Join(dir, "missing.yaml")) {
		name := strings.TrimSuffix(filepath.Base(path), ".yaml")
		check("policy "+name, Config{Policy: policySource{Path: path}}, Pod{})
		if name == "missing" {
			continue // in policyDir it means that the pod has none of its own
		}
		check("policyDir, a namespace's "+name, Config{PolicyDir: dir, Policy: policySource{Path: other}}, Pod{Namespace: name, Name: "x"})
		check("policyDir, a pod's "+name, Config{PolicyDir: filepath.Dir(dir), Policy: policySource{Path: other}}, Pod{Namespace: filepath.Base(dir), Name: name})
	}
	for what, text := range map[string]string{"an empty object": "{}", "an object without a spec": `{"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": {"name": "a"}}`} {
		check(what, Config{Policy: policySource{Text: []byte(text)}}, Pod{})
	}
	testutil.Must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	testutil.Must(t, os.Symlink("nowhere", filepath.Join(dir, "gone")))
	for what, policyDir := range map[string]string{"a policyDir that is missing": dir + "/none", "a policyDir that is a file": other, "a policyDir that leads nowhere": dir + "/gone"} {
		check(what, Config{PolicyDir: policyDir, Policy: policySource{Path: other}}, Pod{Namespace: "a", Name: "x"})
		check(what, Config{PolicyDir: policyDir}, Pod{})
	}
	for _, namespace := range []string{"file", "gone"} {
		check("a namespace's directory that is none: "+namespace, Config{PolicyDir: dir, Policy: policySource{Path: other}}, Pod{Namespace: namespace, Name: "x"})
	}
}

func TestLimitsTakeTheRuntimesBandwidth(t *testing.T) {
	for _, row := range []struct{ name, members, want string }{
		{"none", "", `null`},
		{"the configuration's", `"limits": {"flows": 5}`, `{"flows":5}`},
		{"the runtime's", `"runtimeConfig": {"bandwidth": {"egressRate": 5000000, "egressBurst": 1}}`, `{"egressBandwidth":"5000000"}`},
		{"both, the runtime's first", `"limits": {"flows": 5, "ingressBandwidth": "1G"}, "runtimeConfig": {"bandwidth": {"ingressRate": 8000}}`,
			`{"flows":5,"ingressBandwidth":"8000"}`},
	} {
		c, err := loadConfig(conf(row.members))
		testutil.Must(t, err)
		limits, err := c.limits()
		testutil.Must(t, err)
		var got, want any
		_ = json.Unmarshal(limits, &got)
		_ = json.Unmarshal([]byte(row.want), &want)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %s", row.name, limits)
		}
	}
}

func TestNamesAreDistinctAndTellTheirNetwork(t *testing.T) {
	names := map[string]bool{}
	for _, id := range []string{"abc", "0123456789abcdef", "0123456789abcdeg", "a.b_c-d"} {
		for _, network := range []string{"n1", "n2"} {
			for _, ifName := range []string{"eth0", "net1"} {
				name := attachmentName(network, id, ifName)
				if names[name] || len(name) > 48 || !ofNetwork(name, network) || ofNetwork(name, "n3") {
					t.Errorf("the name %s of %s/%s/%s", name, network, id, ifName)
				}
				names[name] = true
			}
		}
	}
}

func TestExpandSlice(t *testing.T) {
	for path, want := range map[string]string{
		"":                                 "",
		"/kubepods/burstable/pod1":         "/kubepods/burstable/pod1",
		"/kubepods.slice/kubepods-a.slice": "/kubepods.slice/kubepods-a.slice",
		"kubepods-burstable-pod1.slice":    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice",
		"../../etc":                        "/etc",
	} {
		if got, err := expandSlice(path); err != nil || got != want {
			t.Errorf("%q: %q, %v", path, got, err)
		}
	}
	if _, err := expandSlice("a--b.slice"); err == nil {
		t.Error("a--b.slice is taken for a slice")
	}
}

func TestWhereAMonitorMoves(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"unified/pod", "systemd", "memory/pod"} {
		testutil.Must(t, os.MkdirAll(filepath.Join(root, dir), 0o700))
	}
	all := []hierarchy{
		{filepath.Join(root, "unified"), "", "/system.slice/containerd.service"},
		{filepath.Join(root, "systemd"), "name=systemd", "/system.slice/containerd.service"},
		{filepath.Join(root, "memory"), "memory", "/system.slice/containerd.service"},
	}
	at := func(podPath string) (out []string) {
		for _, h := range all {
			dir, err := h.target(podPath)
			testutil.Must(t, err)
			out = append(out, strings.TrimPrefix(dir, root))
		}
		return out
	}
	if got, want := at("/pod"), []string{"/unified/pod/sluice", "/systemd/sluice", "/memory/pod"}; !reflect.DeepEqual(got, want) {
		t.Errorf("with the pod's cgroup: %q", got)
	}
	if got, want := at(""), []string{"/unified/sluice", "/systemd/sluice", ""}; !reflect.DeepEqual(got, want) {
		t.Errorf("without: %q", got)
	}
	if dir, err := (hierarchy{all[0].mount, "", "/"}).target(""); dir != "" || err != nil {
		t.Errorf("one that is in no service moves to %q: %v", dir, err)
	}
	removeCgroups([]string{filepath.Join(root, "unified/pod/sluice"), filepath.Join(root, "memory/pod")})
	if _, err := os.Stat(filepath.Join(root, "unified/pod/sluice")); err == nil {
		t.Error("the cgroup that was made is still there")
	}
	if _, err := os.Stat(filepath.Join(root, "memory/pod")); err != nil {
		t.Error("the pod's cgroup was removed")
	}
}

func TestHierarchies(t *testing.T) {
	dir := t.TempDir()
	testutil.Must(t, os.WriteFile(dir+"/mountinfo", []byte(`30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
33 25 0:28 /docker /mnt/part rw - cgroup2 cgroup2 rw
34 25 0:29 / /tmp rw - tmpfs tmpfs rw
`), 0o600))
	testutil.Must(t, os.WriteFile(dir+"/cgroup", []byte("4:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/c\n"), 0o600))
	got, err := hierarchies(dir+"/mountinfo", dir+"/cgroup")
	testutil.Must(t, err)
	want := []hierarchy{{"/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct", "/a"}, {"/sys/fs/cgroup/systemd", "name=systemd", "/b"}, {"/sys/fs/cgroup/unified", "", "/c"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}
