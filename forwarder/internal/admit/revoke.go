package admit

// A new policy is applied to what the flow table holds, so a flow cannot be overlooked. It takes
// effect in two steps, because a sandbox that does not read its device can block its writers:
//
//	revoke   every flow is judged; one that is refused is marked and halted, by stores and by
//	         system calls on host sockets, none of which waits for the sandbox
//	reap     the halted flows are taken down, resets and all, by a goroutine of its own
//
// SetRules waits for the second step, but no longer than reapPatience.

import (
	"context"
	"sync"
	"time"

	"sluice.dev/sluice/forwarder/internal/engine"
	"sluice.dev/sluice/nat"
	"sluice.dev/sluice/policy"
)

// reapPatience bounds how long SetRules waits for halted flows to be taken down.
const reapPatience = 300 * time.Millisecond

// reaping is what was halted and not taken down yet: no more flows than the table held,
// since a flow is halted once.
type reaping struct {
	wake chan struct{} // capacity 1
	mu   sync.Mutex
	jobs []reapJob
}

// reapJob holds the flows that one SetRules halted.
type reapJob struct {
	flows []*Pass
	done  chan struct{} // closed by the reaper
}

// Revoke halts and returns every flow that r refuses and that was not halted before.
func (a *Gate) Revoke(r *policy.Rules) []*Pass {
	var cut []*Pass
	for _, lease := range a.Table.Leases() {
		p, ok := lease.Owner().(*Pass)
		if !ok {
			lease.Kill(nat.ReasonPolicy) // no question can be asked about it
			continue
		}
		if p.Revoked.Load() || p.reconsider(lease, r) || p.Revoked.Swap(true) {
			continue
		}
		if p.life.Load() == passAlive { // otherwise Enter sees that it is revoked
			p.flow.Halt()
			cut = append(cut, p)
		}
	}
	return cut
}

// Finish makes the reaper take down the halted flows, and waits a while for it.
func (a *Gate) Finish(ctx context.Context, cut []*Pass) {
	if len(cut) == 0 {
		return
	}
	patience := time.NewTimer(reapPatience)
	defer patience.Stop()
	job := reapJob{cut, make(chan struct{})}
	a.halted.mu.Lock()
	a.halted.jobs = append(a.halted.jobs, job)
	a.halted.mu.Unlock()
	engine.Signal(a.halted.wake)
	select {
	case <-job.done:
	case <-patience.C:
	case <-ctx.Done():
	}
}

// Reaper takes down halted flows until ctx ends; the rest end with the forwarder. It is one of
// Run's goroutines.
func (a *Gate) Reaper(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.halted.wake:
		}
		a.halted.mu.Lock()
		jobs := a.halted.jobs
		a.halted.jobs = nil
		a.halted.mu.Unlock()
		for _, job := range jobs {
			for _, p := range job.flows {
				p.flow.Abort(nat.ReasonPolicy)
			}
			close(job.done)
		}
	}
}
