package e2e

// A slot of the soak test: one pod that comes and goes, and the programs that knock at it.

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The states of a slot.
const (
	detached = iota
	attached
	unknown // a plugin was killed
)

// slot is a namespace that is attached and detached again and again, with programs that knock at
// doors from inside and from outside. One goroutine uses it.
type slot struct {
	n     *node
	p     *pod
	alone bool // sluice delegates; otherwise the pod's interface is open after ptp's ADD and before ours
	rng   *rand.Rand
	state int
	left  *atomic.Int64
	// repaired is the error of the last repair. While others kill, it may fail: they may hit the
	// very monitor that it starts.
	repaired error
	killed   map[string]int
	took     map[string]time.Duration // by verb
	in, out  *knocker
}

func newSlot(t *testing.T, n *node, i int, seed uint64, left *atomic.Int64) *slot {
	t.Helper()
	s := &slot{n: n, alone: i%4 != 3, rng: rand.New(rand.NewPCG(seed, uint64(i))), left: left,
		killed: map[string]int{}, took: map[string]time.Duration{}}
	// No other knocker goes where the main plugin's interface is in the pod for a while.
	subnets := map[bool][]string{true: {"10.88.0.0/17", "fd88::/97"}, false: {"10.88.128.0/17", "fd88::8000:0/97"}}[s.alone]
	s.p = n.newPod(t, n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: subnets, alone: s.alone, sluice: gate}))
	// It answers everyone who gets in.
	serve(t, s.p, "0.0.0.0", "::")
	s.in, s.out = newKnocker(t, s.p), newKnocker(t, n.far)
	if s.alone {
		s.in.at(t, s.doors()...)
	}
	return s
}

// doors returns far's doors, open and closed.
func (s *slot) doors() (doors []string) {
	for _, far := range []string{far4, far6} {
		for _, port := range []int{portWhoami, portEcho, portHTTP, portDigest} {
			doors = append(doors, "tcp:"+at(far, port))
		}
		doors = append(doors, "udp:"+at(far, portEcho), "udp:"+at(far, portWhoami))
	}
	return doors
}

// podDoors returns the doors of the pod, and of the addresses that the next pods will have.
func (s *slot) podDoors() (doors []string) {
	for _, a := range s.p.addrs() {
		addr := netip.MustParseAddr(a)
		for range map[bool]int{false: 1, true: 4}[s.alone] {
			doors = append(doors, "tcp:"+at(addr.String(), portHTTP), "tcp:"+at(addr.String(), 4), "udp:"+at(addr.String(), portEcho))
			addr = addr.Next()
		}
	}
	return doors
}

// round kills something, or repairs what was killed.
func (s *slot) round(t *testing.T, slots []*slot, neighbour *pod) {
	switch {
	case s.state == detached:
		s.add(t, s.rng.IntN(3) > 0)
	case s.state == unknown:
		s.cure(t, slots, neighbour)
	case s.rng.IntN(3) == 0:
		s.verb(t, slots, neighbour)
	default:
		s.killServer(t, slots, neighbour)
	}
}

