package xattrat

import (
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// args is struct xattr_args (include/uapi/linux/xattr.h).
type args struct {
	value unsafe.Pointer
	_     [8 - unsafe.Sizeof(uintptr(0))]byte
	size  uint32
	flags uint32
}

// available reports whether the kernel, and whatever filters our calls, has the calls.
var available = sync.OnceValue(func() bool {
	_, err := listAt(-1, ".", nil)
	return err == unix.EBADF
})

// Get reads an attribute into buf and returns its size; with an empty buf only the
// size.
func Get(dirfd int, name, attr string, buf []byte) (n int, err error) {
	if name != "" && available() {
		return getAt(dirfd, name, attr, buf)
	}
	err = retry(func() (e error) {
		if name != "" {
			n, e = unix.Lgetxattr(procPath(dirfd)+"/"+name, attr, buf)
			return e
		}
		if n, e = unix.Fgetxattr(dirfd, attr, buf); e == unix.EBADF {
			n, e = unix.Getxattr(procPath(dirfd), attr, buf)
		}
		return e
	})
	return n, err
}

// List stores the names of all attributes in buf, each with a NUL behind it, and
// returns their size; with an empty buf only the size.
func List(dirfd int, name string, buf []byte) (n int, err error) {
	if name != "" && available() {
		return listAt(dirfd, name, buf)
	}
	err = retry(func() (e error) {
		if name != "" {
			n, e = unix.Llistxattr(procPath(dirfd)+"/"+name, buf)
			return e
		}
		if n, e = unix.Flistxattr(dirfd, buf); e == unix.EBADF {
			n, e = unix.Listxattr(procPath(dirfd), buf)
		}
		return e
	})
	return n, err
}

// Set sets an attribute. flags: XATTR_CREATE, XATTR_REPLACE or 0.
func Set(dirfd int, name, attr string, value []byte, flags int) error {
	if name != "" && available() {
		return setAt(dirfd, name, attr, value, flags)
	}
	return retry(func() error {
		if name != "" {
			return unix.Lsetxattr(procPath(dirfd)+"/"+name, attr, value, flags)
		}
		e := unix.Fsetxattr(dirfd, attr, value, flags)
		if e == unix.EBADF {
			e = unix.Setxattr(procPath(dirfd), attr, value, flags)
		}
		return e
	})
}

// Remove removes an attribute.
func Remove(dirfd int, name, attr string) error {
	if name != "" && available() {
		return removeAt(dirfd, name, attr)
	}
	return retry(func() error {
		if name != "" {
			return unix.Lremovexattr(procPath(dirfd)+"/"+name, attr)
		}
		e := unix.Fremovexattr(dirfd, attr)
		if e == unix.EBADF {
			e = unix.Removexattr(procPath(dirfd), attr)
		}
		return e
	})
}

// shortName is a name, NUL-terminated, that needs no memory of the heap: this is asked
// for at every first look at an object.
type shortName [unix.NAME_MAX + 1]byte

// set copies name.
func (b *shortName) set(name string, tooLong unix.Errno) error {
	switch {
	case len(name) >= len(b):
		return tooLong
	case strings.IndexByte(name, 0) >= 0:
		return unix.EINVAL
	}
	b[copy(b[:], name)] = 0
	return nil
}

// target is the object and the attribute of a call.
type target struct{ path, attr shortName }

func (t *target) set(name, attr string) error {
	if err := t.path.set(name, unix.ENAMETOOLONG); err != nil {
		return err
	}
	return t.attr.set(attr, unix.ERANGE)
}

// Pointers become numbers in the argument lists of the system calls only: there the
// compiler keeps what they point to, and there is nothing to allocate.

func getAt(dirfd int, name, attr string, buf []byte) (int, error) {
	var t target
	if err := t.set(name, attr); err != nil {
		return 0, err
	}
	for {
		a := args{value: unsafe.Pointer(unsafe.SliceData(buf)), size: uint32(len(buf))}
		r, _, e := unix.Syscall6(unix.SYS_GETXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(&t.path)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(&t.attr)), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a))
		if e != unix.EINTR {
			return value(r, e)
		}
	}
}

func setAt(dirfd int, name, attr string, value []byte, flags int) error {
	var t target
	if err := t.set(name, attr); err != nil {
		return err
	}
	for {
		a := args{value: unsafe.Pointer(unsafe.SliceData(value)), size: uint32(len(value)), flags: uint32(flags)}
		_, _, e := unix.Syscall6(unix.SYS_SETXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(&t.path)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(&t.attr)), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a))
		if e != unix.EINTR {
			return result(e)
		}
	}
}

func listAt(dirfd int, name string, buf []byte) (int, error) {
	var t target
	if err := t.set(name, ""); err != nil {
		return 0, err
	}
	for {
		r, _, e := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(&t.path)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0)
		if e != unix.EINTR {
			return value(r, e)
		}
	}
}

func removeAt(dirfd int, name, attr string) error {
	var t target
	if err := t.set(name, attr); err != nil {
		return err
	}
	for {
		_, _, e := unix.Syscall6(unix.SYS_REMOVEXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(&t.path)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(&t.attr)), 0, 0)
		if e != unix.EINTR {
			return result(e)
		}
	}
}

// value is what a system call returns, and its error.
func value(r uintptr, e unix.Errno) (int, error) {
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// result is the error of a system call.
func result(e unix.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func retry(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

func procPath(fd int) string { return Proc() + "/self/fd/" + strconv.Itoa(fd) }

var procRoot atomic.Bool

// Proc is the path of procfs in this process: "/proc", or nothing where procfs is the root.
func Proc() string {
	if procRoot.Load() {
		return ""
	}
	return "/proc"
}

// ProcIsRoot says that the root directory of this process is procfs. No call of this
// package may run meanwhile.
func ProcIsRoot() { procRoot.Store(true) }
