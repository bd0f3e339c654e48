package dns

// Bounds against tunnels: the sandbox chooses the names under a wildcard, so each question for a
// new one carries bytes out to the zone's server, and each answer carries some in. So does the
// choice among known names and types, if the zone's server sees it. None of that can be stopped,
// only made narrow.
//
// Only questions that go upstream are counted: the cache (cache.go) answers the others. For the
// part of a name that a wildcard stands for,
//
//   - a label may have maxLabelLength bytes and the whole part maxWildcardLength;
//   - a long part may not look like encoded bytes (maxWildcardEntropy), nor may
//     the new names of a minute together.
//
// For each pattern of the policy, in each minute,
//
//   - maxNamesPerMinute new names may be asked for. A name asked for in this minute
//     or the one before is not new;
//   - twice as many questions may be asked, types and repeats included;
//   - what the new names spell, and questionCost bytes for each question, which is more than
//     the choice of one known name and type can tell, may come to maxNamesPerMinute ×
//     maxWildcardLength bytes;
//   - the data in answers may come to answerPerName bytes for each of maxNamesPerMinute.
//
// A name that a rule spells out in full may be asked at most exactQuestions times a minute, and its
// answers may carry exactAnswers bytes. Data that has not changed since the last answer costs
// nothing. The sandbox as a whole may ask sandboxPatterns patterns' worth of names.
//
// With the defaults, that comes to 200 bytes a second out and 512 in for a wildcard, 3 out and 273
// in for an exact name, and 20 questions a second in all. The max* bounds are settings of the
// policy (policy.DNS).

import (
	"hash/maphash"
	"math"
	"strings"
	"sync"
	"time"

	"sluice.dev/sluice/policy"
)

const (
	tunnelMinute = time.Minute

	// tunnelLong is the length, in bytes, from which a part's entropy means something. At that
	// length random base32 has about 4.5 bits a byte, and 4.7 at 90 bytes; the longest names that
	// load balancers are given have 4.4, and hexadecimal digits at most 4.
	tunnelLong = 56
	// tunnelSample is the same length for the new names of a minute together: forty of ordinary
	// length. There random base32 has 4.95 bits a byte, and words and numbers 4.3.
	tunnelSample = 512

	// tunnelPatterns bounds the patterns that are remembered.
	tunnelPatterns = 4096

	// questionCost is the information, in bytes, in a question's name and type if neither is new: a
	// choice of 2 × 10000 names and 17 types is 19 bits.
	questionCost = 3
	// answerCost is the information, in bytes, in an answer's code and TTL.
	answerCost = 4
	// answerPerName is the data allowed in answers for each new name: four addresses of each
	// family, and two aliases.
	answerPerName = 256
	// exactQuestions bounds the questions for one exact name in a minute, and
	// exactAnswers the data in their answers: A, AAAA and HTTPS every five seconds.
	exactQuestions = 60
	exactAnswers   = 16 << 10
	// sandboxPatterns is how many patterns a sandbox can use in full.
	sandboxPatterns = 10
)

// tunnelReason is why a question was refused; empty if it was not.
type tunnelReason string

const (
	tunnelOpen      tunnelReason = ""
	tunnelTooLong   tunnelReason = "tunnel:length"
	tunnelRandom    tunnelReason = "tunnel:entropy"
	tunnelTooMany   tunnelReason = "tunnel:names"
	tunnelQuestions tunnelReason = "tunnel:questions"
	tunnelAnswers   tunnelReason = "tunnel:answers"
	tunnelNoMemory  tunnelReason = "tunnel:patterns"
)

// Error makes a refusal usable as a question's outcome.
func (t tunnelReason) Error() string { return "a bound against tunnels: " + string(t) }

// tunnels counts the questions of each pattern. Its zero value is ready.
type tunnels struct {
	mu       sync.Mutex
	seed     maphash.Seed
	patterns map[string]*patternUse

	since time.Time // when the sandbox's current minute began
	asked int       // in that minute
}

// patternUse is the use of one pattern in this minute: the names, by hash, of this minute and the
// one before.
type patternUse struct {
	since    time.Time // when this minute began
	now, old map[uint64]struct{}

	fresh     int // names of now that are not in old; at most maxNamesPerMinute
	asked     int // questions
	out, in   int // bytes
	letters   letters
	spelledBy int // bytes counted in letters
}

// letters counts how often each byte occurs in names.
type letters [256]uint32

func (l *letters) add(part string) {
	for i := range len(part) {
		l[part[i]]++
	}
}

// entropy is the mean information of a byte in bits, judged by how often each occurs.
func (l *letters) entropy() float64 {
	total := 0
	for _, n := range l {
		total += int(n)
	}
	var bits float64
	for _, n := range l {
		if n > 0 {
			p := float64(n) / float64(total)
			bits -= p * math.Log2(p)
		}
	}
	return bits
}

