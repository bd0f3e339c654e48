// Package kube is the test of Sluice in a real Kubernetes, which package cluster runs: every pod
// of two nodes is behind Sluice while the cluster's own ways are tried, containerd and the
// kubelets are restarted, and the last pod goes.
//
//	make e2e-kube    as root; the first time it also builds Kubernetes
//
// The package has tests alone. Each check is a subtest; they follow one another in one cluster.
package kube
