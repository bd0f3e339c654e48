package firstbytes

import (
	"errors"
	"fmt"

	"sluice.dev/sluice/forwarder/sniff"
	"sluice.dev/sluice/policy"
)

// refusalText tells a client which rule refused its request.
func refusalText(v policy.Verdict, policyName string) string {
	rule := v.Rule()
	if v.Tried() != "" {
		rule = v.Tried()
	}
	switch {
	case v.Reason() == policy.ReasonOverride:
		return fmt.Sprintf("Refused by the sandbox's network policy %q, rule %q: it has a field such as X-HTTP-Method-Override or X-Original-URL, by which a server may take it for another request.\n", policyName, rule)
	case v.Allowed():
		return fmt.Sprintf("Refused by the sandbox's network policy %q, rule %q: requests are judged one by one, so that a stream cannot be upgraded.\n", policyName, rule)
	}
	return fmt.Sprintf("Refused by the sandbox's network policy %q, rule %q.\n", policyName, rule)
}

// Forbidden is the answer to a refused request.
func Forbidden(v policy.Verdict, policyName string) string {
	return lastAnswer("403 Forbidden", refusalText(v, policyName))
}

// BadRequest is the answer to a request whose head cannot be read.
func BadRequest(err error) string {
	if errors.Is(err, sniff.ErrTooLong) {
		return lastAnswer("431 Request Header Fields Too Large", fmt.Sprintf("The sandbox's network policy has the host of each request read, in a head of at most %d KiB.\n", sniff.MaxHead>>10))
	}
	return lastAnswer("400 Bad Request", "The sandbox's network policy has the host of each request read, and this one breaks the rules of HTTP/1 (RFC 9112), or can be read in more than one way.\n")
}

// lastAnswer is an answer after which the connection ends.
func lastAnswer(status, text string) string {
	return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(text), text)
}
