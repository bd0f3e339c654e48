package kube

// What Kubernetes and Sluice say of the pods, and whether both say the same.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sluice.dev/sluice/e2e/kube/cluster"
)

// podList is what we read of `kubectl get pods -o json`.
type podList struct {
	Items []struct {
		Metadata struct {
			Namespace, Name, UID string
			DeletionTimestamp    *string
		}
		Spec struct {
			NodeName    string
			HostNetwork bool
		}
		Status struct {
			Phase             string
			PodIPs            []struct{ IP string }
			ContainerStatuses []struct {
				ContainerID  string
				RestartCount int
			}
		}
	}
}

func (s *suite) podList() (list podList, err error) {
	out, err := try(s.Command(s.ctx, "kubectl", "get", "pods", "-A", "-o", "json"))
	if err != nil {
		return list, err
	}
	return list, json.Unmarshal([]byte(out), &list)
}

// podsOf returns the node's pods that have a network of their own: "NAMESPACE/NAME ADDRESS…".
func (l podList) podsOf(node string) []string {
	lines := []string{}
	for _, p := range l.Items {
		if p.Spec.NodeName == node && p.Status.Phase == "Running" && p.Metadata.DeletionTimestamp == nil && !p.Spec.HostNetwork {
			var ips []string
			for _, ip := range p.Status.PodIPs {
				ips = append(ips, ip.IP)
			}
			lines = append(lines, podLine(p.Metadata.Namespace+"/"+p.Metadata.Name, ips))
		}
	}
	slices.Sort(lines)
	return lines
}

func podLine(pod string, ips []string) string {
	slices.Sort(ips)
	return pod + " " + strings.Join(ips, " ")
}

// sandbox is what we read of a line of `sluice ps -o json`.
type sandbox struct {
	Name       string   `json:"name"`
	Command    []string `json:"command"`
	Attachment bool     `json:"attachment"`
	State      string   `json:"state"`
	Guest      []string `json:"guest"`
	PID        int      `json:"pid"`
	WorkerPID  int      `json:"worker_pid"`
	Restarts   int      `json:"restarts"`
}

func (b sandbox) pod() string { return b.Command[1] }

func (s *suite) sandboxes(n *cluster.Node) (list []sandbox, err error) {
	out, err := try(n.Command(s.ctx, s.sluice, "ps", "-o", "json"))
	if err != nil {
		return nil, err
	}
	return list, json.Unmarshal([]byte(out), &list)
}

// attachedOn returns the attachments that serve, as podsOf does the pods.
func (s *suite) attachedOn(n *cluster.Node) ([]string, error) {
	list, err := s.sandboxes(n)
	lines := []string{}
	for _, b := range list {
		if b.Attachment && b.State == "running" {
			var ips []string
			for _, prefix := range b.Guest {
				ip, _, _ := strings.Cut(prefix, "/")
				ips = append(ips, ip)
			}
			lines = append(lines, podLine(b.pod(), ips))
		}
	}
	slices.Sort(lines)
	return lines, err
}

// sandboxOf returns that of a pod in the namespace default.
func (s *suite) sandboxOf(t *testing.T, n *cluster.Node, pod string) sandbox {
	t.Helper()
	list, err := s.sandboxes(n)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(b sandbox) bool { return b.pod() == "default/"+pod })
	if i < 0 {
		t.Fatalf("pod %s is not attached on %s", pod, n.Name())
	}
	return list[i]
}

