package sandbox

import (
	"fmt"
	"sync"

	"sluice/forwarder"
	"sluice/policy"
)

// flagHint tells the person who ran a sandbox without a policy which flag would have
// opened a refused address: once for each flag, so that the sandbox cannot fill the log.
type flagHint struct {
	warn func(string)

	mu   sync.Mutex
	said map[string]bool
}

func (h *flagHint) refused(rules rulesMessage, r forwarder.Refusal) {
	builtin, ok := rules.Policy.Builtin()
	if !ok {
		return
	}
	if flag := builtin.OpenedBy(r.Verdict); flag != "" && h.first(flag) {
		h.warn(fmt.Sprintf("%v to %v was refused: without a policy, %s opens such addresses", policy.Protocol(r.Proto), r.Dst.Addr(), flag))
	}
}

// first reports whether flag has not been told of before.
func (h *flagHint) first(flag string) bool {
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
