package unionfs

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// fdCache bounds the number of descriptors that are open without need. A
// descriptor that is in use is never closed; one that is not may be, and is
// opened again by whoever needs it next.
type fdCache struct {
	mu   sync.Mutex
	max  int
	n    int      // open descriptors in the list
	head fdHandle // ring; head.next is the most recently used
}

// fdSlot is where an object keeps its descriptor. Guarded by fdCache.mu.
type fdSlot struct{ h *fdHandle }

// fdHandle is a descriptor in use: fd stays valid until release.
type fdHandle struct {
	fd         int
	cache      *fdCache // nil: not the cache's to close
	rw         bool     // open for writing too
	refs       int      // guarded by cache.mu
	slot       *fdSlot  // nil once the object has let go; guarded by cache.mu
	prev, next *fdHandle
}

func newFdCache(limit int) *fdCache {
	c := &fdCache{max: max(limit, 16)}
	c.head.prev, c.head.next = &c.head, &c.head
	return c
}

// borrowed wraps a descriptor that somebody else keeps open.
func borrowed(fd int) *fdHandle { return &fdHandle{fd: fd} }

// once wraps a descriptor that is closed when it is released.
func (c *fdCache) once(fd int) *fdHandle { return &fdHandle{fd: fd, cache: c, refs: 1} }

func (c *fdCache) unlink(h *fdHandle) {
	h.prev.next, h.next.prev = h.next, h.prev
	h.prev, h.next = nil, nil
	c.n--
}

func (c *fdCache) push(h *fdHandle) {
	h.prev, h.next = &c.head, c.head.next
	h.prev.next, h.next.prev = h, h
	c.n++
}

// peek returns the slot's descriptor if it is open.
func (c *fdCache) peek(s *fdSlot) *fdHandle {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.use(s)
}

// use takes a reference. Preconditions: c.mu is held.
func (c *fdCache) use(s *fdSlot) *fdHandle {
	h := s.h
	if h == nil {
		return nil
	}
	h.refs++
	if c.head.next != h {
		c.unlink(h)
		c.push(h)
	}
	return h
}

// get returns the slot's descriptor, opening it if needed; with rw, one for
// writing too, which then takes the place of one that is not. open is called
// without locks and once more, after a clean-out, if the process has run out of
// descriptors.
func (c *fdCache) get(s *fdSlot, rw bool, open func() (int, error)) (*fdHandle, error) {
	if h := c.peek(s); h != nil {
		if h.rw || !rw {
			return h, nil
		}
		h.release()
	}
	fd, err := open()
	if err == unix.EMFILE || err == unix.ENFILE {
		c.shrink(0)
		fd, err = open()
	}
	if err != nil {
		return nil, err
	}
	return c.put(s, fd, rw), nil
}

// put stores fd in the slot and returns it in use. If the slot has been filled
// meanwhile with one that will do, fd is closed and that one is returned.
func (c *fdCache) put(s *fdSlot, fd int, rw bool) *fdHandle {
	c.mu.Lock()
	var old *fdHandle
	if h := c.use(s); h != nil {
		if h.rw || !rw {
			c.mu.Unlock()
			fsat.Close(fd)
			return h
		}
		c.unlink(h)
		h.slot = nil
		old = h
	}
	h := &fdHandle{fd: fd, rw: rw, cache: c, refs: 1, slot: s}
	s.h = h
	c.push(h)
	over := c.n > c.max
	c.mu.Unlock()
	if old != nil {
		old.release()
	}
	if over {
		c.shrink(c.max)
	}
	return h
}

// take gives the slot's descriptor to the caller, -1 if there is none or somebody
// uses it.
func (c *fdCache) take(s *fdSlot) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := s.h
	if h == nil || h.refs > 0 {
		return -1
	}
	c.unlink(h)
	s.h, h.slot = nil, nil
	return h.fd
}

// shrink closes unused descriptors, the longest unused first, until at most
// target are left.
func (c *fdCache) shrink(target int) {
	var victims []int
	c.mu.Lock()
	for h := c.head.prev; h != &c.head && c.n > target; {
		prev := h.prev
		if h.refs == 0 {
			c.unlink(h)
			h.slot.h = nil
			victims = append(victims, h.fd)
		}
		h = prev
	}
	c.mu.Unlock()
	for _, fd := range victims {
		fsat.Close(fd)
	}
}

// drop makes the object let go of its descriptor, which is closed when its last
// user releases it.
func (c *fdCache) drop(s *fdSlot) {
	c.mu.Lock()
	h := s.h
	if h == nil {
		c.mu.Unlock()
		return
	}
	s.h = nil
	h.slot = nil
	c.unlink(h)
	closeNow := h.refs == 0
	c.mu.Unlock()
	if closeNow {
		fsat.Close(h.fd)
	}
}

// closeAll drops everything; nothing may be in use any more.
func (c *fdCache) closeAll() { c.shrink(0) }

func (h *fdHandle) release() {
	c := h.cache
	if c == nil {
		return
	}
	c.mu.Lock()
	h.refs--
	closeNow := h.refs == 0 && h.slot == nil
	c.mu.Unlock()
	if closeNow {
		fsat.Close(h.fd)
	}
}
