package unionfs

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout/override"
)

// In an upper with an override form (Options.Override) owners, modes and types are
// written down instead of given to the files: see package override. Where files belong to
// root (Owners.FilesOfRoot), a symbolic link of somebody else is an empty file; elsewhere
// links are given away for real, if that is allowed.

// ownerless reports whether all objects of the upper belong to root, because its file
// system cannot hold what says otherwise.
func (fs *FS) ownerless() bool { return fs.owners.filesOfRoot && fs.upper.override == override.None }

// says reports whether the object must say what it is, because its file does not.
func (fs *FS) says(s *override.Stat) bool { return !fs.owners.filesOfRoot || s.Needed() }

// markOverride gives the root of the upper the attribute, which tells others the form that
// the layer is in. Where files belong to root, that is known already.
func (fs *FS) markOverride() error {
	if fs.owners.filesOfRoot {
		return nil
	}
	o, err := fs.ask(fs.upper.root, "")
	if err == nil {
		err = fs.say(fs.upper.root, "", &o)
	}
	if err != nil {
		return fmt.Errorf("upperdir %q: attribute %s: %w", fs.upper.path, fs.upper.override.Attr(), err)
	}
	return nil
}

// build is cow.Work.Build of an object of the upper. src tells what the object is.
func (fs *FS) build(src cow.Source) (*cow.Temp, error) {
	if fs.ownerless() {
		src.Uid, src.Gid, src.Mode = fs.euid, fs.egid, src.Mode&^(unix.S_ISUID|unix.S_ISGID)
	}
	if fs.upper.override == override.None {
		src.AnyOwner = fs.owners.squash
		return fs.work.Build(src)
	}
	s := override.Stat{UID: uint32(src.Uid), GID: uint32(src.Gid), Mode: src.Mode, Rdev: src.Rdev}
	src.AnyOwner = true
	isLink := src.Mode&unix.S_IFMT == unix.S_IFLNK
	if isLink && !fs.owners.filesOfRoot {
		return fs.work.Build(src)
	}
	src.Uid, src.Gid = fs.euid, fs.egid
	if isLink && !s.Needed() {
		return fs.work.Build(src)
	}
	src.Mode, src.Rdev = override.RealType(s.Mode)|override.RealMode(s.Mode), 0
	if isLink {
		src.Xattrs = append(src.Xattrs, cow.Xattr{Name: override.TargetAttr, Value: []byte(src.Target)})
		src.Mode, src.Target = unix.S_IFREG|0o600, ""
	}
	if fs.says(&s) {
		src.Xattrs = append(src.Xattrs, cow.Xattr{Name: fs.upper.override.Attr(), Value: s.Format()})
	}
	return fs.work.Build(src)
}

// givesOwner reports whether the file system gives the new object o, made under its
// name, the owner that it shall have, and the rest of src with it.
func (fs *FS) givesOwner(o *newObject, src *cow.Source) bool {
	if fs.ownerless() {
		return o.mode&(unix.S_ISUID|unix.S_ISGID) == 0
	}
	if fs.upper.override == override.None {
		// A group handed down by the directory is handed down there, too.
		w := &fs.owners
		return int(w.uids.stored(o.uid)) == fs.euid && int(w.gids.stored(o.gid)) == fs.egid
	}
	s := override.Stat{UID: uint32(src.Uid), GID: uint32(src.Gid), Mode: src.Mode, Rdev: src.Rdev}
	return !fs.says(&s) && len(src.Xattrs) == 0
}

// describeNew is describe of an object that was just made as src asks for.
func (fs *FS) describeNew(dirfd int, name string, src *cow.Source, st *unix.Stat_t) error {
	if fs.upper.override == override.None || src.Mode&unix.S_IFMT == unix.S_IFLNK {
		return fs.upper.describe(dirfd, name, st)
	}
	st.Mode, st.Uid, st.Gid, st.Rdev = src.Mode, uint32(src.Uid), uint32(src.Gid), src.Rdev
	return nil
}

// handedGroup returns the group that a setgid directory hands down to what is made in it;
// -1 if it is none.
func (fs *FS) handedGroup(c *change) (gid int, err error) {
	d := c.p.dir
	if fs.upper.override != override.None {
		if g := d.group.Load(); g != nil {
			return *g, nil
		}
	}
	var st unix.Stat_t
	if err := fs.statUpper(c.h.fd, "", &st); err != nil {
		return -1, err
	}
	if gid = -1; st.Mode&unix.S_ISGID != 0 {
		gid = int(st.Gid)
	}
	if fs.upper.override != override.None { // elsewhere it costs no more to look
		d.group.Store(&gid)
	}
	return gid, nil
}

