package e2e

// Kills at random: whatever ends, and however often, denied traffic stays in, everything that was
// made is found again, and other pods do not notice.
//
//	SLUICE_SOAK_KILLS=500 SLUICE_SOAK_SEED=N  `make soak-cni`; else a short run

import (
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	soakKills = 25 // of the short run
	// soakPause is how long a program that asks again and again waits in between.
	soakPause = "8ms"
)

// gate lets the pod reach two ports anywhere, and lets no client in.
var gate = map[string]any{"policy": map[string]any{
	"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": map[string]any{"name": "gate"},
	"spec": map[string]any{"defaultAction": "drop", "egress": []any{map[string]any{
		"name": "who", "action": "allow", "to": []any{map[string]any{"entity": "world"}},
		"ports": []any{map[string]any{"protocol": "TCP", "port": portWhoami}, map[string]any{"protocol": "TCP", "port": portEcho}},
	}}, "ingress": []any{}},
}}

// throttled lets everything pass, but slowly enough that other things can run.
var throttled = map[string]any{"limits": map[string]any{"egressBandwidth": "150M", "ingressBandwidth": "150M"}}

// escapes reports whether a packet says what gate denies: anything from a pod's address except to
// the ports that it may reach. Neighbour discovery belongs to the uplink namespace.
func escapes(p packet) bool {
	pods := [2]netip.Prefix{netip.MustParsePrefix(pods4), netip.MustParsePrefix(pods6)}
	if !pods[0].Contains(p.src) && !pods[1].Contains(p.src) {
		return false
	}
	const tcp, icmpv6 = 6, 58
	switch p.proto {
	case tcp:
		return p.dport != portWhoami && p.dport != portEcho
	case icmpv6:
		return !p.neighbour
	}
	return true
}

func TestCNISoak(t *testing.T) {
	cniArea(t, "cni.soak")
	kills, seed := soakKills, uint64(time.Now().UnixNano())
	if s := os.Getenv("SLUICE_SOAK_KILLS"); s != "" {
		kills = number10(t, s)
	}
	if s := os.Getenv("SLUICE_SOAK_SEED"); s != "" {
		seed = uint64(number10(t, s))
	}
	t.Logf("%d kills; the same again: SLUICE_SOAK_SEED=%d", kills, seed)
	n := newNode(t)
	serve(t, n.far)
	open := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: []string{"10.88.0.0/17", "fd88::/97"}, alone: true, sluice: throttled})
	neighbour := n.add(t, open)
	serve(t, neighbour)
	var free []netip.Addr
	for _, a := range neighbour.addrs() {
		free = append(free, netip.MustParseAddr(a))
	}
	var allowed atomic.Uint64 // shows that the watch itself works
	out := n.watchFor(t, "", func(p packet) bool {
		if p.proto == 6 && p.dport == portWhoami {
			allowed.Add(1)
		}
		return escapes(p)
	}, free...)
	held := neighbour.start(t, peerBin(), "hold", "-count", "20", at(far4, portEcho))
	held.waitText(t, `"held","open":20`, 10*time.Second)
	heldIn := n.far.start(t, peerBin(), "hold", "-count", "20", at(neighbour.addr(true), portEcho))
	heldIn.waitText(t, `"held","open":20`, 10*time.Second)
	moving := newTransfers(t, neighbour, at(far6, portXfer), n.far, at(neighbour.addr(false), portXfer))

	left := &atomic.Int64{}
	left.Store(int64(kills))
	var slots []*slot
	for i := range 4 {
		slots = append(slots, newSlot(t, n, i, seed, left))
	}
	var working sync.WaitGroup
	for _, s := range slots {
		working.Go(func() {
			for left.Load() > 0 && !t.Failed() {
				s.round(t, slots, neighbour)
			}
		})
	}
	working.Wait()

	for _, s := range slots {
		if s.state == attached && !t.Failed() {
			s.mend(t, slots, neighbour)
			if s.repaired != nil {
				t.Errorf("the last repair, with nothing killed any more: %v", s.repaired)
			}
			s.serves(t, slots, neighbour)
		}
		s.rest(t)
	}
	held.write([]byte("echo\n"))
	held.waitText(t, `"echoed","open":20`, 10*time.Second)
	heldIn.write([]byte("echo\n"))
	heldIn.waitText(t, `"echoed","open":20`, 10*time.Second)
	moving.end(t)
	for _, p := range []*proc{held, heldIn} {
		p.stop(t, syscall.SIGKILL)
	}
	// The runtime forgets them all, and reports only that.
	if err := n.gc(t.Context(), open, neighbour); err != nil {
		t.Errorf("GC: %v", err)
	}
	for _, s := range slots {
		s.forget(t)
	}
	if err := neighbour.del(); err != nil {
		t.Errorf("the neighbour's DEL: %v", err)
	}
	neighbour.close(t)
	n.clean(t)

	if lost := out.lost(t); lost != 0 {
		t.Errorf("the watch lost %d packets", lost)
	}
	got := out.since(0)
	for _, p := range got[:min(len(got), 20)] {
		t.Errorf("a packet got out: %v", p)
	}
	count := map[string]int{}
	for _, s := range slots {
		for what, n := range s.killed {
			count[what] += n
		}
	}
	t.Logf("killed %v; %d packets to allowed ports, %d that got out; neighbours moved %d MiB", count, allowed.Load(), len(got), moving.mib.Load())
	if allowed.Load() == 0 {
		t.Error("the watch saw nothing of what is allowed")
	}
}

func number10(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// transfers runs one checked transfer after the other, in both directions, until end.
type transfers struct {
	stop atomic.Bool
	mib  atomic.Int64
	all  sync.WaitGroup
}

func newTransfers(t *testing.T, inside place, to string, outside place, in string) *transfers {
	m := &transfers{}
	for _, way := range []struct {
		from place
		to   string
	}{{inside, to}, {outside, in}} {
		m.all.Go(func() {
			for !m.stop.Load() && !t.Failed() {
				const mib = 48
				p := way.from.start(t, peerBin(), "xfer", "-streams", "2", "-size", strconv.Itoa(mib<<19), way.to)
				<-p.done
				if r := p.result(""); r.status != 0 || !strings.Contains(r.out, `"ok":2`) {
					t.Errorf("a neighbour's transfer fails\n%s", r)
					return
				}
				m.mib.Add(mib)
			}
		})
	}
	return m
}

func (m *transfers) end(t *testing.T) {
	t.Helper()
	m.stop.Store(true)
	m.all.Wait()
}
