package policy

import "fmt"

// spanWords formats intervals of keys in the words of a policy.
func spanWords(spans []span) []string {
	if len(spans) == 1 && spans[0] == allSpan {
		return []string{"every protocol"}
	}
	var out []string
	for _, s := range spans {
		for s.lo <= s.hi {
			proto := Protocol(s.lo >> 16)
			end := portKey(proto, 0xffff)
			lo, hi := uint16(s.lo), uint16(min(s.hi, end))
			if proto.hasPorts() && hi > 0 {
				lo = max(lo, 1) // port 0 is none
			}
			known := proto.known()
			switch {
			case !known:
				// Up to the next protocol that has a word.
				last := uint32(proto)
				for next := last + 1; next < keys>>16 && portKey(Protocol(next), 0xffff) <= s.hi && !Protocol(next).known(); next++ {
					last = next
				}
				if end = portKey(Protocol(last), 0xffff); last == uint32(proto) {
					out = append(out, fmt.Sprintf("protocol %d", proto))
				} else {
					out = append(out, fmt.Sprintf("protocols %d-%d", proto, last))
				}
			case hi == 0xffff && (lo == 0 || lo == 1 && proto.hasPorts()):
				out = append(out, proto.String())
			case proto.hasPorts() && lo == hi:
				out = append(out, fmt.Sprintf("%v %d", proto, lo))
			case proto.hasPorts():
				out = append(out, fmt.Sprintf("%v %d-%d", proto, lo, hi))
			default:
				out = append(out, icmpWords(proto, int(lo), int(hi))...)
			}
			if end >= s.hi {
				break
			}
			s.lo = end + 1
		}
	}
	return out
}

// icmpWords formats an interval of types and codes: the rest of the first type, whole types, and
// the start of the last.
func icmpWords(proto Protocol, lo, hi int) (out []string) {
	codes := func(lo, hi int) {
		switch first, last := lo&0xff, hi&0xff; {
		case first == last:
			out = append(out, fmt.Sprintf("%v type %d code %d", proto, lo>>8, first))
		default:
			out = append(out, fmt.Sprintf("%v type %d codes %d-%d", proto, lo>>8, first, last))
		}
	}
	if end := lo | 0xff; lo&0xff != 0 {
		if hi <= end {
			codes(lo, hi)
			return out
		}
		codes(lo, end)
		lo = end + 1
	}
	whole := (hi+1)>>8 - 1 // the last type with all of its codes
	switch first := lo >> 8; {
	case whole == first:
		out = append(out, fmt.Sprintf("%v type %d", proto, first))
	case whole > first:
		out = append(out, fmt.Sprintf("%v types %d-%d", proto, first, whole))
	}
	if rest := max(lo, (whole+1)<<8); rest <= hi {
		codes(rest, hi)
	}
	return out
}

func (p Protocol) known() bool { return p.hasPorts() || p == ICMPv4 || p == ICMPv6 }
