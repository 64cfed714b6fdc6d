package unionfs

import (
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// trimmer gives memory back to the system after the kernel has come to know or
// has forgotten many inodes. The garbage collector alone would keep what listing
// directories has left behind, or the inodes themselves, until much later.
type trimmer struct {
	seen  atomic.Uint64
	timer *time.Timer
}

const (
	trimEvery = 8192            // inodes
	trimDelay = 2 * time.Second // after the last such lot: they come in bursts
)

func newTrimmer() *trimmer {
	t := &trimmer{timer: time.AfterFunc(time.Hour, trim)}
	t.timer.Stop()
	return t
}

// trim collects twice: what lies in a sync.Pool, such as the buffers of those who
// answered a burst of requests, survives the first time.
func trim() {
	runtime.GC()
	debug.FreeOSMemory()
}

// note counts one inode that has come or gone.
func (t *trimmer) note() {
	if t.seen.Add(1)%trimEvery == 0 {
		t.timer.Reset(trimDelay)
	}
}

func (t *trimmer) stop() { t.timer.Stop() }
