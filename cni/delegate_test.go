package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

// fakeExec plays delegates. "main" makes a dummy interface in the namespace that it is
// given; the others only pass on what they got.
type fakeExec struct {
	version.PluginDecoder
	t     *testing.T
	calls []call
	fail  string // "TYPE VERB" fails
}

type call struct {
	plugin, verb, netns, stdin string
}

func (f *fakeExec) FindInPath(plugin string, _ []string) (string, error) {
	if plugin == "missing" {
		return "", errors.New("failed to find plugin \"missing\" in path")
	}
	return plugin, nil
}

func (f *fakeExec) ExecPlugin(_ context.Context, plugin string, stdin []byte, environ []string) ([]byte, error) {
	env := make(map[string]string)
	for _, pair := range environ {
		key, value, _ := strings.Cut(pair, "=")
		env[key] = value
	}
	c := call{plugin, env["CNI_COMMAND"], env["CNI_NETNS"], string(stdin)}
	f.calls = append(f.calls, c)
	if f.fail == plugin+" "+c.verb {
		return nil, errors.New("no, says " + f.fail)
	}
	if c.verb != "ADD" {
		return nil, nil
	}
	if plugin == "main" {
		if err := makeMain(c.netns); err != nil {
			return nil, err
		}
		return fmt.Appendf(nil, `{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": %q}], "ips": [{"address": "%s/24", "interface": 0}]}`, c.netns, pod4), nil
	}
	var conf struct{ PrevResult json.RawMessage }
	err := json.Unmarshal(stdin, &conf)
	return conf.PrevResult, err
}

// makeMain plays a main plugin with a veth whose other end is in the namespace too: there
// is nobody to talk to.
func makeMain(path string) error {
	n, err := ns.GetNS(path)
	if err != nil {
		return err
	}
	defer n.Close()
	h, err := uplink.Handle(n)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "far"}); err != nil {
		return err
	}
	link, err := h.LinkByName("eth0")
	if err != nil {
		return err
	}
	return errors.Join(h.LinkSetUp(link), h.AddrAdd(link, &netlink.Addr{IPNet: uplink.IPNet(netip.MustParsePrefix(pod4 + "/24"))}))
}

// verbs lists "TYPE VERB" of the calls since the last time.
func (f *fakeExec) verbs() (out []string) {
	for _, c := range f.calls {
		out = append(out, c.plugin+" "+c.verb)
	}
	f.calls = nil
	return out
}

