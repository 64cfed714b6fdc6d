package snapshotter

import (
	"context"
	"sync"
)

// locks keeps two calls from changing the same snapshot at once, by its name.
type locks struct {
	mu   sync.Mutex
	held map[string]*nameLock
}

type nameLock struct {
	c     chan struct{} // holds one element while it is taken
	users int           // who has it or waits for it
}

// take waits for the lock on a name, or the end of ctx.
func (l *locks) take(ctx context.Context, name string) (release func(), err error) {
	l.mu.Lock()
	n := l.held[name]
	if n == nil {
		if l.held == nil {
			l.held = map[string]*nameLock{}
		}
		n = &nameLock{c: make(chan struct{}, 1)}
		l.held[name] = n
	}
	n.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
	select {
	case n.c <- struct{}{}:
		return func() { <-n.c; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
