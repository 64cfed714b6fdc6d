package fsat

import (
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// PATH_MAX counts the final NUL; longer paths are walked in pieces.
const pathMax = unix.PathMax - 1

const resolveBeneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// retry calls fn until it does not fail with EINTR, or with EAGAIN as openat2
// does when a rename raced with the walk.
func retry(fn func() error) error {
	for i := 0; ; i++ {
		err := fn()
		if err == unix.EINTR || (err == unix.EAGAIN && i < 100) {
			continue
		}
		return err
	}
}

// OpenTrusted opens a directory that the operator named, following links, and
// returns an O_PATH descriptor.
func OpenTrusted(path string) (fd int, err error) {
	err = retry(func() (e error) {
		fd, e = unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return e
	})
	return fd, err
}

// CloneTree opens a directory that the operator named as a private copy of its
// mount: what others mount or unmount below it does not show, and with readOnly
// nothing below it can be changed. Devices in it cannot be opened. It has the given rules for access times
// (MOUNT_ATTR__ATIME and MOUNT_ATTR_NODIRATIME), where they are not locked by a
// user namespace. Where the caller may not do that (it takes CAP_SYS_ADMIN), err
// is EPERM.
func CloneTree(path string, readOnly bool, atime uint64) (fd int, err error) {
	fd, err = unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, err
	}
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE, Attr_set: unix.MOUNT_ATTR_NODEV}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	all := attr
	all.Attr_set |= atime
	all.Attr_clr = unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME&^atime
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &all)
	if err == unix.EPERM {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// OpenBeneath opens the relative path below dirfd ("" or "." is dirfd itself)
// without following any link, leaving dirfd or crossing into another mount. It
// adds O_CLOEXEC.
func OpenBeneath(dirfd int, path string, flags int) (fd int, err error) {
	if path == "" {
		path = "."
	}
	at := dirfd
	for len(path) > pathMax {
		cut := strings.LastIndexByte(path[:pathMax], '/')
		if cut <= 0 {
			if at != dirfd {
				_ = unix.Close(at)
			}
			return -1, unix.ENAMETOOLONG
		}
		next, err := openat2(at, path[:cut], unix.O_PATH|unix.O_DIRECTORY)
		if at != dirfd {
			_ = unix.Close(at)
		}
		if err != nil {
			return -1, err
		}
		at, path = next, strings.TrimLeft(path[cut:], "/")
	}
	fd, err = openat2(at, path, flags)
	if at != dirfd {
		_ = unix.Close(at)
	}
	return fd, err
}

func openat2(dirfd int, path string, flags int) (fd int, err error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: resolveBeneath}
	err = retry(func() (e error) {
		fd, e = unix.Openat2(dirfd, path, &how)
		return e
	})
	return fd, err
}

// OpenNoLinks is OpenBeneath for a tree that spans mounts, as the root of a storage
// engine does, which mounts parts of it on themselves. No link is followed, nor is
// dirfd left.
func OpenNoLinks(dirfd int, path string, flags int) (fd int, err error) {
	how := unix.OpenHow{
		Flags:   uint64(flags) | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	if path == "" {
		path = "."
	}
	err = retry(func() (e error) {
		fd, e = unix.Openat2(dirfd, path, &how)
		return e
	})
	return fd, err
}

// OpenInRoot opens path as a process would whose root is rootFd: links are followed,
// absolute ones and ".." stay below it. Magic links are not followed. It adds
// O_CLOEXEC. It is for the running root of an image, in which names are what they
// are for the programs there; layers are walked with OpenBeneath.
func OpenInRoot(rootFd int, path string, flags int) (fd int, err error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	err = retry(func() (e error) {
		fd, e = unix.Openat2(rootFd, path, &how)
		return e
	})
	return fd, err
}

// OpenName opens one name in dirfd, O_NOFOLLOW and O_CLOEXEC added. name must
// be a single component, as getdents or the kernel's FUSE client hands them out.
func OpenName(dirfd int, name string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() (e error) {
		fd, e = unix.Openat(dirfd, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		return e
	})
	return fd, err
}

// Reopen turns an O_PATH descriptor of a regular file or directory into one
// with the given open flags, through this process's own procfs entry.
func Reopen(fd, flags int) (n int, err error) {
	err = retry(func() (e error) {
		n, e = unix.Open(ProcPath(fd), flags|unix.O_CLOEXEC, 0)
		return e
	})
	return n, err
}

// OpenRegular opens the regular file name in dirfd with flags; ESTALE if the
// name holds anything else. For writing, our own file need not allow it: whoever
// opened it before may go on (open(2)).
func OpenRegular(dirfd int, name string, flags int) (int, error) {
	p, err := OpenName(dirfd, name, unix.O_PATH, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(p)
	var st unix.Stat_t
	if err := unix.Fstat(p, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, unix.ESTALE
	}
	if flags&unix.O_ACCMODE != unix.O_RDWR {
		return Reopen(p, flags)
	}
	var fd int
	err = asOwner(p, "", 0o600, func() (e error) { fd, e = Reopen(p, flags); return e })
	return fd, err
}

// OpenRegularNoDev is OpenRegular for a directory in a mount with nodev: there,
// opening a device has no effect but an error, so the name is opened at once.
func OpenRegularNoDev(dirfd int, name string, flags int) (int, error) {
	fd, err := OpenName(dirfd, name, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		if err == unix.ENOENT || err == unix.EPERM {
			return -1, err
		}
		return OpenRegular(dirfd, name, flags) // which knows what to make of it
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.ESTALE
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ReserveFds makes room for n descriptors in this process's table. The kernel doubles it
// as needed, but has to wait each time for every thread that may be looking at the old
// one, some ten milliseconds. It is no error if there may not be so many.
func ReserveFds(n int) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC) // nothing that leads anywhere, see package confine
	if err != nil {
		return
	}
	if high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, n-1); err == nil {
		_ = unix.Close(high)
	}
	_ = unix.Close(fd)
}

// ProcPath names an open descriptor. The magic link leads to the object
// itself, even where that is a symbolic link, so path calls on it act on
// exactly what the descriptor holds.
func ProcPath(fd int) string { return xattrat.Proc() + "/self/fd/" + strconv.Itoa(fd) }

// ProcIsRoot says that procfs is the root directory of this process from now on. No other
// call of this package may run meanwhile.
func ProcIsRoot() { xattrat.ProcIsRoot() }

// Close closes fd; negative values are ignored.
func Close(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// IsAbsent reports whether err says that a name does not exist.
func IsAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)
}
