package transport

import (
	"sync"
	"sync/atomic"
)

// suspects are requests during which servers have ended by an error of their own. Each is
// answered alone, so that it is known which of them was the reason, if it is the next
// server's end, too.
type suspects struct {
	deaths map[uint64]int // by unique number; immutable
	left   atomic.Int32   // how many have not come again
	alone  sync.RWMutex   // held by requests while any is left; exclusively by one of these
}

// maxEnds is how many servers a request may end before it is refused.
const maxEnds = 2

// admit waits until a request may be answered, and says how many servers it has ended. Call
// done afterwards.
func (s *suspects) admit(unique uint64) (deaths int, done func()) {
	if s == nil || s.left.Load() == 0 {
		return 0, nil
	}
	if deaths = s.deaths[unique]; deaths == 0 {
		s.alone.RLock()
		return 0, s.alone.RUnlock
	}
	s.alone.Lock()
	return deaths, func() {
		s.left.Add(-1)
		s.alone.Unlock()
	}
}
