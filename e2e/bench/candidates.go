package main

// Candidates: how each is started with an agent inside, reached and ended. Each is started at first
// use, one instance per MTU, and kept for the run.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	ours        = "sluice"
	withRules   = "sluice+rules"
	withLog     = "sluice+log"
	withDomains = "sluice+domains"
	withNames   = "sluice+names"
	pasta       = "pasta"
	slirp       = "slirp4netns"
	veth        = "veth"
	host        = "host"

	pastaConfigured = "pasta --config-net" // where the two ways to call pasta are told apart
)

// errAbsent means that a candidate is known not to be on this machine; it is no failure.
var errAbsent = errors.New("not found on PATH")

// process is a child that speaks the agent's protocol.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	lines  chan []byte // closed with its output
	stderr *tail
	ended  chan struct{} // closed when waited for
}

// tail keeps the last bytes written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-1000):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}

func (f *fleet) command(args ...string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = f.o.Dir
	cmd.Env = append(os.Environ(), quietEnv, "XDG_RUNTIME_DIR="+f.path("runtime"), "HOME="+f.o.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Getuid() != f.o.UID {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(f.o.UID), Gid: uint32(f.o.UID)}
	}
	return cmd
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, lines: make(chan []byte, 4), stderr: &tail{}, ended: make(chan struct{})}
	cmd.Stderr = p.stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p.in = in
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = w
	cmd.WaitDelay = time.Second // descendants may keep standard error
	err = cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	go func() { // ends with the process's output
		defer close(p.lines)
		defer r.Close()
		for s := bufio.NewReader(r); ; {
			line, err := s.ReadBytes('\n')
			if err != nil {
				return
			}
			p.lines <- line
		}
	}()
	go func() { // ends with the process
		_ = cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// ask sends a request and waits up to limit for its reply.
func (p *process) ask(q request, limit time.Duration) (r reply, err error) {
	b, err := json.Marshal(q)
	if err != nil {
		return r, err
	}
	if _, err := p.in.Write(append(b, '\n')); err != nil {
		return r, fmt.Errorf("it ended: %s", p.stderr)
	}
	select {
	case line, ok := <-p.lines:
		if !ok {
			return r, fmt.Errorf("it ended during %q: %s", q.Op, p.stderr)
		}
		if err := json.Unmarshal(line, &r); err != nil {
			return r, fmt.Errorf("it answered %q: %w", line, err)
		}
		if r.Error != "" {
			return r, errors.New(r.Error)
		}
		return r, nil
	case <-time.After(limit):
		return r, fmt.Errorf("%q had no answer within %v", q.Op, limit)
	}
}

// stop ends the agent, and what runs it, by ending its input; as a last resort by force.
func (p *process) stop() {
	_ = p.in.Close()
	for _, s := range []os.Signal{nil, syscall.SIGTERM, syscall.SIGKILL} {
		if s != nil {
			_ = p.cmd.Process.Signal(s)
		}
		select {
		case <-p.ended:
			return
		case <-time.After(3 * time.Second):
		}
	}
}

// instance is a running candidate.
type instance struct {
	*process
	name    string
	target  map[string]string // the far side's address from inside, by family
	reached map[string]bool   // families that have answered
	helper  int               // pid of the process that serves its network, if that is not an ancestor
	also    []func()          // ends what else it needs
}

func (i *instance) close() {
	i.stop()
	for _, f := range i.also {
		f()
	}
}

func (f *fleet) start(name string, mtu int) (*instance, error) {
	inst, err := f.launch(name, mtu)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	inst.name = name
	if err := inst.reach("v4"); err != nil {
		inst.close()
		return nil, err
	}
	r, err := inst.ask(request{Op: "info"}, 5*time.Second)
	if err != nil || r.Info == nil {
		inst.close()
		return nil, fmt.Errorf("asking %s's agent: %w", name, err)
	}
	if name != host && r.Info.MTU != mtu {
		inst.close()
		return nil, fmt.Errorf("%s has MTU %d, not the %d it was asked for", name, r.Info.MTU, mtu)
	}
	if r.Info.Congestion != congestion {
		f.note(fmt.Sprintf("behind %s, TCP uses %s, not %s", name, r.Info.Congestion, congestion))
	}
	return inst, nil
}

// reach waits, once a family, until the far side answers through the candidate.
func (i *instance) reach(family string) error {
	if i.reached[family] {
		return nil
	}
	addr := i.target[family]
	if _, err := i.ask(request{Op: "wait", Addr: addr, MS: 8000}, 12*time.Second); err != nil {
		return fmt.Errorf("%s does not reach the far side at %s: %w", i.name, addr, err)
	}
	if i.reached == nil {
		i.reached = map[string]bool{}
	}
	i.reached[family] = true
	return nil
}

func (f *fleet) launch(name string, mtu int) (*instance, error) {
	m := strconv.Itoa(mtu)
	agent := []string{f.path("bench"), "agent"}
	simple := func(v4, v6 string, args ...string) (*instance, error) {
		p, err := startProcess(f.command(append(args, agent...)...))
		return &instance{process: p, target: map[string]string{"v4": v4, "v6": v6}}, err
	}
	sluice := func(more ...string) (*instance, error) {
		args := append([]string{f.o.Sluice, "run", "--host-loopback", "--mtu", m}, more...)
		return simple("10.0.2.2", "fd73:6c75:6963:65::2", append(args, "--")...)
	}
	switch name {
	case host:
		return simple("127.0.0.1", "::1")
	case ours:
		return sluice()
	case withRules:
		return sluice("--policy", f.path("rules.yaml"))
	case withLog:
		return sluice("--flow-log", f.path("logs/flows.json"))
	case withDomains:
		return sluice("--policy", f.path("domains.yaml"), "--add-host", farName+":"+farNamed)
	case withNames:
		if err := f.startNameServer(); err != nil {
			return nil, err
		}
		return sluice("--policy", f.path("names.yaml"), "--dns", fmt.Sprintf("127.0.0.1:%d", namesPort))
	case pasta:
		if f.o.Pasta == "" {
			return nil, errAbsent
		}
		// The gateway's addresses lead to the host's loopback; ports are not watched.
		return simple("192.0.2.1", "2001:db8:1::1", f.o.Pasta, "--config-net", "-m", m,
			"-t", "none", "-u", "none", "-T", "none", "-U", "none", "--")
	case slirp:
		if f.o.Slirp == "" {
			return nil, errAbsent
		}
		return f.launchSlirp(m)
	case veth:
		return f.launchVeth(mtu)
	}
	return nil, fmt.Errorf("no candidate %q", name)
}

// holderProcess returns an agent in user and network namespaces of its own, and its pid. A process
// of the candidates' user makes them, so that this user's slirp4netns may join them.
func (f *fleet) holderProcess() (*process, int, error) {
	p, err := startProcess(f.command(f.path("bench"), "hold"))
	if err != nil {
		return nil, 0, err
	}
	r, err := p.ask(request{Op: "info"}, 5*time.Second)
	if err != nil || r.Info == nil {
		p.stop()
		return nil, 0, fmt.Errorf("its agent: %w", err)
	}
	return p, r.Info.PID, nil
}

func (f *fleet) launchSlirp(mtu string) (*instance, error) {
	p, pid, err := f.holderProcess()
	if err != nil {
		return nil, err
	}
	inst := &instance{process: p, target: map[string]string{"v4": "10.0.2.2", "v6": "fd00::2"}}
	ready, readyW, err := os.Pipe()
	if err != nil {
		inst.close()
		return nil, err
	}
	defer ready.Close()
	exitR, exitW, err := os.Pipe()
	if err != nil {
		readyW.Close()
		inst.close()
		return nil, err
	}
	log := &tail{}
	cmd := f.command(f.o.Slirp, "--configure", "--enable-ipv6", "--mtu="+mtu, "--ready-fd=3", "--exit-fd=4", strconv.Itoa(pid), "tap0")
	cmd.ExtraFiles = []*os.File{readyW, exitR}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = time.Second
	err = cmd.Start()
	readyW.Close()
	exitR.Close()
	if err != nil {
		exitW.Close()
		inst.close()
		return nil, err
	}
	inst.helper = cmd.Process.Pid
	inst.also = append(inst.also, func() {
		exitW.Close()
		done := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		done.Stop()
	})
	_ = ready.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := ready.Read(make([]byte, 1)); n != 1 {
		inst.close()
		return nil, fmt.Errorf("it did not get ready: %w: %s", err, log)
	}
	return inst, nil
}

// launchVeth gives the agent a namespace joined to this one by a cable; each MTU gets a new one.
func (f *fleet) launchVeth(mtu int) (*instance, error) {
	p, pid, err := f.holderProcess()
	if err != nil {
		return nil, err
	}
	f.cables++
	n := f.cables
	near, far := fmt.Sprintf("near%d", n), fmt.Sprintf("far%d", n)
	inst := &instance{process: p, target: map[string]string{
		"v4": fmt.Sprintf("198.51.100.%d", 4*n+1),
		"v6": fmt.Sprintf("2001:db8:2:%d::1", n),
	}}
	err = func() error {
		if err := cable(near, far, mtu); err != nil {
			return err
		}
		l, err := netlink.LinkByName(far)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetNsPid(l, pid); err != nil {
			return err
		}
		if err := addresses(near, inst.target["v4"]+"/30", inst.target["v6"]+"/64"); err != nil {
			return err
		}
		// The agent is root of its namespaces.
		_, err = p.ask(request{Op: "link", Name: far, Prefixes: []string{
			fmt.Sprintf("198.51.100.%d/30", 4*n+2), fmt.Sprintf("2001:db8:2:%d::2/64", n),
		}}, 5*time.Second)
		return err
	}()
	if err != nil {
		inst.close()
		return nil, err
	}
	return inst, nil
}
