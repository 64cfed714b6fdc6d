package unionfs

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// Keeper keeps descriptors of objects without a name for the next server. What it cannot
// keep is lost when this one dies.
type Keeper interface {
	// Keep takes a copy of the descriptor. When it returns the copy outlives this process.
	Keep(node uint64, fd int)
	// Drop lets go of the copy.
	Drop(node uint64)
}

// lateAfter is how long an object without a name that nobody has open may live before
// the keeper is told of it. Most live for microseconds.
const lateAfter = 50 * time.Millisecond

// keeping is what the keeper has, or will have.
type keeping struct {
	to Keeper // nil: nobody; immutable while requests are answered

	mu    sync.Mutex
	held  map[uint64]int // descriptors that the keeper has copies of, by node id; guarded by mu
	late  map[uint64]int // others; guarded by mu
	timer *time.Timer    // for those; guarded by mu

	last atomic.Int64 // when the keeper was last told to drop one, in nanoseconds since 1970
}

// letsGo reports whether the keeper may be about to close a descriptor.
func (k *keeping) letsGo() bool { return time.Since(time.Unix(0, k.last.Load())) < 2*maxSpacePause }

// SetKeeper says who keeps descriptors. Call it before the first request.
func (fs *FS) SetKeeper(k Keeper) {
	fs.kept.to = k
	fs.kept.held, fs.kept.late = make(map[uint64]int), make(map[uint64]int)
}

// add is for a new object without a name; now: the keeper has it when add returns.
func (k *keeping) add(node uint64, fd int, now bool) {
	if k.to == nil {
		return
	}
	k.mu.Lock()
	if now {
		k.held[node] = fd
	} else {
		k.late[node] = fd
		if k.timer == nil {
			k.timer = time.AfterFunc(lateAfter, k.flush)
		} else if len(k.late) == 1 {
			k.timer.Reset(lateAfter)
		}
	}
	k.mu.Unlock()
	if now {
		k.to.Keep(node, fd)
	}
}

// drop is for an object that goes, before its descriptor is closed.
func (k *keeping) drop(node uint64) {
	if k.to == nil {
		return
	}
	k.mu.Lock()
	_, held := k.held[node]
	delete(k.held, node)
	delete(k.late, node)
	k.mu.Unlock()
	if held {
		k.last.Store(time.Now().UnixNano())
		k.to.Drop(node)
	}
}

// flush hands over those that have stayed.
func (k *keeping) flush() {
	for {
		node, fd := uint64(0), -1
		k.mu.Lock()
		for id, its := range k.late {
			delete(k.late, id)
			k.held[id] = its
			// It may go while it is sent.
			if d, err := unix.FcntlInt(uintptr(its), unix.F_DUPFD_CLOEXEC, 3); err == nil {
				node, fd = id, d
			}
			break
		}
		k.mu.Unlock()
		if fd < 0 {
			return
		}
		k.to.Keep(node, fd)
		fsat.Close(fd)
		k.mu.Lock()
		_, held := k.held[node]
		k.mu.Unlock()
		if !held {
			k.to.Drop(node)
		}
	}
}

// Kept calls fn for every descriptor that has to be kept, for a keeper that takes over
// from another one. Meanwhile none goes.
func (fs *FS) Kept(fn func(node uint64, fd int)) {
	k := &fs.kept
	k.mu.Lock()
	defer k.mu.Unlock()
	for node, fd := range k.held {
		fn(node, fd)
	}
	for node, fd := range k.late {
		fn(node, fd)
		k.held[node] = fd
	}
	clear(k.late)
}
