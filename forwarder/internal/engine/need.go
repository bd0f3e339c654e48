package engine

import (
	"sync/atomic"
)

// Need is a flag whose first raising wakes its owner.
type Need struct {
	atomic.Bool
	Wake chan struct{} // capacity 1
}

func (n *Need) Raise() {
	if n.Load() || n.Swap(true) {
		return
	}
	select {
	case n.Wake <- struct{}{}:
	default:
	}
}
