package unionfs

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
)

// orphan is what keeps an object reachable that has lost its last known name while the
// kernel knows it. One of the upper has a descriptor, or, when there are many, a name in
// the workdir, which the next mount sweeps away; one of the lowers needs nothing but its
// record, and one of several hard links is in the link index.
type orphan struct {
	fd   int // -1: none
	name string
	node uint64        // whose
	recs [2]ledger.Ref // for another server
}

// openOrphan makes an orphan of the object n, which has the given name in the
// upper and is about to lose it; nil if it needs none. Preconditions: n.mu is
// held exclusively.
func (fs *FS) openOrphan(n *inode, dirfd int, name string) (*orphan, error) {
	e := n.extra()
	switch {
	case e.orphan != nil || len(e.more) > 0:
		return nil, nil
	case !n.upper:
		return fs.recordOnly(n, ledger.Lower, ""), nil
	case e.group != nil && e.group.links > 1:
		return fs.recordOnly(n, ledger.Index, e.group.index), nil
	}
	if !n.isDir() && fs.orphans.Load() >= fs.maxOrphans {
		temp := fs.work.TempName()
		if fsat.Link(dirfd, name, fs.work.Fd(), temp) == nil {
			return fs.namedOrphan(n, temp), nil
		}
	}
	if n.typ() == unix.S_IFREG && !n.meta {
		if fd := fs.fds.take(&n.fd); fd >= 0 {
			return fs.orphanOf(n, fd, fs.isOpen(n)), nil
		}
	}
	fd, err := fsat.OpenName(dirfd, name, unix.O_PATH, 0)
	if err == unix.EMFILE || err == unix.ENFILE {
		fs.fds.shrink(0)
		fd, err = fsat.OpenName(dirfd, name, unix.O_PATH, 0)
	}
	if err != nil {
		return nil, err
	}
	return fs.orphanOf(n, fd, fs.isOpen(n)), nil
}

// recordOnly makes an orphan of an object that only another server could not find.
func (fs *FS) recordOnly(n *inode, kind ledger.Kind, text string) *orphan {
	if fs.ledger == nil {
		return nil
	}
	return &orphan{fd: -1, node: n.id, recs: fs.loose(n, kind, text)}
}

// orphanOf makes an orphan of the object n, which has no name, or soon will have none, but
// this descriptor, which it takes over. open: the kernel has it open, so it must not be lost
// when this process ends; others are taken care of when they live for long.
func (fs *FS) orphanOf(n *inode, fd int, open bool) *orphan {
	if fs.orphans.Load() >= fs.maxOrphans {
		temp := fs.work.TempName()
		if fsat.LinkFd(fd, fs.work.Fd(), temp) == nil {
			fsat.Close(fd)
			return fs.namedOrphan(n, temp)
		}
	}
	fs.orphans.Add(1)
	o := &orphan{fd: fd, node: n.id, recs: fs.loose(n, ledger.Loose, fs.remains(n, fd))}
	fs.kept.add(o.node, fd, open)
	return o
}

// remains describes a directory that is about to be removed. It is empty, so that is all
// there is to it: until the keeper has it another server can make one that is the same.
func (fs *FS) remains(n *inode, fd int) string {
	var st unix.Stat_t
	if fs.ledger == nil || !n.isDir() || fsat.Fstat(fd, &st) != nil {
		return ""
	}
	b, err := binary.Append(nil, binary.NativeEndian, []int64{
		int64(st.Mode & 0o7777), int64(st.Uid), int64(st.Gid), st.Atim.Sec, st.Atim.Nsec, st.Mtim.Sec, st.Mtim.Nsec,
	})
	if err != nil {
		return ""
	}
	return string(b)
}

// removedDir makes a removed directory that is as remains says.
func (fs *FS) removedDir(remains string) (fd int, err error) {
	var v [7]int64
	if _, err := binary.Decode([]byte(remains), binary.NativeEndian, &v); err != nil {
		return -1, errStale
	}
	name := fs.work.TempName()
	if err := fsat.Mkdir(fs.work.Fd(), name, 0o700); err != nil {
		return -1, err
	}
	defer fs.work.Remove(name)
	if fd, err = fsat.OpenName(fs.work.Fd(), name, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return -1, err
	}
	err = errors.Join(
		fsat.Chown(fd, "", int(v[1]), int(v[2])), fsat.Chmod(fd, "", uint32(v[0])),
		fsat.Utimes(fd, "", [2]unix.Timespec{{Sec: v[3], Nsec: v[4]}, {Sec: v[5], Nsec: v[6]}}))
	if err != nil {
		fsat.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (fs *FS) namedOrphan(n *inode, name string) *orphan {
	return &orphan{fd: -1, name: name, node: n.id, recs: fs.loose(n, ledger.Work, name)}
}

// dropOrphan lets the object go.
func (fs *FS) dropOrphan(o *orphan) {
	if o == nil {
		return
	}
	if o.fd >= 0 {
		fs.kept.drop(o.node)
		fsat.Close(o.fd)
		fs.orphans.Add(-1)
	}
	if o.name != "" {
		fs.work.Remove(o.name)
	}
	for _, r := range o.recs {
		fs.ledger.Drop(r)
	}
}

// loseName forgets a name of n that is gone; o is from openOrphan and taken
// over. It reports whether the name was known, and so pinned its directory.
// Preconditions: n.mu is held exclusively.
func (fs *FS) loseName(n *inode, a alias, o *orphan) bool {
	fs.renameMu.Lock()
	known := fs.dropAlias(n, a)
	fs.renameMu.Unlock()
	if o != nil && n.where.parent == nil && n.extra().orphan == nil {
		n.ownExtra().orphan = o
	} else {
		fs.dropOrphan(o)
	}
	return known
}
