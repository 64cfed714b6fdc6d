package unionfs

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
)

// ensureUpper makes sure that n lives in the upper, with all its data.
func (fs *FS) ensureUpper(n *inode) error { return fs.ensureUpperData(n, math.MaxInt64) }

// ensureUpperData is ensureUpper for callers that need only the first size
// bytes of a regular file: they are about to truncate it.
func (fs *FS) ensureUpperData(n *inode, size int64) error {
	if fs.readOnly() {
		return unix.EROFS
	}
	if n.inUpper() {
		return nil
	}
	for {
		n.mu.RLock()
		parent := n.where.parent
		n.mu.RUnlock()
		if parent != nil {
			if err := fs.ensureUpper(parent); err != nil {
				return err
			}
		}
		err := fs.copyUp(n, parent, size)
		if err == nil {
			// The copy has times, blocks and perhaps a link count of its own;
			// the directory had another time for a moment.
			fs.invalidate(n.id)
			if parent != nil {
				fs.invalidate(parent.id)
			}
		}
		if err != errStale {
			return err
		}
	}
}

// copyUp copies one object whose parent is in the upper. errStale says that
// the object has lost its name meanwhile.
func (fs *FS) copyUp(n, parent *inode, size int64) error {
	n.copyMu.Lock()
	defer n.copyMu.Unlock()
	if n.inUpper() {
		return nil
	}
	src, links, done, err := fs.copySource(n, size)
	if err != nil {
		return fmt.Errorf("copy up: read the original: %w", err)
	}
	defer done()
	src.Anonymous = parent == nil && n.typ == unix.S_IFREG
	t, err := fs.work.Build(*src)
	if err != nil {
		return fmt.Errorf("copy up: %w", err)
	}
	defer t.Discard() // does nothing once published
	if parent == nil {
		return fs.publishOrphan(n, t)
	}
	return fs.publish(n, parent, t, links)
}

// copySource describes the lower object behind n for package cow, and how many
// links it has.
func (fs *FS) copySource(n *inode, size int64) (src *cow.Source, links uint64, done func(), err error) {
	src = &cow.Source{Data: -1, SetTimes: true}
	var st unix.Stat_t
	lower := fs.lowers.layer(n.low)
	err = fs.lowers.with(n.low, func(dirfd int, name string) error {
		if err := fs.lowers.stat(n.low, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != n.typ {
			return unix.ESTALE
		}
		if n.typ == unix.S_IFLNK {
			var err error
			if src.Target, err = fsat.Readlink(dirfd, name); err != nil {
				return err
			}
		}
		var err error
		src.Xattrs, err = fs.copyableXattrs(lower.dialect, dirfd, name)
		return err
	})
	if err != nil {
		return nil, 0, nil, err
	}
	src.Mode, src.Uid, src.Gid, src.Rdev = st.Mode, int(st.Uid), int(st.Gid), st.Rdev
	src.Atime, src.Mtime = st.Atim, st.Mtim
	done = func() {}
	if n.typ == unix.S_IFREG {
		src.Size = min(size, st.Size)
		if src.Size > 0 {
			h, err := fs.dataFd(n, false)
			if err != nil {
				return nil, 0, nil, err
			}
			src.Data, done = h.fd, h.release
		}
	}
	return src, uint64(st.Nlink), done, nil
}

// publish gives the copy its name in the upper.
func (fs *FS) publish(n, parent *inode, t *cow.Temp, links uint64) error {
	d := parent.dir
	d.opMu.Lock()
	defer d.opMu.Unlock()
	if err := fs.load(parent); err != nil {
		return err
	}
	h, err := fs.dirFd(parent)
	if err != nil {
		return err
	}
	defer h.release()

	n.mu.Lock()
	defer n.mu.Unlock()
	if n.where.parent != parent {
		return errStale
	}
	name := n.where.name
	var before, st unix.Stat_t
	if err := fsat.Fstat(h.fd, &before); err != nil {
		return err
	}
	if err := t.Stat(&st); err != nil {
		return fmt.Errorf("copy up: stat the copy: %w", err)
	}
	if err := t.Publish(h.fd, name, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("copy up: publish: %w", err)
	}
	// The directory has not changed for its users.
	_ = fsat.Utimes(h.fd, "", [2]unix.Timespec{before.Atim, before.Mtim})
	fs.nowUpper(n, t, &st)
	if !n.isDir() && links > 1 {
		// The other links still show the original: this is another file now.
		n.ino = fs.inos.shown(st.Dev, st.Ino)
	}
	d.setUpper(name, n, true)
	return nil
}

// publishOrphan is publish for an object without a name: the copy gets none
// either. It lives as long as its descriptor.
func (fs *FS) publishOrphan(n *inode, t *cow.Temp) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.where.parent != nil || n == fs.root {
		return errStale
	}
	fd := t.TakeFd()
	if fd < 0 {
		var err error
		if fd, err = fsat.OpenName(fs.work.Fd(), t.Name(), unix.O_PATH, 0); err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		fsat.Close(fd)
		return err
	}
	fs.nowUpper(n, t, &st)
	n.orphan = fs.orphanOf(fd)
	return nil
}

// nowUpper switches n to its copy. Preconditions: n.mu is held exclusively.
func (fs *FS) nowUpper(n *inode, t *cow.Temp, st *unix.Stat_t) {
	n.upper = true
	if !n.isDir() {
		n.upID = realID{st.Dev, st.Ino}
		fs.nodes.addUpper(n, n.upID)
	}
	fs.fds.drop(&n.rd)
	if fd := t.TakeFd(); fd >= 0 {
		fs.fds.put(&n.rw, fd).release()
	}
}
