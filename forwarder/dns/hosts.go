package dns

// Names answered without asking upstream: --add-host entries and their reverse, and the special-use
// names that RFC 6761, RFC 6303 and RFC 9462 tell a resolver to keep to itself.
//
// A name given by --add-host belongs to it entirely: a type without a record is answered "no such
// data" and never forwarded, so upstream can neither see nor contradict the name.

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// localTTL is short: a sandbox restarted with other --add-host entries should not meet its old ones
// in a cache.
const localTTL = 60

// localNames is immutable after newLocalNames.
type localNames struct {
	addrs map[name][]netip.Addr
	ptrs  map[name][]name
}

// Zones whose names never go upstream.
var (
	zoneLocalhost    = mustName("localhost")
	zoneInvalid      = mustName("invalid")
	zoneResolverArpa = mustName("resolver.arpa")
)

func mustName(s string) name {
	n, ok := parseName(s)
	if !ok {
		panic("dns: not a name: " + s)
	}
	return n
}

func newLocalNames(hosts map[string][]netip.Addr) (*localNames, error) {
	l := &localNames{addrs: make(map[name][]netip.Addr), ptrs: make(map[name][]name)}
	add := func(host name, addrs ...netip.Addr) {
		for _, a := range addrs {
			a = a.Unmap().WithZone("")
			if !slices.Contains(l.addrs[host], a) {
				l.addrs[host] = append(l.addrs[host], a)
			}
			if r := reverseName(a); !slices.Contains(l.ptrs[r], host) {
				l.ptrs[r] = append(l.ptrs[r], host)
			}
		}
	}
	for _, host := range slices.Sorted(maps.Keys(hosts)) {
		n, ok := parseName(host)
		if !ok {
			return nil, fmt.Errorf("host name %q: not a domain name (labels of 1 to 63 bytes, 253 in all)", host)
		}
		for _, a := range hosts[host] {
			if !a.IsValid() {
				return nil, fmt.Errorf("host name %q: invalid address", host)
			}
		}
		if l.addrs[n] == nil {
			l.addrs[n] = []netip.Addr{} // owned even without an address
		}
		add(n, hosts[host]...)
	}
	if _, given := l.addrs[zoneLocalhost]; !given {
		add(zoneLocalhost, netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback())
	}
	return l, nil
}

// reverseName returns a's name below in-addr.arpa or ip6.arpa.
func reverseName(a netip.Addr) name {
	var b strings.Builder
	if a.Is4() {
		v := a.As4()
		for i := len(v) - 1; i >= 0; i-- {
			fmt.Fprintf(&b, "%d.", v[i])
		}
		b.WriteString("in-addr.arpa")
	} else {
		v := a.As16()
		for i := len(v) - 1; i >= 0; i-- {
			fmt.Fprintf(&b, "%x.%x.", v[i]&15, v[i]>>4)
		}
		b.WriteString("ip6.arpa")
	}
	return mustName(b.String())
}

// find looks q up. If known, the name is ours to answer: with records, or with none and the given
// code.
func (l *localNames) find(q question) (records [][]byte, code rcode, known bool) {
	n := q.name
	addrs, isHost := l.addrs[n]
	ptrs, isReverse := l.ptrs[n]
	switch {
	case isHost, isReverse:
	case n.under(zoneLocalhost): // RFC 6761 section 6.3: everything below it too
		addrs = l.addrs[zoneLocalhost]
	case n.under(zoneInvalid):
		return nil, rcodeNXDomain, true
	case n.under(zoneResolverArpa): // RFC 9462 section 6.4: never forwarded
		return nil, rcodeSuccess, true
	default:
		return nil, rcodeSuccess, false
	}
	for _, a := range addrs {
		if (q.qtype == typeA && a.Is4()) || (q.qtype == typeAAAA && a.Is6()) || q.qtype == typeANY {
			records = append(records, addrRecord(a))
		}
	}
	if q.qtype == typePTR || q.qtype == typeANY {
		for _, p := range ptrs {
			records = append(records, append([]byte{0, typePTR}, p...))
		}
	}
	return records, rcodeSuccess, true
}

// addrRecord returns an address as record type and data.
func addrRecord(a netip.Addr) []byte {
	t := uint16(typeAAAA)
	if a.Is4() {
		t = typeA
	}
	return append(binary.BigEndian.AppendUint16(nil, t), a.AsSlice()...)
}
