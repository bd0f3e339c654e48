#!/bin/bash
# Runs rows of the matrix "as without" (e2e/aswithout_test.go), by name or all of them, and
# installs the programs that only they need. As root.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
if [ "$(id -u)" != 0 ]; then
	echo "$0: installs programs, and so runs as root: sudo make clients" >&2
	exit 2
fi
python=/usr/lib/python3/dist-packages
hack/deps.sh \
	$python/{aiohttp/__init__.py=python3-aiohttp,aiosmtpd/__init__.py=python3-aiosmtpd,dns/__init__.py=python3-dnspython,h2/__init__.py=python3-h2} \
	$python/{httpx/__init__.py=python3-httpx,pymongo/__init__.py=python3-pymongo,requests/__init__.py=python3-requests,websockets/__init__.py=python3-websockets} \
	/usr/lib/postgresql/15/bin/postgres=postgresql-15 /usr/share/perl5/LWP.pm=libwww-perl \
	/usr/share/perl5/LWP/Protocol/https.pm=liblwp-protocol-https-perl /usr/share/php8.2-curl/curl/curl.ini=php8.2-curl \
	$python/gi/__init__.py=python3-gi /usr/lib/x86_64-linux-gnu/girepository-1.0/GstRtspServer-1.0.typelib=gir1.2-gst-rtsp-server-1.0 \
	/usr/lib/x86_64-linux-gnu/gstreamer-1.0/{libgstaudiotestsrc.so=gstreamer1.0-plugins-base,libgstrtp.so=gstreamer1.0-plugins-good} \
	/usr/bin/cargo=cargo aria2c=aria2 chronyd=chrony ffmpeg=ffmpeg gnutls-cli=gnutls-bin http=httpie in.tftpd=tftpd-hpa \
	ldapsearch=ldap-utils lftp=lftp mariadbd=mariadb-server mosquitto=mosquitto mosquitto_pub=mosquitto-clients \
	javac=openjdk-17-jdk-headless kdig=knot-dnsutils mysql=mariadb-client nghttp=nghttp2-client node=nodejs npm=npm ntpdate=ntpsec-ntpdate php=php-cli \
	psql=postgresql-client redis-cli=redis-tools redis-server=redis-server ruby=ruby slapd=slapd snmpd=snmpd snmpget=snmp \
	swaks=swaks tftp=tftp-hpa vsftpd=vsftpd
tools=$PWD/build/tools
GOBIN=$tools "$go" install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3 # Debian has neither
GOBIN=$tools "$go" install github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible
PATH=$tools:$PATH exec hack/e2e-cni.sh 30m TestAsWithout SLUICE_CLIENTS="${1:-.}"
