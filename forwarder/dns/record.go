package dns

// Reports on each question, once it is decided.

import (
	"net/netip"
	"time"
)

// Event is one question and its outcome. It is reported only while the policy gates names.
type Event struct {
	From      netip.AddrPort
	Stream    bool          // over TCP
	Name      string        // in policy's normal form; quoted if it has none
	Type      string        // A, AAAA, …
	Code      int           // the response code that the client was told (RFC 1035)
	Forwarded bool          // upstream's answer was passed on; else Rule refused, unless it Failed
	Failed    bool          // no upstream gave an answer
	Told      bool          // if it was refused: the client got an answer
	Rule      string        // the rule that decided
	Audited   bool          // Rule would have refused, but the policy is in audit mode
	Reason    string        // why an answer was refused
	Addrs     []netip.Addr  // in the answer
	Names     []string      // the aliases' targets, in order
	TTL       time.Duration // of Addrs
}

// Bound reports whether it was refused for a bound that has nothing to do with the name, and Rate
// whether because the questions came too fast.
func (e *Event) Bound() bool { return e.Rule == ruleBusy || e.Rule == ruleBounds || e.Rate() }

func (e *Event) Rate() bool { return e.Rule == ruleRate }

func (r *Resolver) record(e Event) {
	if r.tell != nil {
		r.tell(e)
	}
}
