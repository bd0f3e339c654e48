#!/bin/bash
# Builds into the directory DIR the programs from other modules that the CNI tests call:
# cnitool and the main plugins of the newest specification, in the versions that go.mod
# names. The distribution's plugins do not speak that specification yet.
set -euo pipefail
if [ $# != 1 ]; then
	echo "usage: $0 DIR" >&2
	exit 2
fi
mkdir -p "$1"
GOBIN=$(cd "$1" && pwd)
export GOBIN
cd "$(dirname "$0")/.."
go=${GO:-go}
cni=github.com/containernetworking/cni plugins=github.com/containernetworking/plugins
of() { "$go" list -m -f '{{.Version}}' "$1"; }
"$go" install "$cni/cnitool@$(of $cni)"
list=()
for p in main/bridge main/loopback main/macvlan main/ptp ipam/host-local meta/bandwidth meta/portmap; do
	list+=("$plugins/plugins/$p@$(of $plugins)")
done
"$go" install "${list[@]}"
