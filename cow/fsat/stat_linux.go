package fsat

import (
	"golang.org/x/sys/unix"
)

// Stat is lstat of name in dirfd.
func Stat(dirfd int, name string, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstatat(dirfd, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

// Fstat is fstat of an open descriptor, O_PATH included.
func Fstat(fd int, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstat(fd, st) })
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

// Chmod changes the mode of the object behind fd, O_PATH included.
func Chmod(fd int, mode uint32) error {
	return retry(func() error { return unix.Chmod(ProcPath(fd), mode) })
}

// Chown changes owner and group (-1: leave) of the object behind fd itself.
func Chown(fd, uid, gid int) error {
	return retry(func() error { return unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW) })
}

// Utimes sets access and modification time of the object behind fd itself.
func Utimes(fd int, ts [2]unix.Timespec) error {
	return retry(func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, ProcPath(fd), ts[:], 0) })
}
