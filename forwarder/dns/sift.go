package dns

// Sifting reduces an upstream's answer before the sandbox sees it, where the policy gates names.
// Nothing is passed on as it came: the records that answer the question are read, judged and
// written anew.
//
//	question ──CNAME──► alias ──CNAME──► alias … the chain, from the question on
//	                                       └─ records of the type asked for
//
// Everything else in the answer is left out: records of other names or types, the additional
// section, and the authority section. The exception is the SOA record, owned by a parent of the
// name, that gives a negative answer's TTL (RFC 2308 section 3). Addresses that no rule can open
// are left out too: a name that anybody may own must not lead to the machine's own services (DNS
// rebinding). An answer that cannot be read to its end is refused.
//
// Names in record data may be pointers to the question, and then have the case that we mixed. They
// are written in lower case, and pointers of our own restore the client's spelling (cached.write).
//
// dnsmessage follows pointers, at most ten in a name.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// maxChain bounds the aliases of one answer. BIND follows as many.
	maxChain = 16
	// maxAnswerRecords bounds the records of the type asked for in one answer; the rest is left
	// out, and TC is set. Some services have had hundreds of SRV records, and some names as many
	// addresses.
	maxAnswerRecords = 1024
	// maxAnswerData bounds their data in bytes, with the same effect. It is less than every name
	// may receive in a minute (tunnel.go): a longer answer is cut, not refused.
	maxAnswerData = 15 << 10
)

var (
	errChainLoop = errors.New("the aliases form a loop")
	errChainLong = fmt.Errorf("more than %d aliases", maxChain)
)

// siftRules is the part of the policy that concerns the records of one answer.
type siftRules struct {
	admit  func(netip.Addr) bool
	ech    bool          // pass on the keys of encrypted ClientHello
	maxTTL time.Duration // the longest TTL that clients may see
}

// sifted is the part of an answer that remains.
type sifted struct {
	asked   string // the name
	code    dnsmessage.RCode
	cut     bool // upstream cut it short, or we did
	aliases []dnsmessage.Resource
	records []dnsmessage.Resource
	size    int // of the records' data
	soa     *dnsmessage.Resource

	addrs   []netip.Addr  // in records
	ttl     time.Duration // of addrs, including the aliases'
	names   []string      // the aliases' targets, in order
	foreign int           // answer records left out because nobody asked for them
	rebound int           // addresses left out because no rule may open them
}

// emptied reports whether there were addresses and none may be passed on.
func (s *sifted) emptied() bool { return s.rebound > 0 && len(s.records) == 0 }

// sift reads msg, which answers q (see answers), under rules.
func sift(msg []byte, q question, rules siftRules) (*sifted, error) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil {
		return nil, fmt.Errorf("reading the header: %w", err)
	}
	answers, authorities, err := readSections(&p, msg, q.end)
	if err != nil {
		return nil, err
	}
	for i := range answers {
		if b, ok := answers[i].Body.(*dnsmessage.CNAMEResource); ok {
			fold(&b.CNAME)
		}
	}
	s := &sifted{asked: q.name.dotted(), code: h.RCode, cut: h.Truncated}
	if h.RCode != dnsmessage.RCodeSuccess && h.RCode != dnsmessage.RCodeNameError {
		s.foreign = len(answers)
		return s, nil
	}
	last, err := s.follow(answers, q, rules)
	if err != nil {
		return nil, err
	}
	for _, a := range answers {
		if !isOf(a, last, dnsmessage.Type(q.qtype)) || q.qtype == typeCNAME {
			continue
		}
		s.take(a, rules)
	}
	s.foreign = max(len(answers)-len(s.aliases)-len(s.records)-s.rebound, 0)
	if len(s.records) == 0 {
		s.takeSOA(authorities, last, rules)
	}
	return s, nil
}

// follow collects the aliases and returns the name at their end.
func (s *sifted) follow(answers []dnsmessage.Resource, q question, rules siftRules) (last string, err error) {
	last = q.name.dotted()
	seen := map[string]bool{last: true}
	s.ttl = rules.maxTTL
	for {
		i := indexOf(answers, last, dnsmessage.TypeCNAME)
		if i < 0 {
			return last, nil
		}
		a := answers[i]
		target := a.Body.(*dnsmessage.CNAMEResource).CNAME.String()
		if seen[target] {
			return "", errChainLoop
		}
		if len(s.aliases) == maxChain {
			return "", errChainLong
		}
		s.age(&a.Header, rules)
		s.aliases = append(s.aliases, a)
		s.names = append(s.names, strings.TrimSuffix(target, "."))
		if q.qtype == typeCNAME {
			return last, nil // the alias itself was asked for
		}
		seen[target] = true
		last = target
	}
}

