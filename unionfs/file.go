package unionfs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/whiteout/override"
)

// openFlags go with a file that is open through the page cache: its pages stay valid, because all changes
// pass through this mount, unless Options.Timeout says otherwise; and closing needs no request, because nothing
// is held back.
func (fs *FS) openFlags() uint32 {
	if fs.changing {
		return fuse.FOPEN_NOFLUSH
	}
	return fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
}

// Open implements OPEN. Opening for writing is what copies a lower file up, so
// that no write can fail for want of space in a way the program does not
// expect.
func (fs *FS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	if fs.io == IONoOpen {
		return fuse.ENOSYS // and never again
	}
	op := fs.begin(&in.InHeader, ledger.Request{})
	fs.uncount(n, op)
	write := in.Flags&unix.O_ACCMODE != unix.O_RDONLY
	if write {
		fs.resent(&in.InHeader, n)
	}
	err := n.mayOpen(in.Flags)
	if err == nil {
		// What an earlier server has truncated may have been written to since.
		err = fs.openFile(n, write, in.Flags&unix.O_TRUNC != 0 && !op.Had(ledger.Done))
	}
	if err == nil {
		op.Set(ledger.Done)
	}
	if err == nil && in.Mode&fuse.OPEN_KILL_SUIDGID != 0 {
		err = fs.killPrivileges(n, &in.InHeader)
	}
	if err != nil {
		return fs.status("open", n, err)
	}
	if write {
		n.ownExtra().writers.Add(1)
	}
	fs.openHandle(n, write, out)
	counted(op, out.Fh, write)
	if out.Fh == handleCached && !write && fs.watches(n, in.Flags) && fs.mustSeeRead(n) {
		out.OpenFlags &^= fuse.FOPEN_KEEP_CACHE
	}
	return fuse.OK
}

func (fs *FS) openFile(n *inode, write, trunc bool) error {
	switch {
	case trunc:
		if err := fs.truncate(n, 0, true); err != nil {
			return err
		}
	case write:
		if err := fs.ensureAllData(n); err != nil {
			return err
		}
	}
	// Nothing is opened here: whoever needs the data does that.
	return nil
}

// Release implements RELEASE. A handle carries hardly anything; its flags come with
// the request.
func (fs *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	n := fs.node(in.NodeId)
	if n == nil {
		return
	}
	op := fs.begin(&in.InHeader, ledger.Request{})
	if op.Had(ledger.Done) {
		return // an earlier server has counted it
	}
	op.Set(ledger.Done)
	if in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		n.ownExtra().writers.Add(-1)
	}
	fs.closeHandle(n, in.Fh)
}

// Flush implements FLUSH: nothing is held back, so the kernel need not ask.
func (fs *FS) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Read implements READ.
func (fs *FS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, status := fs.ReadInto(in, buf)
	return fuse.ReadResultData(buf[:n]), status
}

// ReadInto is Read with the data in buf.
func (fs *FS) ReadInto(in *fuse.ReadIn, buf []byte) (int, fuse.Status) {
	n := fs.node(in.NodeId)
	if n == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	h, err := fs.dataFd(n, false)
	if err != nil {
		return 0, fs.status("read", n, err)
	}
	defer h.release()
	if buf, err = fs.clampRead(n, buf, int64(in.Offset)); err != nil {
		return 0, fs.status("read", n, err)
	}
	done := 0
	for done < len(buf) {
		m, err := unix.Pread(h.fd, buf[done:], int64(in.Offset)+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fs.status("read", n, err)
		}
		if m == 0 {
			break
		}
		done += m
	}
	fs.accessed(n, in.Flags)
	return done, fuse.OK
}

// clampRead shortens buf, for a read at off, to the size of a metacopied file,
// whose data can be longer.
func (fs *FS) clampRead(n *inode, buf []byte, off int64) ([]byte, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if !n.meta && (n.upper || !fs.lowers.dataElsewhere(n.low)) {
		return buf, nil
	}
	var st unix.Stat_t
	if err := fs.statLocked(n, &st); err != nil {
		return nil, err
	}
	return buf[:max(0, min(int64(len(buf)), st.Size-off))], nil
}

// Write implements WRITE.
func (fs *FS) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n := fs.node(in.NodeId)
	if n == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	fs.resent(&in.InHeader, n)
	if fs.io == IONoOpen {
		// Opening it has not been refused.
		if err := n.mayOpen(in.Flags&unix.O_APPEND | unix.O_WRONLY); err != nil {
			return 0, fs.status("write", n, err)
		}
	}
	done, err := fs.write(n, data, int64(in.Offset), in.WriteFlags&fuse.WRITE_CACHE != 0)
	if err == nil && in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		err = fs.killPrivileges(n, &in.InHeader)
	}
	if err != nil && done == 0 {
		return 0, fs.status("write", n, err)
	}
	return uint32(done), fuse.OK
}

func (fs *FS) killPrivileges(n *inode, h *fuse.InHeader) error {
	return fs.withReal(n, func(dirfd int, name string) error { return fs.killAt(dirfd, name, h) })
}