// call runs verbs of the runtime. With kill, it kills the plugin at some point during them, unless
// the plugin was faster.
func (s *slot) call(verb string, kill bool, f func(*node) error) (killed bool, err error) {
	mine := *s.n // the plugin's caller is this copy
	if !kill {
		begun := time.Now()
		err = f(&mine)
		s.took[verb] = time.Since(begun)
		return false, err
	}
	after := time.Duration(s.rng.Float64() * 1.2 * float64(max(s.took[verb], 60*time.Millisecond)))
	mine.killAfter = func(pid int) {
		time.Sleep(after)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err = f(&mine); err != nil && strings.Contains(err.Error(), "signal: killed") {
		s.count("plugin in " + verb)
		return true, nil
	}
	return false, err // the plugin was faster
}

func (s *slot) count(what string) {
	s.killed[what]++
	s.left.Add(-1)
}

func (s *slot) add(t *testing.T, kill bool) {
	killed, err := s.call("ADD", kill, func(n *node) error { return s.with(n).tryAdd() })
	switch {
	case killed:
		s.state = unknown
	case err != nil && s.state == unknown && strings.Contains(err.Error(), "already"):
		// The previous ADD was killed when everything was done: DEL has to handle this.
	case err != nil:
		t.Errorf("ADD of %s: %v", s.p, err)
	default:
		s.state = attached
		if !s.alone {
			s.in.at(t, s.doors()...)
		}
		s.out.at(t, s.podDoors()...)
	}
}

// with returns the slot's pod as the node's runtime n has it.
func (s *slot) with(n *node) *pod {
	s.p.n = n
	return s.p
}

// rest stops the knocking from outside and, where the pod is open before and after, from inside.
func (s *slot) rest(t *testing.T) {
	s.out.at(t)
	if !s.alone {
		s.in.at(t)
	}
}

// cure does what a runtime does about an ADD or DEL that did not finish.
func (s *slot) cure(t *testing.T, slots []*slot, neighbour *pod) {
	kill := s.rng.IntN(3) == 0
	switch way := s.rng.IntN(3); {
	case way == 0 && s.alone:
		s.add(t, kill)
	case way == 1:
		killed, err := s.call("GC", kill, func(n *node) error { return n.gc(context.Background(), s.p.list, others(slots, s, neighbour)...) })
		if killed {
			return
		}
		if err != nil {
			t.Errorf("GC after a killed verb of %s: %v", s.p, err)
		}
		s.freeLease(t)
		s.state = detached
	default:
		killed, err := s.call("DEL", kill, func(n *node) error { return s.with(n).del() })
		if killed {
			return
		}
		if err != nil {
			t.Errorf("DEL after a killed verb of %s: %v", s.p, err)
		}
		s.state = detached
	}
}

// freeLease does the main plugin's part: host-local has no GC.
func (s *slot) freeLease(t *testing.T) {
	if s.alone {
		return
	}
	mainOnly := *s.p.list
	mainOnly.Plugins = s.p.list.Plugins[:1]
	p := *s.p
	p.list, p.n = &mainOnly, s.n
	if err := p.del(); err != nil {
		t.Errorf("the main plugin's DEL of %s: %v", s.p, err)
	}
}

// others returns the pods that the runtime knows, except one.
func others(slots []*slot, but *slot, more ...*pod) []*pod {
	for _, s := range slots {
		if s != but {
			more = append(more, s.p)
		}
	}
	return more
}

// verb kills a plugin that works on an attached pod.
func (s *slot) verb(t *testing.T, slots []*slot, neighbour *pod) {
	switch s.rng.IntN(4) {
	case 0:
		check := func(n *node) error { return s.with(n).check() }
		killed, err := s.call("CHECK", true, check)
		for range 3 {
			if err == nil || !strings.Contains(err.Error(), "nothing serves the pod") {
				break
			}
			// Another slot's kill hit the verb that was meant to do it.
			s.mend(t, slots, neighbour)
			_, err = s.call("CHECK", false, check)
		}
		if err != nil && !killed && !strings.Contains(err.Error(), "is restarting") {
			t.Errorf("CHECK of %s: %v", s.p, err)
		}
	case 1:
		s.repair(t, slots, neighbour, true)
	default:
		s.rest(t)
		killed, err := s.call("DEL", s.rng.IntN(4) > 0, func(n *node) error { return s.with(n).del() })
		s.state = detached
		if killed {
			s.state = unknown
		} else if err != nil {
			t.Errorf("DEL of %s: %v", s.p, err)
		}
	}
}

// repair has the runtime look after its pods.
func (s *slot) repair(t *testing.T, slots []*slot, neighbour *pod, kill bool) {
	f := func(n *node) error { return n.runtime("1.1.0").GetStatusNetworkList(context.Background(), s.p.list) }
	name := "STATUS"
	if s.rng.IntN(2) == 0 {
		name = "GC"
		f = func(n *node) error { return n.gc(context.Background(), s.p.list, others(slots, nil, neighbour)...) }
	}
	// Another slot may kill the very monitor that is being started: only the final state counts.
	_, s.repaired = s.call(name, kill, f)
}

// mend puts the pod's monitor to work again.
func (s *slot) mend(t *testing.T, slots []*slot, neighbour *pod) {
	s.repair(t, slots, neighbour, false)
}

// killServer ends what serves the pod.
func (s *slot) killServer(t *testing.T, slots []*slot, neighbour *pod) {
	monitor := s.monitor()
	workers := descendants(monitor)
	if monitor > 0 && len(workers) > 0 && s.rng.IntN(2) == 0 {
		if syscall.Kill(workers[0], syscall.SIGKILL) == nil {
			s.count("worker")
		}
	} else if monitor > 0 {
		if syscall.Kill(monitor, syscall.SIGKILL) == nil {
			s.count("monitor")
		}
		for s.rng.IntN(3) == 0 {
			s.repair(t, slots, neighbour, true)
		}
		s.mend(t, slots, neighbour)
	} else {
		s.mend(t, slots, neighbour) // another slot's kill hit the verb that was meant to do it
	}
	if s.rng.IntN(3) == 0 {
		s.serves(t, slots, neighbour)
	}
}

// monitor returns the pid in the attachment's state.
func (s *slot) monitor() int {
	own, _, _ := strings.Cut(s.p.id, "-")
	found, _ := filepath.Glob("/run/sluice/" + own + "_*/state.json")
	if len(found) != 1 {
		return 0
	}
	b, _ := os.ReadFile(found[0])
	_, rest, _ := strings.Cut(string(b), `"pid":`)
	var pid int
	fmt.Sscan(strings.TrimLeft(rest, " "), &pid)
	return pid
}

// serves checks that the pod reaches what it may. Another slot may kill the verb that launches the
// pod's monitor, which then ends with it, so the check retries, as runtimes do.
func (s *slot) serves(t *testing.T, slots []*slot, neighbour *pod) {
	deadline := time.Now().Add(10 * time.Second)
	for _, far := range []string{far4, far6} {
		for {
			p := s.p.start(t, peerBin(), "dial", "-timeout", "1s", at(far, portWhoami))
			<-p.done
			r := p.result("")
			if strings.Contains(r.out, `"got"`) {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s has no network: %s\n%s", s.p, r, s.p.configuration(t))
				return
			}
			s.mend(t, slots, neighbour)
		}
	}
}

// forget removes what is left of the slot when GC does not know it.
func (s *slot) forget(t *testing.T) {
	t.Helper()
	for door, n := range s.in.end(t) {
		if strings.HasSuffix(door, ":"+strconv.Itoa(portHTTP)) || strings.HasSuffix(door, ":"+strconv.Itoa(portDigest)) || strings.HasPrefix(door, "udp") {
			t.Errorf("%s reached %s %d times", s.p, door, n)
		}
	}
	if got := s.out.end(t); len(got) > 0 {
		t.Errorf("%s was reached: %v", s.p, got)
	}
	s.freeLease(t)
	s.p.close(t)
}

// knocker is a `peer knock`.
type knocker struct {
	*proc
	lines int
}

func newKnocker(t *testing.T, in place) *knocker {
	t.Helper()
	return &knocker{proc: in.start(t, peerBin(), "knock", "-pause", soakPause)}
}

// at makes it knock at these doors, and at no others any more.
func (k *knocker) at(t *testing.T, doors ...string) {
	k.lines++
	k.write([]byte(strings.Join(doors, " ") + "\n"))
	deadline := time.Now().Add(10 * time.Second)
	for strings.Count(k.result("").out, `"knocking"`) < k.lines {
		if time.Now().After(deadline) {
			t.Errorf("nobody knocks: %s", k.result(""))
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// end returns which doors it has entered, and how often.
func (k *knocker) end(t *testing.T) map[string]int {
	t.Helper()
	k.closeInput()
	var total struct{ Entered map[string]int }
	k.wait(t, 10*time.Second).into(t, &total)
	for door, n := range total.Entered {
		if n == 0 {
			delete(total.Entered, door)
		}
	}
	return total.Entered
}
