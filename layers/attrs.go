package layers

import (
	"archive/tar"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout/override"
)

const (
	paxXattr = "SCHILY.xattr."
	permBits = unix.S_ISUID | unix.S_ISGID | unix.S_ISVTX | 0o777
)

// attrs are the attributes of one object, with xattr names as an image calls them.
type attrs struct {
	mode         uint32 // permission bits with suid, sgid and sticky
	uid, gid     int
	atime, mtime time.Time
	xattrs       []xattr // sorted

	// Of a device, fifo or socket: its type (S_IFMT), and a device's number. A
	// store without privileges has an empty file in its place.
	special uint32
	rdev    uint64
}

type xattr struct {
	name  string
	value string
	lost  bool // the file could not be given it
}

// droppedXattrs carry meaning only for the machine the tar was made on.
var droppedXattrs = map[string]bool{"security.selinux": true, "system.nfs4_acl": true}

// headerAttrs takes the attributes out of a tar header.
func headerAttrs(h *tar.Header, limit int64) (*attrs, error) {
	a := &attrs{mode: uint32(h.Mode) & permBits, uid: h.Uid, gid: h.Gid, mtime: h.ModTime, atime: h.AccessTime}
	if a.uid < 0 || a.gid < 0 || int64(a.uid) >= 1<<32-1 || int64(a.gid) >= 1<<32-1 {
		return nil, fmt.Errorf("%w: owner %d:%d is out of range", ErrCorrupt, a.uid, a.gid)
	}
	var size int64
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok || droppedXattrs[name] {
			continue
		}
		if name == "" || len(name) > 255 || strings.IndexByte(name, 0) >= 0 {
			return nil, fmt.Errorf("%w: extended attribute %q has no usable name", ErrCorrupt, name)
		}
		size += int64(len(name) + len(v))
		if strings.HasPrefix(name, "user.") && noUserXattrs(h.Typeflag) {
			continue
		}
		a.xattrs = append(a.xattrs, xattr{name: name, value: v})
	}
	if size > limit {
		return nil, fmt.Errorf("%w: %d bytes of extended attributes, the limit is %d", ErrUnsupported, size, limit)
	}
	a.sortXattrs()
	return a, nil
}

// noUserXattrs: no file system has attributes of users on these objects, xattr(7).
// Where only an index holds them, they would show all the same.
func noUserXattrs(typ byte) bool {
	return typ == tar.TypeSymlink || typ == tar.TypeChar || typ == tar.TypeBlock || typ == tar.TypeFifo
}

func (a *attrs) sortXattrs() {
	sort.Slice(a.xattrs, func(i, j int) bool { return a.xattrs[i].name < a.xattrs[j].name })
}

// readAttrs takes the attributes of an object as far as its file tells them, and
// completes what stat(2) says about the file; fd may be O_PATH. Names private to
// the encoding are left out.
func readAttrs(fd int, e encoding) (*attrs, unix.Stat_t, error) {
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return nil, st, err
	}
	if err := e.stat(fd, "", &st); err != nil {
		return nil, st, err
	}
	a := &attrs{
		mode: st.Mode & permBits, uid: int(st.Uid), gid: int(st.Gid),
		atime: time.Unix(st.Atim.Sec, st.Atim.Nsec), mtime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	a.setType(st.Mode, st.Rdev)
	names, err := fsat.Listxattr(fd, "")
	if err != nil {
		return nil, st, err
	}
	for _, disk := range names {
		n, visible := e.fromDisk(disk)
		if !visible || droppedXattrs[n] {
			continue
		}
		v, err := fsat.GetxattrValue(fd, "", disk)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EPERM) {
			continue
		}
		if err != nil {
			return nil, st, err
		}
		a.xattrs = append(a.xattrs, xattr{name: n, value: string(v)})
	}
	a.sortXattrs()
	return a, st, nil
}

// setType remembers what mode, a st_mode, says of an object that is neither file
// nor directory nor link.
func (a *attrs) setType(mode uint32, rdev uint64) {
	switch t := mode & unix.S_IFMT; t {
	case unix.S_IFCHR, unix.S_IFBLK:
		a.special, a.rdev = t, rdev
	case unix.S_IFIFO, unix.S_IFSOCK:
		a.special = t
	}
}

// stat is what an object of kind k is, in the terms of package override.
func (a *attrs) stat(k kind) override.Stat {
	s := override.Stat{UID: uint32(a.uid), GID: uint32(a.gid), Mode: a.special | a.mode, Rdev: a.rdev}
	switch {
	case a.special != 0:
	case k == kindDir:
		s.Mode |= unix.S_IFDIR
	case k == kindSymlink:
		s.Mode |= unix.S_IFLNK
	default:
		s.Mode |= unix.S_IFREG
	}
	return s
}

// overrule puts the object in the place of what its file is: st.
func (a *attrs) overrule(st *unix.Stat_t) {
	if st.Mode&unix.S_IFMT == unix.S_IFLNK { // whose mode says nothing
		st.Uid, st.Gid = uint32(a.uid), uint32(a.gid)
		return
	}
	a.stat(kindFile).Apply(st)
}

func (a *attrs) times() [2]unix.Timespec {
	m := timespec(a.mtime)
	if a.atime.IsZero() {
		return [2]unix.Timespec{m, m}
	}
	return [2]unix.Timespec{timespec(a.atime), m}
}

func timespec(t time.Time) unix.Timespec {
	if t.IsZero() {
		return unix.Timespec{}
	}
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// String is the form that goes into a bind digest.
func (a *attrs) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%o %d:%d %d.%09d", a.mode, a.uid, a.gid, a.mtime.Unix(), a.mtime.Nanosecond())
	for _, x := range a.xattrs {
		fmt.Fprintf(&b, " %q=%q", x.name, x.value)
	}
	return b.String()
}
