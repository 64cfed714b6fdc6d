package fsat

import (
	"errors"

	"golang.org/x/sys/unix"
)

// MaxXattr bounds the size of one value and of one list (XATTR_SIZE_MAX,
// XATTR_LIST_MAX in the kernel).
const MaxXattr = 1 << 16

// Getxattr reads an attribute of the object behind fd (O_PATH will do) into
// buf and returns its size; with an empty buf only the size.
func Getxattr(fd int, name string, buf []byte) (n int, err error) {
	err = retry(func() (e error) { n, e = unix.Getxattr(ProcPath(fd), name, buf); return e })
	return n, err
}

// GetxattrValue reads a whole attribute.
func GetxattrValue(fd int, name string) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := Getxattr(fd, name, buf)
		if err == nil {
			return buf[:n], nil
		}
		if err != unix.ERANGE || len(buf) >= MaxXattr {
			return nil, err
		}
		buf = make([]byte, MaxXattr)
	}
}

// Listxattr returns the names of the attributes of the object behind fd. A
// file system without attributes has none.
func Listxattr(fd int) ([]string, error) {
	buf := make([]byte, 1024)
	for {
		var n int
		err := retry(func() (e error) { n, e = unix.Listxattr(ProcPath(fd), buf); return e })
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

// Setxattr sets an attribute of the object behind fd. flags: XATTR_CREATE,
// XATTR_REPLACE or 0.
func Setxattr(fd int, name string, value []byte, flags int) error {
	return retry(func() error { return unix.Setxattr(ProcPath(fd), name, value, flags) })
}

// Removexattr removes an attribute of the object behind fd.
func Removexattr(fd int, name string) error {
	return retry(func() error { return unix.Removexattr(ProcPath(fd), name) })
}
