package policy

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// HTTPMatch matches clear-text HTTP requests by method and path. An empty list of methods matches
// every method. A path is exact or, if it ends in *, a prefix; an empty path matches every path.
// The query is ignored. CONNECT, which has no path, matches only where it is listed without a path.
//
// Paths are compared as sent. A path that a server might resolve differently matches nothing: dot
// segments, encoded dots and slashes, backslashes, any of these behind a path parameter or encoded
// twice, and bytes that are not UTF-8.
type HTTPMatch struct {
	Methods []string `json:"methods,omitempty"`
	Path    string   `json:"path,omitempty"`
}

func (m HTTPMatch) matches(method, path string) bool {
	if method == methodConnect {
		return m.Path == "" && slices.Contains(m.Methods, method)
	}
	if len(m.Methods) > 0 && !slices.Contains(m.Methods, method) {
		return false
	}
	if prefix, ok := strings.CutSuffix(m.Path, "*"); ok {
		return strings.HasPrefix(path, prefix)
	}
	return m.Path == "" || m.Path == path
}

// requestMatches reports whether the request that was seen matches.
func requestMatches(list []HTTPMatch, method, path string) bool {
	path, _, _ = strings.Cut(path, "?")
	if method != methodConnect && ambiguousPath(path) {
		return false
	}
	for i := range list {
		if list[i].matches(method, path) {
			return true
		}
	}
	return false
}

// ambiguousPath reports whether a server could read the path differently.
func ambiguousPath(path string) bool {
	if path == "*" {
		return false // OPTIONS *
	}
	if !strings.HasPrefix(path, "/") || !utf8.ValidString(path) {
		return true
	}
	for range 2 { // as sent, and as sent inside an encoding
		decoded, err := url.PathUnescape(path)
		if err != nil || strings.ContainsAny(decoded, "\\\x00\r\n") || strings.Count(decoded, "/") != strings.Count(path, "/") {
			return true
		}
		for segment := range strings.SplitSeq(decoded, "/") {
			if name, _, _ := strings.Cut(segment, ";"); name == "." || name == ".." {
				return true
			}
		}
		path = decoded
	}
	return strings.Contains(path, "%") && doubleEncoded(path)
}

// doubleEncoded reports whether two decodings left a third.
func doubleEncoded(path string) bool {
	decoded, err := url.PathUnescape(path)
	return err != nil || decoded != path
}

func (m HTTPMatch) check() error {
	for _, method := range m.Methods {
		if method == "" || strings.Trim(method, methodBytes) != "" {
			return fmt.Errorf("http method %q is not upper-case letters and -", method)
		}
	}
	path, _ := strings.CutSuffix(m.Path, "*")
	if m.Path != "" && m.Path != "*" && ambiguousPath(path) {
		return fmt.Errorf("http path %q does not start with / or has segments that servers resolve", m.Path)
	}
	return nil
}

const methodConnect = "CONNECT"

const methodBytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZ-"
