package fsat

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// MaxXattr bounds the size of one value and of one list (XATTR_SIZE_MAX,
// XATTR_LIST_MAX in the kernel).
const MaxXattr = 1 << 16

// The calls below take the object as package xattrat does.

// asOwner calls fn, and once more with write permission for the owner if that is us
// and it was missing: a file of mode 0444 is no less ours to write down where it
// comes from. bits are those that fn needs.
func asOwner(dirfd int, name string, bits uint32, fn func() error) error {
	err := fn()
	var st unix.Stat_t
	if err != unix.EACCES || Stat(dirfd, name, &st) != nil || int(st.Uid) != unix.Geteuid() ||
		st.Mode&unix.S_IFMT == unix.S_IFLNK || st.Mode&bits == bits {
		return err
	}
	mode := st.Mode & 0o7777
	if Chmod(dirfd, name, mode|bits) != nil {
		return err
	}
	err = fn()
	if e := Chmod(dirfd, name, mode); err == nil {
		err = e
	}
	return err
}

// Getxattr reads an attribute into buf and returns its size; with an empty buf
// only the size.
func Getxattr(dirfd int, name, attr string, buf []byte) (int, error) {
	return xattrat.Get(dirfd, name, attr, buf)
}

// GetxattrValue reads a whole attribute.
func GetxattrValue(dirfd int, name, attr string) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := Getxattr(dirfd, name, attr, buf)
		if err == nil {
			return buf[:n], nil
		}
		if err != unix.ERANGE || len(buf) >= MaxXattr {
			return nil, err
		}
		buf = make([]byte, MaxXattr)
	}
}

// Listxattr returns the names of the object's attributes. A file system
// without attributes has none.
func Listxattr(dirfd int, name string) ([]string, error) {
	buf := make([]byte, 256)
	for {
		n, err := xattrat.List(dirfd, name, buf)
		switch {
		case err == nil:
			return splitNames(buf[:n]), nil
		case errors.Is(err, unix.EOPNOTSUPP):
			return nil, nil
		case err != unix.ERANGE || len(buf) >= MaxXattr:
			return nil, err
		}
		buf = make([]byte, MaxXattr)
	}
}

func splitNames(b []byte) []string {
	var names []string
	start := 0
	for i, c := range b {
		if c == 0 {
			if i > start {
				names = append(names, string(b[start:i]))
			}
			start = i + 1
		}
	}
	return names
}

// Setxattr sets an attribute. flags: XATTR_CREATE, XATTR_REPLACE or 0.
func Setxattr(dirfd int, name, attr string, value []byte, flags int) error {
	return asOwner(dirfd, name, 0o200, func() error { return xattrat.Set(dirfd, name, attr, value, flags) })
}

// Removexattr removes an attribute.
func Removexattr(dirfd int, name, attr string) error {
	return asOwner(dirfd, name, 0o200, func() error { return xattrat.Remove(dirfd, name, attr) })
}
