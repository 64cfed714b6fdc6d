package unionfs

import (
	"encoding/hex"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
)

// ensureUpper makes sure that n lives in the upper: its attributes and names can
// be changed there. The data of a file may stay in the lowers (metacopy).
func (fs *FS) ensureUpper(n *inode) error {
	if fs.readOnly() {
		return unix.EROFS
	}
	if n.inUpper() {
		return nil
	}
	return fs.copyUpNow(n, math.MaxInt64, fs.metacopy, false)
}

// ensureUpperToSet is ensureUpper for a request whose answer brings the attributes of
// n to the kernel, so that it need not be told to forget the old ones.
func (fs *FS) ensureUpperToSet(n *inode) error {
	if fs.readOnly() {
		return unix.EROFS
	}
	if n.inUpper() {
		return nil
	}
	return fs.copyUpNow(n, math.MaxInt64, fs.metacopy, true)
}

// ensureData makes sure that n lives in the upper with the first size bytes of
// its data; callers that need less than all are about to truncate it.
func (fs *FS) ensureData(n *inode, size int64) error {
	if fs.readOnly() {
		return unix.EROFS
	}
	n.mu.RLock()
	upper, meta := n.upper, n.meta
	n.mu.RUnlock()
	if !upper {
		if err := fs.copyUpNow(n, size, false, false); err != nil {
			return err
		}
		meta = true // somebody may have been faster
	}
	if meta {
		return fs.withSpace(func() error { return fs.completeData(n) })
	}
	return nil
}

// ensureAllData is ensureData for all of it.
func (fs *FS) ensureAllData(n *inode) error { return fs.ensureData(n, math.MaxInt64) }

// copyUpNow copies n up, its parents first. answered: see ensureUpperToSet.
func (fs *FS) copyUpNow(n *inode, size int64, meta, answered bool) error {
	for {
		n.mu.RLock()
		parent, ino := n.where.parent, n.ino
		n.mu.RUnlock()
		if parent != nil {
			if err := fs.ensureUpper(parent); err != nil {
				return err
			}
		}
		err := fs.withSpace(func() error { return fs.copyUp(n, parent, size, meta) })
		if err == nil {
			// The copy has times, blocks and perhaps a link count of its own.
			if !answered {
				fs.staleAttr(n)
			}
			// Its directory has another st_ctime now, and had another st_mtime for a
			// moment. To learn that later, for some other reason, would make tar(1)
			// complain that the directory has changed while it was read.
			switch {
			case parent == nil:
			case n.inoNow() != ino: // a cached listing has the old number
				fs.staleAll(parent)
			default:
				fs.staleAttr(parent)
			}
		}
		if err != errStale {
			return err
		}
	}
}

// copyUp copies one object whose parent is in the upper. errStale says that
// the object has lost its name meanwhile.
func (fs *FS) copyUp(n, parent *inode, size int64, meta bool) error {
	mu := &n.ownExtra().copyMu
	mu.Lock()
	defer mu.Unlock()
	if n.inUpper() {
		return nil
	}
	if parent != nil {
		n.mu.RLock()
		err := fs.mayName(n.where.name)
		n.mu.RUnlock()
		if err != nil {
			return err // a lower may have a name that would be a marker in the upper
		}
	}
	meta = meta && n.typ() == unix.S_IFREG && parent != nil
	o, err := fs.original(n, size, meta)
	if err != nil {
		return fmt.Errorf("copy up: read the original: %w", err)
	}
	defer o.done()
	o.src.Anonymous = parent == nil && n.typ() == unix.S_IFREG
	o.src.Unnamed = true
	t, err := fs.build(o.src)
	if err != nil {
		return fmt.Errorf("copy up: %w", err)
	}
	defer t.Discard() // does nothing once published
	if parent == nil {
		err = fs.publishOrphan(n, t)
	} else {
		err = fs.publish(n, parent, t, o)
	}
	switch {
	case err != nil:
	case o.meta:
		fs.counts.CopiedUpMeta()
	default:
		fs.counts.CopiedUp(o.src.Size)
	}
	return err
}

// original is what a copy-up reads of the lower object.
type original struct {
	src   cow.Source
	meta  bool   // the data is left behind
	split bool   // it was one of several hard links that are not kept together
	index string // the name that the copy has in the link index, or ""
	done  func() // closes the data
}

