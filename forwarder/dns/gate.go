package dns

// The gate handles questions while the policy gates names.
//
//	question ─ cache.go ─ normal form ─ rules ─ type ─ tunnel.go ─► a question of our own ─► upstream
//	              │                                                                            │
//	client ◄── written anew ◄── granted ◄── cache.go ◄── tunnel.go ◄── sift.go ◄───────────────┘
//
// A question that the policy refuses never goes upstream. Of one that it allows, only the name and
// the type do: the client's header, options and spelling stay here. A question is asked once,
// however many clients wait for it, so that forgers cannot multiply their chances (RFC 5452 section
// 5). The case of its letters is mixed at random, and only an answer that repeats it is taken
// (exchange.go).
//
// Addresses are granted before any client can see them.

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"sluice.dev/sluice/policy"
)

// refuseNoData is how a type is refused: the name has no such record. NXDOMAIN would deny the name
// and REFUSED the resolver; on either, musl discards the answers for other types too.
const refuseNoData policy.Refusal = "nodata"

// refuseBusy is how a question is refused when no slot is free: the client may ask again.
const refuseBusy policy.Refusal = "servfail"

// Rule names for outcomes that no rule of the policy decided. docs/flow-log.md lists them, with
// those of tunnel.go; a test compares the two.
const (
	ruleBadName   = "dns:name"      // not a name that rules could match
	ruleType      = "dns:type"      // the policy does not list the type
	ruleRate      = "dns:rate"      // too many questions a second
	ruleEncrypted = "dns:encrypted" // a resolver that would bypass the gate
	ruleRebind    = "dns:rebinding"
	ruleBounds    = "dns:grants" // too many names or addresses to grant
	ruleBusy      = "dns:busy"   // too many questions in flight
	ruleUpstream  = "dns:upstream"
)

var (
	errEmptied = errors.New("all addresses in the answer are closed by the policy")
	errGrant   = errors.New("granting the addresses")
)

// changedError says that the policy changed while a name was being asked for.
type changedError struct{ rule string }

func (e changedError) Error() string {
	return "the policy changed, and no longer lets the name be asked"
}

// gated is what the gate knows of a question that it lets pass.
type gated struct {
	name    string // in policy's normal form
	verdict policy.NameVerdict
}

// inForce returns the rules, and whether they gate names.
func (r *Resolver) inForce() (rules *policy.Rules, gates bool) {
	if r.rules == nil {
		return nil, false
	}
	rules = r.rules()
	return rules, rules.GatesNames()
}

// judgeName decides about a well-formed question that we have no answer to ourselves.
func (r *Resolver) judgeName(rules *policy.Rules, qy *query) verdict {
	name, err := policy.NormalizeWire([]byte(qy.q.name))
	if err != nil {
		return r.refuse(qy, qy.q.name.quoted(), policy.RefuseREFUSED, ruleBadName, &r.stats.RefusedName)
	}
	v := rules.DecideName(name)
	if !v.Allowed {
		return r.refuse(qy, name, v.Refusal, v.Rule, &r.stats.RefusedName)
	}
	if rule, how, counter := r.beyondRules(rules, qy, name, v); rule != "" {
		if !rules.Audit() {
			return r.refuse(qy, name, how, rule, counter)
		}
		counter.Add(1)
		v.Audited, v.Rule = true, rule
	}
	qy.gated = &gated{name: name, verdict: v}
	if out := r.fromCacheAgain(rules, qy); out != nil {
		return verdict{answer: out, became: policy.OutcomeAnswered}
	}
	return verdict{forward: qy}
}

// beyondRules checks a question for a name that may be asked against everything but the name rules.
func (r *Resolver) beyondRules(rules *policy.Rules, qy *query, name string, v policy.NameVerdict) (rule string, how policy.Refusal, counter *atomic.Uint64) {
	if v.Pattern != name && encryptedResolver(name) {
		return ruleEncrypted, policy.RefuseNXDOMAIN, &r.stats.RefusedName
	}
	settings := rules.DNS()
	if !slices.Contains(settings.Types, typeName(qy.q.qtype)) {
		return ruleType, refuseNoData, &r.stats.RefusedType
	}
	return "", "", nil
}

// fromCacheAgain answers qy from an entry judged by other rules, if the rules in force let it be
// asked and would have made the same answer.
func (r *Resolver) fromCacheAgain(rules *policy.Rules, qy *query) []byte {
	now := time.Now()
	generation := r.cache.generation()
	e := r.cache.peek(cacheKey{qy.q.name, qy.q.qtype}, now)
	if e == nil || e.rules == rules {
		return nil
	}
	if e = e.stands(rules, qy.gated.verdict, now); e == nil || r.grant(e, now) != nil {
		return nil
	}
	r.cache.put(e, generation)
	return r.tellCached(e, qy, now)
}

