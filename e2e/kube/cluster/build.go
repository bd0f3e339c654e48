package cluster

// The components are built from their modules, with Go's own checks of go.sum. A directory for
// each version of what they are made of keeps the binaries.

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// component is one binary.
type component struct{ name, pkg, dir string }

const kubernetes = "k8s.io/kubernetes"

// components of a cluster; dir is below ../components, or "" for pid1 in this module.
var components = []component{
	{"pid1", "sluice.dev/sluice/e2e/kube/pid1", ""},
	{"etcd", "go.etcd.io/etcd/server/v3", "components"},
	{"kube-apiserver", kubernetes + "/cmd/kube-apiserver", "components"},
	{"kube-controller-manager", kubernetes + "/cmd/kube-controller-manager", "components"},
	{"kube-scheduler", kubernetes + "/cmd/kube-scheduler", "components"},
	{"kubelet", kubernetes + "/cmd/kubelet", "components"},
	{"kube-proxy", kubernetes + "/cmd/kube-proxy", "components"},
	{"kubectl", kubernetes + "/cmd/kubectl", "components"},
	{"agnhost", kubernetes + "/test/images/agnhost", "components"},
	{"coredns", ".", "components/coredns"},
}

// builder compiles into one directory.
type builder struct {
	source string // of e2e/kube
	bin    string
	log    func(format string, args ...any)
}

func newBuilder(c Config) (*builder, error) {
	key, err := versionKey(c.Source)
	if err != nil {
		return nil, err
	}
	return &builder{source: c.Source, bin: filepath.Join(c.Dir, "bin-"+key), log: c.Log}, nil
}

// versionKey names what the components are made of.
func versionKey(source string) (string, error) {
	sum := sha256.New()
	for _, name := range []string{"components/go.mod", "components/go.sum", "components/coredns/go.mod", "components/coredns/go.sum", "components/coredns/main.go"} {
		text, err := os.ReadFile(filepath.Join(source, name))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %d\n%s", name, len(text), text)
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:6]), nil
}

func (b *builder) components(ctx context.Context) error {
	stamp, err := b.stamp()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(b.bin, 0o755); err != nil {
		return err
	}
	for _, c := range components {
		// pid1 is ours, and changes without a version.
		if _, err := os.Stat(b.path(c.name)); err == nil && c.dir != "" {
			continue
		}
		start := time.Now()
		if err := b.build(ctx, c, stamp); err != nil {
			return err
		}
		if c.dir != "" {
			b.log("built %s in %d s", c.name, int(time.Since(start).Seconds()))
		}
	}
	return b.plugins(ctx)
}

func (b *builder) path(name string) string { return filepath.Join(b.bin, name) }

// build makes one binary whole or not at all.
func (b *builder) build(ctx context.Context, c component, stamp string) error {
	cmd := exec.CommandContext(ctx, goTool(), "build", "-buildvcs=false", "-trimpath", "-mod=readonly", "-ldflags", stamp, "-o", b.path(c.name)+".new", c.pkg)
	cmd.Dir = filepath.Join(b.source, c.dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", c.name, err, out)
	}
	return os.Rename(b.path(c.name)+".new", b.path(c.name))
}

// plugins builds the CNI plugins, of the versions that Sluice's own tests use.
func (b *builder) plugins(ctx context.Context) error {
	dir := b.path("cni")
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.RemoveAll(dir + ".new"); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(b.source, "../../hack/cni-plugins.sh"), dir+".new")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GO="+goTool())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building CNI plugins: %w\n%s", err, out)
	}
	b.log("built the CNI plugins")
	return os.Rename(dir+".new", dir)
}

var versionOf = regexp.MustCompile(`(?m)^require ` + kubernetes + ` (v(\d+)\.(\d+)\.\S+)$`)

// stamp returns the linker's flags that tell Kubernetes its version, which its own build
// takes from git.
func (b *builder) stamp() (string, error) {
	text, err := os.ReadFile(filepath.Join(b.source, "components/go.mod"))
	if err != nil {
		return "", err
	}
	v := versionOf.FindSubmatch(text)
	if v == nil {
		return "", fmt.Errorf("components/go.mod requires no %s", kubernetes)
	}
	flags := []string{"-s", "-w"}
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags = append(flags, fmt.Sprintf("-X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s -X %[1]s.gitTreeState=clean", pkg, v[1], v[2], v[3]))
	}
	return strings.Join(flags, " "), nil
}

func goTool() string {
	if tool := os.Getenv("GO"); tool != "" {
		return tool
	}
	return "go"
}
