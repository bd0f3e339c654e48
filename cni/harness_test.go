package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

func init() {
	// The main thread never changes its namespaces: /proc/PID/ns/net speaks of it, and a
	// test that made it a pod's would find the pod to be the host.
	runtime.LockOSThread()
}

// A node of namespaces: the test's thread is in the host's, and the pod's is bound as a
// runtime would bind it. The main plugin is played by hand.
//
//	host netns (the test's thread) ── veth ── eth0, pod netns
//	10.88.0.1/24, fd88::1/64                   10.88.0.5/24, fd88::5/64
type node struct {
	t      *testing.T
	dir    string
	state  string
	podNS  string
	host   ns.NetNS
	pod    ns.NetNS
	podH   *netlink.Handle
	hostH  *netlink.Handle
	plugin *Plugin
	procs  *procLauncher
}

const (
	host4, host6 = "10.88.0.1", "fd88::1"
	pod4, pod6   = "10.88.0.5", "fd88::5"
	podMAC       = "02:88:00:00:00:05"
	testNet      = "testnet"
	testID       = "0123456789abcdef0123456789abcdef"
)

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root to make network namespaces")
	}
	runtime.LockOSThread() // and never unlocked: the thread ends with the test's goroutine
	testutil.Must(t, unix.Unshare(unix.CLONE_NEWNET))
	testutil.Must(t, uplink.WriteSysctl("ipv6/conf/default/accept_dad", "0"))
	dir := testutil.PublicDir(t)
	n := &node{t: t, dir: dir, state: filepath.Join(dir, "state"), podNS: filepath.Join(dir, "pod")}
	n.procs = &procLauncher{dir: filepath.Join(dir, "run")}
	testutil.Must(t, os.Mkdir(n.procs.dir, 0o700))
	n.plugin = &Plugin{Launcher: n.procs}
	host, err := ns.GetCurrentNS()
	testutil.Must(t, err)
	n.host = host
	n.hostH, err = uplink.Handle(host)
	testutil.Must(t, err)
	t.Cleanup(func() {
		n.procs.stopAll(t)
		if n.podH != nil {
			n.podH.Close()
		}
		n.hostH.Close()
		_ = host.Close()
		n.closePod()
		for _, m := range mountsBelow(t, dir) {
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
	})
	n.makePod()
	return n
}

// makePod makes the pod's namespace and, in it, what a main plugin leaves.
func (n *node) makePod() {
	n.t.Helper()
	bindNetns(n.t, n.podNS)
	var err error
	n.pod, err = ns.GetNS(n.podNS)
	testutil.Must(n.t, err)
	n.podH, err = uplink.Handle(n.pod)
	testutil.Must(n.t, err)
	testutil.Must(n.t, n.hostH.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "veth-test", MTU: 1450}, PeerName: "eth0",
		PeerNamespace: netlink.NsFd(n.pod.Fd()), PeerHardwareAddr: mac(podMAC), PeerMTU: 1450,
	}))
	veth, err := n.hostH.LinkByName("veth-test")
	testutil.Must(n.t, err)
	for _, a := range []string{host4 + "/24", host6 + "/64"} {
		testutil.Must(n.t, n.hostH.AddrAdd(veth, address(a)))
	}
	testutil.Must(n.t, n.hostH.LinkSetUp(veth))
	eth0, err := n.podH.LinkByName("eth0")
	testutil.Must(n.t, err)
	testutil.Must(n.t, n.pod.Do(func(ns.NetNS) error { return uplink.WriteSysctl("ipv6/conf/eth0/accept_dad", "0") }))
	testutil.Must(n.t, n.podH.LinkSetUp(eth0))
	for _, a := range []string{pod4 + "/24", pod6 + "/64"} {
		testutil.Must(n.t, n.podH.AddrAdd(eth0, address(a)))
	}
	for _, r := range []*netlink.Route{
		{Gw: net.ParseIP(host4)},
		{Gw: net.ParseIP(host6)},
		{Dst: network("192.0.2.0/24"), Gw: net.ParseIP("169.254.7.7"), Flags: int(netlink.FLAG_ONLINK), Priority: 77, MTU: 1300},
		{Dst: network("198.51.100.0/24"), Gw: net.ParseIP(host4), Table: 99},
		{Dst: network("2001:db8::/32"), Gw: net.ParseIP(host6), Priority: 33},
	} {
		r.LinkIndex = eth0.Attrs().Index
		testutil.Must(n.t, n.podH.RouteAdd(r))
	}
	testutil.Must(n.t, n.podH.NeighSet(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, IP: net.ParseIP("169.254.7.7"), HardwareAddr: mac("02:00:00:00:07:07"), State: netlink.NUD_PERMANENT}))
}

