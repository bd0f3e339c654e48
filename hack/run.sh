#!/bin/bash
# Shows sluice at work on this machine alone. A server runs on the host; in a sandbox, one
# request goes to it and one to an address that the policy denies.
set -euo pipefail
cd "$(dirname "$0")/.."
sluice=$PWD/build/sluice peer=$PWD/build/peer

if [ ! -r /dev/net/tun ] || [ ! -w /dev/net/tun ]; then
	if [ -e /dev/net/tun ]; then
		echo "run: no permission on /dev/net/tun: sudo chmod 666 /dev/net/tun (udev's own default)" >&2
	else
		echo "run: no /dev/net/tun: sudo modprobe tun" >&2
	fi
	exit 1
fi

work=$(mktemp -d)
server=
# shellcheck disable=SC2317 # called by the trap
finish() {
	if [ -n "$server" ]; then
		kill "$server" 2>/dev/null || true
		wait "$server" 2>/dev/null || true
	fi
	rm -rf "$work"
}
trap finish EXIT

# The server is on the host's loopback, which the sandbox sees as 10.0.2.2.
port=$((20000 + $$ % 20000))
"$peer" serve -base "$port" 127.0.0.1 >"$work/server" &
server=$!
for _ in $(seq 100); do
	grep -q listening "$work/server" && break
	sleep 0.05
done
if ! grep -q listening "$work/server"; then
	echo "run: the demonstration's server does not start on port $port" >&2
	exit 1
fi

cat >"$work/policy.yaml" <<POLICY
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata:
  name: demonstration
spec:
  defaultAction: reject
  egress:
  - name: host-server
    action: allow
    to: [{entity: host-loopback}]
    ports: [{protocol: TCP, port: $((port + 8))}]
POLICY

if command -v curl >/dev/null; then
	get='curl -gsS -m 10'
else
	get="$peer get"
fi

cat >"$work/inside.sh" <<INSIDE
echo '\$ curl http://10.0.2.2:$((port + 8))/'
$get http://10.0.2.2:$((port + 8))/ || exit 1
echo '\$ curl http://192.0.2.1/'
start=\$(date +%s%N)
if $get http://192.0.2.1/ 2>&1; then
	echo 'run: an address that the policy denies answered' >&2
	exit 1
fi
ms=\$(((\$(date +%s%N) - start) / 1000000))
echo "(refused after \$ms ms)"
[ "\$ms" -lt 1000 ] || exit 1
touch "$work/done"
while [ ! -e "$work/shown" ]; do sleep 0.05; done
INSIDE

name=demo-$$
echo "\$ sluice run --host-loopback --policy policy.yaml -- …"
"$sluice" run --name "$name" --host-loopback --policy "$work/policy.yaml" -- sh "$work/inside.sh" &
sandbox=$!
while [ ! -e "$work/done" ] && kill -0 "$sandbox" 2>/dev/null; do
	sleep 0.02
done
if [ -e "$work/done" ]; then
	echo "\$ sluice flows --ended $name"
	for _ in $(seq 20); do # an ended flow is told of a moment later
		"$sluice" flows --ended "$name" >"$work/flows"
		if grep -q 192.0.2.1 "$work/flows"; then
			break
		fi
		sleep 0.1
	done
	cat "$work/flows"
	touch "$work/shown"
fi
wait "$sandbox"
for want in "$((port + 8))" 192.0.2.1; do
	if ! grep -q "$want" "$work/flows"; then
		echo "run: the flow table does not show $want" >&2
		exit 1
	fi
done
