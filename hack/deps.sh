#!/bin/bash
# Lists the programs that the tests use and the Debian packages that have them. As root it
# installs the missing ones. Otherwise it says what to install and goes on: the tests that
# need them are then skipped by name. Arguments add to the list.
set -euo pipefail

# program=package; a program may be any file with its path
needed='
/usr/bin/pip3=python3-pip
/usr/lib/cni/ptp=containernetworking-plugins
busybox=busybox
conmon=conmon
conntrack=conntrack
containerd=containerd
crun=crun
curl=curl
dhclient=isc-dhcp-client
dig=bind9-dnsutils
dns2tcpd=dns2tcp
dnsmasq=dnsmasq-base
drill=ldnsutils
getent=libc-bin
git=git
iodine=iodine
ip=iproute2
iptables=iptables
ipcmk=util-linux
iperf3=iperf3
ld-musl-config=musl
newuidmap=uidmap
nc=netcat-openbsd
nft=nftables
nginx=nginx-light
nsenter=util-linux
perl=perl
ping=iputils-ping
podman=podman
/usr/bin/python3=python3
rsync=rsync
script=bsdutils
setpriv=util-linux
shellcheck=shellcheck
socat=socat
ssh=openssh-client
sshd=openssh-server
stty=coreutils
tcc=tcc
tcpdump=tcpdump
tracepath=iputils-tracepath
traceroute=traceroute
tshark=tshark
unbound=unbound
unshare=util-linux
wget=wget
'

packages=()
for entry in $needed "$@"; do
	if [ ! -e "${entry%%=*}" ] && ! command -v "${entry%%=*}" >/dev/null; then
		packages+=("${entry#*=}")
	fi
done
if [ ${#packages[@]} -eq 0 ]; then
	exit 0
fi
mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
if [ "$(id -u)" != 0 ]; then
	echo "deps: not installed: ${packages[*]}" >&2
	echo "deps: tests that need them are skipped; to run them: sudo apt-get install ${packages[*]}" >&2
	exit 0
fi
echo "deps: installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
# No service may start by itself on a machine that only runs tests.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi
apt-get -qq update
apt-get -qq -y --no-install-recommends install "${packages[@]}" >/dev/null
