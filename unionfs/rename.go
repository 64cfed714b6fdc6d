package unionfs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
)

// Rename implements RENAME and RENAME2. RENAME_WHITEOUT is refused as on kernel
// overlayfs: whiteouts are ours to make.
func (fs *FS) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	from, to := fs.node(in.NodeId), fs.node(in.Newdir)
	if from == nil || to == nil || !from.isDir() || !to.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	if fs.readOnly() {
		return fuse.EROFS
	}
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return fuse.EINVAL
	}
	if err := fs.mayName(newName); err != nil {
		return fs.status("rename", to, err)
	}
	code := ledger.Move
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		code = ledger.Swap
	}
	op := fs.begin(&in.InHeader, ledger.Request{Code: code, Dir: from.id, Name: oldName, Dir2: to.id, Name2: newName})
	fs.resent(&in.InHeader, from, to)
	done, err := false, error(nil)
	if op.Had(ledger.Armed) {
		done, err = fs.finishMove(from, to, oldName, newName, code, op)
	}
	if !done && err == nil {
		_, err = again(func() (struct{}, error) {
			return struct{}{}, fs.renameOnce(from, to, oldName, newName, uint(in.Flags), op)
		})
	}
	if err == nil {
		fs.changed(from, in.Pid)
		if to != from {
			fs.changed(to, in.Pid)
		}
	}
	return fs.status("rename", from, err)
}

// move is one rename under way.
type move struct {
	fs       *FS
	from, to *change // the same object if within one directory
	f, g     found   // the old and the new name
	src, dst *inode  // dst nil: the new name is free
	flags    uint
	left     bool // a whiteout has been left at the old name
	op       *ledger.Op

	unpin []*inode // references to give back when no lock is held
}

func (m *move) exchange() bool { return m.flags&unix.RENAME_EXCHANGE != 0 }

func (fs *FS) renameOnce(from, to *inode, oldName, newName string, flags uint, op *ledger.Op) (err error) {
	m := &move{fs: fs, flags: flags, op: op}
	defer func() {
		for _, n := range m.unpin {
			fs.unref(n, 1)
		}
	}()
	if m.src, err = fs.child(from, oldName, nil); err != nil {
		return err
	}
	m.unpin = append(m.unpin, m.src)
	m.dst, err = fs.child(to, newName, nil)
	switch {
	case err == nil:
		m.unpin = append(m.unpin, m.dst)
	case err != unix.ENOENT:
		return err
	case m.exchange():
		return unix.ENOENT
	}
	if done, err := m.check(from, to); done || err != nil {
		return err
	}
	if err := m.copyUp(from, to); err != nil {
		return err
	}
	if err := m.lock(from, to); err != nil {
		return err
	}
	defer m.unlock()
	m.f, m.g = from.dir.find(oldName, true), to.dir.find(newName, true)
	for _, f := range []*found{&m.f, &m.g} {
		if f.child != nil {
			m.unpin = append(m.unpin, f.child)
		}
	}
	if m.f.child != m.src || m.g.child != m.dst || m.dst == nil && m.g.visible() {
		return errStale
	}
	return m.run()
}

// check applies the rules of rename(2) that need no lock. done says that there
// is nothing to do.
func (m *move) check(from, to *inode) (done bool, err error) {
	src, dst := m.src, m.dst
	if dst != nil && m.flags&unix.RENAME_NOREPLACE != 0 {
		return false, unix.EEXIST
	}
	if src == dst {
		return true, nil
	}
	if dst != nil && !m.exchange() {
		switch {
		case dst == from || dst == to:
			return false, unix.ENOTEMPTY
		case src.isDir() && !dst.isDir():
			return false, unix.ENOTDIR
		case !src.isDir() && dst.isDir():
			return false, unix.EISDIR
		}
	}
	if err := m.mayMove(from, to); err != nil {
		return false, err
	}
	// A directory that the lowers have a part of cannot be moved without a
	// redirect: its other part would stay behind (kernel: ovl_can_move).
	for _, n := range []*inode{src, dst} {
		if !m.fs.redirect && n != nil && n.isDir() && n.low != nil && (n == src || m.exchange()) {
			return false, unix.EXDEV
		}
	}
	if m.replacesDir() {
		return false, m.fs.mustBeEmpty(dst)
	}
	return false, nil
}

