package e2e

// What is left when things end out of order: DEL of a half-removed pod, the plugin killed at each
// step, the monitor and the worker killed.

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// attachment is the part of `sluice ps -o json` that the tests read.
type attachment struct {
	Name   string
	State  string
	PID    int
	Worker int `json:"worker_pid"`
}

// attachment asks sluice for the pod's attachment.
func (p *pod) attachment(t *testing.T) attachment {
	t.Helper()
	var all []attachment
	p.n.sluiceJSON(t, &all, "ps", "-o", "json")
	own, _, _ := strings.Cut(p.id, "-")
	i := slices.IndexFunc(all, func(a attachment) bool { return strings.HasPrefix(a.Name, own+"_") })
	if i < 0 {
		t.Fatalf("`sluice ps` does not list %s: %+v", p.id, all)
	}
	return all[i]
}

// kill kills a process of an attachment as the kernel does when memory runs out.
func kill(t *testing.T, pid int) {
	t.Helper()
	if pid <= 1 {
		t.Fatalf("no such process: %d", pid)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	testutil.Within(t, 2*time.Second, func() (bool, string) {
		f := stat(pid)
		// Its first thread may be dead while others are still ending and hold its descriptors.
		const threads = 20 - 3
		return len(f) == 0 || f[0] == "Z" && (f[threads] == "0" || f[threads] == "1"), "a killed process does not end"
	})
}

func (p *pod) record(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(cniState, "attachments", p.attachment(t).Name, "record.json"))
	if len(found) != 1 {
		t.Fatalf("the attachment's records: %q", found)
	}
	return found[0]
}

func TestCNIDelOfWhateverIsLeft(t *testing.T) {
	cniArea(t, "cni.del")
	n := newNode(t)
	for _, alone := range []bool{false, true} {
		list := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: alone})
		for _, row := range []struct {
			name  string
			spoil func(*testing.T, *pod)
		}{
			{"nothing was added", nil},
			{"the namespace is gone", func(t *testing.T, p *pod) { p.close(t) }},
			{"the worker is dead", func(t *testing.T, p *pod) { kill(t, p.attachment(t).Worker) }},
			{"the monitor is dead", func(t *testing.T, p *pod) { kill(t, p.attachment(t).PID) }},
			{"the monitor is dead and the namespace gone", func(t *testing.T, p *pod) { kill(t, p.attachment(t).PID); p.close(t) }},
			{"the record is half-written", func(t *testing.T, p *pod) {
				if err := os.Truncate(p.record(t), 200); err != nil {
					t.Fatal(err)
				}
			}},
			{"the record is half-written and the namespace gone", func(t *testing.T, p *pod) {
				if err := os.Truncate(p.record(t), 200); err != nil {
					t.Fatal(err)
				}
				p.close(t)
			}},
			{"the record is gone", func(t *testing.T, p *pod) {
				if err := os.Remove(p.record(t)); err != nil {
					t.Fatal(err)
				}
			}},
		} {
			t.Run(map[bool]string{false: "chained, ", true: "delegating, "}[alone]+row.name, func(t *testing.T) {
				p := n.newPod(t, list)
				if row.spoil != nil {
					if err := p.tryAdd(); err != nil {
						t.Fatalf("ADD: %v", err)
					}
					row.spoil(t, p)
				}
				for _, time := range []string{"first", "second"} {
					if err := p.del(); err != nil {
						t.Errorf("the %s DEL: %v", time, err)
					}
				}
				p.close(t)
				n.clean(t)
			})
		}
	}
}

func TestCNIKilledAtAnyStep(t *testing.T) {
	cniArea(t, "cni.killed")
	n := newNode(t)
	serve(t, n.far)
	sound := n.bin
	steps := []struct {
		verb, step     string
		chained, alone bool
	}{
		{"ADD", "recorded", true, true}, {"ADD", "namespace", true, true}, {"ADD", "delegated", false, true},
		{"ADD", "saved", true, false}, {"ADD", "moved", true, false}, {"ADD", "restored", true, false},
		{"ADD", "steered", true, true}, {"ADD", "device", true, true}, {"ADD", "addressed", true, true},
		{"ADD", "launched", true, true}, {"ADD", "committed", true, true},
		{"DEL", "stopped", true, true}, {"DEL", "given", true, true}, {"DEL", "unbound", true, true},
	}
	for _, alone := range []bool{false, true} {
		list := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: alone})
		for _, s := range steps {
			if alone && !s.alone || !alone && !s.chained {
				continue
			}
			for _, cure := range []string{"DEL", "GC"} {
				t.Run(map[bool]string{false: "chained, ", true: "delegating, "}[alone]+s.verb+" at "+s.step+", then "+cure, func(t *testing.T) {
					p := n.newPod(t, list)
					call := p.tryAdd
					if s.verb == "DEL" {
						if err := p.tryAdd(); err != nil {
							t.Fatalf("ADD: %v", err)
						}
						call = p.del
					}
					n.bin, n.env = filepath.Dir(os.Getenv("SLUICE_CNI_FAULTS_BIN")), []string{"SLUICE_CNI_FAULT=" + s.step}
					err := call()
					n.bin, n.env = sound, nil
					if err == nil || !strings.Contains(err.Error(), "killed") {
						t.Fatalf("%s was not killed at %s: %v", s.verb, s.step, err)
					}
					if cure == "GC" {
						p.close(t)
						if err := n.gc(t.Context(), list); err != nil {
							t.Errorf("GC: %v", err)
						}
						if !alone {
							// host-local has no GC: only the main plugin's own DEL frees the lease.
							mainOnly := *list
							mainOnly.Plugins = list.Plugins[:1]
							p.list = &mainOnly
							if err := p.del(); err != nil {
								t.Errorf("the main plugin's DEL: %v", err)
							}
						}
					} else if err := p.del(); err != nil {
						t.Errorf("DEL: %v", err)
					}
					p.close(t)
					n.clean(t)
				})
			}
		}
	}
	t.Run("then ADD again", func(t *testing.T) {
		list := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: true})
		p := n.newPod(t, list)
		n.bin, n.env = filepath.Dir(os.Getenv("SLUICE_CNI_FAULTS_BIN")), []string{"SLUICE_CNI_FAULT=launched"}
		err := p.tryAdd()
		n.bin, n.env = sound, nil
		if err == nil {
			t.Fatal("ADD was not killed")
		}
		if err := p.tryAdd(); err != nil {
			t.Fatalf("ADD: %v", err)
		}
		if d, r := dial(t, p, at(far4, portWhoami)); d.Error != "" {
			t.Errorf("the pod has no network\n%s", r)
		}
		if err := p.del(); err != nil {
			t.Errorf("DEL: %v", err)
		}
	})
}

