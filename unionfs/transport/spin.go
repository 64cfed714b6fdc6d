package transport

import (
	"time"

	"golang.org/x/sys/unix"
)

// spinner decides how long it is worth looking for a request instead of going
// to sleep. Waking a sleeping processor costs more than everything else in a
// round trip, but looking in vain takes the processor from others: so every
// look that finds something earns credit, every one in vain costs some, and
// without credit it only looks now and then.
type spinner struct {
	budget time.Duration // negative: never look
	credit int
	skip   int
}

const (
	spinCredit = 8  // at the start, and the most that can be had
	spinProbe  = 32 // without credit, one wait in so many looks all the same

	lookTime = 700 * time.Nanosecond // about what one look takes
)

// wait calls try until it has something else to say than EAGAIN or the budget
// is used up.
func (s *spinner) wait(try func() (int, error)) (int, error) {
	if s.budget < 0 {
		return 0, unix.EAGAIN
	}
	if s.credit <= 0 {
		if s.skip++; s.skip < spinProbe {
			return 0, unix.EAGAIN
		}
		s.skip = 0
	}
	// Looks are counted, not time: what counts is how much of a processor is
	// used up, and while the client runs in our place there is none.
	for range s.budget / lookTime {
		if n, err := try(); err != unix.EAGAIN {
			s.credit = min(s.credit+2, spinCredit)
			return n, err
		}
	}
	s.credit = max(s.credit-1, 0)
	return 0, unix.EAGAIN
}