// chown changes the owner of an object of the upper to ids that the kernel has sent; -1
// leaves one as it is.
func (fs *FS) chown(dirfd int, name string, uid, gid int) error {
	w := &fs.owners
	if w.plain && fs.upper.override == override.None {
		return fsat.Chown(dirfd, name, uid, gid)
	}
	o, err := fs.ask(dirfd, name)
	if err != nil {
		return err
	}
	if uid >= 0 {
		uid = int(w.uids.change(o.is.Uid, uint32(uid)))
	}
	if gid >= 0 {
		gid = int(w.gids.change(o.is.Gid, uint32(gid)))
	}
	if fs.ownerless() {
		if uid > 0 || gid > 0 {
			return unix.EPERM
		}
		return nil
	}
	if fs.upper.override == override.None {
		err := fsat.Chown(dirfd, name, uid, gid)
		if w.squash && (err == unix.EPERM || err == unix.EINVAL) {
			return nil
		}
		return err
	}
	if uid >= 0 {
		o.is.Uid = uint32(uid)
	}
	if gid >= 0 {
		o.is.Gid = uint32(gid)
	}
	return fs.say(dirfd, name, &o)
}

// chmod changes the permission bits of an object of the upper, with those of its ACL.
func (fs *FS) chmod(dirfd int, name string, mode uint32) error {
	if fs.ownerless() {
		mode &^= unix.S_ISUID | unix.S_ISGID
	}
	if fs.upper.override == override.None {
		return fsat.Chmod(dirfd, name, mode&0o7777)
	}
	if err := fs.chmodACL(dirfd, name, mode); err != nil {
		return err
	}
	return fs.sayMode(dirfd, name, mode)
}

// sayMode is chmod without the ACL.
func (fs *FS) sayMode(dirfd int, name string, mode uint32) error {
	o, err := fs.ask(dirfd, name)
	if err != nil {
		return err
	}
	o.is.Mode = o.is.Mode&unix.S_IFMT | mode&0o7777
	return fs.say(dirfd, name, &o)
}

// clearBits removes permission bits from an object of the upper.
func (fs *FS) clearBits(dirfd int, name string, bits uint32) error {
	var st unix.Stat_t
	if err := fs.statUpper(dirfd, name, &st); err != nil {
		return err
	}
	if st.Mode&bits == 0 {
		return nil
	}
	return fs.chmod(dirfd, name, st.Mode&^bits)
}

// object is an object of the upper: its file, what it is, and whether it says so.
type object struct {
	file, is unix.Stat_t
	says     bool
}

// ask looks at an object of the upper.
func (fs *FS) ask(dirfd int, name string) (o object, err error) {
	if err = fsat.Stat(dirfd, name, &o.file); err == nil {
		o.is = o.file
		o.says, err = fs.upper.saying(dirfd, name, &o.is)
	}
	return o, err
}

// say writes down what an object of the upper shall be. As long as the attribute is
// there it alone counts, so it is written before the file changes, and removed after.
func (fs *FS) say(dirfd int, name string, o *object) error {
	if t := o.file.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return fs.change(dirfd, name, &o.file, &o.is)
	}
	isLink := o.is.Mode&unix.S_IFMT == unix.S_IFLNK
	s := override.Stat{UID: o.is.Uid, GID: o.is.Gid, Mode: o.is.Mode, Rdev: o.is.Rdev}
	says := fs.says(&s) || isLink
	if says {
		if err := fsat.Setxattr(dirfd, name, fs.upper.override.Attr(), s.Format(), 0); err != nil {
			return err
		}
	}
	// Also if it is right: the time of change is now.
	if real := override.RealMode(o.is.Mode); !isLink && (o.file.Mode&0o7777 != real || !says && !o.says) {
		if err := fsat.Chmod(dirfd, name, real); err != nil {
			return err
		}
	}
	if says || !o.says {
		return nil
	}
	return fsat.Removexattr(dirfd, name, fs.upper.override.Attr())
}

// change is say of what can carry no attribute: a symbolic link, or a device, pipe or
// socket that somebody else has left in the upper. It is changed itself, as far as that
// is allowed.
func (fs *FS) change(dirfd int, name string, file, st *unix.Stat_t) error {
	if !fs.owners.filesOfRoot && (file.Uid != st.Uid || file.Gid != st.Gid) {
		if err := fsat.Chown(dirfd, name, int(st.Uid), int(st.Gid)); err != nil && err != unix.EPERM {
			return err
		}
	}
	if file.Mode&unix.S_IFMT == unix.S_IFLNK {
		if fs.owners.filesOfRoot && (st.Uid != 0 || st.Gid != 0) {
			return fs.giveLink(dirfd, name, file, st)
		}
		return nil
	}
	if file.Mode == st.Mode {
		return nil
	}
	return fsat.Chmod(dirfd, name, st.Mode&0o7777)
}

