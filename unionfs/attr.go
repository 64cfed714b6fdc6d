package unionfs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// GetAttr implements GETATTR.
func (fs *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	n.tell(in.Pid)
	if err := fs.attr(n, &out.Attr); err != nil {
		return fs.status("getattr", n, err)
	}
	out.SetTimeout(fs.ttl)
	return fuse.OK
}

// attr fills the attributes of n as the union shows them.
func (fs *FS) attr(n *inode, out *fuse.Attr) error {
	var st unix.Stat_t
	n.mu.RLock()
	err := fs.statLocked(n, &st)
	if err == nil && n.meta {
		var data unix.Stat_t
		err = fs.lowers.stat(n.low, &data)
		st.Blocks = data.Blocks // its space is where its data is
	}
	if err != nil {
		n.mu.RUnlock()
		return err
	}
	nlink, ino, counts := fs.nlinkLocked(n, uint32(st.Nlink)), n.ino, fs.countsLocked(n)
	n.mu.RUnlock()
	if counts {
		nlink = fs.countLinks(n)
	}
	if st.Mode&unix.S_IFMT != n.typ() {
		// Somebody changed a layer under the mount.
		return unix.ESTALE
	}
	fs.fillAttr(out, &st)
	out.Ino, out.Nlink = fs.shownIno(ino), nlink
	return nil
}

// shownIno is the inode number that programs see.
func (fs *FS) shownIno(ino uint64) uint64 {
	if !fs.shortInodes || ino>>32 == 0 {
		return ino
	}
	return max(ino>>32^ino&(1<<32-1), 1)
}

// attrSeen is attr from what has been seen, if that is still good.
func (fs *FS) attrSeen(seen *look, out *fuse.Attr) bool {
	n := seen.n
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.upper != seen.upper || n.meta || fs.countsLocked(n) || !n.upper && fs.lowers.dataElsewhere(n.low) || seen.st.Mode&unix.S_IFMT != n.typ() {
		return false
	}
	fs.fillAttr(out, &seen.st)
	out.Ino, out.Nlink = fs.shownIno(n.ino), fs.nlinkLocked(n, uint32(seen.st.Nlink))
	return true
}

// nlinkLocked is the link count to show. A merged directory shows 1, as on
// kernel overlayfs (ovl_getattr), unless countsLocked says otherwise. A removed lower object has lost its last link, whatever its layer
// says; one of several links is reported as the layer has it, as there.
func (fs *FS) nlinkLocked(n *inode, links uint32) uint32 {
	removed := n.where.parent == nil && n != fs.root
	switch {
	case n.isDir() && removed:
		return 0
	case n.isDir() && fs.staticNlink:
		return 1
	case n.isDir() && fs.mergedLocked(n):
		return 1
	case n.extra().group != nil:
		return n.extra().group.links
	case !n.upper && removed && links == 1:
		return 0
	case n.extra().orphan != nil && n.extra().orphan.name != "" && links > 0:
		return links - 1 // not counting the name that only we know
	}
	return links
}

// mergedLocked reports whether a directory consists of several.
func (fs *FS) mergedLocked(n *inode) bool {
	return n.low != nil && (n.upper || fs.lowers.merged(n.low))
}

// countsLocked reports whether the links of n are to be counted, which cannot be done
// with a lock on it: a merged directory that shows how many subdirectories it has.
func (fs *FS) countsLocked(n *inode) bool {
	return fs.countsDirs && n.isDir() && (n.where.parent != nil || n == fs.root) && fs.mergedLocked(n)
}

// countLinks is the link count of a merged directory by its subdirectories. One that
// cannot be read shows what every such directory shows without being counted.
func (fs *FS) countLinks(n *inode) uint32 {
	if err := fs.load(n); err != nil {
		return 1
	}
	return 2 + n.dir.subdirs()
}

