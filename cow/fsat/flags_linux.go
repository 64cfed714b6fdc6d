package fsat

import (
	"encoding/binary"
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

// The inode flags that a copy has from its original, of those of FS_IOC_GETFLAGS
// (kernel: OVL_COPY_FS_FLAGS_MASK).
const copiedFlags = 0x8 | 0x80 // FS_SYNC_FL, FS_NOATIME_FL

// The inode flags that a directory hands down: to all, and to directories alone
// (kernel: EXT4_FL_INHERITED, btrfs_inherit_iflags, SHMEM_FL_INHERITED).
const (
	inheritedFlags    = 0x4 | 0x8 | 0x40 | 0x80 | 0x400 | 0x800000 // COMPR, SYNC, NODUMP, NOATIME, NOCOMP, NOCOW
	inheritedDirFlags = 0x10000 | 0x20000000                       // DIRSYNC, PROJINHERIT
)

// InheritedFlags reads the inode flags that an open directory hands down to new
// regular files and to new directories.
func InheritedFlags(fd int) (file, dir uint32, err error) {
	var b [4]byte
	err = Ioctl(fd, IocGetFlags, b[:])
	flags := binary.NativeEndian.Uint32(b[:])
	return flags & inheritedFlags, flags & (inheritedFlags | inheritedDirFlags), err
}

// FS_IOC_GETFLAGS and FS_IOC_SETFLAGS.
const (
	IocGetFlags = 0x80086601
	IocSetFlags = 0x40086602
)

// CopiedFlags reads the inode flags of an open file that its copy must have.
func CopiedFlags(fd int) (uint32, error) {
	var b [4]byte
	err := Ioctl(fd, IocGetFlags, b[:])
	return binary.NativeEndian.Uint32(b[:]) & copiedFlags, err
}

// AddFlags gives an open file inode flags in addition to those it has.
func AddFlags(fd int, flags uint32) error {
	var b [4]byte
	if err := Ioctl(fd, IocGetFlags, b[:]); err != nil {
		return err
	}
	binary.NativeEndian.PutUint32(b[:], binary.NativeEndian.Uint32(b[:])|flags)
	return Ioctl(fd, IocSetFlags, b[:])
}

// Statx is statx(2) of name in dirfd, links not followed.
func Statx(dirfd int, name string, mask int, st *unix.Statx_t) error {
	// Without memory of the heap: this is asked for at every first look at an object.
	var path [unix.NAME_MAX + 1]byte
	if len(name) >= len(path) {
		return unix.ENAMETOOLONG
	}
	copy(path[:], name)
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(unsafe.Pointer(&path)),
			uintptr(unix.AT_SYMLINK_NOFOLLOW|emptyPath(name)), uintptr(mask), uintptr(unsafe.Pointer(st)), 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
