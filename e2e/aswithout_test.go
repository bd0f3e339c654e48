package e2e

// "As without" is a matrix of real clients. Each must see through Sluice what it sees without it.
// Every row of the tables (aswithout_clients_test.go and, for `make clients`,
// aswithout_more_test.go) is a command that runs in four ways against the same servers in far
// (aswithout_servers_test.go):
//
//	direct   in the namespace "host": what the others are compared with
//	none     in a sandbox without a policy
//	cidr     under a policy that allows far's networks
//	domain   under a policy that allows far's names
//
// Exit status, standard output and standard error must be equal once variations by time or chance
// are hidden. The row states an intended difference with its reason, and the difference must occur.

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// client is a row. The zero value compares all of the output and expects success.
type client struct {
	name   string // what is tried, starting with the program
	needs  string // programs, separated by spaces
	server string // of servers: those that it uses and the preparations for it, separated by spaces
	to     string // names and addresses to go to, separated by spaces: $to in run, and $at in URL form; web.test if empty

	// run is a bash script that ends at the first failure, in a directory of its own. Besides $to
	// and $at it has the variables from settings.
	run    string
	status int    // without Sluice
	says   string // must be in the output without Sluice, or the row would prove nothing
	hide   string // a regular expression for what differs from run to run

	differs []difference
}

// difference is an intended one.
type difference struct {
	by     string // the way in which it occurs; every sandbox if empty
	to     string // a regular expression for the names and addresses for which it occurs
	status int    // instead of the row's
	says   string // must be in the output there
	why    string
}

// barred returns the difference for clients that go to an address although a rule requires a name.
func barred(status int, says string) []difference {
	return []difference{{by: "domain", to: `^[0-9a-f:.]+$`, status: status, says: says, why: "a rule by domain lets no flow pass that says an address in place of the name"}}
}

const domainPolicy = `
defaultAction: reject
dns: {types: [A, AAAA, CNAME, HTTPS, SVCB, SRV, PTR, MX, TXT]}
egress:
- name: said # ports of protocols in which clients say the name
  action: allow
  to: [{domain: web.test}, {domain: "**.web.test"}]
  ports: [{protocol: TCP, port: 8000, endPort: 8999}, {protocol: UDP, port: 8000, endPort: 8999}]
- name: granted
  action: allow
  to: [{domain: web.test}, {domain: "**.web.test"}]
  ports: [{protocol: TCP, port: 1, endPort: 7999}, {protocol: UDP, port: 1, endPort: 7999}, {protocol: TCP, port: 9000, endPort: 65535}, {protocol: UDP, port: 9000, endPort: 65535}]
  icmp: [{family: IPv4, type: 8}, {family: IPv6, type: 128}]
  verify: grant`

const cidrPolicy = `
defaultAction: reject
dns: {names: any, types: [A, AAAA, CNAME, HTTPS, SVCB, SRV, PTR, MX, TXT]}
egress:
- action: allow
  to: [{cidr: 198.51.100.0/24}, {cidr: "2001:db8::/32"}]`

// matrix is what all rows share.
type matrix struct {
	w    *world
	dir  string   // the servers' certificate and files
	ssh  []string // command line of ssh's clients, up to the host
	ways []way
}

type way struct {
	name string
	in   place
}

// plainly starts commands in a namespace as the run's user would at home.
type plainly struct{ *netns }

func (p plainly) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	return p.startPlain(t, argv...)
}

// newMatrix starts the servers that the rows need, and the sandboxes.
func newMatrix(t *testing.T, rows []client) *matrix {
	t.Helper()
	w := newWorld(t)
	m := &matrix{w: w, dir: t.TempDir()}
	if err := os.Chmod(filepath.Dir(m.dir), 0o755); err != nil { // some servers run as another user
		t.Fatal(err)
	}
	w.zone(t, matrixZone...)
	certificate(t, m.dir, "", "web.test", "*.web.test")
	started := map[string]bool{}
	for _, c := range rows {
		for _, s := range strings.Fields(c.server) {
			if !started[s] {
				servers[s](t, m)
				started[s] = true
			}
		}
	}
	m.ways = []way{
		{"direct", plainly{w.host}},
		{"none", w.host.sandbox(t)},
		{"cidr", w.host.sandbox(t, "--policy", policyFile(t, cidrPolicy))},
		{"domain", w.host.sandbox(t, "--policy", policyFile(t, domainPolicy))},
	}
	return m
}

