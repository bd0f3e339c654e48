package nat

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// parsed is what a line of conntrack(8) says.
type parsed struct {
	Event    string // NEW, UPDATE, DESTROY; empty in a listing
	Flow     Flow
	Extended bool
	Counters bool
	Mark     bool
	Use      int
	ID       bool
}

// parseConntrack reads one line as conntrack(8) describes it: protocol, its number,
// seconds left, the state if it is TCP, the original direction, the reply direction,
// with status flags in brackets. It knows nothing of how this package prints, and it
// refuses every word that it does not know.
func parseConntrack(line string) (p parsed, err error) {
	words := strings.Fields(line)
	next := func() string {
		if len(words) == 0 {
			return ""
		}
		w := words[0]
		words = words[1:]
		return w
	}
	word := next()
	if strings.HasPrefix(word, "[") && strings.HasSuffix(word, "]") {
		p.Event = strings.Trim(word, "[]")
		word = next()
	}
	if word == "ipv4" || word == "ipv6" {
		p.Extended = true
		if n := next(); n != map[string]string{"ipv4": "2", "ipv6": "10"}[word] {
			return p, fmt.Errorf("%s has family number %s", word, n)
		}
		word = next()
	}
	numbers := map[string]uint8{"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58, "unknown": 0}
	proto, ok := numbers[word]
	if !ok {
		return p, fmt.Errorf("unknown protocol %q", word)
	}
	number, err := strconv.ParseUint(next(), 10, 8)
	if err != nil || proto != 0 && uint8(number) != proto {
		return p, fmt.Errorf("%s has protocol number %d", word, number)
	}
	proto = uint8(number)
	if len(words) > 0 && !strings.ContainsAny(words[0], "=[") {
		if seconds, err := strconv.Atoi(words[0]); err == nil {
			next()
			p.Flow.TimeoutLeft = time.Duration(seconds) * time.Second
		}
	}
	p.Flow.State = Unreplied
	if proto == 6 {
		name := next()
		if p.Flow.State, ok = ParseState(name); !ok {
			return p, fmt.Errorf("unknown state %q", name)
		}
	}
	p.Flow.SeenReply = true
	var halves [2]map[string]string
	half := -1
	for word := next(); word != ""; word = next() {
		key, value, isField := strings.Cut(word, "=")
		switch {
		case word == "[UNREPLIED]":
			p.Flow.SeenReply = false
		case word == "[ASSURED]":
			p.Flow.Assured = true
		case !isField:
			return p, fmt.Errorf("unknown word %q", word)
		case key == "mark":
			p.Mark = true
		case key == "use":
			p.Use, err = strconv.Atoi(value)
		case key == "id" && (half == 1 && (halves[1]["id"] != "" || halves[1]["type"] == "")):
			p.ID = true
			p.Flow.ID, err = strconv.ParseUint(value, 10, 32)
		default:
			if key == "src" {
				if half++; half > 1 {
					return p, fmt.Errorf("a third direction")
				}
				halves[half] = map[string]string{}
			}
			if half < 0 || halves[half][key] != "" {
				return p, fmt.Errorf("%q is out of place", word)
			}
			halves[half][key] = value
		}
		if err != nil {
			return p, fmt.Errorf("%q: %v", word, err)
		}
	}
	if half != 1 {
		return p, fmt.Errorf("%d directions", half+1)
	}
	p.Counters = halves[0]["packets"] != ""
	if p.Flow.Orig, p.Flow.OrigPackets, p.Flow.OrigBytes, err = parseHalf(proto, halves[0]); err != nil {
		return p, err
	}
	p.Flow.Reply, p.Flow.ReplyPackets, p.Flow.ReplyBytes, err = parseHalf(proto, halves[1])
	return p, err
}

func parseHalf(proto uint8, h map[string]string) (t Tuple, packets, bytes int64, err error) {
	num := func(key string) (n int64) {
		s, ok := h[key]
		if ok && err == nil {
			n, err = strconv.ParseInt(s, 10, 64)
		}
		return n
	}
	src, err1 := netip.ParseAddr(h["src"])
	dst, err2 := netip.ParseAddr(h["dst"])
	if err1 != nil || err2 != nil {
		return t, 0, 0, fmt.Errorf("bad address in %v", h)
	}
	sport, dport := num("sport"), num("dport")
	if proto == 1 || proto == 58 {
		sport, dport = num("id"), num("type")<<8|num("code")
	}
	packets, bytes = num("packets"), num("bytes")
	return NewTuple(proto, netip.AddrPortFrom(src, uint16(sport)), netip.AddrPortFrom(dst, uint16(dport))), packets, bytes, err
}
