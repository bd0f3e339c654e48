package registry

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
)

// Generated names are two words that a person can say and type. A number is added once the pairs
// collide with names in use.
var (
	adjectives = []string{
		"amber", "brave", "brisk", "calm", "clear", "cool", "crisp", "deep", "dry", "eager",
		"fair", "fast", "firm", "fresh", "glad", "grand", "green", "keen", "kind", "late",
		"light", "lone", "loud", "mild", "neat", "pale", "plain", "proud", "quick", "quiet",
		"rapid", "ready", "rich", "sharp", "shy", "slow", "soft", "still", "swift", "warm",
	}
	nouns = []string{
		"basin", "beck", "bight", "bourn", "brook", "canal", "cove", "creek", "dam", "delta",
		"dike", "eddy", "fen", "firth", "fjord", "ford", "gully", "inlet", "lagoon", "lake",
		"levee", "lock", "marsh", "mere", "mill", "moat", "pier", "pond", "pool", "quay",
		"reef", "rill", "shoal", "sound", "spring", "strait", "stream", "tarn", "wadi", "weir",
	}
)

// ClaimGenerated claims a generated name.
func (r *Registry) ClaimGenerated() (*Dir, string, error) {
	for i := range 50 {
		name := adjectives[pick(len(adjectives))] + "-" + nouns[pick(len(nouns))]
		if i >= 10 {
			name += fmt.Sprintf("-%d", pick(10000))
		}
		d, err := r.Claim(name)
		if errors.Is(err, ErrNameInUse) {
			continue
		}
		return d, name, err
	}
	return nil, "", errors.New("found no free name: give one with --name")
}

func pick(n int) int {
	i, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		panic(err) // crypto/rand never fails on Linux
	}
	return int(i.Int64())
}