// original describes the lower object behind n for package cow.
func (fs *FS) original(n *inode, size int64, meta bool) (*original, error) {
	o := &original{src: cow.Source{Data: -1, SetTimes: true}, done: func() {}}
	src := &o.src
	var st unix.Stat_t
	lower := fs.lowers.layer(n.low)
	err := fs.lowers.with(n.low, func(dirfd int, name string) error {
		if err := fs.lowers.stat(n.low, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != n.typ() {
			return unix.ESTALE
		}
		if n.typ() == unix.S_IFLNK {
			var err error
			if src.Target, err = lower.readlink(dirfd, name); err != nil {
				return err
			}
		}
		withoutData := n.isDir() || n.typ() == unix.S_IFREG && (meta || min(size, st.Size) == 0)
		if withoutData && !lower.direct {
			// What has no flags that can be read has none that matter.
			_ = openReal(n, dirfd, name, func(fd int) (e error) { src.Flags, e = fsat.CopiedFlags(fd); return e })
		}
		var err error
		src.Xattrs, err = fs.copyableXattrs(lower, n.typ(), dirfd, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	src.Mode, src.Uid, src.Gid, src.Rdev = st.Mode, int(st.Uid), int(st.Gid), st.Rdev
	src.Atime, src.Mtime = st.Atim, st.Mtim
	if v := n.protectionNow().value(); v != nil && fs.xattrs {
		src.Xattrs = append(src.Xattrs, cow.Xattr{Name: fs.upper.dialect.Attr(protattr), Value: v})
	}
	if err := fs.addOrigin(n, o, uint32(st.Nlink)); err != nil {
		return nil, err
	}
	if n.typ() != unix.S_IFREG {
		return o, nil
	}
	if meta && st.Size > 0 {
		src.Size, o.meta = st.Size, true
		src.Xattrs = append(src.Xattrs, cow.Xattr{Name: fs.upper.dialect.Attr("metacopy")})
		return o, nil
	}
	if src.Size = min(size, st.Size); src.Size > 0 {
		h, err := fs.dataFd(n, false)
		if err != nil {
			return nil, err
		}
		src.Data, o.done = h.fd, h.release
		if !lower.direct {
			src.Flags, _ = fsat.CopiedFlags(h.fd)
		}
	}
	return o, nil
}

// addOrigin adds what connects the copy with its original. One of several hard
// links that is copied alone has nothing to do with the others any more
// (kernel: ovl_copy_up_inode).
func (fs *FS) addOrigin(n *inode, o *original, links uint32) error {
	if n.isDir() {
		return nil // its name or redirect says it all
	}
	n.mu.RLock()
	group, union := n.extra().group, uint32(0)
	if group != nil {
		union = group.links
	}
	n.mu.RUnlock()
	if links > 1 && group == nil {
		o.split = true
		return nil
	}
	if !fs.keepsOrigin(n.typ()) {
		return nil
	}
	attrs, err := fs.originXattr(n.low)
	if err != nil {
		return err
	}
	o.src.Xattrs = append(o.src.Xattrs, attrs...)
	if group != nil && len(attrs) > 0 {
		o.index = hex.EncodeToString(attrs[0].Value)
		o.src.Xattrs = append(o.src.Xattrs, cow.Xattr{
			Name: fs.upper.dialect.Attr("nlink"), Value: nlinkValue('L', int64(union)-int64(links)),
		})
	}
	return nil
}

// publish gives the copy its name in the upper.
func (fs *FS) publish(n, parent *inode, t *cow.Temp, o *original) error {
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
	fs.recordNames(n)
	name := n.where.name
	if o.index != "" {
		return fs.publishIndexed(&change{parent, h}, n, t, o)
	}
	var before, st unix.Stat_t
	if err := fsat.Fstat(h.fd, &before); err != nil {
		return err
	}
	if err := t.Stat(&st); err != nil {
		return fmt.Errorf("copy up: stat the copy: %w", err)
	}
	if !n.isDir() && !o.split {
		if err := fs.markImpure(parent, h.fd); err != nil {
			return err
		}
	}
	fault.Point("copyup.impure")
	if err := t.Publish(h.fd, name, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("copy up: publish: %w", err)
	}
	// The directory has not changed for its users.
	_ = fsat.Utimes(h.fd, "", [2]unix.Timespec{before.Atim, before.Mtim})
	fault.Point("copyup.done")
	fs.nowUpper(n, t, &st, o.meta)
	if o.split {
		// The other links still show the original: this is another file now.
		fs.renumber(n, fs.inos.shown(st.Dev, st.Ino))
		n.origin = false
	}
	d.setUpper(name, n)
	return nil
}

// publishIndexed publishes a copy in the link index first, where all its names
// find it, and then under the name by which it was reached. Preconditions: the
// directory's opMu and n.mu are held.
func (fs *FS) publishIndexed(c *change, n *inode, t *cow.Temp, o *original) error {
	dir, err := fs.index.dir()
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := t.Stat(&st); err != nil {
		return fmt.Errorf("copy up: stat the copy: %w", err)
	}
	if err := t.Publish(dir, o.index, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("copy up: publish in the link index: %w", err)
	}
	fault.Point("copyup.indexed")
	fs.index.add(o.index)
	n.extra().group.index = o.index
	fs.nowUpper(n, t, &st, o.meta)
	f := c.p.dir.find(n.where.name, false)
	return fs.linkUp(c, n, &f)
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
	fs.nowUpper(n, t, &st, false)
	fs.dropOrphan(n.extra().orphan)
	n.ownExtra().orphan = fs.orphanOf(n, fd, true)
	return nil
}

// nowUpper switches n to its copy. Preconditions: n.mu is held exclusively.
func (fs *FS) nowUpper(n *inode, t *cow.Temp, st *unix.Stat_t, meta bool) {
	n.upper, n.meta = true, meta
	n.ownExtra().copied.Store(true)
	if n.extra().group != nil {
		fs.severalNames(n, st)
	}
	if meta {
		return // readers go on with the original
	}
	fs.fds.drop(&n.fd)
	if fd := t.TakeFd(); fd >= 0 {
		fs.fds.put(&n.fd, fd, true).release()
	}
}

// severalNames registers an object of the upper that can be met under more than
// one name. Preconditions: n.mu is held exclusively.
func (fs *FS) severalNames(n *inode, st *unix.Stat_t) {
	e := n.ownExtra()
	e.upID = realID{st.Dev, st.Ino}
	fs.nodes.addTo(n, e.upID, upperObjects)
}

// holdIncomplete keeps a metacopied file as it is while its attributes are changed:
// completeData would put back those that it has found. It returns what to call
// then.
func (n *inode) holdIncomplete() (release func()) {
	n.mu.RLock()
	meta := n.meta
	n.mu.RUnlock()
	if !meta {
		return func() {}
	}
	mu := &n.ownExtra().copyMu
	mu.Lock()
	return mu.Unlock
}

// completeData brings a file's data to its attributes in the upper.
func (fs *FS) completeData(n *inode) error {
	mu := &n.ownExtra().copyMu
	mu.Lock()
	defer mu.Unlock()
	n.mu.RLock()
	meta := n.meta
	n.mu.RUnlock()
	if !meta {
		return nil
	}
	from, err := fs.lowers.open(n.low)
	if err != nil {
		return fmt.Errorf("copy up data: open the original: %w", err)
	}
	defer fsat.Close(from)
	fd := -1
	n.mu.RLock()
	err = fs.withRealLocked(n, func(dirfd int, name string) (e error) {
		if name == "" {
			fd, e = fsat.Reopen(dirfd, unix.O_RDWR)
		} else {
			fd, e = fs.upper.open(dirfd, name, unix.O_RDWR)
		}
		return e
	})
	n.mu.RUnlock()
	if err != nil {
		return fmt.Errorf("copy up data: open the copy: %w", err)
	}
	if err := fs.work.Complete(fd, from, fs.upper.dialect.Attr("metacopy")); err != nil {
		fsat.Close(fd)
		fs.staleAttr(n)
		return fmt.Errorf("copy up data: %w", err)
	}
	var st unix.Stat_t
	_ = fsat.Fstat(fd, &st) // for the counters alone
	fs.counts.Completed(st.Size)
	n.mu.Lock()
	n.meta = false
	if o := n.extra().orphan; o != nil {
		fs.ledger.Drop(o.recs[1])
		o.recs[1] = 0
	}
	n.ownExtra().copied.Store(true)
	fs.fds.drop(&n.fd)
	fs.keepData(n, fd)
	n.mu.Unlock()
	fs.staleAttr(n)
	return nil
}
