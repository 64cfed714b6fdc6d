package unionfs

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/whiteout"
)

// change is a directory in which names may be changed: it is in the upper,
// loaded, open and locked against other changes.
type change struct {
	p *inode
	h *fdHandle
}

// beginChange prepares a directory for a change of its names. Call end.
func (fs *FS) beginChange(p *inode) (*change, error) {
	if err := fs.ensureUpper(p); err != nil {
		return nil, err
	}
	if err := fs.load(p); err != nil {
		return nil, err
	}
	p.dir.opMu.Lock()
	c, err := fs.lockedChange(p)
	if err != nil {
		p.dir.opMu.Unlock()
	}
	return c, err
}

// lockedChange is the second half of beginChange. Preconditions: p.dir.opMu is
// held.
func (fs *FS) lockedChange(p *inode) (*change, error) {
	if p.dir.dead {
		return nil, unix.ENOENT
	}
	h, err := fs.dirFd(p)
	if err != nil {
		return nil, err
	}
	return &change{p, h}, nil
}

func (c *change) end() {
	c.h.release()
	c.p.dir.opMu.Unlock()
}

// newObject is what a request asks to create.
type newObject struct {
	mode     uint32 // type and permissions
	umask    uint32
	uid, gid uint32
	rdev     uint64
	target   string // of a symbolic link
	op       *ledger.Op
}

