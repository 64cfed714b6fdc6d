package unionfs

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// prefetcher looks into the subdirectories of a scan's directories before somebody
// asks, while a program walks through the tree and the server has nothing else to do:
// what a walk takes is mostly the time to look into every layer's directory and at
// every object. It begins when several directories have been listed shortly after each
// other that lie in listed ones, and ends with the walk.
type prefetcher struct {
	s      *scan
	drop   *time.Timer // forgets what nobody has asked for
	some   atomic.Bool // stack is not empty
	mu     sync.Mutex
	stack  []*scanObj              // directories to look into, the next one last; guarded by mu
	ready  map[*scanObj]lowerFacts // what has been found out; guarded by mu
	streak int                     // directories of the walk so far; guarded by mu
	last   time.Time               // when the last one was listed; guarded by mu
}

const (
	walkBegins  = 3                      // directories
	walkPause   = 100 * time.Millisecond // longer, and it is another walk
	prefetchMax = 256                    // directories that wait
	readyMax    = 4096                   // objects that have been looked at in vain so far
	readyRest   = 2 * time.Second        // nobody comes for those any more
)

func newPrefetcher(s *scan) *prefetcher {
	p := &prefetcher{s: s}
	p.drop = time.AfterFunc(time.Hour, p.forget)
	p.drop.Stop()
	return p
}

func (p *prefetcher) stop() {
	if p != nil {
		p.drop.Stop()
	}
}

// listed notes that somebody has begun to read a directory together with what lies in
// it.
func (p *prefetcher) listed(o *scanObj) {
	if p == nil {
		return
	}
	inListed := o.list != nil && o.list.of.dir.listed.Load()
	o.dir.listed.Store(true)
	l := o.dir.listing.Load()
	if l == nil {
		return
	}
	now := time.Now()
	p.mu.Lock()
	if now.Sub(p.last) > walkPause {
		p.streak = 0
		p.stack, p.ready = nil, nil
	}
	p.last = now
	if inListed {
		p.streak++
	}
	if p.streak >= walkBegins {
		// A walker goes down before it goes on.
		for i := len(l.objs) - 1; i >= 0; i-- {
			if l.objs[i].dtype == unix.DT_DIR {
				p.stack = append(p.stack, &l.objs[i])
			}
		}
		if over := len(p.stack) - prefetchMax; over > 0 {
			p.stack = append(p.stack[:0], p.stack[over:]...)
		}
		p.some.Store(len(p.stack) > 0)
		p.drop.Reset(readyRest)
	}
	p.mu.Unlock()
}

// step looks into one directory; false: there is none to look into.
func (p *prefetcher) step() bool {
	o := p.next()
	if o == nil {
		return false
	}
	p.fetch(o)
	return true
}

// next returns the directory to look into; nil if there is none.
func (p *prefetcher) next() *scanObj {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.stack) > 0 && len(p.ready) < readyMax {
		o := p.stack[len(p.stack)-1]
		p.stack = p.stack[:len(p.stack)-1]
		if o.dir.listing.Load() == nil {
			return o
		}
	}
	p.some.Store(false) // until the next directory is listed
	return nil
}

// fetch looks into a directory. What goes wrong goes wrong again when somebody asks.
func (p *prefetcher) fetch(o *scanObj) {
	if _, err := p.s.list(o); err != nil {
		return
	}
	l := o.dir.listing.Load()
	if l == nil {
		return
	}
	for i := range l.objs {
		f, err := p.s.look(&l.objs[i])
		if err != nil {
			continue
		}
		if !p.keep(&l.objs[i], f) {
			return
		}
	}
}

// keep reports whether there is space for more.
func (p *prefetcher) keep(o *scanObj, f lowerFacts) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ready == nil {
		p.ready = make(map[*scanObj]lowerFacts)
	}
	p.ready[o] = f
	return len(p.ready) < readyMax
}

// take returns what has been found out about an object, once.
func (p *prefetcher) take(o *scanObj) (f lowerFacts, ok bool) {
	if p == nil {
		return f, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if f, ok = p.ready[o]; ok {
		delete(p.ready, o)
	}
	return f, ok
}

// forget drops what nobody has asked for.
func (p *prefetcher) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stack, p.ready = nil, nil
}
