package main

// The fleet: the running candidates and the far side.

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type fleet struct {
	o       options
	far     *process
	names   *process             // dnsmasq, once a cell needs it
	running map[string]*instance // by candidate and MTU
	absent  map[string]error     // what could not be started, and is not tried again
	notes   []string
	cables  int
	lastID  uint64
}

func newFleet(o options) *fleet {
	return &fleet{o: o, running: map[string]*instance{}, absent: map[string]error{}, notes: o.Notes}
}

func (f *fleet) note(s string) {
	if !slices.Contains(f.notes, s) {
		f.notes = append(f.notes, s)
	}
}

func (f *fleet) startFarSide() (err error) {
	if f.far, err = startProcess(f.command(f.path("bench"), "serve")); err != nil {
		return err
	}
	_, err = f.far.ask(request{Op: "ping"}, 5*time.Second)
	return err
}

func (f *fleet) close() {
	for _, i := range f.running {
		i.close()
	}
	for _, p := range []*process{f.far, f.names} {
		if p != nil {
			p.stop()
		}
	}
}

// get starts a candidate at first use. One that does not start is not tried again.
func (f *fleet) get(name string, mtu int) (*instance, error) {
	key := fmt.Sprint(name, "/", mtu)
	if err := f.absent[key]; err != nil {
		return nil, err
	}
	if i := f.running[key]; i != nil {
		return i, nil
	}
	i, err := f.start(name, mtu)
	if err != nil {
		f.absent[key] = err
		return nil, err
	}
	f.running[key] = i
	return i, nil
}

// measure runs a probe once. It ends a candidate that failed; the next round gets a new one.
func (f *fleet) measure(p probe, name string) (map[string]float64, error) {
	if p.alone != nil {
		return p.alone(f, name)
	}
	mtu := p.mtu
	if name == host {
		mtu = 65520
	}
	var (
		inst *instance
		err  error
	)
	if p.fresh {
		if inst, err = f.start(name, mtu); err == nil {
			defer inst.close()
		}
	} else {
		inst, err = f.get(name, mtu)
	}
	if err != nil {
		return nil, err
	}
	if err := inst.reach(p.family); err != nil {
		return nil, err
	}
	got, err := p.run(f, inst, inst.target[p.family])
	if err != nil && !p.fresh {
		select {
		case <-inst.ended:
			f.note(fmt.Sprintf("%s ended during %s: %v", name, p.name, err))
		default:
		}
		inst.close()
		delete(f.running, fmt.Sprint(name, "/", mtu))
	}
	time.Sleep(100 * time.Millisecond) // lets what was cut off be torn down
	return got, err
}

// describe records what was measured, and on what.
func (f *fleet) describe(res *results) {
	res.Notes = append(f.notes, res.Notes...)
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		res.Versions["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(cpuinfo)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			if res.Processors++; res.Processors == 1 {
				res.Versions["processor"] = strings.TrimSpace(v)
			}
		}
	}
	for name, args := range map[string][]string{ours: {f.o.Sluice, "version"}, pasta: {f.o.Pasta, "--version"}, slirp: {f.o.Slirp, "--version"}} {
		if args[0] == "" {
			continue
		}
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		if err != nil {
			line = err.Error()
		}
		res.Versions[name] = strings.TrimPrefix(line, name+" ")
	}
}
