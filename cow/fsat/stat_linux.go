package fsat

import (
	"golang.org/x/sys/unix"
)

// Stat is lstat of name in dirfd; with an empty name, of dirfd itself.
func Stat(dirfd int, name string, st *unix.Stat_t) error {
	for {
		err := unix.Fstatat(dirfd, name, st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
		if err != unix.EINTR {
			return err
		}
	}
}

// StatAttributes is Stat that also tells which STATX_ATTR_* the object has.
func StatAttributes(dirfd int, name string, st *unix.Stat_t) (attributes uint64, err error) {
	var sx unix.Statx_t
	if err := Statx(dirfd, name, unix.STATX_BASIC_STATS, &sx); err != nil {
		return 0, err
	}
	ts := func(t unix.StatxTimestamp) unix.Timespec { return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)} }
	*st = unix.Stat_t{
		Dev: unix.Mkdev(sx.Dev_major, sx.Dev_minor), Ino: sx.Ino, Mode: uint32(sx.Mode), Uid: sx.Uid, Gid: sx.Gid,
		Rdev: unix.Mkdev(sx.Rdev_major, sx.Rdev_minor), Size: int64(sx.Size), Blocks: int64(sx.Blocks),
		Atim: ts(sx.Atime), Mtim: ts(sx.Mtime), Ctim: ts(sx.Ctime),
	}
	convert(&st.Nlink, sx.Nlink)
	convert(&st.Blksize, sx.Blksize)
	return sx.Attributes, nil
}

// convert stores v in a field whose type depends on the architecture.
func convert[T int32 | int64 | uint32 | uint64](to *T, v uint32) { *to = T(v) }

// SetCounts sets the fields whose type depends on the architecture.
func SetCounts(st *unix.Stat_t, nlink, blksize uint32) {
	convert(&st.Nlink, nlink)
	convert(&st.Blksize, blksize)
}

// Fstat is fstat of an open descriptor, O_PATH included.
func Fstat(fd int, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstat(fd, st) })
}

// MountID returns the number of the mount that fd lies in.
func MountID(fd int) (uint64, error) {
	var st unix.Statx_t
	err := retry(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st) })
	return st.Mnt_id, err
}

// Readlink reads the target of the symbolic link name in dirfd; with an empty
// name, of the link that dirfd itself (O_PATH|O_NOFOLLOW) holds.
func Readlink(dirfd int, name string) (string, error) {
	for size := 256; size <= 1<<16; size *= 4 {
		buf := make([]byte, size)
		var n int
		err := retry(func() (e error) { n, e = unix.Readlinkat(dirfd, name, buf); return e })
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
	return "", unix.ENAMETOOLONG
}

// Chmod changes the mode of name in dirfd (or of dirfd itself), which must not
// be a symbolic link: those have no mode of their own.
func Chmod(dirfd int, name string, mode uint32) error {
	return retry(func() error {
		err := unix.Fchmodat(dirfd, name, mode, unix.AT_SYMLINK_NOFOLLOW|emptyPath(name))
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS { // before Linux 6.6
			return chmodThroughProc(dirfd, name, mode)
		}
		return err
	})
}

func chmodThroughProc(dirfd int, name string, mode uint32) error {
	if name == "" {
		return unix.Chmod(ProcPath(dirfd), mode)
	}
	fd, err := OpenName(dirfd, name, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return unix.Chmod(ProcPath(fd), mode)
}

// Chown changes owner and group (-1: leave) of name in dirfd (or of dirfd
// itself), links not followed.
func Chown(dirfd int, name string, uid, gid int) error {
	return retry(func() error {
		return unix.Fchownat(dirfd, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW|emptyPath(name))
	})
}

// Utimes sets access and modification time of name in dirfd (or of dirfd
// itself), links not followed. UTIME_NOW and UTIME_OMIT work as usual.
func Utimes(dirfd int, name string, ts [2]unix.Timespec) error {
	err := retry(func() error {
		return unix.UtimesNanoAt(dirfd, name, ts[:], unix.AT_SYMLINK_NOFOLLOW|emptyPath(name))
	})
	if name == "" && (err == unix.EINVAL || err == unix.ENOENT) { // before Linux 5.8
		err = retry(func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, ProcPath(dirfd), ts[:], 0) })
	}
	return err
}

func emptyPath(name string) int {
	if name == "" {
		return unix.AT_EMPTY_PATH
	}
	return 0
}
