package unionfs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// Lookup implements LOOKUP.
func (fs *FS) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	p := fs.nodes.get(h.NodeId)
	if p == nil || !p.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	n, err := fs.child(p, name)
	if err == unix.ENOENT {
		// Node id 0 with a timeout: the kernel remembers that there is
		// nothing.
		out.NodeId = 0
		out.SetEntryTimeout(forever)
		return fuse.OK
	}
	if err != nil {
		return fs.status("lookup", p, err)
	}
	return fs.status("lookup", n, fs.reply(n, out))
}

// Forget implements FORGET.
func (fs *FS) Forget(nodeid, nlookup uint64) {
	if n := fs.nodes.get(nodeid); n != nil && n != fs.root {
		fs.unref(n, int64(nlookup))
	}
}

// reply fills an entry for the kernel and passes the reference to n on to it;
// on an error the reference is given back.
func (fs *FS) reply(n *inode, out *fuse.EntryOut) error {
	if err := fs.attr(n, &out.Attr); err != nil {
		fs.unref(n, 1)
		return err
	}
	out.NodeId = n.id
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	return nil
}

// child returns the referenced object behind a name.
func (fs *FS) child(p *inode, name string) (*inode, error) {
	if len(name) > unix.NAME_MAX {
		return nil, unix.ENAMETOOLONG
	}
	if err := fs.load(p); err != nil {
		return nil, err
	}
	return again(func() (*inode, error) {
		f := p.dir.find(name, true)
		if f.child != nil {
			return f.child, nil
		}
		if !f.visible() {
			return nil, unix.ENOENT
		}
		if f.upper {
			return fs.upperChild(p, &f)
		}
		ino, err := fs.lowers.admit(f.low)
		if err != nil {
			return nil, err
		}
		return fs.adoptChild(p, &f, newInode(f.low.slot(), ino, uint32(f.low.typ())<<12, f.low))
	})
}

// adoptChild makes the new inode n the object behind a name, unless another
// request was faster.
func (fs *FS) adoptChild(p *inode, f *found, n *inode) (*inode, error) {
	n.where = alias{p, f.name}
	p.refs.Add(1) // the caller's request keeps p alive
	have, ok := p.dir.adopt(f, n, fs.nodes)
	if ok && have == nil {
		return n, nil
	}
	// n is known to nobody: it is simply left to the garbage collector.
	fs.unref(p, 1)
	if have == nil {
		return nil, errStale
	}
	return have, nil
}

// upperChild makes the inode for a name that the upper has.
func (fs *FS) upperChild(p *inode, f *found) (*inode, error) {
	h, err := fs.dirFd(p)
	if err != nil {
		return nil, err
	}
	defer h.release()
	var st unix.Stat_t
	if err := fsat.Stat(h.fd, f.name, &st); err != nil {
		if err == unix.ENOENT {
			return nil, errStale
		}
		return nil, err
	}
	typ := st.Mode & unix.S_IFMT
	if uint8(typ>>12) != f.typ {
		return nil, errStale
	}
	if err := refuseIndirect(fs.upper.dialect, h.fd, f.name, f.typ); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, errStale
		}
		return nil, err
	}
	if typ == unix.S_IFDIR {
		return fs.upperDirChild(p, f, h.fd, &st)
	}
	if n := fs.nodes.byUpper(realID{st.Dev, st.Ino}); n != nil {
		return fs.nameKnown(p, f, n)
	}
	ino := f.ino // kept over a copy-up
	if ino == 0 {
		ino = fs.inos.shown(st.Dev, st.Ino)
	}
	n := newInode(fs.nodes.newID(), ino, typ, nil)
	n.upper, n.upID = true, realID{st.Dev, st.Ino}
	return fs.adoptChild(p, f, n)
}

func (fs *FS) upperDirChild(p *inode, f *found, dirfd int, st *unix.Stat_t) (*inode, error) {
	low := f.low
	if low != nil && (low.typ() != unix.DT_DIR || f.white) {
		low = nil
	}
	if low != nil {
		fd, err := fsat.OpenName(dirfd, f.name, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, err
		}
		defer fsat.Close(fd)
		opaque, err := fs.upperOpaque(fd)
		if err != nil {
			return nil, err
		}
		if opaque {
			low = nil
		}
	}
	var err error
	id, ino := fs.nodes.newID(), fs.inos.shown(st.Dev, st.Ino)
	if low != nil {
		id = low.slot()
		if ino, err = fs.lowers.admit(low); err != nil {
			return nil, err
		}
	}
	n := newInode(id, ino, unix.S_IFDIR, low)
	n.upper = true
	return fs.adoptChild(p, f, n)
}

// upperOpaque reports whether a directory of the upper hides the lowers, in
// any form that the upper's dialect has.
func (fs *FS) upperOpaque(fd int) (bool, error) {
	mark, err := fs.upper.dialect.Mark(fd)
	if err != nil || mark == whiteout.Opaque || !fs.upper.dialect.ReadsMarkers() {
		return mark == whiteout.Opaque, err
	}
	var st unix.Stat_t
	err = fsat.Stat(fd, whiteout.OpaqueMarker, &st)
	if fsat.IsAbsent(err) {
		return false, nil
	}
	return err == nil, err
}

// nameKnown records that an object known under another name is also behind
// this one. It takes over the caller's reference to n.
func (fs *FS) nameKnown(p *inode, f *found, n *inode) (*inode, error) {
	a := alias{p, f.name}
	n.mu.Lock()
	defer n.mu.Unlock()
	have, ok := p.dir.adopt(f, n, fs.nodes)
	switch {
	case !ok:
		fs.unref(n, 1)
		return nil, errStale
	case have != nil:
		fs.unref(n, 1)
		return have, nil
	}
	if !n.hasAlias(a) {
		n.addAlias(a)
		p.refs.Add(1)
	}
	return n, nil
}
