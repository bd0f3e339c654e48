package policy

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// publicResolvers are the addresses of well-known public DNS services, which answer in clear text,
// over TLS (RFC 7858), QUIC (RFC 9250) and HTTPS (RFC 8484). Where names are gated, a sandbox that
// reached one could resolve past the gate. The list cannot be complete, and need not be: an address
// resolved elsewhere is not granted. It closes the way that ordinary software takes, under a policy
// that opens the internet by address.
var publicResolvers = func() *bart.Lite {
	var t bart.Lite
	for _, p := range prefixes(
		"1.1.1.0/29", "1.0.0.0/29", "2606:4700:4700::/64", "162.159.36.1/32", "162.159.46.1/32", // Cloudflare
		"104.16.248.249/32", "104.16.249.249/32", "2606:4700::6810:f8f9/128", "2606:4700::6810:f9f9/128", // Cloudflare for browsers
		"8.8.8.8/32", "8.8.4.4/32", "2001:4860:4860::/64", // Google
		"9.9.9.0/24", "149.112.112.0/24", "2620:fe::/64", // Quad9
		"208.67.220.0/24", "208.67.222.0/24", "146.112.41.0/28", "2620:119:35::/64", "2620:119:53::/64", "2620:119:fc::/64", // OpenDNS
		"94.140.14.0/24", "94.140.15.0/24", "2a10:50c0::/64", // AdGuard
		"185.228.168.0/24", "185.228.169.0/24", "2a0d:2a00:1::/64", "2a0d:2a00:2::/64", // CleanBrowsing
		"45.90.28.0/24", "45.90.30.0/24", "2a07:a8c0::/32", "2a07:a8c1::/32", // NextDNS
		"194.242.2.0/28", "2a07:e340::/64", // Mullvad
		"76.76.2.0/24", "76.76.10.0/24", "2606:1a40::/64", "2606:1a40:1::/64", // Control D
		"185.222.222.222/32", "45.11.45.11/32", "2a09::/128", "2a11::/128", // DNS.SB
		"193.110.81.0/28", "185.253.5.0/28", "2a0f:fc80::/64", "2a0f:fc81::/64", // dns0.eu
		"223.5.5.5/32", "223.6.6.6/32", "2400:3200::1/128", "2400:3200:baba::1/128", // AliDNS
		"1.12.12.12/32", "120.53.53.53/32", "119.29.29.29/32", // DNSPod
		"77.88.8.0/29", "77.88.8.88/32", "2a02:6b8::feed:ff/128", "2a02:6b8:0:1::feed:ff/128", // Yandex
		"75.75.75.75/32", "75.75.76.76/32", "2001:558:feed::1/128", "2001:558:feed::2/128", // Comcast
		"86.54.11.0/24", "2a13:1001::/64", // DNS4EU
		"91.239.100.100/32", "89.233.43.71/32", "116.202.176.26/32", "76.223.122.150/32",
	) {
		t.Insert(p)
	}
	return &t
}()

// isPublicResolver reports whether a, unmapped, belongs to a public DNS service.
func isPublicResolver(a netip.Addr) bool { return publicResolvers.Contains(a) }
