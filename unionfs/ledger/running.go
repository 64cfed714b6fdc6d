package ledger

import "sync/atomic"

// Which requests are being answered is written down, too, whatever they ask for: when a
// server does not end by being killed but by an error of its own, one of them is the reason.

// running is a place for the request that a worker answers, or has answered last.
type running struct {
	unique atomic.Uint64
	deaths atomic.Uint64 // how many servers have ended while they answered it
}

const (
	// Workers is how many requests can be written down at a time.
	Workers     = 512
	maxSuspects = 256
)

// table is what lies between the header and the records.
type table struct {
	workers  [Workers]running
	suspects [maxSuspects]running // requests that were answered when a server ended, and are to come again
}

// Run notes that worker i, from 0 to Workers-1, is about to answer a request that has ended
// so many servers before.
func (l *Ledger) Run(i int, unique uint64, deaths int) {
	if l == nil || uint(i) >= Workers {
		return
	}
	w := &l.table.workers[i]
	w.unique.Store(0)
	w.deaths.Store(uint64(deaths))
	w.unique.Store(unique)
}

// Acquit forgets what is held against a request. It has been answered.
func (l *Ledger) Acquit(unique uint64) {
	if l == nil {
		return
	}
	for i := range l.table.suspects {
		if s := &l.table.suspects[i]; s.unique.Load() == unique {
			s.unique.Store(0)
		}
	}
}

// Suspects says of each request during which servers have ended how many those are;
// crashed: the last server is one of them. Call it before the first Run.
func (l *Ledger) Suspects(crashed bool) map[uint64]int {
	if l == nil {
		return nil
	}
	all := make(map[uint64]int)
	for i := range l.table.suspects {
		if s := &l.table.suspects[i]; s.unique.Load() != 0 {
			all[s.unique.Load()] = int(s.deaths.Load())
		}
	}
	if crashed {
		for i := range l.table.workers {
			if w := &l.table.workers[i]; w.unique.Load() != 0 {
				u := w.unique.Load()
				all[u] = max(all[u], int(w.deaths.Load())) + 1
			}
		}
	}
	free := 0
	for u, deaths := range all {
		for free < maxSuspects && all[l.table.suspects[free].unique.Load()] != 0 {
			free++ // one that is there already, and may have become worse
		}
		known := false
		for i := range l.table.suspects {
			if s := &l.table.suspects[i]; s.unique.Load() == u {
				s.deaths.Store(uint64(deaths))
				known = true
			}
		}
		if !known && free < maxSuspects {
			l.table.suspects[free].deaths.Store(uint64(deaths))
			l.table.suspects[free].unique.Store(u)
		}
	}
	for i := range l.table.workers {
		l.table.workers[i].unique.Store(0)
	}
	return all
}