// countedFor returns the pattern that a question counts for, and the part of its name that the
// sandbox chose: none of an exact name. Without a pattern, where the policy lets every name be
// asked, the name's last two labels serve as one.
func countedFor(pattern, name string) (counted, chosen string) {
	if pattern == "" {
		pattern = "**." + name
		if i := strings.LastIndexByte(name, '.'); i > 0 {
			pattern = "**." + name[strings.LastIndexByte(name[:i], '.')+1:]
		}
	}
	if pattern == name {
		return pattern, ""
	}
	return pattern, strings.TrimSuffix(strings.TrimSuffix(name, strings.TrimLeft(pattern, "*.")), ".")
}

// admit decides whether a question for name, which matched pattern, may go upstream, and counts it
// if so. The bounds are a policy's, with defaults filled in.
func (t *tunnels) admit(bounds policy.DNS, pattern, name string, now time.Time) tunnelReason {
	pattern, part := countedFor(pattern, name)
	var own letters
	if pattern != name {
		if reason := shape(bounds, part, &own); reason != tunnelOpen {
			return reason
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.since) >= tunnelMinute {
		t.since, t.asked = now, 0
	}
	p, reason := t.pattern(pattern, now)
	if reason != tunnelOpen {
		return reason
	}
	most := exactQuestions
	if pattern != name {
		most = 2 * bounds.MaxNamesPerMinute
	}
	if p.asked >= most || t.asked >= sandboxPatterns*max(bounds.MaxNamesPerMinute, exactQuestions) {
		return tunnelQuestions
	}
	if pattern != name {
		if reason := p.spell(bounds, part, maphash.String(t.seed, name), &own); reason != tunnelOpen {
			return reason
		}
	}
	p.asked++
	t.asked++
	return tunnelOpen
}

// shape judges the spelling of one name by itself, and counts its letters.
func shape(bounds policy.DNS, part string, own *letters) tunnelReason {
	if len(part) > bounds.MaxWildcardLength {
		return tunnelTooLong
	}
	for label := range strings.SplitSeq(part, ".") {
		if len(label) > bounds.MaxLabelLength {
			return tunnelTooLong
		}
	}
	own.add(part)
	if len(part) >= tunnelLong && own.entropy() >= bounds.MaxWildcardEntropy {
		return tunnelRandom
	}
	return tunnelOpen
}

// spell charges a question for the information in its name.
func (p *patternUse) spell(bounds policy.DNS, part string, hash uint64, own *letters) tunnelReason {
	cost := questionCost
	_, known := p.now[hash]
	_, before := p.old[hash]
	if fresh := !known && !before; fresh {
		if p.fresh >= bounds.MaxNamesPerMinute {
			return tunnelTooMany
		}
		all := p.letters
		for i, n := range own {
			all[i] += n
		}
		if p.spelledBy+len(part) >= tunnelSample && all.entropy() >= bounds.MaxWildcardEntropy {
			return tunnelRandom
		}
		cost += len(part)
		if p.out+cost > bounds.MaxNamesPerMinute*bounds.MaxWildcardLength {
			return tunnelTooMany
		}
		p.fresh++
		p.letters = all
		p.spelledBy += len(part)
	} else if p.out+cost > bounds.MaxNamesPerMinute*bounds.MaxWildcardLength {
		return tunnelQuestions
	}
	p.out += cost
	p.now[hash] = struct{}{}
	return tunnelOpen
}

// told charges an answer's data for a name that was admitted: all of it unless it repeats the last
// answer.
func (t *tunnels) told(bounds policy.DNS, pattern, name string, size int, same bool, now time.Time) tunnelReason {
	pattern, _ = countedFor(pattern, name)
	if same {
		size = 0
	}
	most := exactAnswers
	if pattern != name {
		most = max(most, answerPerName*bounds.MaxNamesPerMinute)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p, reason := t.pattern(pattern, now)
	if reason != tunnelOpen {
		return reason
	}
	if p.in+answerCost+size > most {
		return tunnelAnswers
	}
	p.in += answerCost + size
	return tunnelOpen
}

// pattern returns the use of a pattern, moved on to the current minute.
func (t *tunnels) pattern(pattern string, now time.Time) (*patternUse, tunnelReason) {
	if t.patterns == nil {
		t.seed, t.patterns = maphash.MakeSeed(), make(map[string]*patternUse)
	}
	p := t.patterns[pattern]
	if p == nil {
		if len(t.patterns) >= tunnelPatterns {
			t.forget(now)
		}
		if len(t.patterns) >= tunnelPatterns {
			return nil, tunnelNoMemory
		}
		p = &patternUse{since: now, now: make(map[uint64]struct{})}
		t.patterns[pattern] = p
	}
	switch age := now.Sub(p.since); {
	case age >= 2*tunnelMinute:
		*p = patternUse{since: now, now: make(map[uint64]struct{})}
	case age >= tunnelMinute:
		*p = patternUse{since: now, now: make(map[uint64]struct{}), old: p.now}
	}
	return p, tunnelOpen
}

// forget drops the patterns that have not been used lately.
func (t *tunnels) forget(now time.Time) {
	for pattern, p := range t.patterns {
		if now.Sub(p.since) >= 2*tunnelMinute {
			delete(t.patterns, pattern)
		}
	}
}
