package unionfs

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// Reading changes the access time as on kernel overlayfs: that of an object in
// the upper, by the rules of the mount; that of a lower object never. The kernel leaves access times to a FUSE server, and does
// not tell it of reads that it serves from its cache. So a file's time changes
// when it is opened for reading or when a read reaches us, and a directory's
// when its listing is read from the start.
//
// To set a time changes st_ctime, too, which a read must not do. So the real
// object is read instead; all other descriptors of the upper are O_NOATIME.

// Atime is when reading changes access times.
type Atime uint8

const (
	// AtimeRelative changes those that are older than the last change of the
	// object, or than a day (relatime in mount(8)).
	AtimeRelative Atime = iota
	// AtimeStrict changes them at every read.
	AtimeStrict
	// AtimeNever changes none.
	AtimeNever
)

// The mount flags of statfs(2).
const (
	stNoAtime    = 1 << 10
	stNoDirAtime = 1 << 11
)

// atimeAttr are the rules for the private copy of the mount that the upper lies
// in: its own do not count (kernel: ovl_get_upper).
func (o Options) atimeAttr() (attr uint64) {
	switch o.Atime {
	case AtimeStrict:
		attr = unix.MOUNT_ATTR_STRICTATIME
	case AtimeNever:
		attr = unix.MOUNT_ATTR_NOATIME
	default:
		attr = unix.MOUNT_ATTR_RELATIME
	}
	if o.NoDirAtime {
		attr |= unix.MOUNT_ATTR_NODIRATIME
	}
	return attr
}

// openAtime takes the rules of the mount, and, where they could not be given to
// the mount that the upper lies in, those of that, too.
func (fs *FS) openAtime(o Options) error {
	fs.atime, fs.dirAtime = o.Atime, !o.NoDirAtime
	var st unix.Statfs_t
	if err := unix.Fstatfs(fs.upper.root, &st); err != nil {
		return err
	}
	if st.Flags&stNoAtime != 0 {
		fs.atime = AtimeNever
	}
	fs.dirAtime = fs.dirAtime && st.Flags&stNoDirAtime == 0
	return nil
}

// due reports whether a read changes the access time (kernel:
// relatime_need_update).
func (a Atime) due(st *unix.Stat_t) bool {
	const day = 24 * time.Hour
	switch a {
	case AtimeNever:
		return false
	case AtimeStrict:
		return true
	}
	at := unix.TimespecToNsec(st.Atim)
	return at <= unix.TimespecToNsec(st.Mtim) || at <= unix.TimespecToNsec(st.Ctim) ||
		time.Now().UnixNano()-at >= int64(day)
}

// accessed notes that a file or directory is read through a descriptor that has
// the given open flags. What goes wrong costs an access time, no more.
func (fs *FS) accessed(n *inode, flags uint32) {
	if fs.upper == nil || fs.atime == AtimeNever || flags&unix.O_NOATIME != 0 || n.isDir() && !fs.dirAtime {
		return
	}
	if fs.readReal(n) {
		fs.invalidate(n.id, false)
	}
}

// readReal reads something of an object of the upper whose access time is due.
func (fs *FS) readReal(n *inode) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if !n.upper {
		return false
	}
	var st unix.Stat_t
	if h := fs.fds.peek(&n.fd); h != nil && !n.meta {
		err := fsat.Fstat(h.fd, &st)
		h.release()
		if err != nil || !fs.atime.due(&st) {
			return false
		}
	}
	done := false
	_ = fs.withRealLocked(n, func(dirfd int, name string) error {
		if err := fsat.Stat(dirfd, name, &st); err != nil || !fs.atime.due(&st) {
			return err
		}
		var one [1]byte
		return openReal(n, dirfd, name, func(fd int) (err error) {
			if n.isDir() {
				var some [512]byte
				_, err = unix.Getdents(fd, some[:])
			} else {
				_, err = unix.Pread(fd, one[:], 0)
			}
			done = err == nil
			return err
		})
	})
	return done
}

// quiet keeps what we read through a descriptor of the upper from changing the
// access time. It is for owners and root; for others nothing changes.
func quiet(fd int) { _, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_NOATIME) }
