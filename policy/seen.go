package policy

import "fmt"

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
	Name string // as NormalizeName gives it; empty if none was said, or none that is a name
	ECH  bool   // the ClientHello carries an encrypted one, which may say another name

	// Of a request; the path as it was sent, without scheme and host.
	Method, Path string
}

// Verify says what must be read before a flow may be dialled.
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

// Reason says why the rule that looked right for a flow did not let it pass.
type Reason string

const (
	ReasonNone     Reason = ""
	ReasonNoName   Reason = "no-name"         // no name was said
	ReasonMismatch Reason = "name-mismatch"   // the name that was said is not granted for the address, or not of the rule
	ReasonECH      Reason = "encrypted-hello" // the name may be another inside
	ReasonQUIC     Reason = "quic"            // the rule wants TCP instead
	ReasonNotHTTP  Reason = "not-http"        // the rule judges requests, and this is none
	ReasonRequest  Reason = "http-request"    // the rule does not list this method and path
	ReasonPrivate  Reason = "private-address" // the name resolves to a private address, which the rule does not want
	ReasonUnread   Reason = "unread"          // not yet: the first bytes were not read
)
