package unionfs

import (
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/whiteout/override"
)

// layerLocked is the layer that n lives in. Preconditions: n.mu is held.
func (fs *FS) layerLocked(n *inode) *layer {
	if n.upper {
		return fs.upper
	}
	return fs.lowers.layer(n.low)
}

// refused is the answer to whoever asks for an attribute that this mount does not have.
// ENOSYS makes the kernel stop asking for any.
func (fs *FS) refused(attr string) fuse.Status {
	switch {
	case fs.noXattrs:
		return fuse.ENOSYS
	case fs.noACL && isACL(attr):
		return fuse.Status(unix.EOPNOTSUPP)
	}
	return fuse.OK
}

// GetXAttr implements GETXATTR.
func (fs *FS) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	n := fs.node(h.NodeId)
	if n == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	if err := fs.refused(attr); err != fuse.OK {
		return 0, err
	}
	if fs.tells(attr) {
		return fs.tellXattr(n, attr, dest)
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	if fs.layerLocked(n).isPrefix(attr) {
		return 0, fuse.EINVAL
	}
	if !n.upper && fs.lowers.bare(n.low) {
		return 0, fuse.ENODATA
	}
	disk := fs.layerLocked(n).toDisk(n.typ(), attr)
	var size int
	err := fs.withRealLocked(n, func(dirfd int, name string) (e error) {
		size, e = fsat.Getxattr(dirfd, name, disk, dest)
		return e
	})
	switch {
	case !isACL(attr):
	case err == unix.EOPNOTSUPP:
		// The kernel asks for ACLs to check permissions, and would fail with this
		// error. Where there can be none, there is none.
		err = unix.ENODATA
	case err == nil && size <= len(dest):
		fs.layerLocked(n).storeACL(disk, dest[:size])
		fs.owners.mapACL(dest[:size], true)
	}
	return uint32(size), fs.status("getxattr", n, err)
}

// ListXAttr implements LISTXATTR.
func (fs *FS) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n := fs.node(h.NodeId)
	if n == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	if fs.noXattrs {
		return 0, fuse.ENOSYS
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	if !n.upper && fs.lowers.bare(n.low) {
		return 0, fuse.OK
	}
	var names []string
	err := fs.withRealLocked(n, func(dirfd int, name string) (e error) {
		names, e = fsat.Listxattr(dirfd, name)
		return e
	})
	if err != nil {
		return 0, fs.status("listxattr", n, err)
	}
	var list []byte
	trusted := -1
	for _, disk := range names {
		name, visible := fs.layerLocked(n).fromDisk(n.typ(), disk)
		if !visible {
			continue
		}
		if strings.HasPrefix(name, "trusted.") {
			// The kernel filters these for its own file systems
			// (xattr(7)); for FUSE it leaves that to the server.
			if trusted < 0 {
				trusted = 0
				if callerIsAdmin(h) {
					trusted = 1
				}
			}
			if trusted == 0 {
				continue
			}
		}
		list = append(append(list, name...), 0)
	}
	if len(dest) > 0 && len(list) > len(dest) {
		return 0, fuse.ERANGE
	}
	copy(dest, list)
	return uint32(len(list)), fuse.OK
}

// SetXAttr implements SETXATTR.
func (fs *FS) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	if err := fs.refused(attr); err != fuse.OK {
		return err
	}
	if fs.tells(attr) {
		return fuse.EPERM
	}
	if isACL(attr) {
		if n := fs.node(in.NodeId); attr == aclDefault && n != nil && !n.isDir() {
			return fuse.EACCES // kernel: set_posix_acl
		}
		fs.owners.mapACL(data, false)
	}
	op := fs.begin(&in.InHeader, ledger.Request{})
	return fs.changeXAttr(&in.InHeader, "setxattr", attr, func(dirfd int, name, disk string) error {
		if attr == aclAccess && fs.upper.override != override.None {
			if err := fs.setACL(dirfd, name, data, int(in.Flags)); err != nil {
				return err
			}
			if in.SetXAttrFlags&setxattrACLKillSgid != 0 {
				return fs.clearBits(dirfd, name, unix.S_ISGID)
			}
			return nil
		}
		flags := int(in.Flags)
		if flags != 0 {
			if op.Had(ledger.Armed) { // an earlier server may have set it
				flags = 0
			} else if _, err := fsat.Getxattr(dirfd, name, disk, nil); (err == nil) == (flags == unix.XATTR_REPLACE) {
				op.Set(ledger.Armed)
			}
		}
		err := fsat.Setxattr(dirfd, name, disk, data, flags)
		if err == nil && attr == aclAccess && in.SetXAttrFlags&setxattrACLKillSgid != 0 {
			err = fs.clearBits(dirfd, name, unix.S_ISGID)
		}
		return err
	})
}