// take keeps a record of the type asked for, if it may be passed on.
func (s *sifted) take(a dnsmessage.Resource, rules siftRules) {
	if len(s.records) == maxAnswerRecords || s.size+int(a.Header.Length) > maxAnswerData {
		s.cut = true
		return
	}
	var addr netip.Addr
	switch b := a.Body.(type) {
	case *dnsmessage.AResource:
		addr = netip.AddrFrom4(b.A)
	case *dnsmessage.AAAAResource:
		addr = netip.AddrFrom16(b.AAAA)
	case *dnsmessage.SVCBResource:
		if !s.leadsHere(b.Target) || !bare(b, rules.ech) {
			return
		}
	case *dnsmessage.HTTPSResource:
		if !s.leadsHere(b.Target) || !bare(&b.SVCBResource, rules.ech) {
			return
		}
	}
	if addr.IsValid() {
		if !rules.admit(addr) {
			s.rebound++
			return
		}
		s.addrs = append(s.addrs, addr.Unmap())
	}
	s.age(&a.Header, rules)
	s.size += int(a.Header.Length)
	s.records = append(s.records, a)
}

// leadsHere reports whether a service binding is for the name that was asked for, or one of its
// aliases. Another host is granted only under its own name, but the client would present this name
// there and be refused. Without the binding it asks for the addresses of the name itself (RFC 9460
// section 3).
func (s *sifted) leadsHere(target dnsmessage.Name) bool {
	fold(&target)
	t := target.String()
	return t == "." || t == s.asked || slices.Contains(s.names, strings.TrimSuffix(t, "."))
}

// takeSOA keeps the record that says how long a negative answer is valid.
func (s *sifted) takeSOA(authorities []dnsmessage.Resource, last string, rules siftRules) {
	for _, a := range authorities {
		if a.Header.Type != dnsmessage.TypeSOA || a.Header.Class != dnsmessage.ClassINET || !within(last, a.Header.Name.String()) {
			continue
		}
		a.Header.TTL = clampTTL(a.Header.TTL, rules.maxTTL)
		switch b := a.Body.(type) {
		case *dnsmessage.SOAResource:
			a.Header.TTL = min(a.Header.TTL, clampTTL(b.MinTTL, rules.maxTTL))
		case *dnsmessage.UnknownResource: // its names have dots in labels (section.go)
			if len(b.Data) < 4 {
				continue
			}
			a.Header.TTL = min(a.Header.TTL, clampTTL(binary.BigEndian.Uint32(b.Data[len(b.Data)-4:]), rules.maxTTL))
		}
		s.soa = &a
		return
	}
}

// age bounds a record's TTL, and lowers the whole answer's to it.
func (s *sifted) age(h *dnsmessage.ResourceHeader, rules siftRules) {
	h.TTL = clampTTL(h.TTL, rules.maxTTL)
	s.ttl = min(s.ttl, time.Duration(h.TTL)*time.Second)
}

// clampTTL reads a TTL as RFC 2181 section 8 defines it: zero if the top bit is set.
func clampTTL(ttl uint32, most time.Duration) uint32 {
	if ttl >= 1<<31 {
		return 0
	}
	return uint32(min(int64(ttl), int64(most/time.Second)))
}

// bare strips a service binding of everything but what a client needs to choose port and protocol,
// and reports whether it still makes sense. Address hints are dropped: they would be addresses that
// were not granted, and the client asks for the target's own anyway (RFC 9460 section 7.3). So are
// DoH paths, and the keys of encrypted ClientHello unless they are allowed.
func bare(b *dnsmessage.SVCBResource, ech bool) bool {
	has := make(map[dnsmessage.SVCParamKey]bool)
	var kept []dnsmessage.SVCParam
	for _, p := range b.Params {
		switch p.Key {
		case dnsmessage.SVCParamMandatory, dnsmessage.SVCParamALPN, dnsmessage.SVCParamNoDefaultALPN, dnsmessage.SVCParamPort:
		case dnsmessage.SVCParamECH:
			if !ech {
				continue
			}
		default:
			continue
		}
		has[p.Key] = true
		kept = append(kept, p)
	}
	b.Params = kept
	mandatory, _ := b.GetParam(dnsmessage.SVCParamMandatory)
	if len(mandatory)%2 != 0 {
		return false
	}
	for i := 0; i < len(mandatory); i += 2 {
		if !has[dnsmessage.SVCParamKey(binary.BigEndian.Uint16(mandatory[i:]))] {
			return false // RFC 9460 section 8: a client must not use it without them
		}
	}
	return true
}