func (fs *FS) fillAttr(out *fuse.Attr, st *unix.Stat_t) {
	uid, gid := st.Uid, st.Gid
	if !fs.owners.plain {
		uid, gid = fs.owners.uids.shown(uid), fs.owners.gids.shown(gid)
	}
	*out = fuse.Attr{
		Ino:       st.Ino,
		Size:      uint64(st.Size),
		Blocks:    uint64(st.Blocks),
		Atime:     uint64(st.Atim.Sec),
		Atimensec: uint32(st.Atim.Nsec),
		Mtime:     uint64(st.Mtim.Sec),
		Mtimensec: uint32(st.Mtim.Nsec),
		Ctime:     uint64(st.Ctim.Sec),
		Ctimensec: uint32(st.Ctim.Nsec),
		Mode:      st.Mode,
		Nlink:     uint32(st.Nlink),
		Owner:     fuse.Owner{Uid: uid, Gid: gid},
		Rdev:      wireRdev(st.Rdev),
		Blksize:   uint32(st.Blksize),
	}
}

// wireRdev packs a device number into the 32 bits of the protocol (kernel:
// new_encode_dev); realRdev is its inverse.
func wireRdev(rdev uint64) uint32 {
	major, minor := unix.Major(rdev), unix.Minor(rdev)
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

func realRdev(wire uint32) uint64 {
	return unix.Mkdev(wire>>8&0xfff, wire&0xff|wire>>12&0xfff00)
}

// Access implements ACCESS. The kernel checks permissions by itself
// (default_permissions) and asks only where it must not be told ENOSYS.
func (fs *FS) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// Statx implements STATX, which the kernel sends when somebody wants to know the
// time of birth: that of the real object, so of a copy, as on kernel overlayfs.
func (fs *FS) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	n.tell(in.Pid)
	var a fuse.Attr
	if err := fs.attr(n, &a); err != nil {
		return fs.status("statx", n, err)
	}
	var st unix.Statx_t
	err := fs.withReal(n, func(dirfd int, name string) error { return fsat.Statx(dirfd, name, unix.STATX_BTIME, &st) })
	if err != nil {
		return fs.status("statx", n, err)
	}
	rdev := realRdev(a.Rdev)
	out.Statx = fuse.Statx{
		Mask: unix.STATX_BASIC_STATS | st.Mask&unix.STATX_BTIME,
		Ino:  a.Ino, Size: a.Size, Blocks: a.Blocks, Blksize: a.Blksize, Mode: uint16(a.Mode), Nlink: a.Nlink, Uid: a.Uid, Gid: a.Gid,
		Atime: fuse.SxTime{Sec: a.Atime, Nsec: a.Atimensec}, Btime: fuse.SxTime{Sec: uint64(st.Btime.Sec), Nsec: st.Btime.Nsec},
		Ctime: fuse.SxTime{Sec: a.Ctime, Nsec: a.Ctimensec}, Mtime: fuse.SxTime{Sec: a.Mtime, Nsec: a.Mtimensec},
		RdevMajor: unix.Major(rdev), RdevMinor: unix.Minor(rdev),
	}
	out.SetTimeout(fs.ttl)
	return fuse.OK
}

// Readlink implements READLINK.
func (fs *FS) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n := fs.node(h.NodeId)
	if n == nil {
		return nil, fuse.Status(unix.ESTALE)
	}
	var target string
	n.mu.RLock()
	err := fs.withRealLocked(n, func(dirfd int, name string) (e error) {
		target, e = fs.layerLocked(n).readlink(dirfd, name)
		return e
	})
	n.mu.RUnlock()
	return []byte(target), fs.status("readlink", n, err)
}

// StatFs implements STATFS: the upper's file system, where new data goes, or
// the topmost lower's.
func (fs *FS) StatFs(_ <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	var st unix.Statfs_t
	var err error
	if fs.upper != nil {
		err = unix.Fstatfs(fs.upper.root, &st)
	} else {
		err = fs.lowers.with(fs.lowers.root(), func(dirfd int, _ string) error { return unix.Fstatfs(dirfd, &st) })
	}
	if err != nil {
		return fs.status("statfs", fs.root, err)
	}
	*out = fuse.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Frsize: uint32(st.Frsize), NameLen: uint32(st.Namelen),
	}
	return fuse.OK
}