// RemoveXAttr implements REMOVEXATTR.
func (fs *FS) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, attr string) fuse.Status {
	n := fs.node(h.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	if err := fs.refused(attr); err != fuse.OK {
		return err
	}
	if fs.tells(attr) {
		return fuse.EPERM
	}
	var err error
	if attr == aclAccess {
		if err = fs.dropForeignSgid(n, h); err != nil {
			return fs.status("removexattr", n, err)
		}
	}
	// A lower object that has no such attribute is not copied up to find
	// that out (kernel: ovl_xattr_set, ovl_set_or_remove_acl).
	n.mu.RLock()
	if !n.upper {
		disk := fs.layerLocked(n).toDisk(n.typ(), attr)
		err = fs.withRealLocked(n, func(dirfd int, name string) error {
			_, e := fsat.Getxattr(dirfd, name, disk, nil)
			return e
		})
	}
	n.mu.RUnlock()
	if err != nil {
		return fs.status("removexattr", n, err)
	}
	n.ownExtra().capsGone.Store(attr == capsAttr)
	op := fs.begin(h, ledger.Request{})
	return fs.changeXAttr(h, "removexattr", attr, func(dirfd int, name, disk string) error {
		if op != nil {
			if _, err := fsat.Getxattr(dirfd, name, disk, nil); err == nil {
				op.Set(ledger.Armed)
			} else if err == unix.ENODATA && op.Had(ledger.Armed) {
				return nil // an earlier server has removed it
			}
		}
		err := fsat.Removexattr(dirfd, name, disk)
		if err == unix.ENODATA && disk != attr && isACL(attr) {
			return nil // as of one that a file system keeps
		}
		return err
	})
}

// dropForeignSgid clears setgid before a change of the access ACL by somebody
// who is not in the group: the file system below sees only us (kernel:
// ovl_set_acl). For a new ACL the kernel says so in the request.
func (fs *FS) dropForeignSgid(n *inode, h *fuse.InHeader) error {
	var st unix.Stat_t
	if err := fs.statShown(n, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_ISGID == 0 || callerInGroup(h, st.Gid) {
		return nil
	}
	if err := fs.ensureUpper(n); err != nil {
		return err
	}
	if n.isDir() {
		defer n.dir.group.Store(nil)
	}
	defer n.holdIncomplete()()
	return fs.withReal(n, func(dirfd int, name string) error { return fs.clearBits(dirfd, name, unix.S_ISGID) })
}

// isACL reports whether an attribute holds user and group ids.
func isACL(attr string) bool { return attr == aclAccess || attr == aclDefault }

// capsAttr holds a file's capabilities.
const capsAttr = "security.capability"

// setxattrACLKillSgid is FUSE_SETXATTR_ACL_KILL_SGID.
const setxattrACLKillSgid = 1

func (fs *FS) changeXAttr(h *fuse.InHeader, op, attr string, fn func(dirfd int, name, disk string) error) fuse.Status {
	n := fs.node(h.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	fs.resent(h, n)
	if fs.upper != nil && fs.upper.isPrefix(attr) {
		return fuse.EINVAL
	}
	if err := n.protected(immutable | appendOnly); err != nil {
		return fs.status(op, n, err)
	}
	if err := fs.ensureUpper(n); err != nil {
		return fs.status(op, n, err)
	}
	if n.isDir() && isACL(attr) {
		defer n.dir.group.Store(nil) // its mode may change
	}
	if n.isDir() && attr == aclDefault {
		// Not while an object is made that would inherit it.
		n.dir.opMu.Lock()
		defer n.dir.opMu.Unlock()
		defer n.dir.acl.Store(aclUnknown)
	}
	disk := fs.upper.toDisk(n.typ(), attr)
	release := n.holdIncomplete()
	err := fs.withReal(n, func(dirfd int, name string) error { return fn(dirfd, name, disk) })
	release()
	if attr == aclAccess {
		// The mode has changed with it. The kernel forgets it by itself, but
		// not in a way that a GETATTR under way would notice.
		fs.staleAttr(n)
	}
	return fs.status(op, n, err)
}

// copyableXattrs reads the attributes that a copy in the upper must have.
func (fs *FS) copyableXattrs(from *layer, typ uint32, dirfd int, name string) ([]cow.Xattr, error) {
	names, err := fsat.Listxattr(dirfd, name)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	attrs := make([]cow.Xattr, 0, len(names))
	for _, disk := range names {
		user, visible := from.fromDisk(typ, disk)
		if !visible {
			continue
		}
		v, err := fsat.GetxattrValue(dirfd, name, disk)
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			return nil, err
		}
		from.storeACL(disk, v)
		attrs = append(attrs, cow.Xattr{Name: fs.upper.toDisk(typ, user), Value: v})
	}
	return attrs, nil
}
