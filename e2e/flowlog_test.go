package e2e

// The flow log's files are bounded, and each record is in one of them.

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice.dev/sluice/internal/testutil"
)

// logged reads all files of a flow log. It returns how many records are about a port, how many
// lines are not JSON, and the size of the largest file.
func logged(t *testing.T, name string, port int) (records, torn, files int, largest int64) {
	t.Helper()
	list, err := filepath.Glob(name + "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range list {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		files, largest = files+1, max(largest, int64(len(b)))
		for line := range strings.Lines(string(b)) {
			var r struct {
				L4 struct {
					TCP struct {
						Port int `json:"destination_port"`
					}
				} `json:"l4"`
			}
			switch {
			case json.Unmarshal([]byte(line), &r) != nil:
				torn++
			case r.L4.TCP.Port == port:
				records++
			}
		}
	}
	return records, torn, files, largest
}

// logCounters returns the worker's own counters.
func (sb *sandbox) logCounters(t *testing.T) (c struct {
	Log struct{ Lost, Written, Unwritten, Files, Unrotated int }
}) {
	t.Helper()
	r := sb.host.sluiceOK(t, "stats", "-o", "json", sb.name)
	if err := json.Unmarshal([]byte(r.out), &c); err != nil {
		t.Fatalf("%v\n%s", err, r)
	}
	return c
}

// shorts makes short connections to the far side.
func (sb *sandbox) shorts(t *testing.T, n int) {
	t.Helper()
	var got struct{ OK int }
	r := ok(t, sb, 60*time.Second, peerBin(), "short", "-count", fmt.Sprint(n), at(far4, portOneByte))
	if r.into(t, &got); got.OK != n {
		t.Fatalf("%d of %d connections\n%s", got.OK, n, r)
	}
}

// TestFlowLogRotates makes 10 000 flows through files of 32 KiB. Each is in one of them or counted
// as lost.
func TestFlowLogRotates(t *testing.T) {
	area(t, "flowlog.rotate")
	w := newPair(t)
	serve(t, w.far)
	const n, size = 10000, 32 << 10
	name := filepath.Join(w.host.dir, "flows")
	sb := w.host.sandbox(t, "--flow-log", name, "--flow-log-max-size", "32Ki", "--flow-log-max-files", "1000")
	sb.shorts(t, n)
	testutil.Within(t, 20*time.Second, func() (bool, string) {
		c := sb.logCounters(t).Log
		return c.Written+c.Lost+c.Unwritten >= n, fmt.Sprintf("%+v, want %d records", c, n)
	})
	c := sb.logCounters(t).Log
	records, torn, files, largest := logged(t, name, portOneByte)
	if records+c.Lost+c.Unwritten != n || torn != 0 || c.Unrotated != 0 || files != c.Files+1 || files < 50 || largest > size {
		t.Errorf("%d records in %d files, the largest of %d bytes, %d torn; counted %+v", records, files, largest, torn, c)
	}
	t.Run("with three files the oldest go", func(t *testing.T) {
		name := filepath.Join(w.host.dir, "three")
		sb := w.host.sandbox(t, "--flow-log", name, "--flow-log-max-size", "32Ki")
		sb.shorts(t, 1000)
		sb.close(t)
		if records, torn, files, largest := logged(t, name, portOneByte); files != 3 || largest > size || torn != 0 || records < 2*size/1500 {
			t.Errorf("%d records in %d files, the largest of %d bytes, %d torn", records, files, largest, torn)
		}
	})
}

