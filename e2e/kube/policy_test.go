package kube

// Policies on single pods, set while these run.

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func (s *suite) policies(t *testing.T) {
	t.Run("a policy on one pod", s.policyHolds)
	t.Run("a policy by name on one pod", s.namesHold)
}

// setPolicy gives a pod of the second node a policy.
func (s *suite) setPolicy(t *testing.T, pod, policy string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(policy), 0o644); err != nil {
		t.Fatal(err)
	}
	n := s.Nodes()[1]
	s.on(t, n, s.sluice, "policy", "set", s.sandboxOf(t, n, pod).Name, path)
}

// A policy closes its pod to what this asked before, and no other pod.
func (s *suite) policyHolds(t *testing.T) {
	url := "http://" + s.addressesOf(t, "web").four + ":8080/hostname"
	if answer := output(t, s.in("asker", get(url)...)); answer != "web" {
		t.Fatalf("before the policy: %q", answer)
	}
	s.setPolicy(t, "asker", `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: nothing}
spec: {defaultAction: reject}
`)
	if answer, err := try(s.in("asker", get(url)...)); err == nil {
		t.Errorf("a pod whose policy denies everything was answered %q", answer)
	}
	if answer := s.on(t, s.Nodes()[1], get(url)...); answer != "web" {
		t.Errorf("the node was answered %q", answer)
	}
	if answer := output(t, s.in("namer", get(url)...)); answer != "web" {
		t.Errorf("another pod was answered %q", answer)
	}
}

const (
	webName      = "web.default.svc.cluster.local"
	headlessName = "headless.default.svc.cluster.local"
	otherName    = "kubernetes.default.svc.cluster.local"
	// nameserver is an address of documentation: no server is there.
	nameserver = "192.0.2.53"
)

// Under a policy by name a pod reaches the services that the policy names, by the cluster's DNS,
// whatever its resolv.conf says, and nothing else.
func (s *suite) namesHold(t *testing.T) {
	s.openPod(t, "namer")
	s.setPolicy(t, "namer", `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  egress:
  - action: allow
    to: [{domain: `+webName+`}, {domain: `+headlessName+`}]
    privateAddresses: allow
    ports: [{protocol: TCP, port: 8080}]
`)
	n := s.Nodes()[1]
	log := s.on(t, n, s.sluice, "logs", s.sandboxOf(t, n, "namer").Name)
	if asked := regexp.MustCompile(`names of the policy names are asked of .*from the runtime\)`).FindString(log); asked == "" {
		t.Errorf("the log does not say whom the worker asks\n%s", log)
	}
	s.namerAsks(t, "by the resolv.conf of the kubelet")
	service := s.kubectl(t, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
	for over, flag := range map[string]string{"UDP": "+notcp", "TCP": "+tcp"} {
		for _, at := range [][]string{nil, {"@" + nameserver}} {
			argv := append([]string{"dig", flag, "+short", webName}, at...)
			if answer := output(t, s.in("namer", argv...)); answer != service {
				t.Errorf("DNS over %s %s: %q, not the service's address %s", over, at, answer, service)
			}
		}
		if answer := output(t, s.in("namer", "dig", flag, otherName)); !strings.Contains(answer, "NXDOMAIN") {
			t.Errorf("DNS over %s: a name that the policy does not have\n%s", over, answer)
		}
	}
	output(t, s.in("namer", "sh", "-c", `cp /etc/resolv.conf /tmp/ && sed 's/^nameserver.*/nameserver `+nameserver+`/' /tmp/resolv.conf >/etc/resolv.conf`))
	s.namerAsks(t, "by a resolv.conf of its own")
	output(t, s.in("namer", "sh", "-c", "cat /tmp/resolv.conf >/etc/resolv.conf"))
}

// openPod waits until a pod reaches the server: a refusal afterwards is the policy's.
func (s *suite) openPod(t *testing.T, pod string) {
	t.Helper()
	eventually(t, func() error {
		answer, err := try(s.in(pod, get("http://"+webName+":8080/hostname")...))
		if err == nil && answer != "web" {
			err = fmt.Errorf("%s was answered %q", pod, answer)
		}
		return err
	})
}

// namerAsks for the services by name, which answer, and by address or another name, which do not.
func (s *suite) namerAsks(t *testing.T, when string) {
	t.Helper()
	for _, host := range []string{webName, headlessName} {
		if answer := output(t, s.in("namer", get("http://"+host+":8080/hostname")...)); answer != "web" {
			t.Errorf("%s: %s answers %q", when, host, answer)
		}
	}
	web := s.addressesOf(t, "web")
	service := s.kubectl(t, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
	for _, host := range []string{web.four, bracket(web.six), service, otherName} {
		if answer, err := try(s.in("namer", get("http://"+host+":8080/hostname", "-f")...)); err == nil {
			t.Errorf("%s: %s is let through: %q", when, host, answer)
		}
	}
	if answer, err := try(s.in("namer", get("http://"+webName+":8080/hostname", "-f", "-H", "Host: "+otherName)...)); err == nil {
		t.Errorf("%s: another name in the request is let through: %q", when, answer)
	}
}
