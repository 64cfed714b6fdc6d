package whiteout

import (
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// CreateDevice makes name in dirfd a whiteout device. Since Linux 5.8 this
// needs no privilege on most file systems; EPERM says that this one refuses.
func CreateDevice(dirfd int, name string) error {
	return unix.Mknodat(dirfd, name, unix.S_IFCHR, 0)
}

// SetOpaque marks the directory fd (O_PATH will do) opaque. The dialect must
// be overlay or userxattr.
func (d Dialect) SetOpaque(fd int) error {
	return xattrat.Set(fd, "", d.Attr("opaque"), []byte{'y'}, 0)
}
