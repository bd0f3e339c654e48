// Package e2e drives the built sluice binary, and nothing else of this module, as a
// user would: real clients inside sandboxes, real servers in other network namespaces.
//
// # One run
//
// A run enters namespaces of its own before its first test (main_test.go): user (for an
// ordinary user only), PID, mount, IPC and network. The test process has the
// capabilities it needs there to build topologies, sluice has none of them when the run
// is an ordinary user's. Whatever happens, nothing outlives the run, because its first
// process takes everything with it.
//
//	as root              the machine's root          → sluice run as root
//	as an ordinary user  a user namespace of its own → sluice run as that user, no capability
//
// # One test
//
// Each test builds its topology of network namespaces (topo_test.go), starts servers
// there, a sandbox in the namespace "host" (sandbox_test.go), and commands inside the
// sandbox through an agent (the helper binary, e2e/peer). At its end it checks that the
// sandbox gave back its flows, descriptors and goroutines, and that no process, mount,
// device or state file is left (leak_test.go).
//
// Each test declares the area it proves (areas.txt); `make test` fails when an area
// that could run did not.
//
// The CNI tests (cni_node_test.go) run the plugin as container runtimes do, and with
// podman and containerd themselves (cni_runtime_test.go): these keep their files, images
// and networks in the test's node, and are asked for no image of any registry.
//
// Settings by environment: SLUICE_BIN, SLUICE_CNI_BIN, SLUICE_CNI_FAULTS_BIN (with the
// build tag faults), SLUICE_CGO_BIN (with cgo; none without a C compiler) and PEER_BIN (the
// binaries; built if unset), CNI_PLUGINS (what hack/cni-plugins.sh builds; without it the
// CNI tests are skipped),
// SLUICE_CLIENTS=REGEXP (clients of aswithout_test.go by name, whatever they need; .: all),
// SLUICE_E2E_KEEP=1 (show all output of every command).
package e2e
