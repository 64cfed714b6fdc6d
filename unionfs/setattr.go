package unionfs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// SetAttr implements SETATTR.
func (fs *FS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	fs.resent(&in.InHeader, n)
	if err := fs.setAttr(n, &in.SetAttrInCommon); err != nil {
		fs.staleAttr(n) // it may have been copied up, or changed in part
		return fs.status("setattr", n, err)
	}
	n.tell(in.Pid)
	if err := fs.attr(n, &out.Attr); err != nil {
		return fs.status("setattr", n, err)
	}
	out.SetTimeout(fs.ttl)
	return fuse.OK
}

func (fs *FS) setAttr(n *inode, in *fuse.SetAttrInCommon) error {
	const anyAttr = fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_SIZE |
		fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW
	if err := n.maySetAttr(in); err != nil {
		return err
	}
	kill := in.Valid&fuse.FATTR_KILL_SUIDGID != 0
	if in.Valid&anyAttr == 0 {
		// A request to set nothing is how the kernel asks to take privileges
		// away before a write (FUSE_HANDLE_KILLPRIV_V2). chown(2) with
		// nothing to change looks the same; without a writer it can only be
		// that, and then it is for the owner alone (kernel: notify_change
		// turns it into a change of mode). Before a write of root's it comes
		// only when there were capabilities, which have just been removed;
		// setuid stays.
		beforeRootWrite := n.ownExtra().capsGone.Swap(false) && in.InHeader.Uid == 0
		writers := n.extra().writers.Load() > 0 || fs.io == IONoOpen && fs.mayWrite(n, &in.InHeader)
		kill = !writers || !beforeRootWrite
		switch {
		case !writers:
			if err := fs.mayStrip(n, &in.InHeader); err != nil {
				return err
			}
		case n.protected(immutable) != nil:
			// Before fallocate(2), which will be refused; a write asks once more.
			return nil
		}
	}
	if size, ok := in.GetSize(); ok {
		_, byHandle := in.GetFh()
		if err := fs.truncate(n, int64(size), byHandle); err != nil {
			return err
		}
	} else if err := fs.ensureUpperToSet(n); err != nil {
		return err
	}
	defer n.holdIncomplete()()
	if n.isDir() {
		defer n.dir.group.Store(nil)
	}
	if n.typ() == unix.S_IFLNK && fs.owners.filesOfRoot {
		if err := fs.onlyName(n); err != nil {
			return err
		}
	}
	return fs.withReal(n, func(dirfd int, name string) error {
		// What goes with a change of owner depends on the old group.
		var drop uint32
		if kill {
			var st unix.Stat_t
			if err := fs.statUpper(dirfd, name, &st); err != nil {
				return err
			}
			fs.owners.show(&st)
			drop = privilegeBits(&st, &in.InHeader)
		}
		if uid, gid, ok := ownerOf(in); ok {
			if err := fs.chown(dirfd, name, uid, gid); err != nil {
				return err
			}
		}
		if mode, ok := in.GetMode(); ok {
			if err := fs.chmod(dirfd, name, mode); err != nil {
				return err
			}
		}
		if kill {
			if err := fs.dropPrivileges(dirfd, name, drop); err != nil {
				return err
			}
		}
		if ts, ok := timesOf(in); ok {
			return fsat.Utimes(dirfd, name, ts)
		}
		return nil
	})
}

// mayStrip refuses to take setuid and setgid from a file on behalf of somebody
// who could not change its mode.
func (fs *FS) mayStrip(n *inode, h *fuse.InHeader) error {
	var st unix.Stat_t
	if err := fs.statShown(n, &st); err != nil {
		return err
	}
	if h.Uid != 0 && h.Uid != st.Uid && privilegeBits(&st, h) != 0 {
		return unix.EPERM
	}
	return nil
}

