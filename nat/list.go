package nat

// listed is the eviction list that a lease is on.
type listed uint8

const (
	inNone listed = iota
	inOver
	inMute
)

// list is an intrusive list of leases, oldest first. Guarded by Table.mu.
type list struct {
	first, last *Lease
	kind        listed
}

func (q *list) append(l *Lease) {
	l.listed, l.before, l.after = q.kind, q.last, nil
	if q.last != nil {
		q.last.after = l
	} else {
		q.first = l
	}
	q.last = l
}

func (q *list) remove(l *Lease) {
	if l.before != nil {
		l.before.after = l.after
	} else {
		q.first = l.after
	}
	if l.after != nil {
		l.after.before = l.before
	} else {
		q.last = l.before
	}
	l.listed, l.before, l.after = inNone, nil, nil
}
