package cluster

// A space is what the control plane and each node live in: namespaces and cgroups of their own,
// around a first process that ends all of it.

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type space struct {
	name    string
	dir     string // its own files
	logs    string
	pid1    string // the program
	pid     int
	cgroups []string
	daemons map[string]*daemon
}

// newSpace makes the namespaces of name. It is recorded before it does anything.
func (c *Cluster) newSpace(name string) (*space, error) {
	s := &space{
		name: name, dir: filepath.Join(c.dir, name), logs: c.logs, pid1: c.builder.path("pid1"),
		daemons: make(map[string]*daemon),
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, err
	}
	if err := c.makeCgroups(s); err != nil {
		return nil, fmt.Errorf("making cgroups of %s: %w", name, err)
	}
	log, err := s.log("pid1")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(s.pid1, append([]string{"node", name, filepath.Join(s.dir, "fs")}, s.cgroups...)...)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	}
	word, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	defer word.Close()
	answer, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	s.pid = cmd.Process.Pid
	if err := c.state.addProcess(s.pid); err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	if _, err := io.WriteString(word, "\n"); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(answer).ReadString('\n')
	go cmd.Wait() // ends with the space
	if line != "ready\n" {
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("%s does not become ready: %v\n%s", name, err, text)
	}
	return s, nil
}

func (c *Cluster) makeCgroups(s *space) error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(c.dir))
	name := fmt.Sprintf("sluice-kube-%x-%s", sum[:4], s.name)
	for _, h := range hierarchies {
		s.cgroups = append(s.cgroups, filepath.Join(h, name))
	}
	c.state.Cgroups = append(c.state.Cgroups, s.cgroups...)
	if err := c.state.write(); err != nil {
		return err
	}
	for _, dir := range s.cgroups {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		// A cpuset takes no process before it has processors and memory.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file)); err == nil && exists(filepath.Join(dir, file)) {
				if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// log opens the log of one of the space's processes.
func (s *space) log(of string) (*os.File, error) {
	return os.OpenFile(filepath.Join(s.logs, s.name+"."+of+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}

// command returns a command that runs in the space. It is ended with ctx.
func (s *space) command(ctx context.Context, argv ...string) *exec.Cmd {
	args := append([]string{"join"}, s.cgroups...)
	args = append(args, "--", "nsenter", "-t", strconv.Itoa(s.pid), "-m", "-u", "-i", "-n", "-p", "-C", "--")
	cmd := exec.CommandContext(ctx, s.pid1, append(args, argv...)...)
	endGroup(cmd)
	return cmd
}

// endGroup has a command end with what it has started: nsenter's child is in another PID
// namespace, but in its process group.
func endGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 2 * time.Second
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}

// ip runs commands of iproute2, one a line, in the space's network.
func (s *space) ip(lines string) error {
	cmd := exec.Command("nsenter", "-t", strconv.Itoa(s.pid), "-n", "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("setting up the network of %s: %w\n%s\n%s", s.name, err, lines, out)
	}
	return nil
}

// daemon is a process that goes on until it is stopped or the space ends.
type daemon struct {
	argv []string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

func (s *space) start(name string, argv ...string) error {
	log, err := s.log(name)
	if err != nil {
		return err
	}
	defer log.Close()
	d := &daemon{argv: argv, cmd: s.command(context.Background(), argv...), done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		return fmt.Errorf("starting %s of %s: %w", name, s.name, err)
	}
	s.daemons[name] = d
	go func() { // ends with the daemon
		d.cmd.Wait()
		close(d.done)
	}()
	return nil
}

// alive returns an error that says how a daemon ended, or nil.
func (s *space) alive(name string) error {
	select {
	case <-s.daemons[name].done:
		text, _ := os.ReadFile(filepath.Join(s.logs, s.name+"."+name+".log"))
		return fmt.Errorf("%s of %s has ended: %s", name, s.name, text[max(0, len(text)-2000):])
	default:
		return nil
	}
}

// restart stops a daemon with the signal that an init system sends, and starts it again.
func (s *space) restart(name string) error {
	d := s.daemons[name]
	if d == nil {
		return fmt.Errorf("%s has no %s", s.name, name)
	}
	inner := d.cmd.Process.Pid
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", inner)); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			inner = pid // nsenter's child
		}
	}
	if err := syscall.Kill(inner, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping %s of %s: %w", name, s.name, err)
	}
	select {
	case <-d.done:
	case <-time.After(20 * time.Second):
		if err := syscall.Kill(inner, syscall.SIGKILL); err != nil {
			return err
		}
		<-d.done
	}
	return s.start(name, d.argv...)
}
