package unionfs

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// upperIDs is the first node id of objects born in the upper. Slots of a lower
// tree stay below it.
const upperIDs = 1 << 62

// inode is one object the kernel knows.
type inode struct {
	id   uint64   // node id; immutable
	ino  uint64   // st_ino; changes only when one link of a lower file is copied up, under mu
	typ  uint32   // S_IFMT bits; immutable
	low  lowerObj // the lower object it shows, is merged with, or has its data from; immutable, nil if none
	refs atomic.Int64

	copyMu sync.Mutex

	mu     sync.RWMutex
	upper  bool   // lives in the upper; guarded by mu
	meta   bool   // but its data is still low's; guarded by mu
	origin bool   // it is, or was copied up from, a lower object; guarded by mu
	upID   realID // of an upper object that can have several names; guarded by mu
	orphan orphan // of an upper object without a name; guarded by mu
	// where and more are the object's names. Those of a directory also need
	// FS.renameMu to change, and either to read. Guarded by mu.
	where alias
	more  []alias
	// group, if not nil, says that it is one of several hard links of the
	// lowers; its content is guarded by mu.
	group *linkGroup

	rd, rw  fdSlot       // open for reading; for reading and writing (upper only)
	writers atomic.Int32 // handles that the kernel has open for writing
	// capsGone: the last request removed the capabilities, as the kernel does
	// before root writes.
	capsGone atomic.Bool

	dir *dirState // of a directory; immutable
}

// realID names an object of the upper's file system.
type realID struct{ dev, ino uint64 }

// linkGroup is what hard links of one lower object have in common, copied up or
// not.
type linkGroup struct {
	lower realID // the lower object; immutable
	links uint32 // how many names the union has
	// index is the name in the link index; "" before the copy-up.
	index string
}

// alias is one name of an object. The parent is pinned by it.
type alias struct {
	parent *inode // nil: no name
	name   string
}

func newInode(id, ino uint64, typ uint32, low lowerObj) *inode {
	n := &inode{id: id, ino: ino, origin: low != nil, typ: typ, low: low, orphan: noOrphan}
	n.refs.Store(1)
	if typ == unix.S_IFDIR {
		n.dir = newDirState()
	}
	return n
}

func (n *inode) isDir() bool { return n.dir != nil }

func (n *inode) dtype() uint8 { return uint8(n.typ >> 12) }

// tryRef takes a reference unless the object is being dropped.
func (n *inode) tryRef() bool {
	for {
		r := n.refs.Load()
		if r <= 0 {
			return false
		}
		if n.refs.CompareAndSwap(r, r+1) {
			return true
		}
	}
}

// inUpper reports whether the object lives in the upper.
func (n *inode) inUpper() bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.upper
}

// addAlias records one more name. Preconditions: n.mu is held exclusively; the
// caller has pinned a.parent.
func (n *inode) addAlias(a alias) {
	if n.where.parent == nil {
		n.where = a
		return
	}
	n.more = append(n.more, a)
}

// dropAlias forgets a name and reports whether it was known. The caller unpins
// the parent. Preconditions: n.mu is held exclusively.
func (n *inode) dropAlias(a alias) bool {
	if n.where == a {
		n.where = alias{}
		if l := len(n.more); l > 0 {
			n.where, n.more = n.more[l-1], n.more[:l-1]
		}
		return true
	}
	for i, m := range n.more {
		if m == a {
			n.more = append(n.more[:i], n.more[i+1:]...)
			return true
		}
	}
	return false
}

// hasAlias reports whether a is one of the object's names. Preconditions: n.mu
// is held.
func (n *inode) hasAlias(a alias) bool {
	if n.where == a {
		return true
	}
	for _, m := range n.more {
		if m == a {
			return true
		}
	}
	return false
}

// table maps node ids, and the identity of upper objects that can have several
// names, to inodes.
type table struct {
	shards [64]tableShard
	nextID atomic.Uint64
}

