package transport

import (
	"sync"

	"golang.org/x/sys/unix"
)

// buffer is what a worker reads a request into, and makes the reply in. It is large
// enough for the largest, so it is memory of its own: pages that are never used are
// never there, which the garbage collector does not promise.
type buffer struct {
	in, out []byte
	memory  []byte
	number  int // among all there are
}

const bufferSize = maxWrite + headroom

func newBuffer(number int) (*buffer, error) {
	m, err := unix.Mmap(-1, 0, 2*bufferSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	return &buffer{m[:bufferSize:bufferSize], m[bufferSize:], m, number}, nil
}

// bufferPool keeps a few for workers to come.
type bufferPool struct {
	mu   sync.Mutex
	idle []*buffer // guarded by mu
	free []int     // numbers that no buffer has any more; guarded by mu
	next int       // the first that none has had; guarded by mu
}

func (p *bufferPool) get() (*buffer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle); n > 0 {
		b := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return b, nil
	}
	if n := len(p.free); n > 0 {
		number := p.free[n-1]
		p.free = p.free[:n-1]
		return newBuffer(number)
	}
	p.next++
	return newBuffer(p.next - 1)
}

func (p *bufferPool) put(b *buffer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.idle) <= idleWorkers {
		p.idle = append(p.idle, b)
		return
	}
	p.free = append(p.free, b.number)
	_ = unix.Munmap(b.memory) // a mapping of our own
}

func (p *bufferPool) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.idle {
		_ = unix.Munmap(b.memory)
	}
	p.idle = nil
}
