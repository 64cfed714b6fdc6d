package main

import (
	"bytes"
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The functions here are the timed system calls. They are raw: the Go
// scheduler does not hear of them, so a thread that waits for a FUSE server
// keeps its place and is not handed over, which would cost more than the call.
// The price is that nothing else may want to run on that place: workers have
// more of them than threads, and no garbage collector.

// cstr is a name as the kernel takes it.
type cstr []byte

func newCstr(s string) cstr { return append([]byte(s), 0) }

func cstrs(names []string) []cstr {
	out := make([]cstr, len(names))
	for i, n := range names {
		out[i] = newCstr(n)
	}
	return out
}

func (c cstr) ptr() unsafe.Pointer { return unsafe.Pointer(&c[0]) }

// errOf is nil for success.
func errOf(e unix.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func rawOpen(dir int, name cstr, flags int, mode uint32) (int, error) {
	fd, _, e := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(name.ptr()), uintptr(flags|unix.O_CLOEXEC), uintptr(mode), 0, 0)
	return int(fd), errOf(e)
}

func rawClose(fd int) error {
	_, _, e := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	return errOf(e)
}

func rawRead(fd int, buf []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	return int(n), errOf(e)
}

func rawPread(fd int, buf []byte, off int64) (int, error) {
	n, _, e := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), uintptr(off), 0, 0)
	return int(n), errOf(e)
}

func rawWrite(fd int, buf []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	return int(n), errOf(e)
}

func rawPwrite(fd int, buf []byte, off int64) (int, error) {
	n, _, e := unix.RawSyscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), uintptr(off), 0, 0)
	return int(n), errOf(e)
}

func rawFsync(fd int) error {
	_, _, e := unix.RawSyscall(unix.SYS_FSYNC, uintptr(fd), 0, 0)
	return errOf(e)
}

// rawLstat asks for what stat(2) asks for. It is statx, which all
// architectures have.
func rawLstat(dir int, name cstr, st *unix.Statx_t) error {
	_, _, e := unix.RawSyscall6(unix.SYS_STATX, uintptr(dir), uintptr(name.ptr()), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(st)), 0)
	return errOf(e)
}

func rawChmod(dir int, name cstr, mode uint32) error {
	_, _, e := unix.RawSyscall(unix.SYS_FCHMODAT, uintptr(dir), uintptr(name.ptr()), uintptr(mode))
	return errOf(e)
}

func rawLchown(dir int, name cstr, uid, gid int) error {
	_, _, e := unix.RawSyscall6(unix.SYS_FCHOWNAT, uintptr(dir), uintptr(name.ptr()), uintptr(uid), uintptr(gid), unix.AT_SYMLINK_NOFOLLOW, 0)
	return errOf(e)
}

func rawUnlink(dir int, name cstr, flags int) error {
	_, _, e := unix.RawSyscall(unix.SYS_UNLINKAT, uintptr(dir), uintptr(name.ptr()), uintptr(flags))
	return errOf(e)
}

func rawRename(dir int, from, to cstr) error {
	_, _, e := unix.RawSyscall6(unix.SYS_RENAMEAT2, uintptr(dir), uintptr(from.ptr()), uintptr(dir), uintptr(to.ptr()), 0, 0)
	return errOf(e)
}

// rawGetdents fills buf and returns how much of it is used; 0 at the end.
func rawGetdents(fd int, buf []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	return int(n), errOf(e)
}

// dirent takes the first entry of buf apart. name includes its NUL and points
// into buf.
func dirent(buf []byte) (name cstr, kind byte, rest []byte) {
	const fixed = 19 // d_ino, d_off, d_reclen, d_type
	n := binary.NativeEndian.Uint16(buf[16:])
	name = cstr(buf[fixed:n])
	name = name[:bytes.IndexByte(name, 0)+1]
	return name, buf[18], buf[n:]
}

// dots says whether a name of a listing is "." or "..".
func (c cstr) dots() bool {
	return c[0] == '.' && (c[1] == 0 || c[1] == '.' && c[2] == 0)
}