// write stores data and returns how much of it has arrived. mapped says that
// it comes from a memory mapping: that is no write(2), and takes no privileges
// from the file.
func (fs *FS) write(n *inode, data []byte, off int64, mapped bool) (done int, err error) {
	// OPEN has copied the file up; a shared mapping made before a server
	// took over from another one may still get here first.
	if err := fs.ensureAllData(n); err != nil {
		return 0, err
	}
	h, err := fs.dataFd(n, true)
	if err != nil {
		return 0, err
	}
	defer h.release()
	if mapped && fs.upper.override != override.Containers {
		// Our own write(2) would remove it.
		if caps, err := fsat.GetxattrValue(h.fd, "", capsAttr); err == nil {
			defer func() {
				if e := fsat.Setxattr(h.fd, "", capsAttr, caps, 0); e != nil && err == nil {
					err = e
				}
			}()
		}
	}
	for done < len(data) {
		var m int
		err := fs.withSpace(func() (err error) {
			m, err = unix.Pwrite(h.fd, data[done:], off+int64(done))
			return err
		})
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += m
	}
	return done, nil
}

// Writev implements WRITE of scattered data, which this transport never has.
func (fs *FS) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

// Fsync implements FSYNC.
func (fs *FS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	if fs.volatile || !n.inUpper() {
		return fuse.OK
	}
	h, err := fs.syncFd(n)
	if err != nil {
		return fs.status("fsync", n, err)
	}
	defer h.release()
	// What has been copied up has got its name, or lost a mark, in a way that
	// fdatasync(2) does not always make durable (ext4: it looks at the size).
	copied := n.extra().copied.Load()
	if in.FsyncFlags&fsyncData != 0 && !copied {
		return fs.status("fsync", n, unix.Fdatasync(h.fd))
	}
	err = unix.Fsync(h.fd)
	if err == nil && copied {
		n.ownExtra().copied.Store(false)
	}
	return fs.status("fsync", n, err)
}

// syncFd returns a descriptor of the file in the upper, whether its data is
// there or not.
func (fs *FS) syncFd(n *inode) (*fdHandle, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if !n.meta {
		return fs.dataFdLocked(n, false)
	}
	fd := -1
	err := fs.withRealLocked(n, func(dirfd int, name string) (e error) {
		if name == "" {
			fd, e = fsat.Reopen(dirfd, unix.O_RDONLY)
		} else {
			fd, e = fs.upper.open(dirfd, name, unix.O_RDONLY)
		}
		return e
	})
	if err != nil {
		return nil, err
	}
	return fs.fds.once(fd), nil
}

// FsyncDir implements FSYNCDIR.
func (fs *FS) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	if fs.volatile || !n.inUpper() {
		return fuse.OK
	}
	err := fs.withReal(n, func(dirfd int, _ string) error {
		fd, err := unix.Openat(dirfd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Fsync(fd)
	})
	if err == unix.ENOENT { // removed: there is nothing to keep
		err = nil
	}
	return fs.status("fsyncdir", n, err)
}

// Fallocate implements FALLOCATE.
func (fs *FS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	fs.resent(&in.InHeader, n)
	from := immutable
	if in.Mode&^unix.FALLOC_FL_KEEP_SIZE != 0 {
		from |= appendOnly
	}
	if err := n.protected(from); err != nil {
		return fs.status("fallocate", n, err)
	}
	if err := fs.ensureAllData(n); err != nil {
		return fs.status("fallocate", n, err)
	}
	h, err := fs.dataFd(n, true)
	if err != nil {
		return fs.status("fallocate", n, err)
	}
	defer h.release()
	for {
		err = fs.withSpace(func() error { return unix.Fallocate(h.fd, in.Mode, int64(in.Offset), int64(in.Length)) })
		if err != unix.EINTR {
			return fs.status("fallocate", n, err)
		}
	}
}

// Lseek implements LSEEK: SEEK_DATA and SEEK_HOLE, the kernel does the others.
func (fs *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	n := fs.node(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	h, err := fs.dataFd(n, false)
	if err != nil {
		return fs.status("lseek", n, err)
	}
	defer h.release()
	// The descriptor's own position is nobody's: all I/O names its offset.
	off, err := unix.Seek(h.fd, int64(in.Offset), int(in.Whence))
	out.Offset = uint64(off)
	return fs.status("lseek", n, err)
}

// CopyFileRange implements COPY_FILE_RANGE.
func (fs *FS) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	src, dst := fs.node(in.NodeId), fs.node(in.NodeIdOut)
	if src == nil || dst == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	fs.resent(&in.InHeader, dst)
	if err := dst.protected(immutable); err != nil { // kernel: generic_copy_file_checks
		return 0, fs.status("copy_file_range", dst, err)
	}
	if err := fs.ensureAllData(dst); err != nil {
		return 0, fs.status("copy_file_range", dst, err)
	}
	from, err := fs.dataFd(src, false)
	if err != nil {
		return 0, fs.status("copy_file_range", src, err)
	}
	defer from.release()
	to, err := fs.dataFd(dst, true)
	if err != nil {
		return 0, fs.status("copy_file_range", dst, err)
	}
	defer to.release()
	roff, woff := int64(in.OffIn), int64(in.OffOut)
	length := min(in.Len, 1<<30)
	m, err := unix.CopyFileRange(from.fd, &roff, to.fd, &woff, int(length), int(in.Flags))
	return uint32(max(m, 0)), fs.status("copy_file_range", dst, err)
}

// GetLk, SetLk and SetLkw never come: the kernel keeps locks per inode by
// itself, and an inode stays the same through a copy-up.
func (fs *FS) GetLk(<-chan struct{}, *fuse.LkIn, *fuse.LkOut) fuse.Status { return fuse.ENOSYS }

// SetLk: see GetLk.
func (fs *FS) SetLk(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOSYS }

// SetLkw: see GetLk.
func (fs *FS) SetLkw(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOSYS }

// fsyncData is FUSE_FSYNC_FDATASYNC.
const fsyncData = 1
