package main

// Probes: what is measured, how, and which cells it fills. A cell's name says everything:
//
//	up/8/65520/v4          Gbit/s through 8 flows, MTU 65520, IPv4; …/fair: Jain's index of the flows' bytes
//	tcp-rtt/v4/p99         µs for one byte and back
//	connect/v4/rate        connect + byte + close per second, 16 at once; …/failed
//	udp-rtt/v4             round trips of 64 bytes a second, one at a time
//	udp-1400/v4/rate       echoes a second with 64 under way; …/loss in percent
//	dns/v4/rate            answers a second to one question, through the gate and of dnsmasq itself; …/loss in percent
//	cost/connect/v4        as above, sluice with 10 000 rules or the flow log on, and without
//	cost/tls/connect/v4    as above, a ClientHello first, sluice with 1 000 rules by domain, and without
//	idle/… flows/… start/… a sandbox at rest, with 10 000 idle flows, and begun and ended

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

type probe struct {
	name       string
	candidates []string
	mtu        int
	family     string
	rounds     int      // at most; 0: all
	turns      int      // in a round, there and back through the candidates; 0: one
	fresh      bool     // a sandbox of its own
	cells      []string // all that it fills
	run        func(f *fleet, i *instance, target string) (map[string]float64, error)
	alone      func(f *fleet, candidate string) (map[string]float64, error) // starts what it measures
}

// order returns the candidates in a round's order. Each round begins with a different one, and
// every second turn runs backwards, so that a drift meanwhile hits all alike.
func (p probe) order(round int) (out []string) {
	once := append(slices.Clone(p.candidates[round%len(p.candidates):]), p.candidates[:round%len(p.candidates)]...)
	for range max(p.turns, 1) {
		out = append(out, once...)
		slices.Reverse(once)
	}
	return out
}

func (p probe) matches(cells *regexp.Regexp) bool {
	for _, c := range p.cells {
		if cells.MatchString(c) {
			return true
		}
	}
	return false
}

// timing holds the lengths of the windows.
type timing struct {
	warm, bulk, small int // ms
	idle, settle      time.Duration
	starts            int
	turns             int // of the cost cells
}

const (
	idleFlows    = 10_000
	manyConnects = 200_000
)

func allProbes(short bool) []probe {
	t := timing{warm: 400, bulk: 2000, small: 1500, idle: 20 * time.Second, settle: 5 * time.Second, starts: 10, turns: 6}
	families, flows := []string{"v4", "v6"}, []int{1, 8, 64}
	if short {
		t = timing{warm: 200, bulk: 350, small: 400, idle: 4 * time.Second, settle: time.Second, starts: 4, turns: 1}
		families, flows = families[:1], flows[:2]
	}
	peers := []string{ours, pasta, slirp, veth, host}
	// Start comes first, while no connection is in TIME_WAIT: pasta reads the socket table when it
	// starts.
	out := []probe{startProbe(t), startProbe(t), startProbe(t)}
	for _, mtu := range []int{65520, 1500} {
		for _, fam := range families {
			for _, n := range flows {
				for _, dir := range []string{"up", "down"} {
					p := bulkProbe(fmt.Sprintf("%s/%d/%d/%s", dir, n, mtu, fam), mtu, fam, t.bulkOf(dir, n))
					p.candidates = peers
					if mtu == 1500 { // the loopback has one MTU
						p.candidates = peers[:4]
					}
					out = append(out, p)
				}
			}
		}
	}
	for _, fam := range families {
		out = append(out, small(fam, peers, t)...)
	}
	if !short {
		p := connectProbe("connect-200000/v4", "v4", request{Count: manyConnects, MS: 120_000})
		p.candidates, p.rounds = []string{ours, pasta}, 1
		out = append(out, p)
	}
	out = append(out, costs("cost/", request{}, t, ours, withRules, withLog)...)
	for _, speaks := range greetings(short) {
		// The greeting is sent with the rules off too, so that both carry the same bytes.
		out = append(out, costs("cost/"+speaks+"/", request{Addr: farNamed, Speaks: speaks}, t, ours, withDomains)...)
	}
	out = append(out, dnsProbe(t), idleProbe(t), flowsProbe(t))
	if short { // these vary little
		out[len(out)-1].rounds, out[len(out)-2].rounds = 1, 1
	}
	return out
}

