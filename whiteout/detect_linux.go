package whiteout

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// DirMark is what a directory's attributes say about the directory.
type DirMark uint8

const (
	// Plain: nothing.
	Plain DirMark = iota
	// Opaque: hides everything below.
	Opaque
	// XWhiteouts: may contain whiteouts in the attribute form.
	XWhiteouts
)

// ReadsDevices reports whether a character device 0:0 is a whiteout.
func (d Dialect) ReadsDevices() bool { return d != AUFS }

// ReadsMarkers reports whether ".wh." names are whiteouts and markers.
func (d Dialect) ReadsMarkers() bool { return d == AUFS || d == Auto || d == AutoUser }

// IsDevice reports whether mode and rdev are those of a whiteout device
// (kernel: IS_WHITEOUT).
func IsDevice(mode uint32, rdev uint64) bool {
	return mode&unix.S_IFMT == unix.S_IFCHR && rdev == 0
}

// Mark reads the attributes of the directory fd, which may be an O_PATH
// descriptor. Markers in file form are not looked for: they show in the
// directory's listing.
func (d Dialect) Mark(fd int) (DirMark, error) { return d.MarkAt(fd, "") }

// MarkAt is Mark of the directory name in dirfd.
func (d Dialect) MarkAt(dirfd int, name string) (DirMark, error) {
	var attrs []string
	switch d {
	case Overlay:
		attrs = []string{TrustedPrefix + "opaque"}
	case UserXattr:
		attrs = []string{UserPrefix + "opaque"}
	case Auto, AutoUser:
		attrs = []string{TrustedPrefix + "opaque", UserPrefix + "opaque", FusePrefix + "opaque"}
	}
	for _, a := range attrs {
		var buf [4]byte
		n, err := xattrat.Get(dirfd, name, a, buf[:])
		switch {
		case err == nil && n == 1 && buf[0] == 'y':
			return Opaque, nil
		case err == nil && n == 1 && buf[0] == 'x':
			return XWhiteouts, nil
		case err == nil, absent(err):
		default:
			return Plain, err
		}
	}
	return Plain, nil
}

// IsXWhiteout reports whether the object fd (O_PATH will do), an empty regular
// file in a directory marked XWhiteouts, is a whiteout.
func (d Dialect) IsXWhiteout(fd int) (bool, error) {
	var attrs []string
	switch d {
	case Overlay:
		attrs = []string{TrustedPrefix + "whiteout"}
	case UserXattr:
		attrs = []string{UserPrefix + "whiteout"}
	case Auto, AutoUser:
		attrs = []string{TrustedPrefix + "whiteout", UserPrefix + "whiteout"}
	}
	for _, a := range attrs {
		_, err := xattrat.Get(fd, "", a, nil)
		if err == nil {
			return true, nil
		}
		if !absent(err) {
			return false, err
		}
	}
	return false, nil
}

// absent tells the errors that mean "no such attribute here".
func absent(err error) bool {
	return errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.EPERM) || errors.Is(err, unix.ERANGE)
}
