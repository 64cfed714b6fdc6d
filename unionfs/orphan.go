package unionfs

import (
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// orphan is what keeps an object of the upper reachable that has lost its last
// known name while the kernel knows it: a descriptor, or, when there are many,
// a name in the workdir, which the next mount sweeps away.
type orphan struct {
	fd   int // -1: none
	name string
}

var noOrphan = orphan{fd: -1}

func (o orphan) exists() bool { return o.fd >= 0 || o.name != "" }

// openOrphan makes an orphan of the object n, which has the given name in the
// upper and is about to lose it; none if it needs none. Preconditions: n.mu is
// held.
func (fs *FS) openOrphan(n *inode, dirfd int, name string) (orphan, error) {
	e := n.extra()
	if !n.upper || e.orphan.exists() || len(e.more) > 0 || e.group != nil && e.group.links > 1 {
		return noOrphan, nil
	}
	if !n.isDir() && fs.orphans.Load() >= fs.maxOrphans {
		temp := fs.work.TempName()
		if fsat.Link(dirfd, name, fs.work.Fd(), temp) == nil {
			return orphan{fd: -1, name: temp}, nil
		}
	}
	if n.typ() == unix.S_IFREG && !n.meta {
		if fd := fs.fds.take(&n.fd); fd >= 0 {
			return fs.orphanOf(fd), nil
		}
	}
	fd, err := fsat.OpenName(dirfd, name, unix.O_PATH, 0)
	if err == unix.EMFILE || err == unix.ENFILE {
		fs.fds.shrink(0)
		fd, err = fsat.OpenName(dirfd, name, unix.O_PATH, 0)
	}
	if err != nil {
		return noOrphan, err
	}
	return fs.orphanOf(fd), nil
}

// orphanOf makes an orphan of an object that has no name but this descriptor,
// which it takes over.
func (fs *FS) orphanOf(fd int) orphan {
	if fs.orphans.Load() >= fs.maxOrphans {
		temp := fs.work.TempName()
		if fsat.LinkFd(fd, fs.work.Fd(), temp) == nil {
			fsat.Close(fd)
			return orphan{fd: -1, name: temp}
		}
	}
	fs.orphans.Add(1)
	return orphan{fd: fd}
}

// dropOrphan lets the object go.
func (fs *FS) dropOrphan(o orphan) {
	if o.fd >= 0 {
		fsat.Close(o.fd)
		fs.orphans.Add(-1)
	}
	if o.name != "" {
		fs.work.Remove(o.name)
	}
}

// loseName forgets a name of n that is gone; o is from openOrphan and taken
// over. It reports whether the name was known, and so pinned its directory.
// Preconditions: n.mu is held exclusively.
func (fs *FS) loseName(n *inode, a alias, o orphan) bool {
	fs.renameMu.Lock()
	known := n.dropAlias(a)
	fs.renameMu.Unlock()
	if o.exists() && n.where.parent == nil && !n.extra().orphan.exists() {
		n.ownExtra().orphan = o
	} else {
		fs.dropOrphan(o)
	}
	return known
}
