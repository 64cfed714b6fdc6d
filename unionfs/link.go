package unionfs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
)

// Link implements LINK.
func (fs *FS) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	n, p := fs.node(in.Oldnodeid), fs.node(in.NodeId)
	if n == nil || p == nil || !p.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	op := fs.begin(&in.InHeader, ledger.Request{})
	fs.resent(&in.InHeader, n)
	if err := fs.link(n, p, name, op); err != nil {
		return fs.status("link", n, err)
	}
	fs.changed(p, in.Pid)
	n.refs.Add(1) // for the reply; the kernel holds n while it asks
	return fs.status("link", n, fs.reply(n, &look{pid: in.Pid}, out))
}

func (fs *FS) link(n, p *inode, name string, op *ledger.Op) error {
	if err := fs.mayName(name); err != nil {
		return err
	}
	if err := errors.Join(n.protected(immutable|appendOnly), p.protected(immutable)); err != nil {
		return err
	}
	if err := fs.ensureUpper(n); err != nil {
		return err
	}
	c, err := fs.beginChange(p)
	if err != nil {
		return err
	}
	defer c.end()
	f := p.dir.find(name, false)
	if f.visible() {
		if op.Had(ledger.Armed) && fs.shows(p, name, n) {
			fs.dropMarker(c, &f)
			return nil // an earlier server has done it
		}
		return unix.EEXIST
	}
	op.Set(ledger.Armed)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.meta {
		// At the new name nobody would find its data.
		err := fs.withRealLocked(n, func(dirfd int, name string) error { return fs.setRedirect(n.low, dirfd, name) })
		if err != nil {
			return err
		}
	}
	if n.origin {
		if err := fs.markImpure(p, c.h.fd); err != nil {
			return err
		}
	}
	fault.Point("link.marked")
	if err := fs.linksWillChange(n); err != nil {
		return err
	}
	fault.Point("link.counted")
	if n.extra().upID == (realID{}) {
		var st unix.Stat_t
		if err := fs.withRealLocked(n, func(dirfd int, name string) error { return fsat.Stat(dirfd, name, &st) }); err != nil {
			return err
		}
		fs.severalNames(n, &st)
	}
	if err := fs.linkReal(n, c, &f); err != nil {
		return err
	}
	fault.Point("link.done")
	if g := n.extra().group; g != nil {
		g.links++
	}
	fs.addAlias(n, alias{p, name})
	if e := n.extra(); e.orphan != nil {
		fs.dropOrphan(e.orphan)
		e.orphan = nil
	}
	p.refs.Add(1)
	p.dir.setUpper(name, n)
	fs.dropMarker(c, &f)
	return nil
}

// linkReal makes the new name in the upper; a whiteout in its place is
// replaced in one step. Preconditions: n.mu is held exclusively.
func (fs *FS) linkReal(n *inode, c *change, f *found) error {
	return fs.withRealLocked(n, func(dirfd int, old string) error {
		link := func(newdir int, newname string) error {
			if old == "" {
				return fsat.LinkFd(dirfd, newdir, newname)
			}
			return fsat.Link(dirfd, old, newdir, newname)
		}
		if !f.entry {
			return link(c.h.fd, f.name)
		}
		temp := fs.work.TempName()
		if err := link(fs.work.Fd(), temp); err != nil {
			return err
		}
		fault.Point("link.built")
		err := fsat.Rename(fs.work.Fd(), temp, c.h.fd, f.name, 0)
		if err != nil {
			fs.work.Remove(temp)
		}
		return err
	})
}
