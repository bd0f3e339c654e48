package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config says how a cluster is made.
type Config struct {
	// Source is the directory e2e/kube of the repository.
	Source string
	// Dir keeps the components, and the cluster's files while it lives. Default: sluice-e2e-kube
	// below os.UserCacheDir.
	Dir string
	// Nodes is how many nodes there are, n1, n2 and so on. Default: 2; at most 9.
	Nodes int
	// Log is told what goes on. Default: nothing is.
	Log func(format string, args ...any)
}

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return c, fmt.Errorf("finding a directory for the components: %w", err)
		}
		c.Dir = filepath.Join(cache, "sluice-e2e-kube")
	}
	if c.Nodes == 0 {
		c.Nodes = 2
	}
	if c.Nodes < 0 || c.Nodes > 9 {
		return c, fmt.Errorf("%d nodes: at most 9 are possible", c.Nodes)
	}
	if c.Log == nil {
		c.Log = func(string, ...any) {}
	}
	var err error
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return c, err
	}
	c.Source, err = filepath.Abs(c.Source)
	return c, err
}

// Cluster is one that runs. Close ends it.
type Cluster struct {
	dir     string // removed with the cluster
	logs    string // kept until the next one
	builder *builder
	log     func(format string, args ...any)
	lock    *os.File
	state   *state
	pki     *pki
	control *space
	admin   string // the administrator's kubeconfig
	images  []string
	nodes   []*Node
}

// Up builds what is not built, removes what an earlier run left, starts a cluster and
// returns when its nodes and its DNS are ready.
func Up(ctx context.Context, config Config) (*Cluster, error) {
	if err := Needs(); err != nil {
		return nil, err
	}
	c, err := open(config)
	if err != nil {
		return nil, err
	}
	if config, err = config.withDefaults(); err == nil {
		err = c.up(ctx, config)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Down removes the cluster of a run that did not close it.
func Down(config Config) error {
	c, err := open(config)
	if err != nil {
		return err
	}
	return c.Close()
}

// open takes the lock on the directory, and clears what is recorded there.
func open(config Config) (*Cluster, error) {
	config, err := config.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: filepath.Join(config.Dir, "cluster"), logs: filepath.Join(config.Dir, "log"), log: config.Log}
	if err := os.MkdirAll(config.Dir, 0o755); err != nil {
		return nil, err
	}
	if c.lock, err = os.OpenFile(filepath.Join(config.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(c.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		c.lock.Close()
		return nil, fmt.Errorf("another run uses %s: %w", config.Dir, err)
	}
	if c.state, err = readState(filepath.Join(config.Dir, "state.json")); err != nil {
		c.lock.Close()
		return nil, err
	}
	if len(c.state.Processes) > 0 {
		c.log("removing the cluster of an earlier run")
	}
	if err := c.clear(); err != nil {
		c.lock.Close()
		return nil, fmt.Errorf("removing what an earlier run left: %w", err)
	}
	return c, nil
}

func (c *Cluster) clear() error {
	if err := c.state.clear(); err != nil {
		return err
	}
	return os.RemoveAll(c.dir)
}

// Close ends the cluster and removes all that it had, except its logs.
func (c *Cluster) Close() error {
	return errors.Join(c.clear(), c.lock.Close())
}

func (c *Cluster) up(ctx context.Context, config Config) error {
	var err error
	if c.builder, err = newBuilder(config); err != nil {
		return err
	}
	if err := c.builder.components(ctx); err != nil {
		return err
	}
	start := time.Now()
	for _, dir := range []string{c.logs, c.dir} {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
			return err
		}
	}
	if c.images, err = makeImages(ctx, c.builder, filepath.Join(c.dir, "images")); err != nil {
		return err
	}
	if err := c.state.keepSysctls(); err != nil {
		return err
	}
	if err := c.startControlPlane(ctx); err != nil {
		return err
	}
	c.log("API server ready after %d s", int(time.Since(start).Seconds()))
	for i := range config.Nodes {
		if err := c.startNode(ctx, i+1); err != nil {
			return err
		}
	}
	if err := c.network(ctx); err != nil {
		return err
	}
	if err := c.startDNS(ctx); err != nil {
		return err
	}
	c.log("%d nodes ready after %d s", config.Nodes, int(time.Since(start).Seconds()))
	return nil
}

// Nodes returns the nodes in their order.
func (c *Cluster) Nodes() []*Node { return c.nodes }

// Kubeconfig is the path of the administrator's. Its server is reached as Command reaches it.
func (c *Cluster) Kubeconfig() string { return c.admin }

// Bin is the directory of the components, kubectl among them.
func (c *Cluster) Bin() string { return c.builder.bin }

// Command returns a command that runs beside the control plane: on the machine's file system, in
// the control plane's network, which reaches nodes, pods and services' node ports from outside.
// kubectl is on its PATH and has the administrator's kubeconfig.
func (c *Cluster) Command(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(c.control.pid), "-n", "--"}, argv...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.admin, "PATH="+c.builder.bin+":"+os.Getenv("PATH"),
		// By its websockets kubectl loses what a command says at once ("Unknown stream id").
		"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false")
	endGroup(cmd)
	return cmd
}

// kubectl runs it and returns its output.
func (c *Cluster) kubectl(ctx context.Context, input string, args ...string) (string, error) {
	cmd := c.Command(ctx, append([]string{"kubectl"}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
