package unionfs

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/ledger"
)

// upperIDs is the first node id of objects born in the upper. Slots of a lower
// tree stay below it.
const upperIDs = 1 << 62

// inode is one object the kernel knows. There may be millions, so what few of
// them need is in extra.
type inode struct {
	id   uint64   // node id; immutable
	ino  uint64   // st_ino; changes only when one link of a lower file is copied up, under mu
	low  lowerObj // the lower object it shows, is merged with, or has its data from; immutable, nil if none
	refs atomic.Int64

	mu sync.RWMutex
	// where is one of the object's names; others are in extra. A directory's
	// also needs FS.renameMu to change, and either to read. Guarded by mu.
	where alias

	fd  fdSlot    // open for reading, or in the upper for reading and writing
	dir *dirState // of a directory; immutable
	ext atomic.Pointer[inodeExtra]

	// told is the thread that the kernel has been given attributes of n for since
	// they were last invalidated; see tell.
	told atomic.Uint32

	rec    ledger.Ref // of where, in the ledger; guarded by mu
	dtype  uint8      // DT_*; immutable
	prot   protection // guarded by mu
	upper  bool       // lives in the upper; guarded by mu
	meta   bool       // but its data is still low's; guarded by mu
	origin bool       // it is, or was copied up from, a lower object; guarded by mu
	linked bool       // the lowers have it under several names; immutable
}

// inodeExtra is what an inode has in addition that is copied up, has several
// names, or none.
type inodeExtra struct {
	copyMu sync.Mutex
	// copied: copied up, in whole or in part, and not synced since.
	copied atomic.Bool
	io     atomic.Pointer[fileIO] // of a file that has been opened
	// writers counts the handles that the kernel has open for writing.
	writers atomic.Int32
	// capsGone: the last request removed the capabilities, as the kernel does
	// before root writes.
	capsGone atomic.Bool
	// noAtime: reading it changes no access time, whatever the mount says.
	noAtime atomic.Bool
	// lookups counts the references that the kernel has from this server, if it is
	// not the first one; see resume.go.
	lookups atomic.Int64
	// revived: one of them stands for those from an earlier server.
	revived atomic.Bool

	upID   realID  // of an object in the upper that has several names; guarded by inode.mu
	orphan *orphan // of an object without a known name; guarded by inode.mu
	more   []named // the names besides inode.where; guarded by inode.mu
	// group, if not nil, says that it is one of several hard links of the
	// lowers; its content is guarded by inode.mu.
	group *linkGroup
}

// noExtra is read where an inode has none.
var noExtra inodeExtra

// extra returns what there is, for reading.
func (n *inode) extra() *inodeExtra {
	if e := n.ext.Load(); e != nil {
		return e
	}
	return &noExtra
}

// ownExtra is extra for writing, and for its mutex.
func (n *inode) ownExtra() *inodeExtra {
	if e := n.ext.Load(); e != nil {
		return e
	}
	n.ext.CompareAndSwap(nil, &inodeExtra{})
	return n.ext.Load()
}

// typ returns the S_IFMT bits.
func (n *inode) typ() uint32 { return uint32(n.dtype) << 12 }

// linkGroup is what hard links of one lower object have in common, copied up or
// not.
type linkGroup struct {
	lower realID // the lower object; immutable
	links uint32 // how many names the union has
	// index is the name in the link index; "" before the copy-up.
	index string
}

// realID names an object of a real file system.
type realID struct{ dev, ino uint64 }

// alias is one name of an object. The parent is pinned by it.
type alias struct {
	parent *inode // nil: no name
	name   string
}

// named is an alias with its record in the ledger.
type named struct {
	alias
	rec ledger.Ref
}

func newInode(id, ino uint64, typ uint32, low lowerObj) *inode {
	n := &inode{id: id, ino: ino, origin: low != nil, dtype: uint8(typ >> 12), low: low}
	n.refs.Store(1)
	if typ == unix.S_IFDIR {
		n.dir = newDirState()
	}
	return n
}

func (n *inode) isDir() bool { return n.dir != nil }

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

// inoNow returns the inode number.
func (n *inode) inoNow() uint64 {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.ino
}

// inUpper reports whether the object lives in the upper.
func (n *inode) inUpper() bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.upper
}

// addAlias records one more name. Preconditions: n.mu is held exclusively; the
// caller has pinned a.parent.
func (fs *FS) addAlias(n *inode, a alias) {
	rec := fs.record(n, a)
	if n.where.parent == nil {
		n.where, n.rec = a, rec
		return
	}
	e := n.ownExtra()
	e.more = append(e.more, named{a, rec})
}

