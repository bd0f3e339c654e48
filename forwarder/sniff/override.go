package sniff

import (
	"slices"
	"strings"
)

// Fields by which a client asks for another method, path or host than its request line names. Most
// are in no standard: frameworks and gateways copy them from each other, and many servers believe
// them from any client. A rule for requests would then judge something other than what the server
// does.

// overrideNames are such fields; overridePrefixes and overrideSuffix are naming patterns of such
// fields.
var (
	overrideNames    = []string{"forwarded", "x-host", "x-url", "x-uri", "x-backend-host", "x-proxy-url", "x-unencoded-url", "x-waws-unencoded-url", "-method"}
	overridePrefixes = []string{"x-original-", "x-rewrite-", "x-override-", "x-http-method", "x-method", "x-http-verb", "x-http-host", "x-envoy-original-"}
	overrideSuffix   = "-override"

	// forwardedFrom are the x-forwarded- fields that say where a request comes from, not where it
	// goes.
	forwardedFrom = []string{"for", "proto", "port", "scheme", "ssl", "by", "client-cert"}
)

// overrides reports whether a field, given its folded name, asks for another request.
func overrides(name string) bool {
	if rest, ok := strings.CutPrefix(name, "x-forwarded-"); ok {
		return !slices.Contains(forwardedFrom, rest)
	}
	return slices.Contains(overrideNames, name) || strings.HasSuffix(name, overrideSuffix) ||
		slices.ContainsFunc(overridePrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// fold returns a field's name in the form in which CGI gateways and the like can no longer tell it
// from others: in lower case, with '-' for every character that is neither a letter nor a digit.
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

// mayTrail reports whether a field may follow the content: it decides neither where the message
// goes nor where it ends, even for a server that merges it into the head's fields (RFC 9110,
// section 6.5.1).
func mayTrail(name string) bool {
	name = fold(name)
	switch name {
	case "host", "content-length", "transfer-encoding", "upgrade", "connection":
		return false
	}
	return !overrides(name)
}