// mayWrite reports whether the caller could be writing to a file that it has opened
// without our knowledge.
func (fs *FS) mayWrite(n *inode, h *fuse.InHeader) bool {
	var st unix.Stat_t
	acl := false
	n.mu.RLock()
	disk := fs.layerLocked(n).toDisk(n.typ(), aclAccess)
	err := fs.withRealLocked(n, func(dirfd int, name string) error {
		_, e := fsat.Getxattr(dirfd, name, disk, nil)
		acl = e == nil
		return fs.statLocked(n, &st)
	})
	n.mu.RUnlock()
	fs.owners.show(&st)
	// With an ACL the group bits are the most that anybody in it may have.
	return err == nil && (h.Uid == 0 || h.Uid == st.Uid || st.Mode&0o002 != 0 || st.Mode&0o020 != 0 && (acl || callerInGroup(h, st.Gid)))
}

// privilegeBits are the mode bits that a change by a caller without CAP_FSETID
// takes away (kernel: setattr_should_drop_suidgid): setgid without group
// execute stays for members of the group.
func privilegeBits(st *unix.Stat_t, h *fuse.InHeader) uint32 {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return 0 // of others, devices too, chown takes them (chown_common)
	}
	bits := st.Mode & unix.S_ISUID
	if st.Mode&unix.S_ISGID != 0 && (st.Mode&unix.S_IXGRP != 0 || !callerInGroup(h, st.Gid)) {
		bits |= unix.S_ISGID
	}
	return bits
}

// truncate sets the size of a file; of a lower one only what remains is copied.
// With touch the modification time changes even if the size does not: that is
// the difference between ftruncate(2) or O_TRUNC and truncate(2).
func (fs *FS) truncate(n *inode, size int64, touch bool) error {
	if n.isDir() {
		return unix.EISDIR
	}
	if !touch && !n.inUpper() {
		var st unix.Stat_t
		if err := fs.statShown(n, &st); err != nil {
			return err
		}
		touch = st.Size != size // the copy has the right size from the start
	}
	if err := fs.ensureData(n, size); err != nil {
		return err
	}
	h, err := fs.dataFd(n, true)
	if err != nil {
		return err
	}
	defer h.release()
	if touch {
		return unix.Ftruncate(h.fd, size)
	}
	return unix.Truncate(fsat.ProcPath(h.fd), size)
}

func ownerOf(in *fuse.SetAttrInCommon) (uid, gid int, ok bool) {
	uid, gid = -1, -1
	if v, set := in.GetUID(); set {
		uid, ok = int(v), true
	}
	if v, set := in.GetGID(); set {
		gid, ok = int(v), true
	}
	return uid, gid, ok
}

func timesOf(in *fuse.SetAttrInCommon) (ts [2]unix.Timespec, ok bool) {
	one := func(set, now uint32, sec uint64, nsec uint32) unix.Timespec {
		switch {
		case in.Valid&now != 0:
			ok = true
			return unix.Timespec{Nsec: unix.UTIME_NOW}
		case in.Valid&set != 0:
			ok = true
			return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
		}
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	}
	ts[0] = one(fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec)
	ts[1] = one(fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec)
	return ts, ok
}

// killAt removes setuid, setgid and capabilities from a file of the upper on behalf of
// a caller who has changed it.
func (fs *FS) killAt(dirfd int, name string, h *fuse.InHeader) error {
	var st unix.Stat_t
	if err := fs.statUpper(dirfd, name, &st); err != nil {
		return err
	}
	fs.owners.show(&st)
	return fs.dropPrivileges(dirfd, name, privilegeBits(&st, h))
}

// dropPrivileges removes the given mode bits and capabilities.
func (fs *FS) dropPrivileges(dirfd int, name string, bits uint32) error {
	if bits != 0 {
		if err := fs.clearBits(dirfd, name, bits); err != nil {
			return err
		}
	}
	caps := fs.upper.toDisk(0, capsAttr)
	err := fsat.Removexattr(dirfd, name, caps)
	if err == unix.EPERM {
		// A server without privileges may not remove what is not even there.
		_, err = fsat.Getxattr(dirfd, name, caps, nil)
		if err == nil {
			err = unix.EPERM
		}
	}
	if err == unix.ENODATA || err == unix.EOPNOTSUPP {
		return nil
	}
	return err
}
