package dns

// Judging: the one place that looks at a message from the sandbox and decides its outcome: silence,
// an answer made here, or a query to forward. It never blocks.

import (
	"net/netip"
	"time"

	"sluice.dev/sluice/policy"
)

// maxQuery bounds a message from the sandbox. A question is at most 259 bytes;
// the rest is EDNS options (padding to 468 is the largest in practice) and
// signatures.
const maxQuery = 4096

// query is one question from the sandbox on its way upstream.
type query struct {
	msg    []byte // our own copy, as it is sent
	asked  []byte // header and question as the client sent them
	q      question
	id     uint16         // the client's
	limit  int            // the largest answer the client can take
	stream bool           // it came over TCP
	edns   bool           // it has an OPT record
	do     bool           // ... with the DNSSEC OK bit
	fault  rcode          // ... that gets this answer, unless upstream is to decide
	from   netip.AddrPort // the client
	strict bool           // the answer must repeat the question's letters in the same case
	gated  *gated         // nil where the policy gates no names
}

// verdict: at most one of answer and forward is set; neither means silence.
type verdict struct {
	answer  []byte
	forward *query
	became  policy.Outcome // unless it is to be forwarded
}

// judge decides about msg. It keeps no reference to msg.
func (r *Resolver) judge(msg []byte, from netip.AddrPort, stream bool) verdict {
	r.stats.Queries.Add(1)
	rules, gates := r.inForce()
	if r.only && !gates {
		// It arrived while the policy was being replaced by one that leaves names to others.
		r.stats.Ungated.Add(1)
		return verdict{}
	}
	if len(msg) < headerLen || be16(msg, 2)&bitQR != 0 {
		// Not a query: answering it would invite a loop.
		r.stats.Malformed.Add(1)
		return verdict{}
	}
	qy, code := parseQuery(msg)
	qy.from, qy.stream = from, stream
	if stream {
		qy.limit = maxMessage
	}
	if gates && code == rcodeSuccess {
		code = qy.fault
	}
	if code != rcodeSuccess {
		return r.fault(&qy, msg, code)
	}
	qy.asked = append([]byte(nil), msg[:qy.q.end]...)
	if gates {
		if out := r.fromCache(rules, &qy); out != nil {
			return verdict{answer: out, became: policy.OutcomeAnswered}
		}
	}
	if !r.rate.take(queryRate(rules, gates), time.Now()) {
		return r.refuse(&qy, qy.q.name.quoted(), policy.RefuseREFUSED, ruleRate, &r.stats.OverRate)
	}
	if records, code, known := r.local.find(qy.q); known {
		if qy.fault != rcodeSuccess {
			return r.fault(&qy, msg, qy.fault)
		}
		r.stats.Local.Add(1)
		out := reply(msg, qy.q.end, code)
		for _, rec := range records {
			if len(out)+12+len(rec) > maxMessage-optRecordLen {
				break
			}
			out = appendRecord(out, be16(rec, 0), localTTL, rec[2:])
		}
		if qy.edns {
			out = appendOPT(out, code, qy.do)
		}
		return verdict{answer: r.fit(out, &qy), became: policy.OutcomeAnswered}
	}
	if gates {
		return r.judgeName(rules, &qy)
	}
	qy.msg = append([]byte(nil), msg...)
	return verdict{forward: &qy}
}

// fault answers a message that is not a question for us.
func (r *Resolver) fault(qy *query, msg []byte, code rcode) verdict {
	counter := &r.stats.Refused
	switch code {
	case rcodeFormErr:
		counter = &r.stats.FormErr
	case rcodeNotImp:
		counter = &r.stats.NotImp
	case rcodeBadVers:
		counter = &r.stats.BadVers
	}
	counter.Add(1)
	return verdict{answer: qy.fail(msg, code), became: policy.OutcomeAnswered}
}

// parseQuery reads msg, which has a header and is not a response. On any code but success, the
// fields read until then are filled in.
func parseQuery(msg []byte) (query, rcode) {
	qy := query{id: be16(msg, 0), limit: minUDPSize}
	bits := be16(msg, 2)
	if bits&maskOpcode != 0 { // NOTIFY, UPDATE, STATUS, ...: not for a forwarder
		return qy, rcodeNotImp
	}
	if len(msg) > maxQuery || be16(msg, 4) != 1 {
		return qy, rcodeFormErr
	}
	q, ok := readQuestion(msg)
	if !ok {
		return qy, rcodeFormErr
	}
	qy.q = q
	opts, version, options := 0, byte(0), []byte(nil)
	end, ok := walk(msg, q.end, func(rec record) bool {
		if rec.rtype != typeOPT {
			return true
		}
		opts++
		qy.edns = true
		qy.limit = max(int(rec.class), minUDPSize)
		if msg[rec.start] != 0 || rec.section != 2 || opts > 1 {
			return false
		}
		// The owner of an OPT record is the root, one byte; the version and the flags
		// are in its TTL field.
		version, options = msg[rec.start+6], msg[rec.start+11:rec.end]
		qy.do = be16(msg, rec.start+7)&(1<<15) != 0
		return true
	})
	if !ok || end != len(msg) {
		return qy, rcodeFormErr
	}
	switch {
	case version != 0:
		qy.fault = rcodeBadVers
	case !goodOptions(options):
		qy.fault = rcodeFormErr
	}
	switch q.qtype {
	case 0, typeOPT, typeTSIG: // never asked for
		return qy, rcodeFormErr
	case typeAXFR, typeIXFR, typeTKEY: // between servers, not through a forwarder
		return qy, rcodeRefused
	}
	if be16(msg, 6) != 0 || be16(msg, 8) != 0 {
		return qy, rcodeFormErr
	}
	if q.class != classIN { // CHAOS and HESIOD would reveal details of the host's servers
		return qy, rcodeRefused
	}
	return qy, rcodeSuccess
}

// fail returns an answer to msg that carries code and nothing else.
func (qy *query) fail(msg []byte, code rcode) []byte {
	out := reply(msg, qy.q.end, code)
	if qy.edns {
		out = appendOPT(out, code, qy.do)
	}
	return out
}

// failBecause is fail with the deciding rule named, for people to read.
func (qy *query) failBecause(msg []byte, code rcode, rule string) []byte {
	out := reply(msg, qy.q.end, code)
	if qy.edns {
		out = appendOPT(out, code, qy.do, extendedError(edeProhibited, rule)...)
	}
	return out
}

// fit cuts an answer to the size that the client can take.
func (r *Resolver) fit(msg []byte, qy *query) []byte {
	if len(msg) <= qy.limit {
		return msg
	}
	r.stats.Truncated.Add(1)
	return truncate(msg, qy.q.end, qy.limit)
}
