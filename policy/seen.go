package policy

import (
	"fmt"
	"net/netip"
)

// SeenKind is the kind of a flow's first bytes.
type SeenKind uint8

const (
	SeenNone        SeenKind = iota // nothing was read yet
	SeenTLS                         // a ClientHello over TCP
	SeenHTTP                        // a request of HTTP/1 in clear text
	SeenHTTP2                       // a request of HTTP/2 with prior knowledge
	SeenQUIC                        // a ClientHello in a QUIC Initial
	SeenServerFirst                 // the client waited for the server to speak
	SeenOpaque                      // none of these
)

var seenNames = [...]string{"nothing", "TLS", "HTTP", "HTTP/2", "QUIC", "silence", "opaque bytes"}

func (k SeenKind) String() string {
	if int(k) < len(seenNames) {
		return seenNames[k]
	}
	return fmt.Sprintf("seen(%d)", uint8(k))
}

// Seen is what the first bytes of a flow said. In the zero value nothing has been read yet.
type Seen struct {
	Kind SeenKind
	Name string // as returned by NormalizeSaid; empty if no name was said, or no valid one
	// Nameless reports that the first bytes were read completely, are well formed, and contain no
	// name although their protocol could. missingName: allow applies to these only: silence, opaque
	// bytes and broken ones may be followed by any name.
	Nameless bool
	// Address is what a nameless flow said in place of a name. If it differs from the flow's
	// destination, it counts as a wrong name.
	Address netip.Addr
	ECH     bool // the ClientHello carries an encrypted one, which may say another name

	// For a request; the path as sent, without scheme and host.
	Method, Path string
	// Override reports that a field of the request asks servers to treat it as another one: another
	// method, path or host.
	Override bool
	// Flaw is why the first bytes could not be read completely; no decision depends on it.
	Flaw Reason
}

func (s *Seen) isHTTP() bool { return s.Kind == SeenHTTP || s.Kind == SeenHTTP2 }

// namelessAt reports whether a flow to dst said no name, and nothing in its place.
func (s *Seen) namelessAt(dst netip.Addr) bool {
	return s.Nameless && s.Name == "" && (!s.Address.IsValid() || s.Address.Unmap() == dst.Unmap())
}

// Verify is what must be read before any of a flow may pass.
type Verify uint8

const (
	VerifyNone       Verify = iota // nothing: the verdict is final
	VerifyFirstBytes               // the name in the first bytes: TLS, HTTP or QUIC
	VerifyRequest                  // a request of clear-text HTTP
)

var verifyNames = [...]string{"none", "first-bytes", "request"}

func (v Verify) String() string {
	if int(v) < len(verifyNames) {
		return verifyNames[v]
	}
	return fmt.Sprintf("verify(%d)", uint8(v))
}

// Reason is why the rule that looked right for a flow did not let it pass. This is the complete
// list; docs/flow-log.md repeats it, and a test compares the two.
type Reason string

const (
	ReasonNone     Reason = ""
	ReasonNoName   Reason = "no-name"         // no name was said, and everything could be read
	ReasonMismatch Reason = "name-mismatch"   // the name is not granted for the address, or not the rule's
	ReasonECH      Reason = "encrypted-hello" // the inner hello may say another name
	ReasonQUIC     Reason = "quic"            // the rule wants TCP instead
	ReasonNotHTTP  Reason = "not-http"        // the rule judges requests, and this is not one
	ReasonRequest  Reason = "http-request"    // the rule does not list this method and path
	ReasonOverride Reason = "override-field"  // a field of the request asks servers to treat it as another one
	ReasonPrivate  Reason = "private-address" // the name resolves to a private address, which the rule does not want
	ReasonUnread   Reason = "unread"          // the first bytes have not been read yet

	// The first bytes could not be read.
	ReasonMalformed  Reason = "malformed"  // they break their protocol's rules, or can be read in two ways
	ReasonTooLong    Reason = "too-long"   // the head, or the hello
	ReasonIncomplete Reason = "incomplete" // the rest did not come in time, or the client closed first

	// The address was granted under a name of the rule's, but no longer is.
	ReasonGrantExpired Reason = "grant-expired" // the answer's TTL ran out, and the name has not been asked for since
	ReasonGrantEvicted Reason = "grant-evicted" // newer grants took its place

	// Data on an admitted connection that its rule forbids.
	ReasonAnotherHello  Reason = "another-hello"  // a ClientHello unlike the first
	ReasonAnotherTarget Reason = "another-target" // the rule of the request leads to another address
	ReasonUpgrade       Reason = "upgrade"        // to a stream that could not be judged
)

// Outcome is what became of a DNS question. For several questions it is the greatest of their
// outcomes.
type Outcome uint8

const (
	OutcomeNone     Outcome = iota // there was no question
	OutcomeRefused                 // by the policy, or one of its bounds
	OutcomeFailed                  // no upstream answered
	OutcomeAnswered                // an answer, from upstream or our own, was returned
)
