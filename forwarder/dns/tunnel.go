package dns

// Bounds against tunnels: names under a wildcard are chosen by the sandbox, so
// each question for a new one carries bytes out to whoever serves the zone.
// That cannot be stopped, only made narrow. Of the part of a name that a
// wildcard stands for,
//
//   - a label may have maxLabelLength bytes and the whole part maxWildcardLength;
//   - a long part may not look like encoded bytes (maxWildcardEntropy);
//   - maxNamesPerMinute different names may be asked for, for each pattern of the
//     policy. A name asked for within the last two minutes costs nothing.
//
// All are settings of the policy (policy.DNS). What is left is at most
// maxNamesPerMinute × maxWildcardLength bytes a minute for a pattern.
// Names that a rule spells out in full carry nothing and are not bounded here.

import (
	"hash/maphash"
	"math"
	"strings"
	"sync"
	"time"

	"sluice/policy"
)

const (
	tunnelMinute = time.Minute

	// tunnelLong is from how many bytes on a part's entropy tells something. Random
	// base32 has about 4.5 bits in a byte at that length and 4.7 at 90 bytes, the
	// longest names that load balancers are given 4.4, hexadecimal digits at most 4.
	tunnelLong = 56

	// tunnelPatterns bounds the patterns that are remembered.
	tunnelPatterns = 4096
)

// tunnelReason is why a name was refused; empty if it was not.
type tunnelReason string

const (
	tunnelOpen     tunnelReason = ""
	tunnelTooLong  tunnelReason = "tunnel:length"
	tunnelRandom   tunnelReason = "tunnel:entropy"
	tunnelTooMany  tunnelReason = "tunnel:names"
	tunnelNoMemory tunnelReason = "tunnel:patterns"
)

// tunnels counts the names of each pattern. Its zero value is ready.
type tunnels struct {
	mu       sync.Mutex
	seed     maphash.Seed
	patterns map[string]*patternNames
}

// patternNames is the names asked for under one pattern, by hash, in this minute
// and the one before.
type patternNames struct {
	since    time.Time // when this minute began
	now, old map[uint64]struct{}
	fresh    int // of now, those that are not in old; at most maxNamesPerMinute
}

// admit says whether name, which matched pattern, may be asked for. Without a
// pattern, where the policy lets every name be asked, it is the name's last two
// labels that count as one. The bounds are a policy's, defaults filled in.
func (t *tunnels) admit(bounds policy.DNS, pattern, name string, now time.Time) tunnelReason {
	if pattern == "" {
		pattern = "**." + name
		if i := strings.LastIndexByte(name, '.'); i > 0 {
			pattern = "**." + name[strings.LastIndexByte(name[:i], '.')+1:]
		}
	}
	suffix := strings.TrimLeft(pattern, "*")
	if suffix == pattern {
		return tunnelOpen // an exact name
	}
	part := strings.TrimSuffix(name, suffix)
	if len(part) > bounds.MaxWildcardLength {
		return tunnelTooLong
	}
	for label := range strings.SplitSeq(part, ".") {
		if len(label) > bounds.MaxLabelLength {
			return tunnelTooLong
		}
	}
	if len(part) >= tunnelLong && entropy(part) >= bounds.MaxWildcardEntropy {
		return tunnelRandom
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p, reason := t.pattern(pattern, now)
	if reason != tunnelOpen {
		return reason
	}
	h := maphash.String(t.seed, name)
	if _, known := p.now[h]; known {
		return tunnelOpen
	}
	if _, known := p.old[h]; !known {
		if p.fresh >= bounds.MaxNamesPerMinute {
			return tunnelTooMany
		}
		p.fresh++
	}
	p.now[h] = struct{}{}
	return tunnelOpen
}

// pattern returns the names of a pattern, of the minutes that are due.
func (t *tunnels) pattern(pattern string, now time.Time) (*patternNames, tunnelReason) {
	if t.patterns == nil {
		t.seed, t.patterns = maphash.MakeSeed(), make(map[string]*patternNames)
	}
	p := t.patterns[pattern]
	if p == nil {
		if len(t.patterns) >= tunnelPatterns {
			t.forget(now)
		}
		if len(t.patterns) >= tunnelPatterns {
			return nil, tunnelNoMemory
		}
		p = &patternNames{since: now, now: make(map[uint64]struct{})}
		t.patterns[pattern] = p
	}
	switch age := now.Sub(p.since); {
	case age >= 2*tunnelMinute:
		*p = patternNames{since: now, now: make(map[uint64]struct{})}
	case age >= tunnelMinute:
		*p = patternNames{since: now, now: make(map[uint64]struct{}), old: p.now}
	}
	return p, tunnelOpen
}

// forget drops the patterns that nobody has asked for lately.
func (t *tunnels) forget(now time.Time) {
	for pattern, p := range t.patterns {
		if now.Sub(p.since) >= 2*tunnelMinute {
			delete(t.patterns, pattern)
		}
	}
}

// entropy is the mean information of a byte of s in bits, judged by how often
// each occurs in it.
func entropy(s string) float64 {
	var counts [256]int
	for i := range len(s) {
		counts[s[i]]++
	}
	var bits float64
	for _, n := range counts {
		if n > 0 {
			p := float64(n) / float64(len(s))
			bits -= p * math.Log2(p)
		}
	}
	return bits
}
