package fsat

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ioctl calls ioctl(2) with a buffer, which must be as large as cmd says.
func Ioctl(fd int, cmd uint32, buf []byte) error {
	if len(buf) == 0 {
		return unix.EINVAL
	}
	return retry(func() error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(cmd), uintptr(unsafe.Pointer(&buf[0])))
		if errno != 0 {
			return errno
		}
		return nil
	})
}

// Statx is statx(2) of name in dirfd, links not followed.
func Statx(dirfd int, name string, mask int, st *unix.Statx_t) error {
	return retry(func() error {
		return unix.Statx(dirfd, name, unix.AT_SYMLINK_NOFOLLOW|emptyPath(name), mask, st)
	})
}
