package e2e

// Under a rule by domain a connection is set up when the server's is. For closed ports, and for
// names with several addresses, real clients see what they see without Sluice.

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const connectSpec = `
defaultAction: reject
egress:
- name: web
  action: allow
  to: [{domain: "*.far.test"}]
  ports: [{protocol: TCP, port: 8080, endPort: 8099}]`

func TestGateConnectsAsWithout(t *testing.T) {
	area(t, "gate.connect", "curl", "nginx", "python3")
	w := newWorld(t)
	var records []string
	for name, addrs := range map[string][]string{
		"one.far.test":   {far4},
		"two.far.test":   {other4, far4},           // no server listens at the first
		"six.far.test":   {other6, far4},           // nor here, in the other family
		"away.far.test":  {noHost6, noHost4, far4}, // unreachable addresses
		"gone.far.test":  {noHost4},
		"third.far.test": {other6, other4, far6},
	} {
		for _, a := range addrs {
			kind := "A"
			if strings.Contains(a, ":") {
				kind = "AAAA"
			}
			records = append(records, fmt.Sprintf("%s. %[1]s. 3600 %s %s", name, kind, a))
		}
	}
	w.zone(t, records...)
	nginxIn(t, w.far, t.TempDir(), 8079, fmt.Sprintf("listen %s:8090; listen [%s]:8090;", far4, far6))
	sb := w.host.sandbox(t, "--policy", policyFile(t, connectSpec))

	const fetch = `import sys, urllib.request
try: sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=8).read().decode())
except OSError as e: print(type(e.reason).__name__, getattr(e.reason, "errno", ""))`
	place := func(u string) string { return strings.TrimSuffix(strings.TrimPrefix(u, "http://"), "/") }
	clients := map[string]func(url string) []string{
		"curl":    func(u string) []string { return []string{"curl", "-gsS", "-m", "8", u} },
		"python3": func(u string) []string { return []string{"python3", "-c", fetch, u} },
		"wget":    func(u string) []string { return []string{"wget", "-qO-", "-t1", "-T8", u} },
		"node": func(u string) []string {
			return []string{"node", "-e", `fetch(process.argv[1]).then(r => r.text()).then(t => process.stdout.write(t), e => console.log(e.cause.code))`, u}
		},
		"nc": func(u string) []string {
			host, port, _ := strings.Cut(place(u), ":")
			return []string{"nc", "-z", "-w8", host, port}
		},
		"bash": func(u string) []string {
			host, port, _ := strings.Cut(place(u), ":")
			return []string{"bash", "-c", `exec 2>&- 3<>/dev/tcp/$0/$1 && echo connected`, host, port}
		},
	}
	for client, command := range clients {
		t.Run(client, func(t *testing.T) {
			if _, err := exec.LookPath(client); err != nil {
				t.Skipf("not installed: %s", client)
			}
			urls := []string{"http://one.far.test:8091/", "http://two.far.test:8090/", "http://six.far.test:8090/"}
			if client != "python3" && client != "node" { // these are slow to start
				urls = append(urls, "http://one.far.test:8090/", "http://away.far.test:8090/", "http://gone.far.test:8090/", "http://third.far.test:8090/", "http://third.far.test:8091/")
			}
			for _, u := range urls {
				t.Run(place(u), func(t *testing.T) {
					direct, inside := run(t, w.host, 15*time.Second, command(u)...), run(t, sb, 15*time.Second, command(u)...)
					if direct.status != inside.status || direct.out != inside.out {
						t.Errorf("it is not as without Sluice\ndirectly: %s\ninside: %s", direct, inside)
					}
				})
			}
		})
	}
	if r := run(t, sb, 10*time.Second, "curl", "-gsS", "-m", "8", "-H", "Host: evil.test", "http://one.far.test:8090/"); !strings.Contains(r.out, `rule "egress[0] web"`) {
		t.Errorf("another name is not refused\n%s", r)
	}
}
