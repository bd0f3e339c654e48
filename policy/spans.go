package policy

import (
	"cmp"
	"math"
	"slices"
)

// A rule's protocols and ports are a set of intervals on one line of 2^24 keys: protocol in the
// high byte, then the destination port, or the ICMP type and code, or nothing. "TCP 80-90", "ICMP
// echo request" and "everything" are each one interval, so ordered rules become one painted line:
// cut it at every interval's ends and give each piece to the first rule that covers it. A lookup is
// one binary search, however many rules share an address range.

const keys = 1 << 24

// noRule compares greater than every rule's index.
const noRule = math.MaxInt32

type span struct{ lo, hi uint32 } // inclusive

var allSpan = span{0, keys - 1}

func portKey(p Protocol, port uint16) uint32 { return uint32(p)<<16 | uint32(port) }

// ruleSpans returns a rule's intervals, sorted and disjoint.
func ruleSpans(r *Rule) []span {
	if len(r.Ports) == 0 && len(r.ICMP) == 0 {
		return []span{allSpan}
	}
	var out []span
	for _, p := range r.Ports {
		s := span{portKey(p.Protocol, p.Port), portKey(p.Protocol, max(p.Port, p.EndPort))}
		if p.Port == 0 {
			s.hi = portKey(p.Protocol, math.MaxUint16)
		}
		out = append(out, s)
	}
	for _, m := range r.ICMP {
		proto := ICMPv4
		if m.Family == IPv6 {
			proto = ICMPv6
		}
		var lo, hi uint16 = 0, math.MaxUint16
		if m.Type != nil {
			lo, hi = uint16(*m.Type)<<8, uint16(*m.Type)<<8|0xff
			if m.Code != nil {
				lo |= uint16(*m.Code)
				hi = lo
			}
		}
		out = append(out, span{portKey(proto, lo), portKey(proto, hi)})
	}
	return normalSpans(out)
}

// normalSpans sorts intervals and joins those that touch.
func normalSpans(out []span) []span {
	if len(out) == 0 {
		return nil
	}
	slices.SortFunc(out, func(a, b span) int { return cmp.Compare(a.lo, b.lo) })
	merged := out[:1]
	for _, s := range out[1:] {
		if last := &merged[len(merged)-1]; s.lo <= last.hi+1 {
			last.hi = max(last.hi, s.hi)
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}

// line is a painted line: piece i runs from starts[i] to the next start and
// belongs to rules[i].
type line struct {
	starts []uint32 // starts[0] is 0
	rules  []int32
	least  int32 // the lowest rule on it
}

func (l *line) first(key uint32) int32 {
	lo, hi := 0, len(l.starts) // starts[lo] <= key < starts[hi]
	for hi-lo > 1 {
		mid := int(uint(lo+hi) / 2)
		if l.starts[mid] <= key {
			lo = mid
		} else {
			hi = mid
		}
	}
	return l.rules[lo]
}

// paint returns the line of some rules, given in ascending order.
func paint(rules []int32, spans [][]span) *line {
	cuts := []uint32{0}
	for _, r := range rules {
		for _, s := range spans[r] {
			cuts = append(cuts, s.lo)
			if s.hi+1 < keys {
				cuts = append(cuts, s.hi+1)
			}
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)

	// next[i] leads to the first unpainted piece at or after i, so every piece is painted once and
	// skipped cheaply from then on.
	owner, next := make([]int32, len(cuts)), make([]int, len(cuts)+1)
	for i := range cuts {
		owner[i], next[i] = noRule, i
	}
	next[len(cuts)] = len(cuts)
	free := func(i int) int {
		for next[i] != i {
			next[i] = next[next[i]]
			i = next[i]
		}
		return i
	}
	for _, r := range rules {
		for _, s := range spans[r] {
			i, _ := slices.BinarySearch(cuts, s.lo)
			for i = free(i); i < len(cuts) && cuts[i] <= s.hi; i = free(i) {
				owner[i], next[i] = r, i+1
			}
		}
	}

	l := &line{least: rules[0]}
	for i, c := range cuts {
		if i == 0 || owner[i] != owner[i-1] {
			l.starts = append(l.starts, c)
			l.rules = append(l.rules, owner[i])
		}
	}
	l.starts, l.rules = slices.Clip(l.starts), slices.Clip(l.rules)
	return l
}
