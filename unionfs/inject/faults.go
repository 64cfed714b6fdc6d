package inject

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/plyfs/plyfs/unionfs/trace"
)

// Fault is what happens to one request.
type Fault struct {
	Errno   syscall.Errno // 0: none
	Latency time.Duration
	Short   int64 // 0: no limit

	slow []*rule // whose latencies these are
}

// Wait lets the latency pass, of each rule as long as there is the rule: who clears it lets go
// the requests that wait for it.
func (f Fault) Wait() {
	left := f.Latency
	for _, r := range f.slow {
		d := min(r.Latency, left)
		t := time.NewTimer(d)
		select {
		case <-t.C:
		case <-r.gone:
			t.Stop()
		}
		left -= d
	}
}

// Faults are the rules of one mount. Its zero value has none.
type Faults struct {
	on    atomic.Bool // there are rules
	data  atomic.Bool // some are about data
	mu    sync.Mutex
	rules []*rule // guarded by mu
	last  int     // ID; guarded by mu
	timer *time.Timer
}

type rule struct {
	Rule
	ends  time.Time // with the monotonic clock
	errno syscall.Errno
	gone  chan struct{} // closed when the rule has ended or was cleared
}

// On reports whether there are rules.
func (f *Faults) On() bool { return f.on.Load() }

// Add adds rules that were validated, all or none, and returns them as they are now.
func (f *Faults) Add(rules []Rule) ([]Rule, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expire(time.Now())
	if len(f.rules)+len(rules) > MostRules {
		return nil, fmt.Errorf("a mount has at most %d rules: clear some first", MostRules)
	}
	added := make([]Rule, 0, len(rules))
	for _, r := range rules {
		f.last++
		r.ID, r.Matched, r.Hit = f.last, 0, 0
		if r.For == 0 {
			r.For = Default
		}
		n := &rule{Rule: r, ends: time.Now().Add(r.For), errno: r.errno(), gone: make(chan struct{})}
		n.Expires = n.ends.Round(0).UTC()
		f.rules = append(f.rules, n)
		added = append(added, n.Rule)
	}
	f.changed()
	return added, nil
}

// Clear removes rules, all if none are named, and returns those that were there.
func (f *Faults) Clear(ids []int) []Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expire(time.Now())
	var gone []Rule
	f.rules = slices.DeleteFunc(f.rules, func(r *rule) bool {
		clear := len(ids) == 0 || slices.Contains(ids, r.ID)
		if clear {
			gone = append(gone, r.Rule)
			close(r.gone)
		}
		return clear
	})
	f.changed()
	return gone
}

// List returns the rules that are in force.
func (f *Faults) List() []Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expire(time.Now())
	all := make([]Rule, 0, len(f.rules))
	for _, r := range f.rules {
		all = append(all, r.Rule)
	}
	return all
}

// expire removes what has ended. Preconditions: mu is held.
func (f *Faults) expire(now time.Time) {
	had := len(f.rules)
	f.rules = slices.DeleteFunc(f.rules, func(r *rule) bool {
		over := !now.Before(r.ends)
		if over {
			close(r.gone)
		}
		return over
	})
	if len(f.rules) != had {
		f.changed()
	}
}

// changed follows what the rules are. Preconditions: mu is held.
func (f *Faults) changed() {
	f.on.Store(len(f.rules) > 0)
	f.data.Store(slices.ContainsFunc(f.rules, func(r *rule) bool { return r.Data() }))
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	if len(f.rules) == 0 {
		return
	}
	next := slices.MinFunc(f.rules, func(a, b *rule) int { return cmp.Compare(a.ends.UnixNano(), b.ends.UnixNano()) })
	f.timer = time.AfterFunc(time.Until(next.ends), func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.expire(time.Now())
	})
}

// Decide says what happens to a request. Faults of several rules come together; of two
// errors, that of the older rule. Only a request that is direct, a read or write for a program and
// not for the page cache, can be made a shorter one.
func (f *Faults) Decide(e *trace.Event, direct bool) (Fault, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out Fault
	hit := false
	now := time.Now()
	for _, r := range f.rules {
		if !now.Before(r.ends) || !r.matches(e) || r.Short > 0 && !direct {
			continue
		}
		r.Matched++
		if r.Nth > 0 && r.Matched != r.Nth || r.Matched < r.From || r.Prob > 0 && rand.Float64() >= r.Prob {
			continue
		}
		r.Hit++
		hit = true
		if r.Latency > 0 {
			out.Latency += r.Latency
			out.slow = append(out.slow, r)
		}
		if out.Errno == 0 {
			out.Errno = r.errno
		}
		if r.Short > 0 && (out.Short == 0 || r.Short < out.Short) {
			out.Short = r.Short
		}
	}
	out.Latency = min(out.Latency, LongestLatency)
	return out, hit
}

// HasData reports whether there are rules about data.
func (f *Faults) HasData() bool { return f.data.Load() }

// Direct reports whether a file that is being opened is one that a rule about data names.
func (f *Faults) Direct(path string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.rules, func(r *rule) bool {
		return r.Data() && (r.Path == "" || trace.MatchPath(string(r.Path), path))
	})
}