// mayMove refuses to move or replace what is protected (kernel: may_delete,
// may_create).
func (m *move) mayMove(from, to *inode) error {
	err := errors.Join(from.protected(immutable|appendOnly), m.src.protected(immutable|appendOnly), to.protected(immutable))
	if m.dst != nil {
		err = errors.Join(err, to.protected(appendOnly), m.dst.protected(immutable|appendOnly))
	}
	return err
}

// copyUp brings everything that takes part into the upper, before any
// directory is locked: publishing a copy locks its directory.
func (m *move) copyUp(from, to *inode) error {
	for _, n := range []*inode{from, to, m.src} {
		if err := m.fs.ensureUpper(n); err != nil {
			return err
		}
	}
	switch {
	case m.exchange():
		return m.fs.ensureUpper(m.dst)
	case m.dst != nil:
		return m.fs.ensureCounted(m.dst)
	}
	return nil
}

// lock makes both directories ready for change, the ancestor first, and the
// directory that is to be replaced last.
func (m *move) lock(from, to *inode) error {
	if from == to {
		c, err := m.fs.beginChange(from)
		m.from, m.to = c, c
		if err != nil {
			return err
		}
	} else {
		first, second := &m.from, &m.to
		a, b := from, to
		if m.fs.below(from, to) || !m.fs.below(to, from) && from.id > to.id {
			a, b, first, second = to, from, second, first
		}
		var err error
		if *first, err = m.fs.beginChange(a); err != nil {
			*first = nil
			return err
		}
		if *second, err = m.fs.beginChange(b); err != nil {
			*second = nil
			(*first).end()
			*first = nil
			return err
		}
	}
	if m.replacesDir() {
		m.dst.dir.opMu.Lock()
	}
	return nil
}

func (m *move) unlock() {
	if m.replacesDir() {
		m.dst.dir.opMu.Unlock()
	}
	m.from.end()
	if m.to != m.from {
		m.to.end()
	}
}

func (m *move) replacesDir() bool { return m.dst != nil && m.dst.isDir() && !m.exchange() }

// below reports whether n lies in the tree under dir.
func (fs *FS) below(n, dir *inode) bool {
	fs.renameMu.RLock()
	defer fs.renameMu.RUnlock()
	for n != nil && n != fs.root {
		n = n.where.parent
		if n == dir {
			return true
		}
	}
	return false
}

// run does the rename. Preconditions: lock has succeeded, names are as expected.
func (m *move) run() error {
	fs := m.fs
	if m.replacesDir() {
		if err := fs.mustBeEmpty(m.dst); err != nil {
			return err
		}
		if err := m.clearTarget(); err != nil {
			return err
		}
		fault.Point("rename.cleared")
	}
	if !m.exchange() && (m.f.needsWhiteout() || m.g.entry) {
		if err := fs.allowWhiteouts(m.from); err != nil {
			return err
		}
	}
	if m.g.xform && !m.exchange() && !fs.xwhite {
		// Swapped to the old name, a whiteout in the attribute form might be
		// a file there.
		if err := fs.whiteoutOver(m.to, m.g.name, 0); err != nil {
			return err
		}
		fault.Point("rename.replaced")
		m.to.p.dir.setGone(m.g.name, true, fs.xwhite)
	}
	first, second := m.src, m.dst
	if second != nil && second.id < first.id {
		first, second = second, first
	}
	first.mu.Lock()
	defer first.mu.Unlock()
	if second != nil {
		second.mu.Lock()
		defer second.mu.Unlock()
	}
	if err := m.prepare(); err != nil {
		return err
	}
	var o *orphan
	if m.dst != nil && !m.exchange() {
		if err := fs.linksWillChange(m.dst); err != nil {
			return err
		}
		var err error
		if o, err = fs.openOrphan(m.dst, m.to.h.fd, m.g.name); err != nil {
			return err
		}
	}
	if err := m.arm(); err != nil {
		fs.dropOrphan(o)
		return err
	}
	fault.Point("rename.prepared")
	if err := m.moveNames(); err != nil {
		fs.dropOrphan(o)
		return err
	}
	m.record(o)
	return nil
}

