#!/bin/bash
# Shows sluice-cni with podman: two containers, one of which may reach the other, and the
# flow table of each. The script and podman run in namespaces of their own: they use nothing
# of the machine but its programs, and nothing outlives the script.
set -euo pipefail
cd "$(dirname "$0")/.."
sluice=$PWD/build/sluice plugin=$PWD/build/sluice-cni peer=$PWD/build/peer examples=$PWD/examples/podman

fail() {
	echo "demo-cni: $*" >&2
	exit 1
}

if [ "${1:-}" != inside ]; then
	[ "$(id -u)" = 0 ] || fail "container runtimes call their network plugins as root: sudo make demo-cni"
	missing=()
	for program in podman crun conmon ip unshare; do
		command -v "$program" >/dev/null || missing+=("$program")
	done
	[ ${#missing[@]} -eq 0 ] || fail "not installed: ${missing[*]} (on Debian 12: apt-get install podman crun conmon iproute2 util-linux containernetworking-plugins)"
	[ -e /dev/net/tun ] || fail "no /dev/net/tun: modprobe tun"
	# Whatever happens to this process, the kernel ends all that it started.
	exec unshare --mount --net --ipc --pid --fork --mount-proc --kill-child "$PWD/hack/demo-cni.sh" inside
fi

trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
# A podman that Ctrl-C interrupts forgets what it has made, so it is allowed to finish.
podman() {
	setsid --wait podman "$@"
}

for plugins in /usr/lib/cni /opt/cni/bin /usr/libexec/cni none; do
	[ -x "$plugins/bridge" ] && [ -x "$plugins/host-local" ] && break
done
[ "$plugins" != none ] || fail "no main plugins of CNI (on Debian: apt-get install containernetworking-plugins)"

mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=755 lib /var/lib
# crun refuses cgroup v1 with v2 beside it; these containers use neither.
umount /sys/fs/cgroup/unified 2>/dev/null || true
ip link set lo up
mkdir /run/demo /run/demo/net.d /run/demo/bin /run/demo/root
cd /run/demo
export CONTAINERS_CONF=$PWD/containers.conf CONTAINERS_STORAGE_CONF=$PWD/storage.conf

cat >containers.conf <<CONF
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[network]
network_backend = "cni"
cni_plugin_dirs = ["$PWD/bin", "$plugins"]
network_config_dir = "$PWD/net.d"
default_network = "demo"
[engine]
cgroup_manager = "cgroupfs"
runtime = "crun"
events_logger = "none"
lock_type = "file"
tmp_dir = "$PWD/tmp"
CONF
cat >storage.conf <<CONF
[storage]
driver = "vfs"
graphroot = "/var/lib/podman"
runroot = "$PWD/run"
CONF
cp "$examples/demo.conflist" net.d/
cp "$examples/containers.yaml" .
sed "s,/etc/sluice,$PWD," "$examples/keys.json" >keys.json

backend=$(podman info --format '{{.Host.NetworkBackend}}')
[ "$backend" = cni ] || fail "this podman's networks are $backend's: the demonstration needs podman 4, which has CNI (network_backend = \"cni\")"

# shellcheck disable=SC2317 # called by the trap
finish() {
	local status=$?
	trap '' INT TERM HUP
	podman rm --all --force --time 0 >/dev/null || status=1
	local left
	left=$("$sluice" ps | sed 1d; ip -o link | grep -vE ' (lo|demo0):' || true; ls -A /run/netns 2>/dev/null || true)
	if [ -n "$left" ]; then
		printf 'demo-cni: left behind:\n%s\n' "$left" >&2
		status=1
	else
		echo "Removed: no container, attachment, device or namespace is left."
	fi
	exit "$status"
}
trap finish EXIT

say() {
	echo
	echo "\$ $*"
}

say sluice-cni install --conflist demo.conflist --config keys.json
"$plugin" install --conflist net.d/demo.conflist --config keys.json --bin-dir bin
sed -n '/^spec/,$p' containers.yaml

cp "$peer" root/peer
tar -C root -c . | podman import --quiet - peer >/dev/null
declare -A id
for who in alice:10 bob:11; do
	name=${who%:*} address=10.5.0.${who#*:}
	say podman run --detach --name "$name" --ip "$address" peer /peer serve
	id[$name]=$(podman run --detach --name "$name" --ip "$address" peer /peer serve)
done
for name in alice bob; do
	for _ in $(seq 100); do
		podman logs "$name" 2>&1 | grep -q listening && break
		sleep 0.05
	done
done
say sluice ps
"$sluice" ps

# attachment prints the name that sluice knows a container by.
attachment() {
	"$sluice" ps | awk -v id="${id[$1]:0:12}" 'index($1, id) == 1 {print $1}'
}

status=0
say podman exec alice /peer get http://10.5.0.11:7008/addr
podman exec alice /peer get http://10.5.0.11:7008/addr || status=1
say sluice flows bob
"$sluice" flows "$(attachment bob)" | tee flows
say podman exec bob /peer get http://10.5.0.10:7008/addr
if podman exec bob /peer get http://10.5.0.10:7008/addr 2>&1; then
	status=1
fi
say sluice flows --ended alice
"$sluice" flows --ended "$(attachment alice)" | tee -a flows
echo
[ $status = 0 ] || fail "the policy is not what the containers meet"
grep -q 'ingress\[0\] alice' flows || fail "the flow table does not show that alice was let in"
grep -q '^REJECTED.*default' flows || fail "the flow table does not show that bob was refused"
