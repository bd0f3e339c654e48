package policy

import (
	"fmt"
	"net/netip"
)

// SeenKind says what the first bytes of a flow turned out to be.
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

// Seen is what the first bytes of a flow said; its zero value is that nothing
// was read yet.
type Seen struct {
	Kind SeenKind
	Name string // as NormalizeSaid gives it; empty if none was said, or none that is a name
	// Nameless reports that the first bytes were read whole, are well formed, and say
	// no name, though their protocol could. missingName: allow is about these alone:
	// silence, opaque bytes and broken ones may be followed by any name.
	Nameless bool
	// Address is what a nameless flow said in a name's place. Any other than the one it
	// goes to counts as a wrong name.
	Address netip.Addr
	ECH     bool // the ClientHello carries an encrypted one, which may say another name

	// Of a request; the path as it was sent, without scheme and host.
	Method, Path string
	// Override reports that a field of the request asks servers to take it for another
	// one: another method, path or host.
	Override bool
	// Flaw is why the first bytes could not be read whole; no decision depends on it.
	Flaw Reason
}

func (s *Seen) isHTTP() bool { return s.Kind == SeenHTTP || s.Kind == SeenHTTP2 }

// namelessAt reports whether a flow to dst said no name, and nothing in a name's place.
func (s *Seen) namelessAt(dst netip.Addr) bool {
	return s.Nameless && s.Name == "" && (!s.Address.IsValid() || s.Address.Unmap() == dst.Unmap())
}

// Verify says what must be read before anything of a flow may pass.
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

// Reason says why the rule that looked right for a flow did not let it pass. All of them are
// here, and docs/flow-log.md lists them; a test compares the two.
type Reason string

const (
	ReasonNone     Reason = ""
	ReasonNoName   Reason = "no-name"         // no name was said, nor anything that could not be read
	ReasonMismatch Reason = "name-mismatch"   // the name that was said is not granted for the address, or not of the rule
	ReasonECH      Reason = "encrypted-hello" // the name may be another inside
	ReasonQUIC     Reason = "quic"            // the rule wants TCP instead
	ReasonNotHTTP  Reason = "not-http"        // the rule judges requests, and this is none
	ReasonRequest  Reason = "http-request"    // the rule does not list this method and path
	ReasonOverride Reason = "override-field"  // a field of the request asks servers to take it for another one
	ReasonPrivate  Reason = "private-address" // the name resolves to a private address, which the rule does not want
	ReasonUnread   Reason = "unread"          // not yet: the first bytes were not read

	// The first bytes could not be read.
	ReasonMalformed  Reason = "malformed"  // they break their protocol's rules, or can be read in two ways
	ReasonTooLong    Reason = "too-long"   // the head, or the hello
	ReasonIncomplete Reason = "incomplete" // the rest did not come in time, or the client ended before

	// The address was granted under a name of the rule's, and is not any more.
	ReasonGrantExpired Reason = "grant-expired" // the answer's TTL ran out, and the name was not asked for since
	ReasonGrantEvicted Reason = "grant-evicted" // newer grants took its place

	// What followed on a connection that was let in, and more than its rule forbids it.
	ReasonAnotherHello  Reason = "another-hello"  // a ClientHello unlike the first one
	ReasonAnotherTarget Reason = "another-target" // the request's rule leads to another address
	ReasonUpgrade       Reason = "upgrade"        // of a stream, in which nothing could be judged
)

// Outcome is what became of a DNS question, or of several: then it is the greatest of theirs.
type Outcome uint8

const (
	OutcomeNone     Outcome = iota // there was no question
	OutcomeRefused                 // by the policy, or one of its bounds
	OutcomeFailed                  // no upstream answered
	OutcomeAnswered                // upstream's word, or our own, was passed on
)
