package cluster

// The control plane: one of each component, in the space cp.

import (
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
	"time"
)

// The cluster's addresses. They exist in its namespaces only.
const (
	pods4     = "10.244.0.0/16"
	pods6     = "fd00:10:244::/56"
	services4 = "10.96.0.0/16"
	services6 = "fd00:10:96::/112"
	dns4      = "10.96.0.10"
)

// underlay4 and underlay6 are the addresses of the nodes' own network: 1 is the control plane.
func underlay4(n int) string { return fmt.Sprintf("172.31.249.%d", n) }
func underlay6(n int) string { return fmt.Sprintf("fd00:31:249::%d", n) }

//go:embed coredns.yaml
var corednsManifest string

func (c *Cluster) startControlPlane(ctx context.Context) (err error) {
	if c.control, err = c.newSpace("cp"); err != nil {
		return err
	}
	if err := c.control.ip(fmt.Sprintf(`link set lo up
link add kb0 type bridge
addr add %s/24 dev kb0
addr add %s/64 dev kb0 nodad
link set kb0 up
`, underlay4(1), underlay6(1))); err != nil {
		return err
	}
	if err := c.certificates(); err != nil {
		return fmt.Errorf("making certificates: %w", err)
	}
	const etcd, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	p := c.pki.path
	// What a component writes beside its data goes here.
	run := "--cert-dir=" + filepath.Join(c.dir, "run")
	if err := c.control.start("etcd", c.builder.path("etcd"), "--name=cluster", "--data-dir="+filepath.Join(c.dir, "etcd"),
		"--unsafe-no-fsync", "--log-level=warn", "--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
		"--listen-peer-urls="+peers, "--initial-advertise-peer-urls="+peers, "--initial-cluster=cluster="+peers); err != nil {
		return err
	}
	if err := c.control.start("kube-apiserver", c.builder.path("kube-apiserver"), "--etcd-servers="+etcd, run,
		"--secure-port=6443", "--advertise-address="+underlay4(1), "--service-cluster-ip-range="+services4+","+services6,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--client-ca-file="+p("ca.crt"), "--tls-cert-file="+p("apiserver.crt"), "--tls-private-key-file="+p("apiserver.key"),
		"--kubelet-client-certificate="+p("kubelet-client.crt"), "--kubelet-client-key="+p("kubelet-client.key"),
		"--kubelet-certificate-authority="+p("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+p("sa.pub"), "--service-account-signing-key-file="+p("sa.key"),
		"--requestheader-client-ca-file="+p("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+p("front-proxy.crt"), "--proxy-client-key-file="+p("front-proxy.key")); err != nil {
		return err
	}
	if err := until(120*time.Second, func() error {
		if err := c.control.alive("kube-apiserver"); err != nil {
			return err
		}
		_, err := c.kubectl(ctx, "", "get", "--raw", "/readyz")
		return err
	}); err != nil {
		return fmt.Errorf("waiting for the API server: %w", err)
	}
	as := func(name string) []string {
		return []string{"--kubeconfig=" + p(name+".conf"), "--authentication-kubeconfig=" + p(name+".conf"),
			"--authorization-kubeconfig=" + p(name+".conf"), "--leader-elect=false", run}
	}
	if err := c.control.start("kube-controller-manager", append([]string{c.builder.path("kube-controller-manager"),
		"--use-service-account-credentials=true", "--service-account-private-key-file=" + p("sa.key"),
		"--root-ca-file=" + p("ca.crt"), "--cluster-signing-cert-file=" + p("ca.crt"), "--cluster-signing-key-file=" + p("ca.key"),
		"--allocate-node-cidrs=true", "--cluster-cidr=" + pods4 + "," + pods6,
		"--service-cluster-ip-range=" + services4 + "," + services6}, as("controller-manager")...)...); err != nil {
		return err
	}
	return c.control.start("kube-scheduler", append([]string{c.builder.path("kube-scheduler")}, as("scheduler")...)...)
}

func (c *Cluster) certificates() (err error) {
	if c.pki, err = newPKI(filepath.Join(c.dir, "pki")); err != nil {
		return err
	}
	for _, cert := range []struct {
		name, user, group string
		names             []string
	}{
		{"apiserver", "kube-apiserver", "", []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc.cluster.local", underlay4(1), underlay6(1), "10.96.0.1", "fd00:10:96::1"}},
		{"kubelet-client", "kube-apiserver-kubelet-client", "system:masters", nil},
		{"front-proxy", "front-proxy-client", "", nil},
		{"admin", "admin", "system:masters", nil},
		{"controller-manager", "system:kube-controller-manager", "", nil},
		{"scheduler", "system:kube-scheduler", "", nil},
		{"proxy", "system:kube-proxy", "", nil},
	} {
		if err := c.pki.certificate(cert.name, cert.user, cert.group, cert.names...); err != nil {
			return err
		}
		if _, err := c.pki.kubeconfig(cert.name); err != nil {
			return err
		}
	}
	c.admin = c.pki.path("admin.conf")
	return nil
}

// startDNS deploys CoreDNS as kubeadm does, and waits until it serves.
func (c *Cluster) startDNS(ctx context.Context) error {
	if _, err := c.kubectl(ctx, corednsManifest, "apply", "-f", "-"); err != nil {
		return err
	}
	_, err := c.kubectl(ctx, "", "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s")
	return err
}
