package unionfs

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// Reading changes the access time as on kernel overlayfs: that of an object in
// the upper, by the rules of the mount; that of a lower object never. The kernel
// leaves access times to a FUSE server, and does not tell it of reads that it
// serves from its cache. So a small file whose time is due is opened for reading
// without its cache, and the first read reaches us; a large one would lose too
// much. The listing of a directory is read anew after each change, when its time
// is due, too.
//
// To set a time changes st_ctime, too, which a read must not do. So the real
// object is read instead; all other descriptors of the upper are O_NOATIME. The
// kernel asks for the time again after each request to read.

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

// watches reports whether a read of n by a descriptor that has the given open
// flags can change its access time.
func (fs *FS) watches(n *inode, flags uint32) bool {
	return fs.upper != nil && fs.atime != AtimeNever && flags&unix.O_NOATIME == 0 && (fs.dirAtime || !n.isDir()) &&
		!n.extra().noAtime.Load()
}

// mustSeeRead reports whether the next read of a file has to reach us. (To make the
// kernel forget one page is no way out: that waits for readers of the page, whose
// requests may wait for us.)
func (fs *FS) mustSeeRead(n *inode) bool {
	const large = 1 << 20
	st, ok := fs.times(n)
	return ok && st.Size <= large && fs.atime.due(&st)
}

// times looks at an object of the upper.
func (fs *FS) times(n *inode) (st unix.Stat_t, ok bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if !n.upper {
		return st, false
	}
	if h := fs.fds.peek(&n.fd); h != nil {
		defer h.release()
		if !n.meta {
			err := fsat.Fstat(h.fd, &st)
			return st, err == nil
		}
	}
	err := fs.withRealLocked(n, func(dirfd int, name string) error { return fsat.Stat(dirfd, name, &st) })
	return st, err == nil
}

// accessed notes that a file or directory has been read by a descriptor that has
// the given open flags. What goes wrong costs an access time, no more.
func (fs *FS) accessed(n *inode, flags uint32) {
	if !fs.watches(n, flags) {
		return
	}
	before, ok := fs.times(n)
	if !ok || !fs.atime.due(&before) {
		return
	}
	fs.readReal(n)
	const tick = time.Second // more than the granularity of times
	after, ok := fs.times(n)
	if ok && after.Atim == before.Atim && time.Since(time.Unix(after.Atim.Unix())) > tick {
		// It has the inode flag "no atime", say, and would be due for ever.
		n.ownExtra().noAtime.Store(true)
	}
}

// readReal reads something of the real file or directory behind n, an object of
// the upper.
func (fs *FS) readReal(n *inode) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	_ = fs.withRealLocked(n, func(dirfd int, name string) error {
		var buf [512]byte
		return openReal(n, dirfd, name, func(fd int) (err error) {
			if n.isDir() {
				_, err = unix.Getdents(fd, buf[:])
			} else {
				_, err = unix.Pread(fd, buf[:1], 0)
			}
			return err
		})
	})
}

// quiet keeps what we read through a descriptor of the upper from changing the
// access time. It is for owners and root; for others nothing changes.
func quiet(fd int) { _, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_NOATIME) }
