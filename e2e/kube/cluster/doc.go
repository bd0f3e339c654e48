// Package cluster runs a real Kubernetes on one machine as plain processes, without a virtual
// machine, a container engine or an image from a registry.
//
//	 cp   etcd, API server, controller manager, scheduler; bridge kb0 172.31.249.1 fd00:31:249::1
//	 │ veth                                                 │ veth
//	n1   containerd, kubelet, kube-proxy  .11  ::11        n2   …  .12  ::12
//	 │ the main plugin (ptp)                                │
//	pods 10.244.0.0/24 fd00:10:244::/64                    pods 10.244.1.0/24 fd00:10:244:1::/64
//
// Control plane and nodes have namespaces of their own, each with pid1 (../pid1) as its first
// process. The machine's own network is not touched: commands reach the cluster through those
// namespaces (Cluster.Command, Node.Command). With the first process of each, the kernel ends all
// that is in it. Besides these processes there are only the nodes' cgroups and some of the
// machine's sysctls that kubelets set. All are written into a state file before they are made, so
// that Down removes them after a crash too.
//
// Build compiles the components from their modules (../components), once for each version, into
// a cache directory, together with images made of these binaries and of programs of this machine.
//
// The package knows nothing of Sluice. What is checked lies in package kube, beside it.
package cluster
