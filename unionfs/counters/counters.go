package counters

import (
	"sync/atomic"
	"syscall"
	"time"
)

const cacheLine = 64

// Counters are those of one server. The zero value does not count time: use [New].
type Counters struct {
	start time.Time

	ops [opCount]op

	_      [cacheLine]byte
	active atomic.Int64 // requests being answered
	most   atomic.Int64 // the most that were
	_      [cacheLine - 16]byte

	read, written atomic.Uint64 // bytes
	_             [cacheLine - 16]byte

	copied, copiedMeta, completed, copiedBytes atomic.Uint64
	passed, cached                             atomic.Uint64
	invalidated, stored                        atomic.Uint64
}

// op counts one operation. Its size is a multiple of a cache line, so that workers
// which answer different operations do not disturb each other.
type op struct {
	buckets [Buckets]atomic.Uint64
	nanos   atomic.Uint64
	errors  [classes]atomic.Uint64
	_       [(cacheLine - (Buckets+1+int(classes))*8%cacheLine) % cacheLine]byte
}

// New returns counters at zero.
func New() *Counters { return &Counters{start: time.Now()} }

// Since is when the counters were zero.
func (c *Counters) Since() time.Time { return c.start }

// Begin notes that a request is there. It returns what [Counters.End] needs.
func (c *Counters) Begin() time.Duration {
	if now := c.active.Add(1); now > c.most.Load() {
		c.newMost(now)
	}
	return time.Since(c.start) // the monotonic clock alone
}

func (c *Counters) newMost(n int64) {
	for most := c.most.Load(); n > most; most = c.most.Load() {
		if c.most.CompareAndSwap(most, n) {
			return
		}
	}
}

// End counts the request with its answer; errno is 0 if that is no error.
func (c *Counters) End(opcode uint32, began time.Duration, errno syscall.Errno) {
	took := time.Since(c.start) - began
	o := &c.ops[slot(opcode)]
	o.buckets[bucketOf(took)].Add(1)
	o.nanos.Add(uint64(took))
	if errno != 0 {
		o.errors[classOf(errno)].Add(1)
	}
	c.active.Add(-1)
}

// Read counts bytes that were given to a program.
func (c *Counters) Read(n int) { c.read.Add(uint64(n)) }

// Written counts bytes that came from a program.
func (c *Counters) Written(n uint32) { c.written.Add(uint64(n)) }

// CopiedUp counts an object that was copied to the upper, with so much of its data.
func (c *Counters) CopiedUp(data int64) {
	c.copied.Add(1)
	c.copiedBytes.Add(uint64(max(data, 0)))
}

// CopiedUpMeta counts a file that was copied to the upper without its data.
func (c *Counters) CopiedUpMeta() {
	c.copied.Add(1)
	c.copiedMeta.Add(1)
}

// Completed counts such a file that has got its data after all.
func (c *Counters) Completed(data int64) {
	c.completed.Add(1)
	c.copiedBytes.Add(uint64(max(data, 0)))
}

// OpenedPassed counts a file that the kernel reads and writes by itself.
func (c *Counters) OpenedPassed() { c.passed.Add(1) }

// OpenedCached counts a file that goes through the page cache of the mount.
func (c *Counters) OpenedCached() { c.cached.Add(1) }

// Invalidated counts a message to the kernel to forget what it knows of an object.
func (c *Counters) Invalidated() { c.invalidated.Add(1) }

// Stored counts a file whose data was handed to the kernel before it was asked for.
func (c *Counters) Stored() { c.stored.Add(1) }
