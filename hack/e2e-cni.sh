#!/bin/bash
# Runs single end-to-end tests as root, for longer than `make test` does, with the binaries
# that it builds for them.
set -euo pipefail
if [ $# -lt 2 ]; then
	echo "usage: $0 TIMEOUT TESTS [NAME=VALUE...]" >&2
	exit 2
fi
cd "$(dirname "$0")/.."
go=${GO:-go}
if [ "$(id -u)" != 0 ]; then
	echo "$0: these tests run as root: sudo make …" >&2
	exit 2
fi
hack/deps.sh
timeout=$1 tests=$2
shift 2
work=$(mktemp -d /tmp/sluice-test.XXXXXX)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
"$go" test -c -o "$work/e2e.test" ./e2e
cp build/sluice build/sluice-cni build/peer "$work/"
"$go" build -trimpath -tags faults -o "$work/faults/sluice-cni" ./cmd/sluice-cni
hack/cni-plugins.sh "$work/cni"
export SLUICE_BIN=$work/sluice PEER_BIN=$work/peer
export SLUICE_CNI_BIN=$work/sluice-cni SLUICE_CNI_FAULTS_BIN=$work/faults/sluice-cni CNI_PLUGINS=$work/cni
cd "$work"
env TMPDIR="$work" "$@" "$work/e2e.test" -test.v -test.timeout "$timeout" -test.run "^($tests)\$" </dev/null
