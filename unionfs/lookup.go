package unionfs

import (
	"fmt"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
)

// Lookup implements LOOKUP.
func (fs *FS) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	p := fs.node(h.NodeId)
	if p == nil || !p.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	seen := look{pid: h.Pid}
	n, err := fs.child(p, name, &seen)
	if err == unix.ENOENT {
		// Node id 0 with a timeout: the kernel remembers that there is
		// nothing.
		out.NodeId = 0
		out.SetEntryTimeout(fs.ttl)
		return fuse.OK
	}
	if err != nil {
		return fs.status("lookup", p, err)
	}
	return fs.status("lookup", n, fs.reply(n, &seen, out))
}

// Forget implements FORGET.
func (fs *FS) Forget(nodeid, nlookup uint64) {
	if n := fs.nodes.get(nodeid); n != nil && n != fs.root {
		if count := fs.forgotten(n, int64(nlookup)); count > 0 {
			fs.unref(n, count)
		}
	}
}

// look is what the thread pid has seen who met an object for the first time, and
// need not look again.
type look struct {
	pid   uint32
	n     *inode // nil: nothing
	st    unix.Stat_t
	upper bool // the object was in the upper
}

// at notes what has been seen of n, which nobody else knows yet.
func (l *look) at(n *inode, st *unix.Stat_t) {
	if l != nil {
		l.n, l.st, l.upper = n, *st, n.upper
		n.tell(l.pid)
	}
}

// reply fills an entry for the kernel and passes the reference to n on to it;
// on an error the reference is given back. seen is what child has seen.
func (fs *FS) reply(n *inode, seen *look, out *fuse.EntryOut) error {
	var err error
	if seen.n != n || !fs.attrSeen(seen, &out.Attr) {
		n.tell(seen.pid)
		err = fs.attr(n, &out.Attr)
	}
	if err != nil {
		fs.unref(n, 1)
		return err
	}
	fs.passed(n)
	out.NodeId = n.id
	out.SetEntryTimeout(fs.ttl)
	out.SetAttrTimeout(fs.ttl)
	return nil
}

// child returns the referenced object behind a name. What it sees of it is left in
// seen, which may be nil.
func (fs *FS) child(p *inode, name string, seen *look) (*inode, error) {
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
			return fs.upperChild(p, &f, seen)
		}
		return fs.lowerChild(p, &f, seen)
	})
}

// lowerChild makes the inode for a name that only the lowers have.
func (fs *FS) lowerChild(p *inode, f *found, seen *look) (*inode, error) {
	facts, err := fs.lowers.admit(f.low)
	if err != nil {
		return nil, err
	}
	was, known, err := fs.before(p, f)
	if err != nil || known != nil {
		return known, err
	}
	links := fs.lowers.sharesSlots() && (f.typ != unix.DT_DIR || fs.resumed) // what has a slot in common is one file
	if links && fs.readOnly() {
		if have := fs.nodes.get(f.low.slot()); have != nil && have.tryRef() {
			return fs.nameKnown(p, f, have)
		}
	}
	id, twice := fs.idFor(f.low)
	switch {
	case was != nil:
		id, facts.ino = was.ID, was.Ino
	case twice && !links:
		facts.ino = id // once it is copied up, it will be another than the one known already
	}
	n := newInode(id, facts.ino, uint32(f.low.typ())<<12, f.low)
	n.prot, n.linked = facts.prot, facts.links > 1
	if facts.whole {
		seen.at(n, &facts.st)
	}
	if fs.index == nil || facts.links < 2 || !fs.keepsOrigin(n.typ()) || !fs.lowers.layer(f.low).handles {
		return fs.adoptChild(p, f, n)
	}
	have, err := fs.lowerLink(n, &facts)
	if err != nil {
		return nil, err
	}
	if have != nil {
		return fs.nameKnown(p, f, have)
	}
	got, err := fs.adoptChild(p, f, n)
	if got != n || n.upper || fs.index.empty() {
		return got, err
	}
	// It may have been copied up, and forgotten again, after we looked.
	name, err := fs.indexEntry(f.low)
	if err != nil || fs.index.has(name) && !n.inUpper() {
		fs.unref(n, 1)
		if err == nil {
			err = errStale
		}
		return nil, err
	}
	return n, nil
}

// adoptChild makes the new inode n the object behind a name, unless another
// request was faster.
func (fs *FS) adoptChild(p *inode, f *found, n *inode) (*inode, error) {
	n.where = alias{p, f.name}
	n.rec = fs.record(n, n.where)
	if fs.resumed {
		n.told.Store(toldMany) // by an earlier server, perhaps
	}
	p.refs.Add(1) // the caller's request keeps p alive
	have, ok := p.dir.adopt(f, n, fs.nodes)
	if ok && have == nil {
		fs.trim.note()
		return n, nil
	}
	// n is known to nobody: it is simply left to the garbage collector.
	fs.ledger.Drop(n.rec)
	fs.unref(p, 1)
	if have == nil {
		return nil, errStale
	}
	return have, nil
}