// giveLink puts an empty file that says what it is in the place of a symbolic link that
// does not belong to root any more. One with several names, or none, stays root's.
func (fs *FS) giveLink(dirfd int, name string, file, st *unix.Stat_t) error {
	if name == "" || file.Nlink > 1 {
		return nil
	}
	target, err := fsat.Readlink(dirfd, name)
	if err != nil {
		return err
	}
	t, err := fs.build(cow.Source{
		Mode: st.Mode, Uid: int(st.Uid), Gid: int(st.Gid), Target: target, Data: -1, SetTimes: true, Atime: file.Atim, Mtime: file.Mtim,
	})
	if err != nil {
		return err
	}
	defer t.Discard()
	return t.Publish(dirfd, name, 0)
}

// onlyName makes ready for giveLink what has had several names and has one left: the file
// behind it will be another, and the number of the one that was may be given to anything.
func (fs *FS) onlyName(n *inode) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.extra()
	if e.upID == (realID{}) {
		return nil
	}
	var st unix.Stat_t
	err := fs.withRealLocked(n, func(dirfd int, name string) error { return fsat.Stat(dirfd, name, &st) })
	if err == nil && st.Nlink == 1 {
		fs.nodes.removeFrom(n, e.upID, upperObjects)
		e.upID = realID{}
	}
	return err
}

// chmodACL gives the entries of an object's ACL that a mode shows the bits of that mode
// (kernel: posix_acl_chmod).
func (fs *FS) chmodACL(dirfd int, name string, mode uint32) error {
	disk := fs.upper.toDisk(0, aclAccess)
	acl, err := fsat.GetxattrValue(dirfd, name, disk)
	if err != nil {
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
			return nil
		}
		return err
	}
	if !validACL(acl) {
		return unix.EIO
	}
	group := uint16(aclGroupObj)
	if aclPerm(acl, aclMask) != nil {
		group = aclMask
	}
	for tag, bits := range map[uint16]uint32{aclUserObj: mode >> 6, group: mode >> 3, aclOther: mode} {
		if p := aclPerm(acl, tag); p != nil {
			binary.LittleEndian.PutUint16(p, uint16(bits&7))
		}
	}
	return fsat.Setxattr(dirfd, name, disk, acl, 0)
}

// setACL stores an access ACL, beside the file if the form keeps it there, and writes down
// the mode that the ACL says (kernel: posix_acl_update_mode).
func (fs *FS) setACL(dirfd int, name string, acl []byte, flags int) error {
	if !validACL(acl) {
		return unix.EINVAL
	}
	var st unix.Stat_t
	if err := fs.statUpper(dirfd, name, &st); err != nil {
		return err
	}
	mode := st.Mode &^ 0o777
	group := aclPerm(acl, aclMask)
	if group == nil {
		group = aclPerm(acl, aclGroupObj)
	}
	for shift, p := range map[int][]byte{6: aclPerm(acl, aclUserObj), 3: group, 0: aclPerm(acl, aclOther)} {
		if p == nil {
			return unix.EINVAL
		}
		mode |= uint32(binary.LittleEndian.Uint16(p)&7) << shift
	}
	disk := fs.upper.toDisk(0, aclAccess)
	var err error
	if len(acl) > aclHeader+3*aclEntrySize {
		err = fsat.Setxattr(dirfd, name, disk, acl, flags)
	} else if err = fsat.Removexattr(dirfd, name, disk); err == unix.ENODATA {
		err = nil // it says no more than the mode
	}
	if err != nil {
		return err
	}
	return fs.sayMode(dirfd, name, mode)
}

// mapACL maps the ids in an ACL in place, from stored to shown ones or back.
func (w *owners) mapACL(acl []byte, shown bool) {
	if w.plain || !validACL(acl) {
		return
	}
	for e := acl[aclHeader:]; len(e) > 0; e = e[aclEntrySize:] {
		m := &w.uids
		switch binary.LittleEndian.Uint16(e) {
		case aclUser:
		case aclGroup:
			m = &w.gids
		default:
			continue
		}
		id := binary.LittleEndian.Uint32(e[4:])
		if shown {
			id = m.shown(id)
		} else {
			id = m.stored(id)
		}
		binary.LittleEndian.PutUint32(e[4:], id)
	}
}