// fromCache answers qy from the cache, if it can. The rules in force must be the ones that let it
// be asked.
func (r *Resolver) fromCache(rules *policy.Rules, qy *query) []byte {
	now := time.Now()
	e, due := r.cache.lookup(cacheKey{qy.q.name, qy.q.qtype}, rules, now)
	switch {
	case e == nil, due && r.grant(e, now) != nil:
		return nil
	case !r.rate.take(rules.Limits().DNSQueriesPerSecond, now):
		return nil // to be refused like any other
	}
	return r.tellCached(e, qy, now)
}

func (r *Resolver) tellCached(e *cached, qy *query, now time.Time) []byte {
	r.stats.Cached.Add(1)
	r.record(e.event(qy))
	return r.fit(e.write(qy, now), qy)
}

// grant grants an answer's addresses for as long as the answer is served.
func (r *Resolver) grant(e *cached, now time.Time) error {
	addrs := e.addrs()
	if len(addrs) == 0 {
		return nil
	}
	if err := r.names.Grant(e.name, addrs, e.left(now), now); err != nil {
		r.stats.GrantsRefused.Add(1)
		return fmt.Errorf("%w: %w", errGrant, err)
	}
	return nil
}

// event is the Event of an answer that was passed on.
func (e *cached) event(qy *query) Event {
	return Event{
		From: qy.from, Stream: qy.stream, Name: e.name, Type: typeName(qy.q.qtype), Rule: e.verdict.Rule, Audited: e.verdict.Audited,
		Forwarded: true, Code: int(e.answer.code), Addrs: e.answer.addrs, Names: e.answer.names, TTL: e.answer.ttl,
	}
}

// queryRate is how many questions a second are accepted that the cache cannot answer; zero means no
// bound.
func queryRate(rules *policy.Rules, gates bool) int {
	if n := rules.Limits().DNSQueriesPerSecond; n > 0 || !gates {
		return n
	}
	return gatedRate
}

// refuse returns the answer to a question that is not forwarded. It names the rule, if the client
// can be told (RFC 8914).
func (r *Resolver) refuse(qy *query, name string, how policy.Refusal, rule string, counter *atomic.Uint64) verdict {
	counter.Add(1)
	code := rcodeRefused
	switch how {
	case policy.RefuseNXDOMAIN:
		code = rcodeNXDomain
	case refuseNoData:
		code = rcodeSuccess
	case refuseBusy:
		code = rcodeServFail
	}
	r.record(Event{From: qy.from, Stream: qy.stream, Name: name, Type: typeName(qy.q.qtype), Code: int(code), Rule: rule, Told: how != policy.RefuseDrop})
	if how == policy.RefuseDrop {
		return verdict{became: policy.OutcomeRefused}
	}
	return verdict{answer: qy.failBecause(qy.asked, code, rule), became: policy.OutcomeRefused}
}

// forwardGated asks upstream and returns the answer for the client; there always is one.
func (r *Resolver) forwardGated(qy *query) answer {
	key := strconv.Itoa(int(qy.q.qtype)) + " " + qy.gated.name
	v, err, _ := r.flights.Do(key, func() (any, error) { return r.askGated(qy) })
	if c, ok := v.(*cached); ok && err == nil {
		r.stats.Forwarded.Add(1)
		r.record(c.event(qy))
		return answer{msg: r.fit(c.write(qy, time.Now()), qy), became: policy.OutcomeAnswered, release: func() {}}
	}
	rule, code, counter, became := ruleUpstream, rcodeServFail, &r.stats.ServFail, policy.OutcomeRefused
	var tunnel tunnelReason
	var changed changedError
	switch {
	case errors.As(err, &tunnel):
		rule, code, counter = string(tunnel), rcodeRefused, &r.stats.RefusedTunnel
	case errors.Is(err, errEmptied):
		// There is nothing of this type for the sandbox; there may be of another.
		rule, code, counter = ruleRebind, rcodeSuccess, nil
	case errors.Is(err, errGrant):
		rule = ruleBounds
	case errors.As(err, &changed):
		rule, code, counter = changed.rule, rcodeRefused, &r.stats.RefusedName
	default:
		became = policy.OutcomeFailed
	}
	if counter != nil {
		counter.Add(1)
	}
	r.record(Event{
		From: qy.from, Stream: qy.stream, Name: qy.gated.name, Type: typeName(qy.q.qtype), Rule: rule,
		Audited: qy.gated.verdict.Audited, Failed: became == policy.OutcomeFailed, Told: true, Code: int(code), Reason: err.Error(),
	})
	return answer{msg: r.fit(qy.failBecause(qy.asked, code, rule), qy), became: became, release: func() {}}
}