// seenBy is what a client saw.
type seenBy struct {
	status int
	text   string // of both outputs
	result result
}

func (m *matrix) try(t *testing.T, c client, in place, to string) seenBy {
	t.Helper()
	dir := t.TempDir()
	at := to
	if strings.Contains(to, ":") {
		at = "[" + to + "]"
	}
	r := run(t, in, time.Minute, "bash", "-ec", fmt.Sprintf("set -o pipefail; cd \"%s\"; to=%s at=%s; . %s\n%s", dir, to, at, m.settings(t), c.run))
	text := strings.ReplaceAll("stdout:\n"+r.out+"\nstderr:\n"+r.err, dir, "DIR")
	if c.hide != "" {
		text = regexp.MustCompile(c.hide).ReplaceAllString(text, "#")
	}
	return seenBy{r.status, text, r}
}

// row runs a client in all ways and compares the results.
func (m *matrix) row(t *testing.T, c client) {
	for _, to := range strings.Fields(cmp.Or(c.to, "web.test")) {
		direct := m.try(t, c, m.ways[0].in, to)
		took := fmt.Sprintf("%s: direct %v", to, direct.result.took)
		if direct.status != c.status || !strings.Contains(direct.text, c.says) {
			t.Errorf("without Sluice, status %d and %q are expected\n%s", c.status, c.says, direct.result)
			continue
		}
		for _, way := range m.ways[1:] {
			got := m.try(t, c, way.in, to)
			took += fmt.Sprintf(", %s %v", way.name, got.result.took)
			same := got.status == direct.status && got.text == direct.text
			i := slices.IndexFunc(c.differs, func(d difference) bool {
				return (d.by == "" || d.by == way.name) && regexp.MustCompile(d.to).MatchString(to)
			})
			switch {
			case i < 0 && !same:
				t.Errorf("%s, %s: it is not as without Sluice\n%s\nwithout:\n%s", way.name, to, got.result, direct.result)
			case i >= 0 && (same || got.status != c.differs[i].status || !strings.Contains(got.text, c.differs[i].says)):
				t.Errorf("%s, %s: status %d and %q are expected, since %s\n%s\nwithout:\n%s", way.name, to, c.differs[i].status, c.differs[i].says, c.differs[i].why, got.result, direct.result)
			}
		}
		t.Log(took)
	}
}

// missing returns the programs that a client needs and the machine lacks.
func (c client) missing() (missing []string) {
	for _, tool := range strings.Fields(c.needs) {
		_, err := exec.LookPath(tool)
		if filepath.IsAbs(tool) { // a file that need not be a program
			_, err = os.Stat(tool)
		}
		if err != nil {
			missing = append(missing, tool)
		}
	}
	return missing
}

// TestAsWithout runs the clients with small packages. Under `make clients`, SLUICE_CLIENTS is a
// regular expression: of all clients, those whose names match it run, and one that cannot run is a
// failure.
func TestAsWithout(t *testing.T) {
	rows := slices.Concat(smallClients, smallFailures)
	if wanted := os.Getenv("SLUICE_CLIENTS"); wanted != "" {
		rows = slices.DeleteFunc(slices.Concat(rows, moreClients, moreFailures), func(c client) bool {
			return !regexp.MustCompile(wanted).MatchString(c.name)
		})
		for _, c := range rows {
			if missing := c.missing(); len(missing) > 0 {
				t.Errorf("%s cannot run: not installed: %s", c.name, strings.Join(missing, ", "))
			}
		}
		if len(rows) == 0 {
			t.Errorf("no client's name matches %q", wanted)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	tools := map[string]bool{}
	for _, c := range slices.Concat(smallClients, smallFailures) {
		for _, tool := range strings.Fields(c.needs) {
			tools[tool] = true
		}
	}
	area(t, "aswithout", slices.Sorted(maps.Keys(tools))...)
	m := newMatrix(t, rows)
	for _, c := range rows {
		t.Run(c.name, func(t *testing.T) { m.row(t, c) })
	}
	t.Logf("%d clients, each without Sluice and in %d sandboxes", len(rows), len(m.ways)-1)
}
