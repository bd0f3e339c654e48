package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/api"
)

func TestFlagsMayFollowArguments(t *testing.T) {
	for in, want := range map[string]string{
		"sluice flows web -o json":                            "sluice flows -o json web",
		"sluice flows -o json web -w":                         "sluice flows -o json -w web",
		"sluice flows web --output=json":                      "sluice flows --output=json web",
		"sluice policy show web -o json":                      "sluice policy show -o json web",
		"sluice capture web -w - -s 64":                       "sluice capture -w - -s 64 web",
		"sluice policy set web -":                             "sluice policy set web -",
		"sluice port add web 1:1 -- -x":                       "sluice port add web 1:1 -- -x",
		"sluice run --name x -- curl -o f":                    "sluice run --name x -- curl -o f",
		"sluice run curl -o f":                                "sluice run curl -o f",
		"sluice":                                              "sluice",
		"sluice --help":                                       "sluice --help",
		"sluice flows web -o json --generate-bash-completion": "sluice flows -o json web --generate-bash-completion",
	} {
		if got := strings.Join(flagsFirst(strings.Fields(in)), " "); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

// runApp runs one command line with a runtime directory of its own.
func runApp(t *testing.T, line ...string) (stdout string, err error) {
	t.Helper()
	a := app()
	var out bytes.Buffer
	a.Writer, a.ErrWriter = &out, &out
	a.ExitErrHandler = func(*cli.Context, error) {}
	err = a.RunContext(context.Background(), flagsFirst(append([]string{"sluice"}, line...)))
	return out.String(), err
}

func TestWithoutSandboxesTheCommandsSaySo(t *testing.T) {
	testutil.RuntimeDir(t)
	if out, err := runApp(t, "ps"); err != nil || out != "NAME  PID  COMMAND  UPTIME  FLOWS  STATE\n" {
		t.Errorf("ps: %q, %v", out, err)
	}
	if out, err := runApp(t, "ps", "-o", "json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("ps -o json: %q, %v", out, err)
	}
	for _, row := range []struct {
		line, want string
	}{
		{"flows", "no sandbox is running"},
		{"flows web", `"web": no such sandbox`},
		{"flows a/b", `"a/b"`},
		{"flows -o xml", "-o xml: want table, json, conntrack"},
		{"flows -w --ended", "exclude each other"},
		{"stats web extra", "no such sandbox"},
		{"port add 8080:80", "no sandbox is running"},
		{"policy set", "want [NAME] FILE"},
		{"policy check", "want a FILE"},
		{"policy check /nonexistent.yaml", "/nonexistent.yaml"},
		{"completion tcsh", "bash, zsh or fish"},
		{"ps web", `unexpected argument "web"`},
	} {
		if out, err := runApp(t, strings.Fields(row.line)...); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %q, %v; want %q", row.line, out, err, row.want)
		}
	}
}

func TestPolicyCheck(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.yaml"), filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(good, []byte("apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: g}\nspec: {defaultAction: drop}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bad, []byte("kind: SandboxPolicy\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := runApp(t, "policy", "check", good); err != nil || !strings.Contains(out, `policy "g" is right`) {
		t.Errorf("a right one: %q, %v", out, err)
	}
	if _, err := runApp(t, "policy", "check", bad, good); err == nil || !strings.Contains(err.Error(), bad+":1:1: ") {
		t.Errorf("a wrong one: %v, want its place", err)
	}
}

func TestEndedFlowsTable(t *testing.T) {
	var out bytes.Buffer
	err := printEnded(&out, api.FlowsResult{Dropped: 3, Ended: []api.FlowRecord{
		{
			Verdict: api.VerdictForwarded, Duration: 1.5, Rule: "default", Reason: "closed",
			IP: api.IP{Source: netip.MustParseAddr("fd00::1"), Destination: netip.MustParseAddr("2001:db8::1")}, L4: api.L4{TCP: &api.Ports{Source: 1000, Destination: 443}},
			Orig: api.Counter{Bytes: 100}, Reply: api.Counter{Bytes: 3 << 20}, DestinationNames: []string{"evil\x1b[2J.example"},
		},
		{
			Verdict: api.VerdictDropped, L4: api.L4{ICMPv4: &api.ICMP{Type: 8}}, Count: 4, Rule: "special:metadata", Reason: "policy",
			IP: api.IP{Source: netip.MustParseAddr("10.0.2.100"), Destination: netip.MustParseAddr("169.254.169.254")},
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Join([]string{
		"VERDICT     PROTO  SOURCE          DESTINATION        SENT  RECEIVED  DURATION  RULE              REASON  NAMES",
		"FORWARDED   tcp    [fd00::1]:1000  [2001:db8::1]:443  100B  3.0MiB    1.5s      default           closed  evil�[2J.example",
		"DROPPED ×4  icmp   10.0.2.100      169.254.169.254    0B    0B        0s        special:metadata  policy  -",
		"and 3 before them",
	}, "\n") + "\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestRowOfALiveFlow(t *testing.T) {
	r := api.FlowRecord{
		IP: api.IP{Source: netip.MustParseAddr("10.0.2.100"), Destination: netip.MustParseAddr("192.0.2.1")}, L4: api.L4{ICMPv4: &api.ICMP{Type: 8, ID: 77}},
		State: "NONE", Duration: 90.5, Orig: api.Counter{Bytes: 1536},
	}
	if got := strings.Join(flowRow(&r), "|"); got != "icmp|NONE|10.0.2.100|192.0.2.1|1.5KiB|0B|1m30s||" {
		t.Errorf("row %s", got)
	}
}

func TestUnitsForPeople(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 8500 * time.Millisecond: "8s", 312 * time.Second: "5m12s",
		3*time.Hour + 5*time.Minute: "3h5m", 76 * time.Hour: "3d4h",
	} {
		if got := age(d); got != want {
			t.Errorf("age(%v) = %s, want %s", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0B", 1023: "1023B", 1024: "1.0KiB", 5 << 30: "5.0GiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestFlattenNamesCountersByTheirPath(t *testing.T) {
	into := make(map[string]string)
	if err := flatten("link", json.RawMessage(`{"rx":1,"dropped":{"short":2}}`), into); err != nil {
		t.Fatal(err)
	}
	if len(into) != 2 || into["link.rx"] != "1" || into["link.dropped.short"] != "2" {
		t.Errorf("got %v", into)
	}
}
