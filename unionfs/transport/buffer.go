package transport

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// buffer is what a worker reads a request into, and makes the reply in. It is large
// enough for the largest, so it is memory of its own: pages of replies that are never used
// are never there, which the garbage collector does not promise.
//
// Those of requests are always there. If this process is killed while the kernel copies a
// request to a page that is not, the page cannot be had any more, and the request fails with
// EIO (fs/fuse/dev.c: fuse_dev_do_read) instead of being sent to the next server.
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
	b := &buffer{m[:bufferSize:bufferSize], m[bufferSize:], m, number}
	if unix.Madvise(b.in, unix.MADV_POPULATE_WRITE) != nil { // before Linux 5.14
		for i := 0; i < len(b.in); i += os.Getpagesize() {
			b.in[i] = 0
		}
	}
	return b, nil
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
