#!/bin/bash
# All rows of the matrix "as without" (e2e/aswithout_test.go), with the programs that only they
# need. As root.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "$0: installs programs, and so runs as root: sudo make clients" >&2
	exit 2
fi
hack/deps.sh
exec hack/e2e-cni.sh 20m TestAsWithout SLUICE_CLIENTS=all