// upperChild makes the inode for a name that the upper has.
func (fs *FS) upperChild(p *inode, f *found, seen *look) (*inode, error) {
	h, err := fs.dirFd(p)
	if err != nil {
		return nil, err
	}
	defer h.release()
	var st unix.Stat_t
	attributes, err := fsat.StatAttributes(h.fd, f.name, &st)
	if err == nil {
		err = fs.upper.describe(h.fd, f.name, &st)
	}
	if err != nil {
		if err == unix.ENOENT {
			return nil, errStale
		}
		return nil, err
	}
	typ := st.Mode & unix.S_IFMT
	if uint8(typ>>12) != f.typ {
		return nil, errStale
	}
	was, known, err := fs.before(p, f)
	if err != nil || known != nil {
		return known, err
	}
	if typ == unix.S_IFDIR {
		return fs.upperDirChild(p, f, h.fd, &st, protectionOf(attributes), was)
	}
	if n := fs.nodes.byReal(realID{st.Dev, st.Ino}, upperObjects); n != nil {
		return fs.nameKnown(p, f, n)
	}
	n, err := fs.upperFile(p, f, h.fd, &st, was)
	if fsat.IsAbsent(err) {
		return nil, errStale
	}
	if err != nil {
		return nil, err
	}
	n.prot |= protectionOf(attributes)
	seen.at(n, &st)
	return fs.adoptChild(p, f, n)
}

// upperFile makes the inode of an object of the upper that is no directory. was is what
// an earlier server has said of it, if not nil.
func (fs *FS) upperFile(p *inode, f *found, dirfd int, st *unix.Stat_t, was *ledger.Record) (*inode, error) {
	typ := st.Mode & unix.S_IFMT
	id, ino := uint64(0), f.ino // kept over a copy-up
	if ino == 0 {
		ino = fs.inos.shown(st.Dev, st.Ino)
	}
	if was != nil {
		id, ino = was.ID, was.Ino
	} else {
		id = fs.nodes.newID()
	}
	n := newInode(id, ino, typ, nil)
	n.upper, n.origin = true, ino != fs.inos.shown(st.Dev, st.Ino)
	if st.Nlink > 1 {
		n.ownExtra().upID = realID{st.Dev, st.Ino}
	}
	private, err := fs.hasPrivate(dirfd, f.name)
	if err != nil || !private {
		return n, err
	}
	redirect, meta, err := fs.rules.read(fs.upper.dialect, dirfd, f.name, f.typ)
	if err != nil {
		return nil, err
	}
	if meta {
		if n.low, err = fs.dataOf(p, f, redirect); err != nil {
			return nil, err
		}
		n.meta = true
	}
	if n.prot, err = fs.readProtection(dirfd, f.name); err != nil {
		return nil, err
	}
	if fs.index != nil && st.Nlink > 1 {
		origin, err := fs.readOrigin(dirfd, f.name)
		if err != nil {
			return nil, err
		}
		if n.ownExtra().group, err = fs.indexedUpper(f, st, origin); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// hasPrivate reports whether an object of the upper has any of our attributes;
// few have.
func (fs *FS) hasPrivate(dirfd int, name string) (bool, error) {
	attrs, err := fsat.Listxattr(dirfd, name)
	for _, a := range attrs {
		if strings.HasPrefix(a, fs.upper.dialect.Prefix()) {
			return true, err
		}
	}
	return false, err
}

// dataOf finds the lower file that a metacopied file of the upper has its data
// from.
func (fs *FS) dataOf(p *inode, f *found, redirect string) (low lowerObj, err error) {
	if low = f.low; redirect != "" {
		if low, err = fs.followRedirect(p, redirect); err != nil {
			return nil, err
		}
	}
	if low == nil || low.typ() != unix.DT_REG {
		return nil, fmt.Errorf("the data of %q, which has metadata only, is missing in the lowers: %w", f.name, unix.EIO)
	}
	_, err = fs.lowers.admit(low)
	return low, err
}

func (fs *FS) upperDirChild(p *inode, f *found, dirfd int, st *unix.Stat_t, flags protection, was *ledger.Record) (*inode, error) {
	low := f.low
	if f.white {
		low = nil
	}
	low, err := fs.mergedWith(p, dirfd, f.name, low)
	if fsat.IsAbsent(err) {
		return nil, errStale
	}
	if err != nil {
		return nil, err
	}
	prot, err := fs.readProtection(dirfd, f.name)
	if err != nil {
		return nil, err
	}
	id, ino := uint64(0), fs.inos.shown(st.Dev, st.Ino)
	if low != nil {
		facts, err := fs.lowers.admit(low)
		if err != nil {
			return nil, err
		}
		var twice bool
		if id, twice = fs.idFor(low); !twice {
			ino = facts.ino
		}
	} else {
		id = fs.nodes.newID()
	}
	if was != nil {
		id, ino = was.ID, was.Ino
	}
	n := newInode(id, ino, unix.S_IFDIR, low)
	n.upper, n.prot = true, prot|flags
	return fs.adoptChild(p, f, n)
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
		fs.addAlias(n, a)
		p.refs.Add(1)
	}
	return n, nil
}
