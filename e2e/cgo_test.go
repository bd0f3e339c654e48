package e2e

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// TestAPlainBuildWorks runs what `go build` makes on a machine with a C compiler: a binary linked
// with the C library, which starts its threads.
func TestAPlainBuildWorks(t *testing.T) {
	area(t, "cgo", "curl", "nginx", "nsenter", "unshare", "ip")
	bin := os.Getenv("SLUICE_CGO_BIN")
	if bin == "" {
		t.Skip("no binary with cgo: there is no C compiler (cc or gcc), or SLUICE_BIN is set and SLUICE_CGO_BIN is not")
	}
	f, err := elf.Open(bin)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if libs, err := f.ImportedLibraries(); err != nil || !slices.ContainsFunc(libs, func(l string) bool { return strings.HasPrefix(l, "libc.") }) {
		t.Fatalf("%s is linked with %v, %v: it was built without cgo", bin, libs, err)
	}
	t.Setenv("SLUICE_BIN", bin)
	w := newWorld(t)
	zone := w.zone(t, gateZone...)
	serve(t, w.far)
	nginx(t, w.far, 8080, true)

	sb := w.host.sandbox(t, "--policy", policyFile(t, gateSpec+`
ingress:
- name: clients
  action: allow`), "-p", "9000:9000")
	curl := func(in place, u string) result {
		t.Helper()
		return run(t, in, 15*time.Second, "curl", "-gsSk", "-m", "8", u)
	}
	curl(sb, "https://pypi.test:8443/").wantStatus(t, 0).wantOut(t, "hello from nginx")
	if r := curl(sb, "https://"+at(far4, 8443)+"/"); strings.Contains(r.out, "hello from") {
		t.Errorf("what the policy denies is let through\n%s", r)
	}
	nginx(t, sb, 9000, false)
	curl(w.far, url(host4, 9000, "/")).wantStatus(t, 0).wantOut(t, "hello from nginx")

	worker := sb.worker()
	everyThread(t, "the worker", worker, map[string]string{
		"CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1", "Seccomp": "2"})
	if root, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/", worker)); err != nil || len(root) > 0 {
		t.Errorf("the worker's root is not empty: %v %v", root, err)
	}
	// The monitor has its caller's capabilities, of which an ordinary user's run has none.
	if !privileged {
		everyThread(t, "the monitor", sb.run.pid, map[string]string{"CapEff": none})
	}
	filtered := 0
	for _, pid := range descendants(sb.run.pid) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if argv := strings.Split(string(cmdline), "\x00"); len(argv) > 1 && argv[1] == "guest" && status(pid)["Seccomp"] == "2" {
			filtered++
			everyThread(t, "the stage", pid, map[string]string{"Seccomp": "2"})
		}
	}
	if filtered == 0 {
		t.Errorf("no stage is filtered: %v", describe(descendants(sb.run.pid)))
	}
	zone.stop(t, syscall.SIGTERM)

	c := container(t, w.host)
	p := w.host.sluice(t, "attach", fmt.Sprint(c.pid))
	testutil.Within(t, 10*time.Second, func() (bool, string) {
		r := inContainer(t, w.host, c.pid, peerBin(), "dial", at(far4, portWhoami))
		return strings.Contains(r.out, `"got":"`+host4), "an attachment reaches nothing\n" + r.String()
	})
	c.signal(syscall.SIGKILL)
	<-c.done
	p.wait(t, 10*time.Second)
}

const none = "0000000000000000"

// everyThread checks the status of all threads of a process.
func everyThread(t *testing.T, who string, pid int, want map[string]string) {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if len(tasks) < 2 {
		t.Errorf("%s has %d threads", who, len(tasks))
	}
	for _, task := range tasks {
		s := statusAt(task)
		for key, value := range want {
			if len(s) > 0 && s[key] != value { // empty: the thread has ended
				t.Errorf("%s, %s: %s is %q, not %q", who, task, key, s[key], value)
			}
		}
	}
}
