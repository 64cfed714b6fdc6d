package oracle

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileFlags are the letters of lsattr(1) that are compared: what every file
// system below has, and a union must carry over a copy-up.
var fileFlags = []struct {
	letter string
	flag   int    // FS_*_FL
	xflag  uint32 // FS_XFLAG_*
}{
	{"a", 0x20, 0x10},
	{"d", 0x40, 0x80},
	{"i", 0x10, 0x8},
	{"A", 0x80, 0x40},
	{"S", 0x8, 0x20},
}

func openForFlags(path string) (int, error) {
	return unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// setFileFlags gives a file exactly those of the letters.
func setFileFlags(path, letters string) error {
	fd, err := openForFlags(path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	have, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	for _, f := range fileFlags {
		have &^= f.flag
		if strings.Contains(letters, f.letter) {
			have |= f.flag
		}
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, have)
}

// opGetFlags is lsattr(1).
func opGetFlags(a *agent, op Op) (string, error) {
	fd, err := openForFlags(op.path())
	if err != nil {
		return "open", err
	}
	defer unix.Close(fd)
	have, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return "", err
	}
	out := ""
	for _, f := range fileFlags {
		if have&f.flag != 0 {
			out += f.letter
		}
	}
	return "flags=" + out, nil
}

// opSetFlags is chattr(1) with =: of the letters compared, the file has those
// given afterwards.
func opSetFlags(a *agent, op Op) (string, error) {
	return "", setFileFlags(op.path(), op.Flags)
}

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

const (
	ioctlFSGetXattr = 0x801c581f
	ioctlFSSetXattr = 0x401c5820
)

func fsxattrIoctl(fd int, cmd uintptr, x *fsxattr) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), cmd, uintptr(unsafe.Pointer(x))); e != 0 {
		return e
	}
	return nil
}

// opGetFSX reads the flags in their newer form.
func opGetFSX(a *agent, op Op) (string, error) {
	fd, err := openForFlags(op.path())
	if err != nil {
		return "open", err
	}
	defer unix.Close(fd)
	var x fsxattr
	if err := fsxattrIoctl(fd, ioctlFSGetXattr, &x); err != nil {
		return "", err
	}
	out := ""
	for _, f := range fileFlags {
		if x.xflags&f.xflag != 0 {
			out += f.letter
		}
	}
	return fmt.Sprintf("xflags=%s projid=%d", out, x.projid), nil
}

// opSetFSX sets the flags in their newer form.
func opSetFSX(a *agent, op Op) (string, error) {
	fd, err := openForFlags(op.path())
	if err != nil {
		return "open", err
	}
	defer unix.Close(fd)
	var x fsxattr
	if err := fsxattrIoctl(fd, ioctlFSGetXattr, &x); err != nil {
		return "get", err
	}
	for _, f := range fileFlags {
		x.xflags &^= f.xflag
		if strings.Contains(op.Flags, f.letter) {
			x.xflags |= f.xflag
		}
	}
	return "", fsxattrIoctl(fd, ioctlFSSetXattr, &x)
}

// opHandle asks for a file handle, and whether it leads back.
func opHandle(a *agent, op Op) (string, error) {
	h, mount, err := unix.NameToHandleAt(unix.AT_FDCWD, op.path(), 0)
	if err != nil {
		return "", err
	}
	root, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "open root", err
	}
	defer unix.Close(root)
	fd, err := unix.OpenByHandleAt(root, h, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "open by handle", err
	}
	defer unix.Close(fd)
	var opened, named unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &opened), unix.Lstat(op.path(), &named)); err != nil {
		return "stat", err
	}
	return fmt.Sprintf("leads back: %t, mount id: %t", opened.Ino == named.Ino, mount > 0), nil
}
