package unionfs

import (
	"runtime/debug"
	"sync/atomic"
	"time"
)

// trimmer gives memory back to the system after the kernel has forgotten many
// inodes. The garbage collector alone would keep it, until much later, for new
// ones.
type trimmer struct {
	dropped atomic.Uint64
	timer   *time.Timer
}

const (
	trimEvery = 8192            // dropped inodes
	trimDelay = 2 * time.Second // after the last such lot: they come in bursts
)

func newTrimmer() *trimmer {
	t := &trimmer{timer: time.AfterFunc(time.Hour, debug.FreeOSMemory)}
	t.timer.Stop()
	return t
}

// note counts one dropped inode.
func (t *trimmer) note() {
	if t.dropped.Add(1)%trimEvery == 0 {
		t.timer.Reset(trimDelay)
	}
}

func (t *trimmer) stop() { t.timer.Stop() }
