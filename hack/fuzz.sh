#!/bin/bash
# Runs every fuzz target of the module for the given time.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
time=${1:-20s}
status=0
while IFS=: read -r file target; do
	echo "== $target in $(dirname "$file") for $time"
	"$go" test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 2s "./$(dirname "$file")" || status=1
done < <(grep -rhoE --include='*_test.go' --with-filename '^func Fuzz[A-Za-z0-9_]*' . | sed -E 's|^\./||; s/:func /:/')
exit $status