// TestFlowLogSurvivesKills kills the worker and the monitor while files change.
func TestFlowLogSurvivesKills(t *testing.T) {
	area(t, "flowlog.killed")
	w := newPair(t)
	serve(t, w.far)
	name := filepath.Join(w.host.dir, "flows")
	flags := []string{"--pid", "--flow-log", name, "--flow-log-max-size", "4Ki", "--flow-log-max-files", "1000"}
	sb := w.host.sandbox(t, flags...)
	const kills = 5
	load := sb.start(t, "sh", "-c", fmt.Sprintf("while :; do %s short -count 500 -timeout 1s %s; done", peerBin(), at(far4, portOneByte)))
	files := func() int {
		list, _ := filepath.Glob(name + "*")
		return len(list)
	}
	busy := func() { // they cannot be read meanwhile, because they are being renamed
		t.Helper()
		than := files() + 5
		testutil.Within(t, 20*time.Second, func() (bool, string) {
			return files() > than, fmt.Sprintf("%d files, want more than %d\n%s", files(), than, load.result(""))
		})
	}
	for range kills {
		busy()
		old := sb.worker()
		syscall.Kill(old, syscall.SIGKILL)
		sb.waitWorker(t, old, 5*time.Second)
	}
	busy()
	sb.run.signal(syscall.SIGKILL)
	sb.run.wait(t, 10*time.Second)
	before, torn, _, largest := logged(t, name, portOneByte)
	if torn > kills+1 || largest > 4<<10+2048 {
		t.Errorf("%d lines are torn by %d kills, the largest file has %d bytes", torn, kills+1, largest)
	}
	again := w.host.sandbox(t, flags...)
	again.shorts(t, 200)
	again.close(t)
	w.host.sluiceOK(t, "ps") // clears up after the killed monitor
	if after, nowTorn, _, _ := logged(t, name, portOneByte); after != before+200 || nowTorn > kills+1 {
		t.Errorf("the next sandbox added %d records, not 200; %d lines are torn", after-before, nowTorn)
	}
}

// TestFlowLogIsRotatedByOthers renames the log as logrotate does, and truncates it.
func TestFlowLogIsRotatedByOthers(t *testing.T) {
	area(t, "flowlog.logrotate")
	w := newPair(t)
	serve(t, w.far)
	name := filepath.Join(w.host.dir, "flows")
	sb := w.host.sandbox(t, "--flow-log", name, "--flow-log-max-size", "0")
	has := func(file string, want int) {
		t.Helper()
		testutil.Within(t, 10*time.Second, func() (bool, string) {
			b, _ := os.ReadFile(file)
			n := strings.Count(string(b), "\n")
			return n == want && !strings.HasPrefix(string(b), "\x00"), fmt.Sprintf("%s has %d records, want %d", file, n, want)
		})
	}
	sb.shorts(t, 10)
	has(name, 10)
	if err := os.Rename(name, name+".old"); err != nil {
		t.Fatal(err)
	}
	sb.shorts(t, 5)
	has(name+".old", 15)
	w.host.sluiceOK(t, "flow-log", "reopen").wantOut(t, name)
	sb.shorts(t, 7)
	has(name, 7)
	if err := os.Truncate(name, 0); err != nil {
		t.Fatal(err)
	}
	sb.shorts(t, 3)
	has(name, 3)
	t.Run("a sandbox without one", func(t *testing.T) {
		bare := w.host.sandbox(t)
		w.host.sluiceRun(t, "flow-log", "reopen", bare.name).wantMessage(t, "no flow log")
		w.host.sluiceOK(t, "flow-log", "reopen").wantOut(t, name)
	})
	t.Run("live flows have the same shape", func(t *testing.T) {
		h := sb.start(t, peerBin(), "hold", "-count", "1", at(far4, portEcho))
		h.waitText(t, `"held"`, 5*time.Second)
		r := w.host.sluiceOK(t, "flows", "-o", "json", sb.name)
		var list []struct {
			Verdict   string `json:"verdict"`
			Direction string `json:"traffic_direction"`
			State     string `json:"state"`
			IP        struct{ Destination string }
			Conntrack struct{ Replied bool }
		}
		if err := json.Unmarshal([]byte(r.out), &list); err != nil {
			t.Fatalf("%v\n%s", err, r)
		}
		found := false
		for _, f := range list {
			found = found || f.Verdict == "FORWARDED" && f.Direction == "EGRESS" && f.State == "ESTABLISHED" && f.IP.Destination == far4 && f.Conntrack.Replied
		}
		if !found {
			t.Errorf("the flow is not listed in the words of the log\n%s", r)
		}
		h.closeInput()
		h.wait(t, 5*time.Second)
	})
}
