package unionfs

import (
	"golang.org/x/sys/unix"
)

// lowerTree is the read-only tree that all lowers together make: whiteouts
// applied, directories merged. It never changes, so everything it says may be
// kept. There are two kinds: scan, which reads live directories, and one over
// an index file that knows the merged tree already.
type lowerTree interface {
	root() lowerObj
	// admit returns the inode number of an object that is looked at for the
	// first time, and refuses objects that cannot be shown rightly.
	admit(o lowerObj) (ino uint64, err error)
	// list returns the merged listing of a directory.
	list(dir lowerObj) (lowerList, error)
	// with calls fn with a directory descriptor and a name (or the object's
	// own descriptor and no name) through which o can be reached.
	with(o lowerObj, fn func(dirfd int, name string) error) error
	stat(o lowerObj, st *unix.Stat_t) error
	// open opens a regular file for reading.
	open(o lowerObj) (fd int, err error)
	// layer tells which layer serves o.
	layer(o lowerObj) *layer
	// merged reports whether several layers contribute to the directory o.
	merged(o lowerObj) bool
	close()
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