// dropAlias forgets a name and reports whether it was known. The caller unpins
// the parent. Preconditions: n.mu is held exclusively.
func (fs *FS) dropAlias(n *inode, a alias) bool {
	e := n.extra()
	if n.where == a {
		fs.ledger.Drop(n.rec)
		n.where, n.rec = alias{}, 0
		if l := len(e.more); l > 0 {
			n.where, n.rec, e.more = e.more[l-1].alias, e.more[l-1].rec, e.more[:l-1]
		}
		return true
	}
	for i, m := range e.more {
		if m.alias == a {
			fs.ledger.Drop(m.rec)
			e.more = append(e.more[:i], e.more[i+1:]...)
			return true
		}
	}
	return false
}

// moveAlias gives a name of n another place, and reports whether it was known, as
// dropAlias does; is is known from then on in any case. Preconditions: as for both.
func (fs *FS) moveAlias(n *inode, was, is alias) bool {
	if n.where != was {
		fs.addAlias(n, is)
		return fs.dropAlias(n, was)
	}
	// The old record goes last: another server is to find one of them.
	old := n.rec
	n.where, n.rec = is, fs.record(n, is)
	fs.ledger.Drop(old)
	return true
}

// hasAlias reports whether a is one of the object's names. Preconditions: n.mu
// is held.
func (n *inode) hasAlias(a alias) bool {
	if n.where == a {
		return true
	}
	for _, m := range n.extra().more {
		if m.alias == a {
			return true
		}
	}
	return false
}

// table maps node ids, and the identity of upper objects that can have several
// names, to inodes.
type table struct {
	shards [64]tableShard
	// newID returns a node id that no object has had.
	newID func() uint64
}

type tableShard struct {
	mu    sync.RWMutex
	nodes map[uint64]*inode // by node id; guarded by mu
	peak  int               // most entries that nodes has had; guarded by mu
	upper map[realID]*inode // guarded by mu
	lower map[realID]*inode // hard links of the lowers; guarded by mu
}

func newTable() *table {
	t := &table{}
	var last atomic.Uint64
	last.Store(upperIDs)
	t.newID = func() uint64 { return last.Add(1) }
	for i := range t.shards {
		t.shards[i].nodes = make(map[uint64]*inode)
		t.shards[i].upper = make(map[realID]*inode)
		t.shards[i].lower = make(map[realID]*inode)
	}
	return t
}

// size is how many objects the kernel knows, and by how many names.
func (t *table) size() (objects, names int) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		nodes := slices.Collect(maps.Values(s.nodes))
		s.mu.RUnlock()
		objects += len(nodes)
		for _, n := range nodes {
			n.mu.RLock()
			names += 1 + len(n.extra().more)
			n.mu.RUnlock()
		}
	}
	return objects, names
}

func (t *table) shard(key uint64) *tableShard { return &t.shards[key%uint64(len(t.shards))] }

// get returns the inode of a node id the kernel holds.
func (t *table) get(id uint64) *inode {
	s := t.shard(id)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.nodes[id]
}

// add registers n under its node id and, if it can have several names, its
// identity. It fails if another live object has one of them: n is then a second
// look at the same file, and the caller looks again.
func (t *table) add(n *inode) bool {
	e := n.extra()
	ok := t.addTo(n, e.upID, upperObjects) &&
		(e.group == nil || t.addTo(n, e.group.lower, lowerLinks)) && t.addID(n)
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
	s.peak = max(s.peak, len(s.nodes))
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
		s.shrink()
	}
	s.mu.Unlock()
	e := n.extra()
	t.removeFrom(n, e.upID, upperObjects)
	if e.group != nil {
		t.removeFrom(n, e.group.lower, lowerLinks)
	}
}

// shrink makes the map anew when most of it is gone: it never gets smaller by
// itself. Preconditions: mu is held exclusively.
func (s *tableShard) shrink() {
	const small = 256
	if s.peak < small || len(s.nodes) > s.peak/8 {
		return
	}
	nodes := make(map[uint64]*inode, len(s.nodes))
	maps.Copy(nodes, s.nodes)
	s.nodes, s.peak = nodes, len(nodes)
}

func (t *table) removeFrom(n *inode, id realID, in func(*tableShard) map[realID]*inode) {
	if id == (realID{}) {
		return
	}
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
			fs.ledger.Drop(n.rec)
		}
		for _, a := range n.extra().more {
			a.parent.dir.forget(n, a.name)
			fs.ledger.Drop(a.rec)
		}
		fs.nodes.remove(n)
		fs.trim.note()
		fs.fds.drop(&n.fd)
		if n.isDir() && n.low != nil {
			fs.lowers.forget(n.low)
		}
		if e := n.ext.Load(); e != nil {
			if f := e.io.Load(); f != nil {
				fs.unregister(f)
				fs.ledger.Drop(f.rec)
			}
			fs.dropOrphan(e.orphan)
			e.orphan = nil
		}
		for _, a := range n.extra().more {
			fs.unref(a.parent, 1)
		}
		n, count = n.where.parent, 1
	}
}
