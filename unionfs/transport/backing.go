package transport

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// backing registers files that the kernel then reads and writes by itself
// (fs/fuse/passthrough.c).
type backing struct{ fd int }

// The ioctls of /dev/fuse (include/uapi/linux/fuse.h).
const (
	backingOpen  = 0x4010e501 // _IOW(229, 1, struct fuse_backing_map)
	backingClose = 0x4004e502 // _IOW(229, 2, uint32)
)

// open registers the file behind fd, which may be an O_PATH descriptor and need not
// stay open.
func (b backing) open(fd int) (id int32, err error) {
	m := struct {
		fd      int32
		flags   uint32
		padding uint64
	}{fd: int32(fd)}
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(b.fd), backingOpen, uintptr(unsafe.Pointer(&m)))
	if errno != 0 {
		return 0, errno
	}
	return int32(r), nil
}

// close takes a registration back. Files that are open go on.
func (b backing) close(id int32) {
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(b.fd), backingClose, uintptr(unsafe.Pointer(&id)))
}