// create makes an object and returns it referenced. A regular file is left open
// for reading and writing in the cache.
func (fs *FS) create(p *inode, name string, o newObject, seen *look) (*inode, error) {
	if fs.readOnly() {
		return nil, unix.EROFS
	}
	if err := fs.mayName(name); err != nil {
		return nil, err
	}
	if err := p.protected(immutable); err != nil {
		return nil, err
	}
	c, err := fs.beginChange(p)
	if err != nil {
		return nil, err
	}
	defer c.end()
	f := p.dir.find(name, false)
	switch {
	case !f.visible():
	case o.op.Had(ledger.Armed): // an earlier server has made it
		n, err := fs.child(p, name, seen)
		if err == nil {
			fs.dropMarker(c, &f)
			fs.unclaim(o.op.Moved().Node)
		}
		return n, err
	default:
		return nil, unix.EEXIST
	}
	src, inherits, err := fs.source(c, o)
	if err != nil {
		return nil, err
	}
	fd := -1
	// A directory over a lower name has to be opaque, which takes two steps.
	overLower := o.mode&unix.S_IFMT == unix.S_IFDIR && f.low != nil
	inPlace := !f.entry && !overLower && fs.givesOwner(&o, src)
	if inPlace && !inherits {
		o.mode &^= o.umask
	}
	o.op.Set(ledger.Armed)
	err = fs.withSpace(func() (err error) {
		if inPlace {
			// The file system gives it the right owner, group and ACL by
			// itself, in one step.
			fd, err = c.createInPlace(name, o)
		} else {
			fd, err = fs.createInWork(c, &f, src)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	fault.Point("create.done")
	defer fs.dropMarker(c, &f)
	n, err := fs.born(c, name, src, fd, seen)
	if err == nil {
		o.op.SetMoved(ledger.Moved{Node: n.id})
	}
	return n, err
}

// mayName refuses names that nothing new may have. Where markers are read, a
// program could hide files by making some (fuse-overlayfs says EINVAL, too).
func (fs *FS) mayName(name string) error {
	switch {
	case len(name) > unix.NAME_MAX:
		return unix.ENAMETOOLONG
	case fs.upper != nil && fs.upper.dialect.ReadsMarkers() && strings.HasPrefix(name, whiteout.MarkerPrefix):
		return unix.EINVAL
	}
	return nil
}

// dropMarker removes the marker that has hidden the name f in the lowers, now that
// the upper has an object there: fuse-overlayfs would take the marker to hide that,
// too. We do not, so a crash before this changes nothing.
func (fs *FS) dropMarker(c *change, f *found) {
	if f.white && !f.entry && fsat.Unlink(c.h.fd, whiteout.MarkerPrefix+f.name) == nil {
		c.p.dir.unmark(f.name)
	}
}

// source describes a new object as package cow builds it: with the group,
// setgid bit and ACL that the directory hands down.
func (fs *FS) source(c *change, o newObject) (src *cow.Source, inherits bool, err error) {
	w := &fs.owners
	src = &cow.Source{Mode: o.mode, Uid: int(w.uids.stored(o.uid)), Gid: int(w.gids.stored(o.gid)), Rdev: o.rdev, Target: o.target, Data: -1}
	isDir, isLink := o.mode&unix.S_IFMT == unix.S_IFDIR, o.mode&unix.S_IFMT == unix.S_IFLNK
	src.Flags = c.p.dir.flagsFor(c.h.fd, o.mode&unix.S_IFMT)
	group, err := fs.handedGroup(c)
	if err != nil {
		return nil, false, err
	}
	if group >= 0 {
		src.Gid = group
		if isDir {
			src.Mode |= unix.S_ISGID
		}
	}
	if isLink {
		return src, false, nil
	}
	def, err := fs.defaultACL(c.p.dir, c.h.fd)
	if err != nil {
		return nil, false, err
	}
	if def == nil {
		src.Mode &^= o.umask
		return src, false, nil
	}
	src.Mode, src.Xattrs, err = inheritACL(def, src.Mode, isDir)
	for i := range src.Xattrs {
		src.Xattrs[i].Name = fs.upper.toDisk(src.Mode&unix.S_IFMT, src.Xattrs[i].Name)
	}
	return src, true, err
}

func (c *change) createInPlace(name string, o newObject) (fd int, err error) {
	switch o.mode & unix.S_IFMT {
	case unix.S_IFREG:
		return fsat.OpenName(c.h.fd, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOATIME, o.mode&0o7777)
	case unix.S_IFDIR:
		return -1, fsat.Mkdir(c.h.fd, name, o.mode&0o7777)
	case unix.S_IFLNK:
		return -1, fsat.Symlink(o.target, c.h.fd, name)
	}
	return -1, fsat.Mknod(c.h.fd, name, o.mode, o.rdev)
}

func (fs *FS) createInWork(c *change, f *found, src *cow.Source) (fd int, err error) {
	isDir := src.Mode&unix.S_IFMT == unix.S_IFDIR
	build := fs.build
	if isDir && f.low != nil {
		build = fs.buildOpaque
	}
	t, err := build(*src)
	if err != nil {
		return -1, err
	}
	defer t.Discard()
	var flags uint = unix.RENAME_NOREPLACE
	if f.entry {
		flags = 0
		if isDir {
			flags = unix.RENAME_EXCHANGE
		}
	}
	if err := t.Publish(c.h.fd, f.name, flags); err != nil {
		return -1, err
	}
	return t.TakeFd(), nil
}

// born makes the inode of an object that has just got its first name. fd is a
// descriptor of its data or -1; it is taken over. src is what has been asked for.
func (fs *FS) born(c *change, name string, src *cow.Source, fd int, seen *look) (*inode, error) {
	var st unix.Stat_t
	dirfd, at := c.h.fd, name
	if fd >= 0 {
		dirfd, at = fd, ""
	}
	err := fsat.Stat(dirfd, at, &st)
	if err == nil {
		err = fs.describeNew(dirfd, at, src, &st)
	}
	if err != nil {
		fsat.Close(fd)
		return nil, err
	}
	n := fs.newUpper(&st)
	seen.at(n, &st)
	n.where = alias{c.p, name}
	n.rec = fs.record(n, n.where)
	c.p.refs.Add(1)
	fs.nodes.add(n)
	fs.trim.note()
	if fd >= 0 && n.typ() == unix.S_IFREG {
		fs.fds.put(&n.fd, fd, true).release()
	} else {
		fsat.Close(fd) // of a file that says that it is something else
	}
	c.p.dir.setUpper(name, n)
	return n, nil
}

// newUpper makes the inode of an object born in the upper.
func (fs *FS) newUpper(st *unix.Stat_t) *inode {
	n := newInode(fs.nodes.newID(), fs.inos.shown(st.Dev, st.Ino), st.Mode&unix.S_IFMT, nil)
	n.upper = true
	if n.isDir() {
		n.dir.loaded = true // it is empty
	}
	return n
}

func (fs *FS) makeNode(op string, h *fuse.InHeader, name string, o newObject, out *fuse.EntryOut) fuse.Status {
	p := fs.node(h.NodeId)
	if p == nil || !p.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	o.uid, o.gid = h.Uid, h.Gid
	if o.op == nil {
		o.op = fs.begin(h, ledger.Request{})
	}
	fs.resent(h, p)
	seen := look{pid: h.Pid}
	n, err := fs.create(p, name, o, &seen)
	if err != nil {
		return fs.status(op, p, err)
	}
	fs.changed(p, h.Pid)
	return fs.status(op, n, fs.reply(n, &seen, out))
}

// Mknod implements MKNOD. A device 0:0 would be a whiteout, so it is refused as
// on kernel overlayfs (ovl_mknod).
func (fs *FS) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if whiteout.IsDevice(in.Mode, uint64(in.Rdev)) {
		return fuse.EPERM
	}
	o := newObject{mode: in.Mode, umask: in.Umask, rdev: realRdev(in.Rdev)}
	return fs.makeNode("mknod", &in.InHeader, name, o, out)
}

// Mkdir implements MKDIR.
func (fs *FS) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	o := newObject{mode: in.Mode&0o7777 | unix.S_IFDIR, umask: in.Umask}
	return fs.makeNode("mkdir", &in.InHeader, name, o, out)
}

// Symlink implements SYMLINK.
func (fs *FS) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return fs.makeNode("symlink", h, name, newObject{mode: unix.S_IFLNK | 0o777, target: target}, out)
}

