package count

// Counters. Each is registered once by name and then held by pointer, so that counting is one
// atomic addition. Names are in snake case and appear unchanged in `sluice stats`.

import (
	"sync"
	"sync/atomic"
)

type Set struct {
	mu       sync.Mutex
	counters map[string]*atomic.Uint64
}

// Counter returns the counter of that name, made on first use.
func (s *Set) Counter(name string) *atomic.Uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.counters[name]; c != nil {
		return c
	}
	if s.counters == nil {
		s.counters = make(map[string]*atomic.Uint64)
	}
	c := new(atomic.Uint64)
	s.counters[name] = c
	return c
}

// Snapshot returns every counter's value by name.
func (s *Set) Snapshot() map[string]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := make(map[string]uint64, len(s.counters))
	for name, c := range s.counters {
		m[name] = c.Load()
	}
	return m
}