// alone is a node without a main plugin's interface, and the configuration of one that
// delegates.
func alone(t *testing.T) (*node, *fakeExec, func(verb string, more ...string) error) {
	n := newNode(t)
	link, err := n.podH.LinkByName("eth0")
	testutil.Must(t, err)
	testutil.Must(t, n.podH.LinkDel(link))
	exec := &fakeExec{t: t}
	n.plugin.Exec = exec
	run := func(verb string, more ...string) error {
		text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "type": "sluice-cni", "stateDir": %q,
			"delegate": [{"type": "main", "key": [1, 2]}, {"type": "meta", "capabilities": {"portMappings": true}}],
			"runtimeConfig": {"portMappings": [{"hostPort": 8080}], "mac": "02:00:00:00:00:01"}`, testNet, n.state)
		for _, m := range more {
			text += ", " + m
		}
		args := n.args()
		args.StdinData = []byte(text + "}")
		c, err := loadConfig(args.StdinData)
		testutil.Must(t, err)
		switch verb {
		case "ADD":
			_, err = n.plugin.add(t.Context(), c, args)
		case "DEL":
			err = n.plugin.del(t.Context(), c, args)
		case "CHECK":
			err = n.plugin.check(t.Context(), c, args)
		case "GC":
			args.ContainerID, args.IfName, args.Netns = "", "", "" // it is about no container
			err = n.plugin.gc(t.Context(), c, args)
		case "STATUS":
			err = n.plugin.status(t.Context(), c, args)
		}
		return err
	}
	return n, exec, run
}

func same(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func TestDelegates(t *testing.T) {
	n, exec, run := alone(t)
	testutil.Must(t, run("ADD"))
	uplinkNS := n.state + "/netns/" + n.name()
	for _, c := range exec.calls {
		if c.netns != uplinkNS {
			t.Errorf("%s was run on %s, not on the uplink namespace", c.plugin, c.netns)
		}
	}
	if first := exec.calls[0].stdin; !strings.Contains(first, `"key":[1,2]`) || strings.Contains(first, "runtimeConfig") || !strings.Contains(first, `"name":"testnet"`) {
		t.Errorf("the main delegate was told %s", first)
	}
	if second := exec.calls[1].stdin; !strings.Contains(second, `"runtimeConfig":{"portMappings":[{"hostPort":8080}]}`) || !strings.Contains(second, "prevResult") {
		t.Errorf("the second delegate was told %s", second)
	}
	same(t, "ADD", exec.verbs(), "main ADD", "meta ADD")
	if link, err := n.podH.LinkByName("eth0"); err != nil || !uplink.IsDevice(link) {
		t.Errorf("the pod's eth0: %v, %v", link, err)
	}
	testutil.Must(t, run("CHECK"))
	if len(exec.calls) != 2 || !strings.Contains(exec.calls[0].stdin, uplinkNS) || exec.calls[0].netns != uplinkNS {
		t.Errorf("CHECK called %+v", exec.calls)
	}
	same(t, "CHECK", exec.verbs(), "main CHECK", "meta CHECK")
	testutil.Must(t, run("STATUS"))
	same(t, "STATUS", exec.verbs(), "main STATUS", "meta STATUS")
	testutil.Must(t, run("GC", fmt.Sprintf(`"cni.dev/valid-attachments": [{"containerID": %q, "ifname": "eth0"}]`, testID)))
	if len(exec.calls) != 2 || !strings.Contains(exec.calls[0].stdin, testID) {
		t.Errorf("GC called %+v", exec.calls)
	}
	same(t, "GC", exec.verbs(), "main GC", "meta GC")
	testutil.Must(t, run("DEL"))
	same(t, "DEL", exec.verbs(), "meta DEL", "main DEL")
	n.clean()
	testutil.Must(t, run("DEL"))
	same(t, "DEL again", exec.verbs(), "meta DEL", "main DEL") // their leases may be left
	n.clean()
}

func TestADelegateThatFailsIsTakenBack(t *testing.T) {
	n, exec, run := alone(t)
	for _, fail := range []string{"main ADD", "meta ADD"} {
		exec.fail = fail
		if err := run("ADD"); err == nil || !strings.Contains(err.Error(), "no, says "+fail) {
			t.Errorf("with %s failing: %v", fail, err)
		}
		calls := exec.verbs()
		same(t, "with "+fail+" failing", calls[len(calls)-2:], "meta DEL", "main DEL")
		n.clean()
	}
	exec.fail = "meta DEL"
	testutil.Must(t, run("ADD"))
	if err := run("DEL"); err == nil {
		t.Error("a delegate's failing DEL is no error")
	}
	exec.fail = ""
	testutil.Must(t, run("DEL"))
	n.clean()
}

func TestAContainerThatIsNotSelectedHasItsDelegatesInThePod(t *testing.T) {
	n, exec, run := alone(t)
	selector := `"select": {"namespaces": ["other"]}`
	testutil.Must(t, run("ADD", selector))
	for _, c := range exec.calls {
		if c.netns != n.podNS {
			t.Errorf("%s was run on %s", c.plugin, c.netns)
		}
	}
	exec.calls = nil
	testutil.Must(t, run("DEL", selector))
	if len(exec.calls) != 2 || exec.calls[0].netns != n.podNS {
		t.Errorf("DEL called %+v", exec.calls)
	}
	link, err := n.podH.LinkByName("eth0")
	testutil.Must(t, err) // the fake leaves it
	testutil.Must(t, n.podH.LinkDel(link))
	n.clean()
}

func TestDelOfNothingRunsNoDefaultDelegates(t *testing.T) {
	n, exec, _ := alone(t)
	args := n.args()
	args.StdinData = fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": %q, "type": "sluice-cni", "stateDir": %q}`, testNet, n.state)
	c, err := loadConfig(args.StdinData)
	testutil.Must(t, err)
	testutil.Must(t, n.plugin.del(t.Context(), c, args))
	same(t, "DEL", exec.verbs())
	n.clean()
}

func TestTheDefaultDelegates(t *testing.T) {
	args := (&node{podNS: "/x"}).args()
	args.StdinData = conf(`"runtimeConfig": {"portMappings": [], "ips": ["10.212.0.9"]}`)
	c, err := loadConfig(args.StdinData)
	testutil.Must(t, err)
	list, err := newChain(c, args, nil)
	testutil.Must(t, err)
	var types []string
	for _, d := range list.plugins {
		types = append(types, d.Type)
	}
	same(t, "the delegates", types, "ptp", "portmap")
	if !strings.Contains(string(list.plugins[0].conf["runtimeConfig"]), "10.212.0.9") {
		t.Errorf("ptp is not told the wanted address: %s", asJSON(list.plugins[0].conf))
	}
}

func TestADelegateThatOutlivesThePluginIsWaitedFor(t *testing.T) {
	s, err := openStore(t.TempDir())
	testutil.Must(t, err)
	h, err := s.hold(t.Context(), "pod-1")
	testutil.Must(t, err)
	start := func() (end func()) {
		cmd := exec.Command("cat")
		in, err := cmd.StdinPipe()
		testutil.Must(t, err)
		testutil.Must(t, cmd.Start())
		return func() { _ = in.Close(); _ = cmd.Wait() }
	}
	var endDelegate func()
	testutil.Must(t, h.lend(func() error { endDelegate = start(); return nil }))
	endMonitor := start()
	defer endMonitor()
	h.release() // as by the plugin's death
	if _, err := s.tryHold("pod-1"); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("with the delegate at work: %v", err)
	}
	endDelegate()
	h, err = s.tryHold("pod-1")
	testutil.Must(t, err)
	h.release()
}

// A plugin that is killed as it makes, or removes, an attachment leaves a directory
// without a record: nobody knows whose it was.
func TestGCOfRemainsWithoutARecordRunsNoDelegateForThem(t *testing.T) {
	n, exec, run := alone(t)
	s, err := openStore(n.state)
	testutil.Must(t, err)
	h, err := s.hold(t.Context(), n.name())
	testutil.Must(t, err)
	h.release()
	testutil.Must(t, run("GC"))
	same(t, "GC", exec.verbs(), "main GC", "meta GC")
	n.clean()
}
