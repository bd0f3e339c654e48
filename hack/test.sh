#!/bin/bash
# Runs all tests. As root the end-to-end tests run twice, as root and as an ordinary user;
# the tests of the CNI plugin, which mostly wait, run beside them. An ordinary user runs them
# once. The end lists every skipped test with its reason. An area of e2e/areas.txt that could
# have run and did not is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" != --in-session ]; then
	exec hack/session.sh hack/test.sh --in-session
fi

go=${GO:-go}
nobody=65534 # exists, and owns nothing, on every machine
reports=$PWD/build/report
rm -rf "$reports"
mkdir -p "$reports"

hack/deps.sh

"$go" build -o build/report-tests ./hack/report
"$go" build -o build/test2json cmd/test2json
report=build/report-tests

# A failed step does not stop the run, so that one run reports everything; the closing report fails.
step() {
	echo "== $*"
}

step go vet
"$go" vet ./... || echo vet >"$reports/failed"

step unit tests
packages=$("$go" list ./... | grep -v '/e2e$')
# shellcheck disable=SC2086
"$go" test -json -timeout 5m $packages | "$report" -name unit -dir "$reports" || true

# The ordinary user may be unable to enter this directory, so the binaries go elsewhere.
work=$(mktemp -d /tmp/sluice-test.XXXXXX)
tun=/dev/net/tun
mode=
beside= # process group of the run beside the others
# shellcheck disable=SC2317 # called by the trap
restore() {
	if [ -n "$beside" ]; then
		kill -- -"$beside" 2>/dev/null || true
	fi
	if [ -n "$mode" ]; then
		chmod "$mode" "$tun"
	fi
	rm -rf "$work"
}
trap restore EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
chmod 755 "$work"
"$go" test -c -o "$work/e2e.test" ./e2e
cp build/sluice build/sluice-cni build/peer docs/threat-model.md "$work/"
"$go" build -trimpath -tags faults -o "$work/faults/sluice-cni" ./cmd/sluice-cni
if command -v gcc >/dev/null || command -v cc >/dev/null; then
	CGO_ENABLED=1 "$go" build -o "$work/cgo/sluice" ./cmd/sluice
	export SLUICE_CGO_BIN=$work/cgo/sluice
fi
hack/cni-plugins.sh "$work/cni"

cni=^TestCNI

# e2e NAME FLAG COMMAND...: runs the tests that the test binary's FLAG selects.
e2e() {
	local name=$1 flag=$2
	shift 2
	step "end-to-end tests: $name"
	(cd "$work" && "$@" "$work/e2e.test" -test.v=test2json -test.timeout 24m "$flag" 2>&1) </dev/null |
		build/test2json -t -p "sluice.dev/sluice/e2e ($name)" |
		"$report" -name "$name" -dir "$reports" -v || true
}

export SLUICE_BIN=$work/sluice PEER_BIN=$work/peer THREAT_MODEL=$work/threat-model.md
export SLUICE_CNI_BIN=$work/sluice-cni SLUICE_CNI_FAULTS_BIN=$work/faults/sluice-cni CNI_PLUGINS=$work/cni
if [ "$(id -u)" = 0 ]; then
	if [ ! -e "$tun" ]; then
		modprobe tun 2>/dev/null || true
	fi
	if [ ! -e "$tun" ]; then
		mkdir -p /dev/net
		mknod "$tun" c 10 200
	fi
	# The mode that udev gives the device everywhere; the old one is restored at the end.
	old=$(stat -c %a "$tun")
	if [ "$old" != 666 ]; then
		mode=$old
		chmod 666 "$tun"
	fi
	mkdir -m 700 "$work/nobody"
	chown $nobody:$nobody "$work/nobody"
	mkdir "$work/plugin"
	set -m
	e2e cni -test.run=$cni env TMPDIR="$work/plugin" >"$reports/cni.txt" &
	beside=$!
	set +m
	e2e root -test.skip=$cni env TMPDIR="$work"
	e2e user -test.skip=$cni setpriv --reuid $nobody --regid $nobody --clear-groups env TMPDIR="$work/nobody" HOME="$work/nobody"
	wait "$beside"
	beside=
	cat "$reports/cni.txt"
	strict=-strict
	modes=root,cni,user
else
	if [ ! -r "$tun" ] || [ ! -w "$tun" ]; then
		echo "test: no permission on $tun: tests with a sandbox are skipped; to run them: sudo chmod 666 $tun" >&2
	fi
	e2e user -test.skip= env TMPDIR="$work"
	strict=
	modes=user
fi
# shellcheck disable=SC2086
"$report" -close $strict -areas e2e/areas.txt -modes $modes -dir "$reports"
