package override

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// Stat is what an object is, instead of what its file is.
type Stat struct {
	UID, GID uint32
	// Mode has the permission bits with setuid, setgid and sticky, and, if the
	// attribute tells it, the type (S_IFMT); else those bits are 0.
	Mode uint32
	Rdev uint64 // of a device
}

// ErrInvalid says that an attribute is not in the form of the package comment.
var ErrInvalid = errors.New("invalid override_stat")

const maxValue = 64 // bytes; the longest that Format makes has less

var types = []struct {
	name string
	mode uint32
}{
	{"dir", unix.S_IFDIR},
	{"file", unix.S_IFREG},
	{"symlink", unix.S_IFLNK},
	{"pipe", unix.S_IFIFO},
	{"socket", unix.S_IFSOCK},
	{"block", unix.S_IFBLK},
	{"char", unix.S_IFCHR},
}

// Parse reads the value of the attribute.
func Parse(value []byte) (Stat, error) {
	var s Stat
	bad := func() (Stat, error) { return Stat{}, fmt.Errorf("%w: %q", ErrInvalid, value) }
	if len(value) > maxValue {
		return bad()
	}
	f := strings.SplitN(string(bytes.TrimRight(value, "\x00")), ":", 4)
	if len(f) < 3 {
		return bad()
	}
	uid, err1 := strconv.ParseUint(f[0], 10, 32)
	gid, err2 := strconv.ParseUint(f[1], 10, 32)
	mode, err3 := strconv.ParseUint(f[2], 8, 16)
	if err1 != nil || err2 != nil || err3 != nil || uid == 1<<32-1 || gid == 1<<32-1 {
		return bad()
	}
	// fuse-overlayfs writes st_mode as it is, type and all.
	s = Stat{UID: uint32(uid), GID: uint32(gid), Mode: uint32(mode) & 0o7777}
	if len(f) == 3 {
		return s, nil
	}
	name, number, device := strings.Cut(f[3], "-")
	for _, t := range types {
		if t.name != name {
			continue
		}
		if device != (t.mode == unix.S_IFBLK || t.mode == unix.S_IFCHR) {
			return bad()
		}
		s.Mode |= t.mode
		if device {
			a, b, _ := strings.Cut(number, "-")
			major, err1 := strconv.ParseUint(a, 10, 12)
			minor, err2 := strconv.ParseUint(b, 10, 20)
			if err1 != nil || err2 != nil {
				return bad()
			}
			s.Rdev = unix.Mkdev(uint32(major), uint32(minor))
		}
		return s, nil
	}
	return bad()
}

// Format is the inverse of Parse. The type is written if it is one that the file
// cannot have.
func (s Stat) Format() []byte {
	b := fmt.Appendf(nil, "%d:%d:%o", s.UID, s.GID, s.Mode&0o7777)
	typ := s.Mode & unix.S_IFMT
	if typ == 0 || typ == unix.S_IFREG || typ == unix.S_IFDIR {
		return b
	}
	for _, t := range types {
		if t.mode == typ {
			b = append(append(b, ':'), t.name...)
		}
	}
	if typ == unix.S_IFBLK || typ == unix.S_IFCHR {
		b = fmt.Appendf(b, "-%d-%d", unix.Major(s.Rdev), unix.Minor(s.Rdev))
	}
	return b
}

// Apply puts s in the place of what the file is. A directory stays one, whatever the
// attribute says, and nothing else becomes one. A file with data stays a file.
func (s Stat) Apply(st *unix.Stat_t) {
	st.Uid, st.Gid = s.UID, s.GID
	typ := st.Mode & unix.S_IFMT
	if t := s.Mode & unix.S_IFMT; t != 0 && t != unix.S_IFDIR && typ == unix.S_IFREG && st.Size == 0 {
		typ = t
	}
	st.Mode = typ | s.Mode&0o7777
	if typ == unix.S_IFBLK || typ == unix.S_IFCHR {
		st.Rdev = s.Rdev
	}
}

// Read reads the attribute of the object that package xattrat would take as
// (dirfd, name). found is false if it has none, or cannot have any.
func (f Form) Read(dirfd int, name string) (s Stat, found bool, err error) {
	var buf [maxValue + 1]byte
	n, err := xattrat.Get(dirfd, name, f.Attr(), buf[:])
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM):
		return s, false, nil
	case errors.Is(err, unix.ERANGE):
		return s, false, fmt.Errorf("%w: more than %d bytes", ErrInvalid, maxValue)
	case err != nil:
		return s, false, err
	}
	s, err = Parse(buf[:n])
	return s, err == nil, err
}

// Stat completes st, which is what stat(2) says about the file (dirfd, name), by what
// the object is. Files that cannot have the attribute are not asked. self: files of
// this user that have none belong to root: in a layer that a user has written, all
// files are his. A negative self means none. says reports that it has the attribute.
func (f Form) Stat(dirfd int, name string, st *unix.Stat_t, self int) (says bool, err error) {
	if f == None {
		return false, nil
	}
	if typ := st.Mode & unix.S_IFMT; typ == unix.S_IFREG || typ == unix.S_IFDIR {
		s, found, err := f.Read(dirfd, name)
		if err != nil {
			return false, err
		}
		if found {
			s.Apply(st)
			if st.Mode&unix.S_IFMT == unix.S_IFLNK {
				target, err := f.Readlink(dirfd, name)
				st.Size = int64(len(target))
				return true, err
			}
			return true, nil
		}
	}
	if self >= 0 && int(st.Uid) == self {
		st.Uid, st.Gid = 0, 0
	}
	return false, nil
}

// Readlink reads the target of a symbolic link that is an empty file.
func (f Form) Readlink(dirfd int, name string) (string, error) {
	if f != Containers {
		return "", fmt.Errorf("%w: no symbolic link of the form %v has a target", ErrInvalid, f)
	}
	var buf [unix.PathMax]byte
	n, err := xattrat.Get(dirfd, name, TargetAttr, buf[:])
	if err != nil {
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ERANGE) {
			return "", fmt.Errorf("%w: a symbolic link without a target in %s", ErrInvalid, TargetAttr)
		}
		return "", err
	}
	if n == 0 || bytes.IndexByte(buf[:n], 0) >= 0 {
		return "", fmt.Errorf("%w: %s is no path", ErrInvalid, TargetAttr)
	}
	return string(buf[:n]), nil
}

// RealMode is the mode that the file of an object gets: its owner, who is not root,
// can always read and write it, and it grants nothing that only a real owner could.
func RealMode(mode uint32) uint32 {
	real := mode&0o1777 | 0o600
	if mode&unix.S_IFMT == unix.S_IFDIR {
		real |= 0o700
	}
	return real
}

// RealType is the type (S_IFMT) of the file of an object.
func RealType(mode uint32) uint32 {
	switch t := mode & unix.S_IFMT; t {
	case unix.S_IFDIR, unix.S_IFLNK, unix.S_IFREG:
		return t
	}
	return unix.S_IFREG
}

// Needed reports whether an object differs from what its file says by itself, in a
// layer whose files belong to root (see [Form.Stat]). Symbolic links are real ones if
// they do not.
func (s Stat) Needed() bool {
	typ := s.Mode & unix.S_IFMT
	if typ == unix.S_IFLNK {
		return s.UID != 0 || s.GID != 0
	}
	return s.UID != 0 || s.GID != 0 || s.Mode&0o7777 != RealMode(s.Mode) || typ != RealType(s.Mode)
}