// moveNames renames in the upper and tells the objects their new places, in one
// step for those who open directories by path.
func (m *move) moveNames() error {
	m.fs.renameMu.Lock()
	defer m.fs.renameMu.Unlock()
	if err := m.renameReal(); err != nil {
		return err
	}
	fault.Point("rename.done")
	from, to := m.from.p, m.to.p
	was, is := alias{from, m.f.name}, alias{to, m.g.name}
	if m.fs.moveAlias(m.src, was, is) {
		m.unpin = append(m.unpin, from)
	}
	to.refs.Add(1)
	if m.exchange() {
		if m.fs.moveAlias(m.dst, is, was) {
			m.unpin = append(m.unpin, to)
		}
		from.refs.Add(1)
	}
	return nil
}

// arm writes down what is about to move.
func (m *move) arm() error {
	if m.op == nil {
		return nil
	}
	moved := ledger.Moved{Node: m.src.id}
	if m.dst != nil {
		moved.Node2 = m.dst.id
	}
	if m.exchange() {
		var st, st2 unix.Stat_t
		if err := errors.Join(fsat.Stat(m.from.h.fd, m.f.name, &st), fsat.Stat(m.to.h.fd, m.g.name, &st2)); err != nil {
			return err
		}
		moved.Ino, moved.Ino2 = st.Ino, st2.Ino
	}
	m.op.SetMoved(moved)
	m.op.Set(ledger.Armed)
	return nil
}

// prepare gives what will move the attributes that it needs at its new place,
// and everything the names that the rename is about. Preconditions: the mu of
// both objects are held.
func (m *move) prepare() error {
	if err := m.fs.linkUp(m.from, m.src, &m.f); err != nil {
		return err
	}
	if err := m.prepareFor(m.src, m.from, m.f.name, m.to, &m.g); err != nil {
		return err
	}
	if m.dst == nil {
		return nil
	}
	if err := m.fs.linkUp(m.to, m.dst, &m.g); err != nil {
		return err
	}
	if !m.exchange() {
		return nil
	}
	return m.prepareFor(m.dst, m.to, m.g.name, m.from, &m.f)
}

// prepareFor prepares n, now name in the directory at, for the place of f in the
// directory to.
func (m *move) prepareFor(n *inode, at *change, name string, to *change, f *found) error {
	switch {
	case n.isDir() && n.low != nil, n.meta:
		// Its content stays where the lowers have it.
		if err := m.fs.setRedirect(n.low, at.h.fd, name); err != nil {
			return err
		}
	case n.isDir() && f.low != nil:
		// A directory that comes to lie over a lower one must not merge
		// with it.
		if err := m.setOpaque(at, name); err != nil {
			return err
		}
	}
	fault.Point("rename.marked")
	if n.origin {
		return m.fs.markImpure(to.p, to.h.fd)
	}
	return nil
}