// costs returns the probes that measure what a feature of sluice costs: variants with and without
// it, under requests like q. The ratios are near one and scatter with the scheduler's momentary
// placement, so they take many turns in short windows.
func costs(prefix string, q request, t timing, variants ...string) []probe {
	t.warm, t.bulk, t.small = 200, 400, 400
	up, down := t.bulkOf("up", 8), t.bulkOf("down", 8)
	short := request{WarmMS: t.warm, MS: t.small}
	for _, r := range []*request{&up, &down, &short} {
		r.Addr, r.Speaks = q.Addr, q.Speaks
	}
	out := []probe{
		bulkProbe(prefix+"up/8/65520/v4", 65520, "v4", up),
		bulkProbe(prefix+"down/8/65520/v4", 65520, "v4", down),
		connectProbe(prefix+"connect/v4", "v4", short),
	}
	for i := range out {
		out[i].candidates, out[i].turns = variants, t.turns
	}
	return out
}

func (t timing) bulkOf(dir string, flows int) request {
	return request{Dir: dir, Flows: flows, WarmMS: t.warm, MS: t.bulk}
}

func bulkProbe(name string, mtu int, fam string, q request) probe {
	q.Op = "bulk"
	cells := []string{name}
	if q.Flows > 1 && !strings.HasPrefix(name, "cost/") {
		cells = append(cells, name+fairCell)
	}
	return probe{name: name, mtu: mtu, family: fam, cells: cells,
		run: func(f *fleet, i *instance, target string) (map[string]float64, error) {
			f.lastID++
			q := q
			q.ID, q.Addr = f.lastID, cmp.Or(q.Addr, target)
			r, err := i.ask(q, 20*time.Second)
			if err != nil {
				return nil, err
			}
			counts := r.Flows
			if q.Dir == "up" {
				taken, err := f.far.ask(request{Op: "take", ID: q.ID, Flows: q.Flows}, 5*time.Second)
				if err != nil {
					return nil, err
				}
				if counts = taken.Flows; len(counts) != q.Flows {
					return nil, fmt.Errorf("the far side saw %d of %d flows end", len(counts), q.Flows)
				}
			}
			var sum int64
			for _, n := range counts {
				sum += n
			}
			m := map[string]float64{name: float64(sum) * 8 / r.Seconds / 1e9}
			if len(cells) > 1 {
				m[cells[1]] = jain(counts)
			}
			return m, nil
		}}
}

// small returns the small-message probes of a family.
func small(fam string, candidates []string, t timing) []probe {
	rtt := "tcp-rtt/" + fam
	out := []probe{{
		name: rtt, family: fam, cells: []string{rtt + "/p50", rtt + "/p99", rtt + "/p99.9"},
		run: func(_ *fleet, i *instance, target string) (map[string]float64, error) {
			r, err := i.ask(request{Op: "rtt", Addr: target, WarmMS: t.warm, MS: t.small}, 20*time.Second)
			return map[string]float64{rtt + "/p50": r.P50, rtt + "/p99": r.P99, rtt + "/p99.9": r.P999}, err
		},
	},
		connectProbe("connect/"+fam, fam, request{WarmMS: t.warm, MS: t.small}),
		udpProbe("udp-rtt/"+fam, fam, 64, 1, t),
		udpProbe("udp-64/"+fam, fam, 64, batch, t),
		udpProbe("udp-1400/"+fam, fam, 1400, batch, t),
	}
	for i := range out {
		out[i].candidates, out[i].mtu = candidates, 65520
	}
	return out
}

func connectProbe(name, fam string, q request) probe {
	q.Op, q.Parallel = "connect", 16
	return probe{name: name, mtu: 65520, family: fam, cells: []string{name + "/rate", name + "/failed"},
		run: func(f *fleet, i *instance, target string) (map[string]float64, error) {
			q := q
			q.Addr = cmp.Or(q.Addr, target)
			r, err := i.ask(q, time.Duration(q.WarmMS+q.MS)*time.Millisecond+20*time.Second)
			if err != nil {
				return nil, err
			}
			for what, n := range r.Failed {
				f.note(fmt.Sprintf("%s: %d connections through %s failed: %s", name, n, i.name, what))
			}
			if q.Count > 0 && r.Count+int64(r.failures()) < int64(q.Count) {
				f.note(fmt.Sprintf("%s: only %d of %d were tried through %s in the time", name, r.Count+int64(r.failures()), q.Count, i.name))
			}
			return map[string]float64{name + "/rate": float64(r.Count) / r.Seconds, name + "/failed": float64(r.failures())}, nil
		}}
}

func udpProbe(name, fam string, size, window int, t timing) probe {
	cells := []string{name + "/rate", name + "/loss"}
	if window == 1 {
		cells = []string{name}
	}
	return probe{name: name, family: fam, cells: cells,
		run: func(_ *fleet, i *instance, target string) (map[string]float64, error) {
			return datagramCells(i, request{Op: "udp", Addr: target, Size: size, Window: window, WarmMS: t.warm, MS: t.small}, name)
		}}
}

