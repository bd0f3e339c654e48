package admit

// A flow admitted by a name keeps the name's grant while it is open (policy.Hold), because its
// client keeps using the address.

// keep holds the grants that a flow uses, or may use once it has spoken.
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

// letGo ends keep for good. It may be called again.
func (p *Pass) letGo() {
	p.holdMu.Lock()
	defer p.holdMu.Unlock()
	if !p.over {
		p.over = true
		p.hold.End(p.heldBy, p.a.Now())
	}
}
