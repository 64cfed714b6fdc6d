package unionfs

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// lowerTree is the read-only tree that all lowers together make: whiteouts
// applied, directories merged. It never changes, so everything it says may be
// kept. There are two kinds: scan, which reads live directories, and one over
// an index file that knows the merged tree already.
type lowerTree interface {
	root() lowerObj
	// admit looks at an object for the first time, and refuses those that
	// cannot be shown rightly.
	admit(o lowerObj) (lowerFacts, error)
	// lookup finds the object of an absolute path, "" being the root.
	lookup(path string) (lowerObj, error)
	// path is the inverse of lookup.
	path(o lowerObj) string
	// origin describes the object for ever, see fsat.Origin.
	origin(o lowerObj) ([]byte, error)
	// byOrigin looks at the object that origin has described, if it can be
	// found, wherever it is.
	byOrigin(origin []byte) (facts lowerFacts, ok bool)
	// list returns the merged listing of a directory.
	list(dir lowerObj) (lowerList, error)
	// with calls fn with a directory descriptor and a name (or the object's
	// own descriptor and no name) through which o can be reached.
	with(o lowerObj, fn func(dirfd int, name string) error) error
	stat(o lowerObj, st *unix.Stat_t) error
	// open opens a regular file for reading.
	open(o lowerObj) (fd int, err error)
	// dataElsewhere reports whether a file's data and attributes are two
	// files, which may differ in size.
	dataElsewhere(o lowerObj) bool
	// bare reports that o is known to have no extended attributes.
	bare(o lowerObj) bool
	// sharesSlots reports whether several names of one file have one slot.
	sharesSlots() bool
	// walked notes that somebody has begun to read a directory together with the
	// attributes of what lies in it.
	walked(dir lowerObj)
	// step does a piece of work that requests will need, if hasWork.
	step()
	hasWork() bool
	// layer tells which layer serves o.
	layer(o lowerObj) *layer
	// merged reports whether several layers contribute to the directory o,
	// which has been admitted.
	merged(o lowerObj) bool
	// forget drops what is kept of a directory that nobody looks into any more.
	forget(dir lowerObj)
	close()
}

// lowerFacts is what admit learns.
type lowerFacts struct {
	ino   uint64 // to show
	links uint32 // that the layer's file system counts; of a directory 0
	id    realID
	prot  protection
	// st are the attributes of the object, if whole says so.
	st    unix.Stat_t
	whole bool
}

// lowerObj is one object of a lowerTree.
type lowerObj interface {
	slot() uint64 // its node id, the same for the whole life of the mount
	ino() uint64  // the inode number, as far as the listing tells
	typ() uint8   // DT_*
}

// lowerList is the merged listing of one lower directory, sorted by name.
type lowerList interface {
	length() int
	at(pos int) (name string, o lowerObj)
	find(name string) (pos int, ok bool)
}

// lookupIn implements lowerTree.lookup by its other methods.
func lookupIn(t lowerTree, path string) (lowerObj, error) {
	o := t.root()
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if name == "" {
			continue
		}
		if o.typ() != unix.DT_DIR {
			return nil, unix.ENOENT
		}
		list, err := t.list(o)
		if err != nil {
			return nil, err
		}
		pos, ok := list.find(name)
		if !ok {
			return nil, unix.ENOENT
		}
		_, o = list.at(pos)
	}
	return o, nil
}

// openIn implements lowerTree.open for a file whose data is where it is itself.
func openIn(t lowerTree, o lowerObj) (fd int, err error) {
	err = t.with(o, func(dirfd int, name string) (e error) {
		fd, e = t.layer(o).openData(dirfd, name)
		return e
	})
	return fd, err
}

// originIn implements lowerTree.origin by its other methods.
func originIn(t lowerTree, o lowerObj) (origin []byte, err error) {
	l := t.layer(o)
	if !l.handles {
		return nil, unix.EOPNOTSUPP
	}
	err = t.with(o, func(dirfd int, name string) (e error) {
		origin, e = fsat.Origin(dirfd, name, l.uuid)
		return e
	})
	return origin, err
}

// byOriginIn implements lowerTree.byOrigin for layers that lie side by side.
func byOriginIn(layers []*layer, inos *inoMap, origin []byte) (facts lowerFacts, ok bool) {
	tried := make(map[uint64]bool, 1)
	for _, l := range layers {
		if tried[l.dev] || !l.handles {
			continue
		}
		tried[l.dev] = true
		fd, err := fsat.OpenOrigin(l.root, l.uuid, origin)
		if err != nil {
			continue
		}
		facts, err := inos.factsAt(fd, "")
		fsat.Close(fd)
		if err == nil {
			return facts, true
		}
	}
	return lowerFacts{}, false
}
