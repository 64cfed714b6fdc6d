package layers

import (
	"io"
	"sync"
	"time"
)

// progress turns byte counts into calls of a ProgressFunc.
type progress struct {
	mu sync.Mutex // calls of fn come one at a time
	fn ProgressFunc
}

type track struct {
	p    *progress
	last time.Time // guarded by p.mu, like ev
	ev   Progress
}

func (p *progress) start(id, action string, total int64) *track {
	t := &track{p: p, ev: Progress{ID: id, Action: action, Total: total}}
	t.tell(true, func(*Progress) {})
	return t
}

// tell changes the event and passes it on, unless another one has just been.
func (t *track) tell(force bool, change func(*Progress)) {
	if t.p == nil || t.p.fn == nil {
		return
	}
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	change(&t.ev)
	if force || time.Since(t.last) >= 50*time.Millisecond {
		t.last = time.Now()
		t.p.fn(t.ev)
	}
}

func (t *track) action(a string) { t.tell(true, func(ev *Progress) { ev.Action = a }) }

func (t *track) add(n int64) { t.tell(false, func(ev *Progress) { ev.Current += n }) }

func (t *track) done() { t.tell(true, func(ev *Progress) { ev.Done = true }) }

func (t *track) reader(r io.Reader) io.Reader { return trackReader{t, r} }

type trackReader struct {
	t *track
	r io.Reader
}

func (r trackReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.t.add(int64(n))
	return n, err
}

func (t *track) Write(p []byte) (int, error) { t.add(int64(len(p))); return len(p), nil }