func datagramCells(i *instance, q request, name string) (map[string]float64, error) {
	r, err := i.ask(q, 20*time.Second)
	switch rate := float64(r.Count) / r.Seconds; {
	case err != nil:
		return nil, err
	case q.Window == 1:
		return map[string]float64{name: rate}, nil
	default:
		return map[string]float64{name + "/rate": rate, name + "/loss": 100 * float64(r.Lost) / float64(max(1, r.Sent))}, nil
	}
}

// startProbe times a whole run of `true`. pasta's plain form leaves the network unconfigured.
func startProbe(t timing) probe {
	return probe{name: "start", candidates: []string{ours, pasta, pastaConfigured}, cells: []string{"start/true"}, rounds: 1,
		alone: func(f *fleet, name string) (map[string]float64, error) {
			args := map[string][]string{
				ours:            {f.o.Sluice, "run", "--", "true"},
				pasta:           {f.o.Pasta, "--", "true"},
				pastaConfigured: {f.o.Pasta, "--config-net", "--", "true"},
			}[name]
			if args[0] == "" {
				return nil, errAbsent
			}
			var took []float64
			for range t.starts {
				// A file, not a pipe: what a peer leaves behind for a moment would keep a pipe
				// open, and so be timed.
				out, err := os.CreateTemp(f.o.Dir, "start-")
				if err != nil {
					return nil, err
				}
				defer out.Close()
				cmd := f.command(args...)
				cmd.Stderr = out
				begun := time.Now()
				if err := cmd.Start(); err != nil {
					return nil, err
				}
				limit := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
				err = cmd.Wait()
				took = append(took, float64(time.Since(begun).Microseconds())/1000)
				limit.Stop()
				if err != nil {
					said, _ := os.ReadFile(out.Name())
					return nil, fmt.Errorf("%w: %s", err, said)
				}
			}
			return map[string]float64{"start/true": median(took)}, nil
		}}
}

// idleProbe measures a sandbox in which nothing has happened.
func idleProbe(t timing) probe {
	return probe{name: "idle", candidates: []string{ours, pasta, slirp}, mtu: 65520, family: "v4", rounds: 2, fresh: true,
		cells: []string{"idle/cpu", "idle/wakeups", "idle/private", "idle/all-rss", "idle/all-private"},
		run: func(_ *fleet, i *instance, _ string) (map[string]float64, error) {
			time.Sleep(t.settle)
			all, worker, err := i.parts()
			if err != nil {
				return nil, err
			}
			before, err := procUsage(worker)
			begun := time.Now()
			time.Sleep(t.idle)
			after, err2 := procUsage(worker)
			seconds := time.Since(begun).Seconds()
			if err := errors.Join(err, err2); err != nil {
				return nil, err
			}
			m := map[string]float64{
				"idle/cpu":     float64(after.cpu-before.cpu) / 1e9 / seconds * 100,
				"idle/wakeups": float64(after.switches-before.switches) / seconds,
			}
			for _, pid := range all {
				mem, err := procMemory(pid)
				if err != nil {
					return m, err
				}
				if pid == worker {
					m["idle/private"] = float64(mem.private) / (1 << 20)
				}
				m["idle/all-rss"] += float64(mem.rss) / (1 << 20)
				m["idle/all-private"] += float64(mem.private) / (1 << 20)
			}
			return m, nil
		}}
}

// flowsProbe measures what 10 000 idle flows add to the worker's memory.
func flowsProbe(t timing) probe {
	return probe{name: "flows", candidates: []string{ours, pasta}, mtu: 65520, family: "v4", rounds: 2, fresh: true,
		cells: []string{"flows/bytes"},
		run: func(f *fleet, i *instance, target string) (map[string]float64, error) {
			_, worker, err := i.parts()
			if err != nil {
				return nil, err
			}
			before, err := procMemory(worker)
			if err != nil {
				return nil, err
			}
			r, err := i.ask(request{Op: "hold", Addr: target, Count: idleFlows, MS: 20_000}, 40*time.Second)
			if err != nil {
				return nil, err
			}
			if r.Count < idleFlows*9/10 {
				return nil, fmt.Errorf("only %d of %d idle flows were set up: %v", r.Count, idleFlows, r.Failed)
			}
			if r.Count < idleFlows {
				f.note(fmt.Sprintf("%d of %d idle flows through %s were set up: %v", r.Count, idleFlows, i.name, r.Failed))
			}
			time.Sleep(t.settle)
			after, err := procMemory(worker)
			if err != nil {
				return nil, err
			}
			_, err = i.ask(request{Op: "release"}, 10*time.Second)
			return map[string]float64{"flows/bytes": float64(after.rss-before.rss) / float64(r.Count)}, err
		}}
}
