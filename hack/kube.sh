#!/bin/bash
# Puts every pod of a real two-node Kubernetes cluster behind Sluice. It installs sluice-cni
# behind the cluster's main plugin, makes all pods anew, runs the cluster's own checks,
# restarts containerd and the kubelets under the pods, and runs the checks again. After the
# last pod nothing may be left. Prints a line for each check, and fails if a check fails.
# shellcheck disable=SC2016 # text in single quotes is for a shell in a node or a pod
set -euo pipefail
cd "$(dirname "$0")/.."

sluice=${SLUICE_BIN:-$PWD/build/sluice} plugin=${SLUICE_CNI_BIN:-$PWD/build/sluice-cni}
tools=${KUBE_TOOLS:-}
image=${KUBE_IMAGE:-registry.k8s.io/e2e-test-images/agnhost:2.63.0}
plugins=${KUBE_CNI_PLUGINS:-}

if [ -z "$tools" ]; then
	cat >&2 <<'NEEDS'
e2e-kube: KUBE_TOOLS names no directory. It must hold programs that run a Kubernetes on this
machine, with nodes that share its root file system but have /run, /etc/cni and /opt/cni of
their own:
  up              starts it, with as many nodes as the environment's NODES says and a main
                  plugin; prints its KUBECONFIG, beside which bin/kubectl lies if PATH has none
  down            ends it
  in NODE CMD…    runs a command in a node's namespaces
  daemon NODE containerd|kubelet restart
  smoke           checks a cluster: lines "ok NAME…" and "FAIL NAME…", a last one that
                  counts, and the exit status