func (m *move) setOpaque(c *change, name string) error {
	fd, err := fsat.OpenName(c.h.fd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	return m.fs.markOpaque(fd)
}

// clearTarget makes a directory that is to be replaced really empty: it may
// hold whiteouts in the upper. An empty opaque one takes its place first, so
// that it looks the same at every moment (kernel: ovl_clear_empty).
func (m *move) clearTarget() error {
	fs, dst := m.fs, m.dst
	if !dst.inUpper() {
		return nil
	}
	h, err := fs.dirFd(dst)
	if err != nil {
		return err
	}
	defer h.release()
	bare := true
	if err := fsat.ReadDirBeneath(h.fd, func(fsat.Dirent) error { bare = false; return nil }); err != nil || bare {
		return err
	}
	var st unix.Stat_t
	if err := fs.statUpper(h.fd, "", &st); err != nil {
		return err
	}
	attrs, err := fs.copyableXattrs(fs.upper, unix.S_IFDIR, h.fd, "")
	if err != nil {
		return err
	}
	build := fs.buildOpaque
	if !fs.xattrs {
		// It must be empty, so the marker lies beside it.
		if err := fs.putMarker(m.to, &m.g); err != nil {
			return err
		}
		build = fs.build
	}
	t, err := build(cow.Source{
		Mode: st.Mode, Uid: int(st.Uid), Gid: int(st.Gid), Data: -1, Xattrs: attrs,
		SetTimes: true, Atime: st.Atim, Mtime: st.Mtim,
	})
	if err != nil {
		return err
	}
	defer t.Discard()
	if err := m.swapTarget(t); err != nil {
		return err
	}
	dst.dir.reset()
	return nil
}

// swapTarget puts the empty directory in the place of dst. dst's descriptor is
// of the directory that is gone; nobody may open that while it goes.
func (m *move) swapTarget(t *cow.Temp) error {
	fs := m.fs
	fs.renameMu.Lock()
	defer fs.renameMu.Unlock()
	err := t.Publish(m.to.h.fd, m.g.name, unix.RENAME_EXCHANGE)
	if err == unix.EINVAL {
		// The file system cannot swap. A crash between the two steps leaves the name free.
		temp := fs.work.TempName()
		if err = fsat.Rename(m.to.h.fd, m.g.name, fs.work.Fd(), temp, 0); err == nil {
			if err = t.Publish(m.to.h.fd, m.g.name, unix.RENAME_NOREPLACE); err != nil {
				return errors.Join(err, fsat.Rename(fs.work.Fd(), temp, m.to.h.fd, m.g.name, 0))
			}
			fs.work.Remove(temp)
		}
	}
	if err == nil {
		fs.fds.drop(&m.dst.fd)
	}
	return err
}

// renameReal is the one system call that makes the change visible.
func (m *move) renameReal() error {
	fs := m.fs
	old, name := m.from.h.fd, m.to.h.fd
	if m.exchange() {
		return fsat.Rename(old, m.f.name, name, m.g.name, unix.RENAME_EXCHANGE)
	}
	if err := fs.hideByMarker(m.from, &m.f); err != nil {
		return err
	}
	white := m.f.needsWhiteout()
	if m.g.entry {
		// A whiteout lies at the new name: swapping brings it where it may
		// be needed, and replaces it by a directory too.
		if err := fsat.Rename(old, m.f.name, name, m.g.name, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
		fault.Point("rename.swapped")
		m.left = true
		if !white {
			m.left = fsat.Unlink(old, m.f.name) != nil // then it stays, and hides nothing
		}
		return nil
	}
	m.left = white
	if !white {
		return fsat.Rename(old, m.f.name, name, m.g.name, 0)
	}
	if !fs.xwhite { // a device is what it makes
		err := fsat.Rename(old, m.f.name, name, m.g.name, unix.RENAME_WHITEOUT)
		if err != unix.EINVAL && err != unix.EPERM && err != unix.EOPNOTSUPP {
			return err
		}
	}
	// The file system has no RENAME_WHITEOUT. Between the two steps a crash
	// leaves the old name showing the lower object.
	wh, err := fs.work.Whiteout()
	if err != nil {
		return err
	}
	if err := fsat.Rename(old, m.f.name, name, m.g.name, 0); err != nil {
		fs.work.Remove(wh)
		return err
	}
	fault.Point("rename.moved")
	if err := fsat.Rename(fs.work.Fd(), wh, old, m.f.name, 0); err != nil {
		fs.work.Remove(wh)
		return errors.Join(err, fsat.Rename(name, m.g.name, old, m.f.name, unix.RENAME_NOREPLACE))
	}
	return nil
}

// record updates the names in memory; o is from openOrphan.
// Preconditions: both objects' mu are held.
func (m *move) record(o *orphan) {
	fs := m.fs
	from, to := m.from.p, m.to.p
	if m.exchange() {
		from.dir.setUpper(m.f.name, m.dst)
		to.dir.setUpper(m.g.name, m.src)
		return
	}
	if m.dst != nil {
		if fs.loseName(m.dst, alias{to, m.g.name}, o) {
			m.unpin = append(m.unpin, to)
		}
		fs.linksLost(m.dst)
		if m.dst.isDir() {
			m.dst.dir.dead = true
			fs.fds.drop(&m.dst.fd)
		}
	}
	from.dir.setGone(m.f.name, m.left, fs.xwhite)
	to.dir.setUpper(m.g.name, m.src)
	fs.dropMarker(m.to, &m.g)
}
