package dns

import (
	"strings"
)

// Names of encrypted resolvers, and names that software asks for to learn whether it may use one.
// Where names are gated they do not exist, unless a rule spells the name out: a wildcard does not
// match them.
//
// Their addresses are in the policy package (resolvers.go there).
var encryptedResolvers = []string{
	// Asked for as a signal; the absence of the name turns the service off (Firefox, Apple).
	"use-application-dns.net", "mask.icloud.com", "mask-h2.icloud.com", "mask.apple-dns.net",

	"dns.google", "dns.google.com",
	"cloudflare-dns.com", "cloudflare-gateway.com", "one.one.one.one",
	"quad9.net", "opendns.com", "adguard-dns.com", "dns.adguard.com",
	"cleanbrowsing.org", "nextdns.io", "dns.mullvad.net", "doh.mullvad.net", "controld.com",
	"dns.sb", "dns0.eu", "dns.alidns.com", "doh.pub", "dot.pub", "dns.yandex.ru", "common.dot.dns.yandex.net",
	"doh.xfinity.com", "dns4all.eu", "joindns4.eu", "uncensoreddns.org", "libredns.gr",
	"applied-privacy.net", "digitale-gesellschaft.ch", "dns.switch.ch", "rethinkdns.com", "tiar.app", "doh.sb",
	"blahdns.com", "ahadns.net", "decloudus.com", "dnsforge.de", "dnslify.com", "dns.njal.la",
}

// encryptedResolver reports whether name is one of them or below one.
func encryptedResolver(name string) bool {
	for _, e := range encryptedResolvers {
		if name == e || strings.HasSuffix(name, e) && name[len(name)-len(e)-1] == '.' {
			return true
		}
	}
	return false
}
