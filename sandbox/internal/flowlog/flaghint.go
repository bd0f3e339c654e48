package flowlog

import (
	"fmt"
	"sync"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/channel"
)

// FlagHint tells the user of a sandbox without a policy which flag would have opened a refused
// address. It does so once per flag, so that the sandbox cannot fill the log.
type FlagHint struct {
	Warn func(string)

	mu   sync.Mutex
	said map[string]bool
}

func (h *FlagHint) Refused(rules channel.RulesMessage, r forwarder.Refusal) {
	builtin, ok := rules.Policy.Builtin()
	if !ok {
		return
	}
	if flag := builtin.OpenedBy(r.Verdict); flag != "" && h.first(flag) {
		h.Warn(fmt.Sprintf("%v to %v was refused: without a policy, %s opens such addresses", policy.Protocol(r.Proto), r.Dst.Addr(), flag))
	}
}

// first reports whether flag has not been mentioned before.
func (h *FlagHint) first(flag string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.said[flag] {
		return false
	}
	if h.said == nil {
		h.said = make(map[string]bool)
	}
	h.said[flag] = true
	return true
}