// closePod ends the pod's namespace, as a runtime does that is in a hurry.
func (n *node) closePod() {
	if n.pod == nil {
		return
	}
	_ = n.pod.Close()
	_ = unix.Unmount(n.podNS, unix.MNT_DETACH)
	_ = os.Remove(n.podNS)
	n.pod = nil
}

func (n *node) args() *skel.CmdArgs {
	return &skel.CmdArgs{ContainerID: testID, Netns: n.podNS, IfName: "eth0", Args: "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web", Path: "/nonexistent"}
}

func (n *node) name() string { return attachmentName(testNet, testID, "eth0") }

// config is the plugin's configuration, chained, with further keys as JSON members.
func (n *node) config(more ...string) (*Config, *skel.CmdArgs) {
	n.t.Helper()
	prev := fmt.Sprintf(`{"cniVersion": "1.0.0",
		"interfaces": [{"name": "veth-test"}, {"name": "eth0", "mac": %q, "sandbox": %q}],
		"ips": [{"address": "%s/24", "gateway": "%s", "interface": 1}, {"address": "%s/64", "gateway": "%s", "interface": 1}],
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}`, podMAC, n.podNS, pod4, host4, pod6, host6)
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "type": "sluice-cni", "stateDir": %q, "prevResult": %s`, testNet, n.state, prev)
	for _, m := range more {
		text += ", " + m
	}
	args := n.args()
	args.StdinData = []byte(text + "}")
	c, err := loadConfig(args.StdinData)
	testutil.Must(n.t, err)
	return c, args
}

func (n *node) add(more ...string) error {
	c, args := n.config(more...)
	_, err := n.plugin.add(n.t.Context(), c, args)
	return err
}

func (n *node) del(more ...string) error {
	c, args := n.config(more...)
	return n.plugin.del(n.t.Context(), c, args)
}

func (n *node) check() error {
	c, args := n.config()
	return n.plugin.check(n.t.Context(), c, args)
}

// gc runs GC with testID valid or not.
func (n *node) gc(valid bool) error {
	list := "[]"
	if valid {
		list = fmt.Sprintf(`[{"containerID": %q, "ifname": "eth0"}]`, testID)
	}
	c, args := n.config(`"cni.dev/valid-attachments": ` + list)
	c.prevResult = nil // GC has none
	return n.plugin.gc(n.t.Context(), c, args)
}

func (n *node) status() error {
	c, args := n.config()
	c.prevResult = nil // STATUS has none
	return n.plugin.status(n.t.Context(), c, args)
}

// inside is what the pod has.
func (n *node) inside() *uplink.LinkState {
	n.t.Helper()
	_, s, err := uplink.ReadLink(n.podH, "eth0")
	testutil.Must(n.t, err)
	s.Addrs = withoutLinkLocal(s.Addrs)
	s.Neighs = permanent(s.Neighs)
	return s
}

// uplink opens the uplink namespace.
func (n *node) uplink() (ns.NetNS, *netlink.Handle) {
	n.t.Helper()
	up, err := ns.GetNS(filepath.Join(n.state, netnsDir, n.name()))
	testutil.Must(n.t, err)
	h, err := uplink.Handle(up)
	testutil.Must(n.t, err)
	n.t.Cleanup(func() { h.Close(); _ = up.Close() })
	return up, h
}

// clean fails the test if anything of an attachment is left.
func (n *node) clean() {
	n.t.Helper()
	for _, m := range mountsBelow(n.t, n.state) {
		n.t.Errorf("left: the mount %s", m)
	}
	for _, dir := range []string{attachmentsDir, netnsDir} {
		entries, _ := os.ReadDir(filepath.Join(n.state, dir))
		for _, e := range entries {
			n.t.Errorf("left: %s/%s", dir, e.Name())
		}
	}
	for _, pid := range n.procs.living() {
		n.t.Errorf("left: the monitor %d", pid)
	}
	if n.pod == nil {
		return
	}
	links, err := n.podH.LinkList()
	testutil.Must(n.t, err)
	for _, l := range links {
		if name := l.Attrs().Name; name != "lo" && name != "eth0" || l.Type() == "tuntap" {
			n.t.Errorf("left: the interface %s (%s) in the pod", name, l.Type())
		}
	}
}

// unchanged fails the test if the pod's interface is not what it was.
func (n *node) unchanged(before *uplink.LinkState) {
	n.t.Helper()
	after := n.inside()
	if !reflect.DeepEqual(before, after) {
		n.t.Errorf("the pod's interface is not what it was:\nbefore %s\nafter  %s", asJSON(before), asJSON(after))
	}
	link, err := n.podH.LinkByName("eth0")
	testutil.Must(n.t, err)
	if link.Type() != "veth" {
		n.t.Errorf("the pod's interface is a %s", link.Type())
	}
}

// procLauncher starts a process that holds the descriptors and does nothing, which is
// what the plugin sees of a monitor. Processes are known by files, so that another
// process's launcher finds them.
type procLauncher struct {
	dir  string
	fail error    // of the next Launch
	mute bool     // monitors do not answer
	told sync.Map // LaunchSpec by name: what each was started with last
}

func (l *procLauncher) file(name string) string { return filepath.Join(l.dir, name) }

func (l *procLauncher) Launch(_ context.Context, a LaunchSpec) (int, uint64, error) {
	if l.fail != nil {
		return 0, 0, l.fail
	}
	l.told.Store(a.Name, a)
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.ExtraFiles = append(append([]*os.File(nil), a.DeviceFDs...), a.InboundFD)
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	go func() { _ = cmd.Wait() }() // ends with the process
	return cmd.Process.Pid, 1, os.WriteFile(l.file(a.Name), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600)
}

func (l *procLauncher) pid(name string) int {
	b, err := os.ReadFile(l.file(name))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(string(b))
	return pid
}

func (l *procLauncher) Stop(_ context.Context, a LaunchSpec) error {
	if pid := l.pid(a.Name); pid != 0 {
		endProcess(pid)
	}
	_ = os.Remove(l.file(a.Name))
	return nil
}

func (l *procLauncher) Alive(_ context.Context, a LaunchSpec) error {
	switch {
	case !lives(l.pid(a.Name)):
		return errors.New("the monitor is dead")
	case l.mute:
		return errors.New("the monitor does not answer")
	}
	return nil
}

func (l *procLauncher) Gone(a LaunchSpec) (bool, error) { return !lives(l.pid(a.Name)), nil }

func (l *procLauncher) Check(a LaunchSpec) error {
	_, err := a.Policy.Policy()
	return err
}

func (l *procLauncher) living() (out []int) {
	entries, _ := os.ReadDir(l.dir)
	for _, e := range entries {
		if pid := l.pid(e.Name()); lives(pid) {
			out = append(out, pid)
		}
	}
	return out
}

func (l *procLauncher) stopAll(*testing.T) {
	for _, pid := range l.living() {
		endProcess(pid)
	}
}

// lives says whether a process is there and has not ended; a zombie has.
func lives(pid int) bool {
	if pid == 0 {
		return false
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n == 0 && err == nil
}

// endProcess kills a process and waits until it is gone, or waits only for its parent.
func endProcess(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
}

// bindNetns makes a network namespace bound at path.
func bindNetns(t *testing.T, path string) {
	t.Helper()
	testutil.Must(t, os.WriteFile(path, nil, 0o600))
	done := make(chan error)
	go func() { // ends with its thread, which is in the new namespace
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
		}
		done <- err
	}()
	testutil.Must(t, <-done)
}

func mountsBelow(t *testing.T, dir string) (out []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	testutil.Must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			out = append(out, f[4])
		}
	}
	return out
}

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func network(s string) *net.IPNet { return uplink.IPNet(netip.MustParsePrefix(s)) }

func address(s string) *netlink.Addr {
	p := netip.MustParsePrefix(s)
	a := &netlink.Addr{IPNet: uplink.IPNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

func withoutLinkLocal(list []uplink.AddrState) (out []uplink.AddrState) {
	for _, a := range list {
		if !a.Prefix.Addr().IsLinkLocalUnicast() {
			out = append(out, a)
		}
	}
	return out
}

func permanent(list []uplink.NeighState) (out []uplink.NeighState) {
	for _, n := range list {
		if n.Permanent {
			out = append(out, n)
		}
	}
	return out
}

func asJSON(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}