// TestCNIRepair kills the processes that serve a pod. Until something repairs the pod it has no
// network rather than an open one, and other pods do not notice.
func TestCNIRepair(t *testing.T) {
	cniArea(t, "cni.repair")
	n := newNode(t)
	serve(t, n.far)
	list := n.conflist(t, network{version: "1.1.0", main: "ptp", subnets: dual, alone: true, sluice: map[string]any{
		"policy": map[string]any{
			"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": map[string]any{"name": "gate"},
			"spec": map[string]any{"defaultAction": "drop", "egress": []any{map[string]any{
				"name": "who", "action": "allow", "to": []any{map[string]any{"entity": "world"}},
				"ports": []any{map[string]any{"protocol": "TCP", "port": portWhoami}, map[string]any{"protocol": "TCP", "port": portEcho}},
			}}},
		}}})
	p, other := n.add(t, list), n.add(t, list)
	held := other.start(t, peerBin(), "hold", "-count", "20", at(far4, portEcho))
	held.waitText(t, `"held","open":20`, 10*time.Second)
	reaches := func(t *testing.T, port int) bool {
		t.Helper()
		d, _ := dial(t, p, "-timeout", "400ms", at(far4, port))
		d6, _ := dial(t, p, "-timeout", "400ms", at(far6, port))
		if (d.Error == "") != (d6.Error == "") {
			t.Errorf("IPv4 %q, but IPv6 %q", d.Error, d6.Error)
		}
		return d.Error == ""
	}
	serves := func(t *testing.T) {
		t.Helper()
		testutil.Within(t, 5*time.Second, func() (bool, string) { return reaches(t, portWhoami), "the pod has no network" })
		if reaches(t, portHTTP) {
			t.Error("the pod reaches a port that the policy denies")
		}
		if err := p.check(); err != nil {
			t.Errorf("CHECK: %v", err)
		}
	}
	serves(t)
	t.Run("the worker", func(t *testing.T) {
		before := p.attachment(t)
		kill(t, before.Worker)
		serves(t)
		if now := p.attachment(t); now.PID != before.PID || now.Worker == before.Worker {
			t.Errorf("before %+v, now %+v", before, now)
		}
	})
	for _, row := range []struct {
		name   string
		repair func() error
	}{
		{"GC", func() error { return n.gc(t.Context(), list, p, other) }},
		{"STATUS", func() error { return n.runtime("1.1.0").GetStatusNetworkList(t.Context(), list) }},
	} {
		t.Run("the monitor, then "+row.name, func(t *testing.T) {
			kill(t, p.attachment(t).PID)
			for _, port := range []int{portWhoami, portHTTP} {
				if reaches(t, port) {
					t.Errorf("the pod still reaches port %d", port)
				}
			}
			if err := p.check(); err == nil || !strings.Contains(err.Error(), "nothing serves the pod") {
				t.Errorf("CHECK says %v", err)
			}
			if err := row.repair(); err != nil {
				t.Fatalf("%s: %v", row.name, err)
			}
			serves(t)
		})
	}
	t.Run("the policy that was set last stays", func(t *testing.T) {
		shut := write(t, "shut.yaml", "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: shut}\nspec: {defaultAction: reject}\n")
		name := p.attachment(t).Name
		n.sluiceCtl(t, "policy", "set", name, shut).wantStatus(t, 0)
		denied := func(when string) {
			t.Helper()
			if d, r := dial(t, p, "-timeout", "2s", at(far4, portWhoami)); d.Error != "ECONNREFUSED" {
				t.Errorf("%s: %q\n%s", when, d.Error, r)
			}
			n.sluiceCtl(t, "policy", "show", name).wantOut(t, "shut")
		}
		denied("set")
		worker := p.attachment(t).Worker
		kill(t, worker)
		testutil.Within(t, 5*time.Second, func() (bool, string) {
			now := p.attachment(t).Worker
			return now != 0 && now != worker, "there is no new worker"
		})
		denied("with a new worker")
		kill(t, p.attachment(t).PID)
		if err := n.gc(t.Context(), list, p, other); err != nil {
			t.Fatalf("GC: %v", err)
		}
		denied("with a new monitor")
	})
	held.write([]byte("echo\n"))
	held.waitText(t, `"echoed","open":20`, 10*time.Second)
	held.stop(t, syscall.SIGKILL)
	t.Run("the monitor and the pod", func(t *testing.T) {
		kill(t, p.attachment(t).PID)
		p.close(t)
		if err := n.gc(t.Context(), list, other); err != nil {
			t.Fatalf("GC: %v", err)
		}
		dial(t, other, at(far4, portWhoami))
		if err := other.del(); err != nil {
			t.Errorf("DEL: %v", err)
		}
		other.close(t)
		n.clean(t)
	})
}