// Create implements CREATE: a new regular file, open.
func (fs *FS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	o := newObject{mode: in.Mode&0o7777 | unix.S_IFREG, umask: in.Umask, op: fs.begin(&in.InHeader, ledger.Request{})}
	st := fs.makeNode("create", &in.InHeader, name, o, &out.EntryOut)
	if st == fuse.OK {
		fs.opened(in, out, o.op)
	}
	return st
}

// opened makes the handle that comes with a new file.
func (fs *FS) opened(in *fuse.CreateIn, out *fuse.CreateOut, op *ledger.Op) {
	out.OpenFlags = fs.openFlags()
	n := fs.node(out.NodeId)
	if n == nil || fs.io == IONoOpen { // then it will not be closed either
		return
	}
	fs.uncount(n, op)
	write := in.Flags&unix.O_ACCMODE != unix.O_RDONLY
	if write {
		n.ownExtra().writers.Add(1)
	}
	fs.openHandle(n, write, &out.OpenOut)
	counted(op, out.Fh, write)
}

// Tmpfile implements TMPFILE: a regular file without a name.
func (fs *FS) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	p := fs.node(in.NodeId)
	if p == nil || !p.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	op := fs.begin(&in.InHeader, ledger.Request{})
	fs.unclaim(op.Moved().Node) // nobody has been told of it
	op.Restart()
	n, err := fs.tmpfile(p, newObject{
		mode: in.Mode&0o7777 | unix.S_IFREG, umask: in.Umask, uid: in.Uid, gid: in.Gid, op: op,
	})
	if err == nil {
		err = fs.reply(n, &look{pid: in.Pid}, &out.EntryOut)
	}
	if err != nil {
		return fs.status("tmpfile", p, err)
	}
	fs.opened(in, out, op)
	return fuse.OK
}

func (fs *FS) tmpfile(p *inode, o newObject) (*inode, error) {
	if fs.readOnly() {
		return nil, unix.EROFS
	}
	if err := p.protected(immutable); err != nil {
		return nil, err
	}
	c, err := fs.beginChange(p)
	if err != nil {
		return nil, err
	}
	defer c.end()
	src, _, err := fs.source(c, o)
	if err != nil {
		return nil, err
	}
	// Made in the workdir, so that the directory's own ACL is not handed down
	// twice.
	src.Anonymous = true
	t, err := fs.build(*src)
	if err != nil {
		return nil, err
	}
	fd := t.TakeFd()
	var st unix.Stat_t
	if err := fs.statUpper(fd, "", &st); err != nil {
		fsat.Close(fd)
		return nil, err
	}
	n := fs.newUpper(&st)
	n.ownExtra().orphan = fs.orphanOf(n, fd, true)
	o.op.SetMoved(ledger.Moved{Node: n.id})
	fs.nodes.add(n)
	return n, nil
}
