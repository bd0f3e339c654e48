package admit

// A flow that was let in by a name keeps the name's grant while it is open (policy.Hold): its
// client goes on using the address that it knows.

// keep holds the grants that a flow goes by, or may go by once it has spoken.
func (p *Pass) keep(j *Judged) {
	name := j.Verdict.Name()
	if p.a.Granted == nil || j.Local || j.Query.Ingress || name == "" && !j.Waits() {
		return
	}
	p.holdMu.Lock()
	defer p.holdMu.Unlock()
	if p.over || name != "" && name == p.heldBy {
		return
	}
	now := p.a.Now()
	next := p.a.Granted.Hold(j.Query.Dst.Addr(), name, now)
	p.hold.End(p.heldBy, now)
	p.hold, p.heldBy = next, name
}

// letGo ends what keep began, for good. It may be called again.
func (p *Pass) letGo() {
	p.holdMu.Lock()
	defer p.holdMu.Unlock()
	if !p.over {
		p.over = true
		p.hold.End(p.heldBy, p.a.Now())
	}
}