Its nodes must have the image of KUBE_IMAGE (default: Kubernetes' agnhost), with sh, awk, curl,
ss and OpenBSD's nc. This machine must have jq and /dev/net/tun; the caller must be root.
With KUBE_CNI_PLUGINS=DIR, a directory that hack/cni-plugins.sh has made, the nodes get the
main plugins from there and a list of CNI 1.1.0: a runtime that calls STATUS (containerd 2)
must then bring a killed monitor back.
NEEDS
	exit 2
fi
for program in up down in daemon smoke; do
	if [ ! -x "$tools/$program" ]; then
		echo "e2e-kube: KUBE_TOOLS=$tools has no program $program (unset it to read what is needed)" >&2
		exit 2
	fi
done
for program in jq nsenter ip nft curl; do
	if ! command -v "$program" >/dev/null; then
		echo "e2e-kube: no $program on PATH: apt-get install jq util-linux iproute2 nftables curl" >&2
		exit 2
	fi
done
if [ "$(id -u)" != 0 ]; then
	echo "e2e-kube: nodes are made of namespaces: run it as root" >&2
	exit 2
fi

work=$(mktemp -d)
watcher=
# shellcheck disable=SC2317 # called by the trap
finish() {
	if [ -n "$watcher" ]; then
		kill "$watcher" 2>/dev/null || true
		wait "$watcher" 2>/dev/null || true
	fi
	"$tools/down" >/dev/null 2>&1 || true
	rm -rf "$work"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

passed=0 failed=0
# check NAME COMMAND…: runs the command and prints all the output of one that fails.
check() {
	local name=$1 out
	shift
	if out=$("$@" 2>&1); then
		passed=$((passed + 1))
		printf 'ok    %s%s\n' "$name" "${out:+: ${out//$'\n'/; }}"
	else
		failed=$((failed + 1))
		printf 'FAIL  %s: %s\n' "$name" "$out"
	fi
}
# eventually COMMAND…: repeats the command until it succeeds, for up to 30 s; prints its last output.
eventually() {
	local out end=$((SECONDS + 30))
	until out=$("$@" 2>&1); do
		if [ $SECONDS -ge $end ]; then
			echo "$out"
			return 1
		fi
		sleep 0.2
	done
	echo "$out"
}
# same WHAT FILE FILE
same() {
	diff "$2" "$3" >"$work/diff" && return
	echo "$1:"
	cat "$work/diff"
	return 1
}
in_node() { "$tools/in" "$@"; }

# --- What Kubernetes and Sluice say, one pod a line.

# pods NODE: the pods with a network of their own, with their addresses.
pods() {
	kubectl get pods -A -o json | jq -r --arg n "$1" '.items[]
		| select(.spec.nodeName == $n and .status.phase == "Running" and .metadata.deletionTimestamp == null and (.spec.hostNetwork | not))
		| "\(.metadata.namespace)/\(.metadata.name) \([.status.podIPs[].ip] | sort | join(" "))"' | sort
}
# attached NODE: the same for the running attachments.
attached() {
	in_node "$1" "$sluice" ps -o json | jq -r '.[] | select(.attachment and .state == "running")
		| "\(.command[1]) \([.guest[] | split("/")[0]] | sort | join(" "))"' | sort
}
records() { in_node "$1" bash -c 'shopt -s nullglob; for f in /run/sluice-cni/attachments/*/record.json; do cat "$f"; done'; }
# processes: the monitors and workers of all nodes.
processes() {
	local n
	for n in "${nodes[@]}"; do
		in_node "$n" "$sluice" ps -o json | jq -r --arg n "$n" '.[] | "\($n) \(.command[1]) monitor \(.pid) worker \(.worker_pid) restarts \(.restarts)"'
	done | sort
}
# containers: what a restarted runtime must leave alone.
containers() {
	kubectl get pods -A -o json | jq -r '.items[]
		| "\(.metadata.namespace)/\(.metadata.name) \(.metadata.uid) \([.status.containerStatuses[] | "\(.containerID) \(.restartCount)"] | join(" "))"' | sort
}

# --- The checks.

no_attachment() {
	local n
	for n in "${nodes[@]}"; do
		attached "$n" >"$work/attached" && records "$n" >>"$work/attached" || return 1
		if [ -s "$work/attached" ]; then
			cat "$work/attached"
			return 1
		fi
	done
}
every_pod_attached() {
	local n
	for n in "${nodes[@]}"; do
		pods "$n" >"$work/pods" && attached "$n" >"$work/attached" || return 1
		same "$n: pods (<) and attachments (>)" "$work/pods" "$work/attached" || return 1
		echo "$n $(wc -l <"$work/pods")"
	done
}
# The pod's one interface is a TAP, whatever the records say.
every_pod_on_tap() {
	local n netns
	for n in "${nodes[@]}"; do
		for netns in $(records "$n" | jq -r .netns); do
			in_node "$n" nsenter --net="$netns" ip -d -o link show >"$work/links"
			if [ "$(grep -vc ': lo:' "$work/links")" != 1 ] || ! grep -q ' eth0: .* tun type tap' "$work/links"; then
				cat "$work/links"
				return 1
			fi
		done
	done
}
# serving NODE: the pods, each with its processes.
serving() { in_node "$1" "$sluice" ps -o json | jq -r '.[] | "\(.command[1]) \(.pid) \(.worker_pid)"'; }
# With a runtime that passes cgroupPath, monitor and worker are charged to the pod: to its
# own cgroup, beside those of its containers.
every_pod_charged() {
	local n pod monitor worker dir pid
	for n in "${nodes[@]}"; do
		records "$n" >"$work/records"
		while read -r pod monitor worker; do
			jq -r --arg pod "$pod" 'select("\(.pod.namespace)/\(.pod.name)" == $pod) | .launch.cgroups[]?' "$work/records" >"$work/cgroups"
			while read -r dir; do
				for pid in "$monitor" "$worker"; do
					in_node "$n" grep -qx "$pid" "$dir/cgroup.procs" </dev/null || { echo "$n: process $pid of $pod is not in $dir"; return 1; }
				done
				case $dir in
				*/memory/*) in_node "$n" awk -v pod="$pod" '$1 == "rss" || $1 == "cache" {n += $2} END {printf "%s %d KiB\n", pod, n / 1024}' "$dir/memory.stat" </dev/null ;;
				esac
			done <"$work/cgroups"
		done < <(serving "$n")
	done
	jq -se 'any(.[]; .launch.cgroups)' "$work/records" >/dev/null || echo 'not at all: this runtime passes no cgroupPath'
}
memory() {
	local n
	for n in "${nodes[@]}"; do
		serving "$n" | while read -r _ monitor worker; do
			in_node "$n" cat "/proc/$monitor/smaps_rollup" "/proc/$worker/smaps_rollup" </dev/null | awk '/^Private/ {n += $2} END {print n}'
		done
	done | sort -n | awk '{v[NR] = $1} END {printf "%d pods, from %d to %d KiB private\n", NR, v[1], v[NR]; exit !NR}'
}

# smoke runs the cluster's own checks, and watches their pods come and go meanwhile.
smoke() {
	local result=0
	: >"$work/seen-pods"
	: >"$work/seen-attached"
	# Owned by smoke, which ends it; finish does if we are interrupted.
	while :; do
		for n in "${nodes[@]}"; do
			pods "$n" >>"$work/seen-pods" || true
			attached "$n" >>"$work/seen-attached" || true
		done
		sleep 0.2
	done 2>/dev/null &
	watcher=$!
	"$tools/smoke" >"$work/smoke" 2>&1 || result=$?
	kill "$watcher"
	wait "$watcher" 2>/dev/null || true
	watcher=
	sed 's/^/      /' "$work/smoke"
	check "smoke $1" smoke_result $result
	check "smoke's pods were attached $1" smoke_pods
	cut -d' ' -f2- "$work/seen-pods" | tr ' ' '\n' >>"$work/addresses"
}
smoke_result() {
	tail -1 "$work/smoke"
	[ "$1" = 0 ]
}
smoke_pods() {
	local line missing=0
	# To the API, a pod whose network is just ending is still Running for a moment.
	while read -r line; do
		grep -qxF -- "$line" "$work/seen-attached" || { echo "never attached: $line"; missing=1; }
	done < <(sort -u "$work/seen-pods")
	[ $missing = 0 ] || return 1
	sort -u "$work/seen-pods" | wc -l
}

# address POD 4|6
address() { kubectl get pod "$1" -o json | jq -r --arg six "$2" '.status.podIPs[].ip | select(contains(":") == ($six == "6"))'; }
bracket() { case $1 in *:*) echo "[$1]" ;; *) echo "$1" ;; esac; }
# seen_from_pod 4|6: a pod asks the server, which sees the pod's address.
seen_from_pod() {
	local to from got
	to=$(address web "$1") from=$(address asker "$1")
	got=$(kubectl exec asker -- curl -gsS -m 5 "http://$(bracket "$to"):8080/clientip")
	[ "${got%:*}" = "$(bracket "$from")" ] || { echo "the server saw $got, not $from"; return 1; }
	echo "$got"
}
# seen_from_node 4|6: the other node asks the server, which sees an address of that node.
seen_from_node() {
	local to got
	to=$(address web "$1")
	got=$(in_node "${nodes[1]}" curl -gsS -m 5 "http://$(bracket "$to"):8080/clientip")
	in_node "${nodes[1]}" ip -o addr show >"$work/own"
	grep -qF " $(echo "${got%:*}" | tr -d '[]')/" "$work/own" || { echo "the server saw $got, which is not of ${nodes[1]}"; return 1; }
	echo "$got"
}
# policy_holds: a policy on one pod keeps it from the server that it asked before, and affects no other pod.
policy_holds() {
	local to name
	to=$(address web 4)
	name=$(in_node "${nodes[1]}" "$sluice" ps -o json | jq -r '.[] | select(.command[1] == "default/asker") | .name')
	printf '%s\n' 'apiVersion: sluice.dev/v1alpha1' 'kind: SandboxPolicy' 'metadata: {name: nothing}' 'spec: {defaultAction: reject}' >"$work/policy.yaml"
	in_node "${nodes[1]}" "$sluice" policy set "$name" "$work/policy.yaml" || return 1
	if kubectl exec asker -- curl -sS -m 5 "http://$to:8080/hostname"; then
		echo 'a pod whose policy denies everything was answered'
		return 1
	fi
	in_node "${nodes[1]}" curl -sS -m 5 "http://$to:8080/hostname"
}

# names_hold: under a policy by name a pod reaches the services that the policy names, and
# nothing else. It finds them by the cluster's DNS, whatever its resolv.conf says.
names_hold() {
	local name what
	name=$(in_node "${nodes[1]}" "$sluice" ps -o json | jq -r '.[] | select(.command[1] == "default/namer") | .name')
	in_node "${nodes[1]}" "$sluice" policy set "$name" "$work/names.yaml" || return 1
	in_node "${nodes[1]}" "$sluice" logs "$name" | grep -o 'names of the policy names are asked of .*from the runtime)' | tail -1 || { echo 'nobody is known to be asked'; return 1; }
	namer_asks 'by the resolv.conf of the kubelet' || return 1
	for what in 'DNS over UDP:+notcp' 'DNS over TCP:+tcp'; do
		in_namer 'dig "$1" +short "$2"' "${what#*:}" web.default.svc.cluster.local | grep -qxF "$(service web)" || { echo "${what%:*}: not the service's address"; return 1; }
		in_namer 'dig "$1" "$2"' "${what#*:}" kubernetes.default.svc.cluster.local | grep -q NXDOMAIN || { echo "${what%:*}: a name that the policy does not have"; return 1; }
		# No server has this address: ours answers.
		in_namer 'dig "$1" +short @192.0.2.53 "$2"' "${what#*:}" web.default.svc.cluster.local | grep -qxF "$(service web)" || { echo "${what%:*}: another server than ours"; return 1; }
	done
	in_namer 'cp /etc/resolv.conf /tmp/ && sed s/^nameserver.*/nameserver\ 192.0.2.53/ /tmp/resolv.conf >/etc/resolv.conf' || return 1
	namer_asks 'by a resolv.conf of its own' || return 1
	in_namer 'cat /tmp/resolv.conf >/etc/resolv.conf'
}
# namer_asks WHEN: reaches the services by name, and none by address or by another name.
namer_asks() {
	local host
	for host in web headless; do
		[ "$(in_namer 'curl -gsS -m 5 "http://$1:8080/hostname"' $host.default.svc.cluster.local)" = web ] || { echo "$1: no answer of $host"; return 1; }
	done
	for host in "$(address web 4)" "$(bracket "$(address web 6)")" "$(service web)" kubernetes.default.svc.cluster.local; do
		! in_namer 'curl -fgsS -m 5 "http://$1:8080/hostname"' "$host" 2>"$work/refused" || { echo "$1: $host is let through"; return 1; }
	done
	if in_namer 'curl -fsS -m 5 -H "Host: $1" "http://$2:8080/hostname"' kubernetes.default.svc.cluster.local web.default.svc.cluster.local 2>"$work/refused"; then
		echo "$1: another name in the request is let through"
		return 1
	fi
}
in_namer() { kubectl exec namer -- sh -c "$1" - "${@:2}"; }
service() { kubectl get service "$1" -o jsonpath='{.spec.clusterIP}'; }

# held 4|6 LINES: the connection opened at the start goes on after LINES lines, and each line
# arrives once and in order.
held() {
	local n
	n=$(kubectl exec held-server -c "v$1" -- awk '$1 != NR - 1 {exit 1} END {print NR}' /tmp/lines) || { echo 'lines are missing'; return 1; }
	[ "$n" -gt "$2" ] || { echo "no line after the first $2"; return 1; }
	echo "$n lines"
}
lines_of() { kubectl exec held-server -c "v$1" -- awk 'END {print NR}' /tmp/lines; }
kubelets_answer() {
	local n
	for n in "${nodes[@]}"; do
		kubectl get --raw "/api/v1/nodes/$n/proxy/healthz" >/dev/null || return 1
	done
	kubectl exec held-server -c v4 -- true && kubectl exec held-client -c v4 -- true
}

# replaced: the runtime's STATUS replaces a monitor that was killed. Until then the pod has no
# network; afterwards it has the same address.
replaced() {
	local before after to start=$SECONDS
	to=$(address web 4)
	before=$(serving "${nodes[0]}" | awk '$1 == "default/web" {print $2}')
	in_node "${nodes[0]}" kill -9 "$before" || return 1
	eventually in_node "${nodes[1]}" curl -sS -m 1 -o /dev/null "http://$to:8080/hostname" >/dev/null || return 1
	after=$(serving "${nodes[0]}" | awk '$1 == "default/web" {print $2}')
	[ "$after" != "$before" ] || { echo "$before was not killed"; return 1; }
	echo "after $((SECONDS - start)) s"
}

no_pod() {
	local left
	left=$(kubectl get pods -A -o name) || return 1
	echo "$left"
	[ -z "$left" ]
}
# clean NODE: no pod has left anything.
clean() {
	in_node "$1" bash -s -- "$(sort -u "$work/addresses" | tr '\n' ' ')" <<'IN'
		shopt -s nullglob
		left=$(
			for f in /run/sluice/* /run/sluice-cni/*/* /run/netns/cni-* /var/lib/cni/results/* /var/lib/cni/networks/*/[0-9a-f]*[.:]*; do echo "file $f"; done
			ip -o link | grep -v -e ': lo:' -e ': eth0@' | sed 's/^/device /'
			grep -e sluice -e /netns/cni- /proc/self/mountinfo | sed 's/^/mount /'
			ps -eo pid,args | grep '[s]luice-cni' | sed 's/^/process /'
			find /sys/fs/cgroup -type d \( -name 'pod*' -o -name '*-pod*' -o -name sluice \) | sed 's/^/cgroup /'
			rules=$(nft list ruleset 2>/dev/null)
			for a in sluice $1; do grep -wF -- "$a" <<<"$rules" | sed 's/^/rule /'; done
		)
		echo "$left"
		[ -z "$left" ]
IN
}
# remains NODE: while there are pods, clean finds remains of every kind.
remains() {
	local kind
	if clean "$1" >"$work/remains"; then
		echo 'nothing found'
		return 1
	fi
	for kind in file device mount process cgroup rule; do
		grep -q "^$kind " "$work/remains" || { echo "no $kind found"; return 1; }
	done
}
no_failures() {
	kubectl get events -A -o json | jq -r '.items[] | select(.reason == "FailedCreatePodSandBox" or .reason == "FailedKillPod") | "\(.involvedObject.name): \(.message)"' >"$work/events" || return 1
	[ ! -s "$work/events" ] || { cat "$work/events"; return 1; }
}
uninstalled() {
	local n
	for n in "${nodes[@]}"; do
		in_node "$n" "$plugin" uninstall --conflist "$conflist" || return 1
		in_node "$n" cat "$conflist" | jq -S . >"$work/after"
		same "$n: the list before (<) and after (>)" "$work/conflist-$n" "$work/after" || return 1
	done
}
# gone: no process runs one of the binaries that the nodes had.
gone() {
	local p
	for p in /proc/[0-9]*; do
		if grep -qxF "$(stat -L -c %d:%i "$p/exe" 2>/dev/null)" "$work/binaries"; then
			tr '\0' ' ' <"$p/cmdline"
			return 1
		fi
	done
}

# --- The run.

NODES=2 "$tools/up" >"$work/up" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
KUBECONFIG=$(tail -1 "$work/up")
export KUBECONFIG PATH=$PATH:${KUBECONFIG%/*}/bin
# kubectl loses the output that a command prints before the websocket is ready ("Unknown
# stream id"). Its older transport does not.
export KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false
mapfile -t nodes < <(kubectl get nodes -o name | sed 's,^node/,,' | sort)
kubectl get nodes -o json | jq -r '.items[].status.nodeInfo | "      \(.kubeletVersion), \(.containerRuntimeVersion), kernel \(.kernelVersion)"' | sort -u
conflist=$(in_node "${nodes[0]}" bash -c 'set -- /etc/cni/net.d/*.conflist; echo "$1"')

check 'no pod is attached before' no_attachment
for n in "${nodes[@]}"; do
	if [ -n "$plugins" ]; then
		in_node "$n" bash -c 'cp "$1"/* /opt/cni/bin/ && jq ".cniVersion = \"1.1.0\"" "$2" >"$2.new" && mv "$2.new" "$2"' - "$plugins" "$conflist"
	fi
	in_node "$n" cat "$conflist" | jq -S . >"$work/conflist-$n"
	check "install on $n" in_node "$n" "$plugin" install --conflist "$conflist" --bin-dir /opt/cni/bin
	in_node "$n" stat -c %d:%i /opt/cni/bin/sluice-cni >>"$work/binaries"
done
check 'pods from before are left alone' no_attachment

# Every existing pod belongs to a deployment.
for d in $(kubectl get deployments -A -o json | jq -r '.items[] | "\(.metadata.namespace)/\(.metadata.name)"'); do
	kubectl -n "${d%/*}" rollout restart "deployment/${d#*/}" >/dev/null
	check "$d anew" kubectl -n "${d%/*}" rollout status "deployment/${d#*/}" --timeout=60s
done

until kubectl get serviceaccount default >/dev/null 2>&1; do sleep 0.1; done
# pod NAME NODE CONTAINERS
pod() {
	printf '{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "%s", "labels": {"app": "%s"}}, "spec": {"nodeName": "%s", "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [%s]}}\n' "$1" "$@" | kubectl apply -f - >/dev/null
	kubectl wait --for=condition=Ready "pod/$1" --timeout=60s >/dev/null
}
container() { jq -n --arg name "$1" --arg image "$image" --arg run "$2" '{name: $name, image: $image, command: ["sh", "-c", $run]}'; }
pod held-server "${nodes[0]}" "$(container v4 'nc -4 -l 9004 >/tmp/lines'), $(container v6 'nc -6 -l 9006 >/tmp/lines')"
eventually kubectl exec held-server -c v4 -- sh -c 'ss -tln | grep -q :9004' && eventually kubectl exec held-server -c v6 -- sh -c 'ss -tln | grep -q :9006'
send='i=0; while echo $i; do i=$((i + 1)); sleep 0.1; done'
pod held-client "${nodes[1]}" "$(container v4 "($send) | nc -4 $(address held-server 4) 9004"), $(container v6 "($send) | nc -6 $(address held-server 6) 9006")"
pod web "${nodes[0]}" "$(container web '/agnhost netexec --http-port=8080')"
pod asker "${nodes[1]}" "$(container asker 'sleep 100000')"
pod namer "${nodes[1]}" "$(container namer 'sleep 100000')"
kubectl expose pod web --port=8080 >/dev/null
kubectl expose pod web --name=headless --cluster-ip=None --port=8080 >/dev/null
cat >"$work/names.yaml" <<'POLICY'
apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec:
  defaultAction: reject
  egress:
  - action: allow
    to: [{domain: web.default.svc.cluster.local}, {domain: headless.default.svc.cluster.local}]
    privateAddresses: allow
    ports: [{protocol: TCP, port: 8080}]
POLICY
eventually kubectl exec namer -- sh -c 'dig +short headless.default.svc.cluster.local | grep .' >/dev/null
eventually kubectl exec asker -- curl -sS -m 2 "http://$(address web 4):8080/hostname" >/dev/null

check 'every pod is attached' every_pod_attached
check 'every pod is on a TAP' every_pod_on_tap
for family in 4 6; do
	check "the server sees the pod, IPv$family" seen_from_pod $family
	check "the server sees the node, IPv$family" seen_from_node $family
done
check 'a policy on one pod' policy_holds
check 'a policy by name on one pod' names_hold
smoke 'at first'
check 'memory of monitor and worker' memory
check 'charged to the pods' every_pod_charged

processes >"$work/processes"
containers >"$work/containers"
before4=$(lines_of 4) before6=$(lines_of 6)
for n in "${nodes[@]}"; do
	"$tools/daemon" "$n" containerd restart
	"$tools/daemon" "$n" kubelet restart
done
check 'containerd and kubelet restarted' eventually kubelets_answer
check 'the nodes are ready' kubectl wait --for=condition=Ready node --all --timeout=60s
processes >"$work/processes.after"
containers >"$work/containers.after"
check 'monitors and workers are the same' same 'before (<), after (>)' "$work/processes" "$work/processes.after"
check 'containers are the same' same 'before (<), after (>)' "$work/containers" "$work/containers.after"
check 'an open connection goes on, IPv4' held 4 "$before4"
check 'an open connection goes on, IPv6' held 6 "$before6"
check 'a policy by name on one pod' names_hold
smoke 'after the restarts'
check 'every pod is attached' every_pod_attached
check 'an open connection goes on, IPv4' held 4 "$before4"
check 'an open connection goes on, IPv6' held 6 "$before6"

if [ -n "$plugins" ]; then
	check 'a killed monitor is replaced' replaced
fi

for n in "${nodes[@]}"; do pods "$n"; done | cut -d' ' -f2- | tr ' ' '\n' >>"$work/addresses"
for n in "${nodes[@]}"; do
	check "what pods have is found on $n" remains "$n"
done
kubectl delete deployments,pods -A --all --wait >/dev/null
check 'all pods deleted' eventually no_pod
for n in "${nodes[@]}"; do
	check "nothing is left on $n" eventually clean "$n"
done
check 'no sandbox failed to start or to end' no_failures
check 'uninstall' uninstalled
check 'the cluster ends' "$tools/down"
check 'no process is left' gone

echo "$passed passed, $failed failed"
[ $failed = 0 ]
