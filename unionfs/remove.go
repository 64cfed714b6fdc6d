package unionfs

import (
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/whiteout"
)

// Unlink implements UNLINK.
func (fs *FS) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.remove("unlink", h, name, false)
}

// Rmdir implements RMDIR.
func (fs *FS) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.remove("rmdir", h, name, true)
}

func (fs *FS) remove(op string, h *fuse.InHeader, name string, dir bool) fuse.Status {
	p := fs.node(h.NodeId)
	if p == nil || !p.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	if fs.readOnly() {
		return fuse.EROFS
	}
	mark := fs.begin(h, ledger.Request{Code: ledger.Remove, Dir: p.id, Name: name})
	fs.resent(h, p)
	_, err := again(func() (struct{}, error) { return struct{}{}, fs.removeName(p, name, dir, mark) })
	if err == nil {
		fs.changed(p, h.Pid)
	}
	return fs.status(op, p, err)
}

func (fs *FS) removeName(p *inode, name string, dir bool, op *ledger.Op) error {
	n, err := fs.child(p, name, nil)
	if err == unix.ENOENT && op.Had(ledger.Armed) {
		return nil // an earlier server has removed it
	}
	if err != nil {
		return err
	}
	defer fs.unref(n, 1)
	switch {
	case dir && !n.isDir():
		return unix.ENOTDIR
	case !dir && n.isDir():
		return unix.EISDIR
	}
	for _, o := range []*inode{p, n} {
		if err := o.protected(immutable | appendOnly); err != nil {
			return err
		}
	}
	// What will fail leaves no trace in the upper.
	if err := fs.mustBeEmpty(n); err != nil {
		return err
	}
	if err := fs.ensureCounted(n); err != nil {
		return err
	}
	c, err := fs.beginChange(p)
	if err != nil {
		return err
	}
	defer c.end()
	f := p.dir.find(name, true)
	if f.child != nil {
		fs.unref(f.child, 1) // n is kept by the reference above
	}
	if f.child != n {
		return errStale
	}
	if dir {
		n.dir.opMu.Lock()
		defer n.dir.opMu.Unlock()
		if err := fs.mustBeEmpty(n); err != nil {
			return err
		}
	}
	op.Set(ledger.Armed)
	last, err := fs.removeReal(c, n, &f)
	if err != nil {
		return err
	}
	if last {
		fs.unref(p, 1) // what the name pinned
	}
	return nil
}

// mustBeEmpty says ENOTEMPTY of a directory that shows a name.
func (fs *FS) mustBeEmpty(n *inode) error {
	if !n.isDir() {
		return nil
	}
	if err := fs.load(n); err != nil {
		return err
	}
	if !n.dir.empty() {
		return unix.ENOTEMPTY
	}
	return nil
}

// removeReal takes the name away in the upper and in memory. pinned reports
// whether the object knew the name, and so whether it pinned the directory.
func (fs *FS) removeReal(c *change, n *inode, f *found) (pinned bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := fs.linkUp(c, n, f); err != nil {
		return false, err
	}
	if err := fs.linksWillChange(n); err != nil {
		return false, err
	}
	fault.Point("unlink.counted")
	o, err := fs.openOrphan(n, c.h.fd, f.name)
	if err != nil {
		return false, err
	}
	hidden := f.visible() && !f.upper // a marker will do
	if err := fs.hideByMarker(c, f); err != nil {
		fs.dropOrphan(o)
		return false, err
	}
	hidden = hidden && f.white && !f.entry
	white := f.needsWhiteout()
	if white {
		if err := fs.allowWhiteouts(c); err != nil {
			fs.dropOrphan(o)
			return false, err
		}
	}
	switch {
	case !n.upper && hidden:
	case !n.upper && white:
		err = fs.work.WhiteoutAt(c.h.fd, f.name)
	case !n.upper: // a marker hides it already: it was not visible
		err = errStale
	case n.isDir():
		err = fs.removeUpperDir(c, f.name, white)
	case white:
		err = fs.whiteoutOver(c, f.name, 0)
	default:
		err = fsat.Unlink(c.h.fd, f.name)
	}
	if err != nil {
		fs.dropOrphan(o)
		return false, err
	}
	fault.Point("unlink.done")
	if n.isDir() {
		n.dir.dead = true
		defer fs.fds.drop(&n.fd)
	}
	pinned = fs.loseName(n, alias{c.p, f.name}, o)
	fs.linksLost(n)
	c.p.dir.setGone(f.name, white, fs.xwhite)
	return pinned, nil
}

// allowWhiteouts marks a directory that will hold whiteouts in the form of files
// (kernel: overlayfs.rst, "Nesting overlayfs mounts"). The root is marked with
// the first.
func (fs *FS) allowWhiteouts(c *change) error {
	if !fs.xwhite || c.p.dir.xmarked.Load() {
		return nil
	}
	mark, err := fs.upper.dialect.Mark(c.h.fd)
	if err != nil {
		return fmt.Errorf("read opaque attribute: %w", err)
	}
	attr := fs.upper.dialect.Attr("opaque")
	if mark == whiteout.Plain {
		if err := fsat.Setxattr(c.h.fd, "", attr, []byte{'x'}, 0); err != nil {
			return fmt.Errorf("mark the directory as one with whiteouts: %w", err)
		}
	}
	if c.p != fs.root && !fs.root.dir.xmarked.Load() {
		if err := fsat.Setxattr(fs.upper.root, "", attr, []byte{'x'}, 0); err != nil {
			return fmt.Errorf("mark the root as one with whiteouts: %w", err)
		}
		fs.root.dir.xmarked.Store(true)
	}
	c.p.dir.xmarked.Store(true)
	return nil
}

// whiteoutOver replaces a name of the upper by a whiteout.
func (fs *FS) whiteoutOver(c *change, name string, flags uint) error {
	wh, err := fs.work.Whiteout()
	if err != nil {
		return err
	}
	err = fsat.Rename(fs.work.Fd(), wh, c.h.fd, name, flags)
	fault.Point("whiteout.placed")
	if err != nil || flags&unix.RENAME_EXCHANGE != 0 {
		fs.work.Remove(wh)
	}
	return err
}

// removeUpperDir takes away a directory of the upper that shows no name. It may
// hold whiteouts.
func (fs *FS) removeUpperDir(c *change, name string, white bool) error {
	if white {
		return fs.whiteoutOver(c, name, unix.RENAME_EXCHANGE)
	}
	err := fsat.Rmdir(c.h.fd, name)
	if err != unix.ENOTEMPTY && err != unix.EEXIST {
		return err
	}
	temp := fs.work.TempName()
	if err := fsat.Rename(c.h.fd, name, fs.work.Fd(), temp, unix.RENAME_NOREPLACE); err != nil {
		return err
	}
	fault.Point("rmdir.moved")
	fs.work.Remove(temp)
	return nil
}