// told is the TTL that all records are sent with: the least of theirs, so that TTLs carry as little
// information as possible.
func (s *sifted) told() uint32 {
	ttl := uint32(s.ttl / time.Second)
	if s.soa != nil {
		ttl = min(ttl, s.soa.Header.TTL)
	}
	return ttl
}

// holds is how long the answer may be served again.
func (s *sifted) holds() time.Duration {
	switch {
	case s.code != dnsmessage.RCodeSuccess && s.code != dnsmessage.RCodeNameError:
		return cacheFailure
	case s.cut, len(s.records) == 0 && s.soa == nil:
		return cacheFloor
	}
	return max(time.Duration(s.told())*time.Second, cacheFloor)
}

// message returns the answer to q, without an ID, the client's bits and an OPT record.
func (s *sifted) message(q question) ([]byte, error) {
	h := dnsmessage.Header{Response: true, RecursionAvailable: true, RCode: s.code, Truncated: s.cut}
	name, err := dnsmessage.NewName(q.name.dotted())
	if err != nil {
		return nil, fmt.Errorf("writing the question: %w", err)
	}
	m := dnsmessage.Message{
		Header:    h,
		Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.Type(q.qtype), Class: dnsmessage.ClassINET}},
		Answers:   append(append([]dnsmessage.Resource(nil), s.aliases...), s.records...),
	}
	if s.soa != nil {
		m.Authorities = []dnsmessage.Resource{*s.soa}
	}
	out, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("writing the answer: %w", err)
	}
	return out, nil
}

func isOf(a dnsmessage.Resource, owner string, t dnsmessage.Type) bool {
	return a.Header.Type == t && a.Header.Class == dnsmessage.ClassINET && a.Header.Name.String() == owner
}

func indexOf(list []dnsmessage.Resource, owner string, t dnsmessage.Type) int {
	for i, a := range list {
		if isOf(a, owner, t) {
			return i
		}
	}
	return -1
}

// within reports whether name is zone or a name below it; both end in a dot.
func within(name, zone string) bool {
	return name == zone || zone == "." || strings.HasSuffix(name, "."+zone)
}

// fold lowers a name's ASCII letters (RFC 4343). dnsmessage takes no name with a dot inside a
// label, so names are equal when their texts are.
func fold(n *dnsmessage.Name) {
	for i := range n.Data[:n.Length] {
		n.Data[i] = lower(n.Data[i])
	}
}

// namesIn returns the names in a record's data.
func namesIn(body dnsmessage.ResourceBody) []*dnsmessage.Name {
	switch b := body.(type) {
	case *dnsmessage.NSResource:
		return []*dnsmessage.Name{&b.NS}
	case *dnsmessage.PTRResource:
		return []*dnsmessage.Name{&b.PTR}
	case *dnsmessage.MXResource:
		return []*dnsmessage.Name{&b.MX}
	case *dnsmessage.SRVResource:
		return []*dnsmessage.Name{&b.Target}
	case *dnsmessage.SOAResource:
		return []*dnsmessage.Name{&b.NS, &b.MBox}
	case *dnsmessage.SVCBResource:
		return []*dnsmessage.Name{&b.Target}
	case *dnsmessage.HTTPSResource:
		return []*dnsmessage.Name{&b.Target}
	}
	return nil
}

// unmix puts the labels at the end of a name's text into lower case if they match asked, which is
// how the question came back, letter for letter.
func unmix(text []byte, asked string) {
	from := len(text)
	for i, j := len(text)-1, len(asked)-1; i >= 0 && j >= 0 && text[i] == asked[j]; i, j = i-1, j-1 {
		if (i == 0 || text[i-1] == '.') && (j == 0 || asked[j-1] == '.') {
			from = i // a label begins here, in both
		}
	}
	for i := from; i < len(text); i++ {
		text[i] = lower(text[i])
	}
}

// dotted returns the name as text, with the final dot. The text is unambiguous only if no label
// holds a dot, which is checked before a question gets this far.
func (n name) dotted() string {
	if len(n) <= 1 {
		return "."
	}
	b := []byte(n[1:])
	for i := int(n[0]); i < len(b); i += 1 + int(n[1+i]) {
		b[i] = '.'
	}
	return string(b)
}