// record is what we read of an attachment's record.
type record struct {
	Netns string `json:"netns"`
	Pod   struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"pod"`
	Launch struct {
		Cgroups []string `json:"cgroups"`
	} `json:"launch"`
}

func (s *suite) records(t *testing.T, n *cluster.Node) []record {
	t.Helper()
	out := s.on(t, n, "sh", "-c", "for f in /run/sluice-cni/attachments/*/record.json; do [ ! -e $f ] || cat $f; done")
	var all []record
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var r record
		err := d.Decode(&r)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
}

func (s *suite) noAttachment(t *testing.T) {
	for _, n := range s.Nodes() {
		list, err := s.sandboxes(n)
		if err != nil {
			t.Fatal(err)
		}
		if records := s.records(t, n); len(list) > 0 || len(records) > 0 {
			t.Errorf("%s: %v, records %v", n.Name(), list, records)
		}
	}
}

func (s *suite) pods(t *testing.T) {
	t.Run("every pod is attached", s.everyPodAttached)
	t.Run("every pod is on a TAP", s.everyPodOnTAP)
	for _, family := range families {
		t.Run("the server sees the pod, "+family.name, func(t *testing.T) { s.seenFromPod(t, family) })
		t.Run("the server sees the node, "+family.name, func(t *testing.T) { s.seenFromNode(t, family) })
	}
}

func (s *suite) everyPodAttached(t *testing.T) {
	list, err := s.podList()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes() {
		pods := list.podsOf(n.Name())
		attached, err := s.attachedOn(n)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(pods, attached) || len(pods) == 0 {
			t.Errorf("%s: pods\n  %s\nattachments\n  %s", n.Name(), strings.Join(pods, "\n  "), strings.Join(attached, "\n  "))
		}
		t.Logf("%s: %d", n.Name(), len(pods))
	}
}

// The pod's one interface is a TAP, whatever the records say.
func (s *suite) everyPodOnTAP(t *testing.T) {
	for _, n := range s.Nodes() {
		records := s.records(t, n)
		if len(records) == 0 {
			t.Errorf("%s has no records", n.Name())
		}
		for _, r := range records {
			out := s.on(t, n, "nsenter", "--net="+r.Netns, "ip", "-d", "-o", "link", "show")
			links := slices.DeleteFunc(strings.Split(out, "\n"), func(l string) bool { return strings.Contains(l, ": lo:") })
			if len(links) != 1 || !strings.Contains(links[0], " eth0: ") || !strings.Contains(links[0], " tun type tap") {
				t.Errorf("%s/%s has\n%s", r.Pod.Namespace, r.Pod.Name, out)
			}
		}
	}
}

// addressPair is a pod's address of each family.
type addressPair struct{ four, six string }

func (s *suite) addressesOf(t *testing.T, pod string) (a addressPair) {
	t.Helper()
	for ip := range strings.FieldsSeq(s.kubectl(t, "get", "pod", pod, "-o", "jsonpath={.status.podIPs[*].ip}")) {
		s.addresses[ip] = true
		if strings.Contains(ip, ":") {
			a.six = ip
		} else {
			a.four = ip
		}
	}
	if a.four == "" || a.six == "" {
		t.Fatalf("pod %s has the addresses %+v", pod, a)
	}
	return a
}

// family picks one of a pair.
type family struct {
	name string
	of   func(addressPair) string
	held string // the container of held-server
}

var families = []family{
	{"IPv4", func(a addressPair) string { return a.four }, "v4"},
	{"IPv6", func(a addressPair) string { return a.six }, "v6"},
}

// client parses what netexec's /clientip answers.
func client(t *testing.T, answer string) netip.Addr {
	t.Helper()
	a, err := netip.ParseAddrPort(answer)
	if err != nil {
		t.Fatalf("the server says %q: %v", answer, err)
	}
	return a.Addr().Unmap()
}

func (s *suite) seenFromPod(t *testing.T, f family) {
	url := fmt.Sprintf("http://%s:8080/clientip", bracket(f.of(s.addressesOf(t, "web"))))
	got := client(t, output(t, s.in("asker", get(url)...)))
	if want := f.of(s.addressesOf(t, "asker")); got.String() != want {
		t.Errorf("the server saw %s, not %s", got, want)
	}
}

func (s *suite) seenFromNode(t *testing.T, f family) {
	n := s.Nodes()[1]
	url := fmt.Sprintf("http://%s:8080/clientip", bracket(f.of(s.addressesOf(t, "web"))))
	got := client(t, s.on(t, n, get(url)...))
	if own := s.on(t, n, "ip", "-o", "addr", "show"); !strings.Contains(own, " "+got.String()+"/") {
		t.Errorf("the server saw %s, which is not %s's:\n%s", got, n.Name(), own)
	}
}

func bracket(ip string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]"
	}
	return ip
}

func (s *suite) costs(t *testing.T) {
	t.Run("memory of monitor and worker", s.memory)
	t.Run("charged to the pods", s.charged)
}

func (s *suite) memory(t *testing.T) {
	var all []int
	for _, n := range s.Nodes() {
		list, err := s.sandboxes(n)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range list {
			sum := 0
			for _, pid := range []int{b.PID, b.WorkerPID} {
				for line := range strings.Lines(s.on(t, n, "cat", fmt.Sprintf("/proc/%d/smaps_rollup", pid))) {
					var kib int
					if _, err := fmt.Sscanf(line[strings.Index(line, ":")+1:], "%d kB", &kib); err == nil && strings.HasPrefix(line, "Private") {
						sum += kib
					}
				}
			}
			if sum == 0 {
				t.Errorf("%s: no private memory", b.pod())
			}
			all = append(all, sum)
		}
	}
	if len(all) == 0 {
		t.Fatal("nothing serves")
	}
	t.Logf("%d pods, from %d to %d KiB private", len(all), slices.Min(all), slices.Max(all))
}

// A runtime that passes cgroupPath has monitor and worker charged to the pod.
func (s *suite) charged(t *testing.T) {
	charged := 0
	for _, n := range s.Nodes() {
		list, err := s.sandboxes(n)
		if err != nil {
			t.Fatal(err)
		}
		records := s.records(t, n)
		for _, b := range list {
			for _, r := range records {
				if r.Pod.Namespace+"/"+r.Pod.Name != b.pod() {
					continue
				}
				for _, dir := range r.Launch.Cgroups {
					procs := strings.Fields(s.on(t, n, "cat", filepath.Join(dir, "cgroup.procs")))
					for _, pid := range []int{b.PID, b.WorkerPID} {
						if !slices.Contains(procs, fmt.Sprint(pid)) {
							t.Errorf("%s: process %d of %s is not in %s", n.Name(), pid, b.pod(), dir)
						}
					}
					charged++
				}
			}
		}
	}
	if charged == 0 {
		t.Log("no pod: this runtime passes no cgroupPath")
	}
}
