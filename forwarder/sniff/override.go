package sniff

import (
	"slices"
	"strings"
)

// Fields by which a client asks for another method, path or host than its request says.
// No standard has most of them: frameworks and gateways take them from each other, and
// many a server believes them from everybody. A rule for requests would judge what the
// server does not do.

// overrideNames are such fields; overridePrefixes and overrideSuffix are the ways in which
// such fields are named.
var (
	overrideNames    = []string{"forwarded", "x-host", "x-url", "x-uri", "x-backend-host", "x-proxy-url", "x-unencoded-url", "x-waws-unencoded-url", "-method"}
	overridePrefixes = []string{"x-original-", "x-rewrite-", "x-override-", "x-http-method", "x-method", "x-http-verb", "x-http-host", "x-envoy-original-"}
	overrideSuffix   = "-override"

	// forwardedFrom are the fields named x-forwarded- that say where a request comes
	// from and not where it goes.
	forwardedFrom = []string{"for", "proto", "port", "scheme", "ssl", "by", "client-cert"}
)

// overrides reports whether a field, by its folded name, asks for another request.
func overrides(name string) bool {
	if rest, ok := strings.CutPrefix(name, "x-forwarded-"); ok {
		return !slices.Contains(forwardedFrom, rest)
	}
	return slices.Contains(overrideNames, name) || strings.HasSuffix(name, overrideSuffix) ||
		slices.ContainsFunc(overridePrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// fold gives a field's name as gateways to CGI and its kin can no longer tell it from
// others: in small letters, with '-' for what is neither a letter nor a digit.
func fold(name string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z':
			return r + 'a' - 'A'
		case 'a' <= r && r <= 'z', '0' <= r && r <= '9':
			return r
		}
		return '-'
	}, name)
}

// mayTrail reports whether a field may come behind the content: it decides neither where
// the message goes nor where it ends, even for a server that adds it to those of the head
// (RFC 9110, section 6.5.1).
func mayTrail(name string) bool {
	name = fold(name)
	switch name {
	case "host", "content-length", "transfer-encoding", "upgrade", "connection":
		return false
	}
	return !overrides(name)
}