type tableShard struct {
	mu    sync.RWMutex
	nodes map[uint64]*inode // by node id; guarded by mu
	upper map[realID]*inode // guarded by mu
	lower map[realID]*inode // hard links of the lowers; guarded by mu
}

func newTable() *table {
	t := &table{}
	t.nextID.Store(upperIDs)
	for i := range t.shards {
		t.shards[i].nodes = make(map[uint64]*inode)
		t.shards[i].upper = make(map[realID]*inode)
		t.shards[i].lower = make(map[realID]*inode)
	}
	return t
}

func (t *table) shard(key uint64) *tableShard { return &t.shards[key%uint64(len(t.shards))] }

func (t *table) newID() uint64 { return t.nextID.Add(1) }

// get returns the inode of a node id the kernel holds.
func (t *table) get(id uint64) *inode {
	s := t.shard(id)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.nodes[id]
}

// idFor returns a node id for an object of a lower tree: its slot, unless a
// forged redirect shows it at two places.
func (t *table) idFor(low lowerObj) uint64 {
	if t.get(low.slot()) != nil {
		return t.newID()
	}
	return low.slot()
}

// add registers n under its node id and, if it can have several names, its
// identity. It fails if another live object has one of them: n is then a second
// look at the same file, and the caller looks again.
func (t *table) add(n *inode) bool {
	ok := t.addTo(n, n.upID, upperObjects) &&
		(n.group == nil || t.addTo(n, n.group.lower, lowerLinks)) && t.addID(n)
	if !ok {
		t.remove(n)
	}
	return ok
}

func (t *table) addID(n *inode) bool {
	s := t.shard(n.id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if have := s.nodes[n.id]; have != nil && have != n && have.refs.Load() > 0 {
		return false
	}
	s.nodes[n.id] = n
	return true
}

func upperObjects(s *tableShard) map[realID]*inode { return s.upper }
func lowerLinks(s *tableShard) map[realID]*inode   { return s.lower }

// byReal returns a referenced inode for an object of the upper, or for one that
// has several names in the lowers; or nil.
func (t *table) byReal(id realID, in func(*tableShard) map[realID]*inode) *inode {
	s := t.shard(id.ino)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := in(s)[id]; n != nil && n.tryRef() {
		return n
	}
	return nil
}

// addTo registers n, if it has such an identity.
func (t *table) addTo(n *inode, id realID, in func(*tableShard) map[realID]*inode) bool {
	if id == (realID{}) {
		return true
	}
	s := t.shard(id.ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if have := in(s)[id]; have != nil && have != n && have.refs.Load() > 0 {
		return false
	}
	in(s)[id] = n
	return true
}

func (t *table) remove(n *inode) {
	s := t.shard(n.id)
	s.mu.Lock()
	if s.nodes[n.id] == n {
		delete(s.nodes, n.id)
	}
	s.mu.Unlock()
	t.removeFrom(n, n.upID, upperObjects)
	if n.group != nil {
		t.removeFrom(n, n.group.lower, lowerLinks)
	}
}

func (t *table) removeFrom(n *inode, id realID, in func(*tableShard) map[realID]*inode) {
	s := t.shard(id.ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if in(s)[id] == n {
		delete(in(s), id)
	}
}

// unref gives back count references. The last one drops the object: nobody
// can reach it any more, so its fields need no lock.
func (fs *FS) unref(n *inode, count int64) {
	for n != nil && n.refs.Add(-count) == 0 {
		if n.where.parent != nil {
			n.where.parent.dir.forget(n, n.where.name)
		}
		for _, a := range n.more {
			a.parent.dir.forget(n, a.name)
		}
		fs.nodes.remove(n)
		fs.fds.drop(&n.rd)
		fs.fds.drop(&n.rw)
		if n.isDir() {
			fs.fds.drop(&n.dir.fd)
		}
		fs.dropOrphan(n.orphan)
		n.orphan = noOrphan
		for _, a := range n.more {
			fs.unref(a.parent, 1)
		}
		n, count = n.where.parent, 1
	}
}
