package fsat

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// UUID names a file system; zero if it has no name.
type UUID [16]byte

// FSUUID returns the name of the file system that the directory fd (O_PATH will
// do) lies on. One that cannot tell has none.
func FSUUID(fd int) UUID {
	const fsIocGetFSUUID = 0x80111500 // linux/fs.h, since Linux 6.9
	var out struct {
		size uint8
		uuid UUID
	}
	d, err := OpenName(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return UUID{}
	}
	defer unix.Close(d)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d), fsIocGetFSUUID, uintptr(unsafe.Pointer(&out)))
	if errno != 0 || int(out.size) != len(out.uuid) {
		return UUID{}
	}
	return out.uuid
}

// The form in which overlayfs stores a file handle (kernel: struct ovl_fb).
const (
	originMagic  = 0xfb
	originHeader = 5 + len(UUID{})
	originMax    = 255
)

// Origin returns what says for ever which object of its file system (dirfd,
// name) is: its file handle in the form that kernel overlayfs keeps in the
// attribute "origin" of a copy, with the name of the file system in it.
// EOPNOTSUPP says that the file system has no handles.
func Origin(dirfd int, name string, fs UUID) ([]byte, error) {
	var h unix.FileHandle
	err := retry(func() (e error) {
		h, _, e = unix.NameToHandleAt(dirfd, name, emptyPath(name))
		return e
	})
	if err != nil {
		return nil, err
	}
	// The type takes one byte; file systems use no larger ones.
	b := h.Bytes()
	if size := originHeader + len(b); size > originMax || uint32(h.Type()) > originMax {
		return nil, unix.EOPNOTSUPP
	}
	o := make([]byte, originHeader, originHeader+len(b))
	o[1], o[2], o[4] = originMagic, byte(originHeader+len(b)), byte(h.Type())
	copy(o[5:], fs[:])
	return append(o, b...), nil
}

// OpenOrigin opens the object that Origin has described (O_PATH), anywhere on
// the file system that mount lies on, whose name is fs. It takes
// CAP_DAC_READ_SEARCH; ESTALE says that there is no such object any more.
func OpenOrigin(mount int, fs UUID, origin []byte) (fd int, err error) {
	if len(origin) <= originHeader || origin[0] != 0 || origin[1] != originMagic || int(origin[2]) != len(origin) ||
		origin[3] != 0 || UUID(origin[5:originHeader]) != fs {
		return -1, unix.ESTALE
	}
	d, err := OpenName(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(d)
	h := unix.NewFileHandle(int32(origin[4]), origin[originHeader:])
	err = retry(func() (e error) {
		fd, e = unix.OpenByHandleAt(d, h, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW)
		return e
	})
	return fd, err
}