// askGated asks for qy's name and type on behalf of every client that waits for them.
func (r *Resolver) askGated(qy *query) (*cached, error) {
	name := qy.gated.name
	rules, verdict, err := r.decideAgain(qy)
	if err != nil {
		return nil, err
	}
	if e, _ := r.cache.lookup(cacheKey{qy.q.name, qy.q.qtype}, rules, time.Now()); e != nil {
		return e, nil // it arrived between this question and its turn
	}
	beyond := r.tunnels.admit(rules.DNS(), verdict.Pattern, name, time.Now())
	if beyond != tunnelOpen {
		if !rules.Audit() {
			return nil, beyond
		}
		r.stats.RefusedTunnel.Add(1)
	}
	generation := r.cache.generation()
	// Not the client's own context: others wait for this too.
	ctx, cancel := context.WithTimeout(r.ctx, r.limits.QueryTime)
	defer cancel()
	a, err := r.ask(ctx, newQuery(qy.q))
	if err != nil {
		return nil, err
	}
	defer a.release()
	if rules, verdict, err = r.decideAgain(qy); err != nil {
		return nil, err
	}
	dns := rules.DNS()
	s, err := sift(a.msg, qy.q, siftRules{
		admit:  func(addr netip.Addr) bool { return rules.Grantable(name, addr) },
		ech:    verdict.ECH,
		maxTTL: time.Duration(dns.TTLCap),
	})
	if err != nil {
		r.stats.AnswersRefused.Add(1)
		return nil, err
	}
	r.stats.RecordsForeign.Add(uint64(s.foreign))
	r.stats.RecordsRebound.Add(uint64(s.rebound))
	if s.emptied() {
		return nil, errEmptied
	}
	if beyond != tunnelOpen {
		verdict.Audited, verdict.Rule = true, string(beyond)
	}
	now := time.Now()
	e, err := newCached(qy, rules, verdict, s, now)
	if err != nil {
		return nil, err
	}
	if reason := r.tunnels.told(dns, verdict.Pattern, name, e.size, r.cache.says(e.key, e), now); reason != tunnelOpen && !rules.Audit() {
		return nil, reason
	}
	if err := r.grant(e, now); err != nil {
		return nil, err
	}
	r.cache.put(e, generation)
	return e, nil
}

// decideAgain judges qy's name by the current rules, which may differ from those in force when it
// arrived.
func (r *Resolver) decideAgain(qy *query) (*policy.Rules, policy.NameVerdict, error) {
	rules, _ := r.inForce()
	v := rules.DecideName(qy.gated.name)
	if !v.Allowed {
		return nil, v, changedError{v.Rule}
	}
	if qy.gated.verdict.Audited {
		v.Audited, v.Rule = true, qy.gated.verdict.Rule
	}
	return rules, v, nil
}

// newQuery makes a question of our own: recursion desired, our buffer size, and letters in random
// case.
func newQuery(q question) *query {
	up := &query{q: q, limit: maxMessage, edns: true, strict: true}
	msg := make([]byte, headerLen, q.end+optRecordLen)
	put16(msg, 2, bitRD)
	put16(msg, 4, 1)
	msg = append(msg, q.name...)
	mixed := msg[headerLen:]
	coins := make([]byte, len(mixed))
	rand.Read(coins) // never fails: crypto/rand
	for i, c := range mixed {
		if 'a' <= c && c <= 'z' && coins[i]&1 == 1 {
			mixed[i] = c - ('a' - 'A')
		}
	}
	msg = append(msg, byte(q.qtype>>8), byte(q.qtype), 0, classIN)
	up.asked = msg
	up.msg = appendOPT(append([]byte(nil), msg...), rcodeSuccess, false)
	return up
}

// queryTypes names the types that a policy can list.
var queryTypes = map[uint16]string{
	typeA: "A", 2: "NS", typeCNAME: "CNAME", 6: "SOA", typePTR: "PTR", 15: "MX", 16: "TXT", typeAAAA: "AAAA",
	33: "SRV", 35: "NAPTR", 43: "DS", 44: "SSHFP", 48: "DNSKEY", 52: "TLSA", 64: "SVCB", 65: "HTTPS", 257: "CAA",
}

// typeName is a type's name, or TYPE123 (RFC 3597 section 5).
func typeName(t uint16) string {
	if s, ok := queryTypes[t]; ok {
		return s
	}
	return "TYPE" + strconv.Itoa(int(t))
}

// quoted returns the name, which may hold any byte, as a quoted string.
func (n name) quoted() string { return strconv.QuoteToASCII(n.dotted()) }
