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
	"github.com/plyfs/plyfs/whiteout"
)

const (
	paxXattr = "SCHILY.xattr."
	permBits = unix.S_ISUID | unix.S_ISGID | unix.S_ISVTX | 0o777
)

// attrs are the attributes of one object, with xattr names as they are on disk.
type attrs struct {
	mode         uint32 // permission bits with suid, sgid and sticky
	uid, gid     int
	atime, mtime time.Time
	xattrs       []xattr // sorted

	// Of a device: its type, and its number. A store without privileges has
	// an empty file in its place.
	device uint32
	rdev   uint64
}

type xattr struct {
	name  string
	value string
	lost  bool // the file does not have it
}

// droppedXattrs carry meaning only for the machine the tar was made on.
var droppedXattrs = map[string]bool{"security.selinux": true, "system.nfs4_acl": true}

// headerAttrs takes the attributes out of a tar header for a layer in dialect
// d. Names that the dialect keeps for itself are escaped: an image cannot forge
// whiteouts, opaque directories or redirects.
func headerAttrs(h *tar.Header, limit int64, d whiteout.Dialect) (*attrs, error) {
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
		a.xattrs = append(a.xattrs, xattr{name: d.ToDisk(name), value: v})
	}
	if size > limit {
		return nil, fmt.Errorf("%w: %d bytes of extended attributes, the limit is %d", ErrUnsupported, size, limit)
	}
	sort.Slice(a.xattrs, func(i, j int) bool { return a.xattrs[i].name < a.xattrs[j].name })
	return a, nil
}

// readAttrs takes the attributes of an object of a layer in dialect d; fd may
// be O_PATH. Names private to the dialect are left out, escaped ones stay
// escaped.
func readAttrs(fd int, d whiteout.Dialect) (*attrs, unix.Stat_t, error) {
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return nil, st, err
	}
	a := &attrs{
		mode: st.Mode & permBits, uid: int(st.Uid), gid: int(st.Gid),
		atime: time.Unix(st.Atim.Sec, st.Atim.Nsec), mtime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	names, err := fsat.Listxattr(fd, "")
	if err != nil {
		return nil, st, err
	}
	sort.Strings(names)
	for _, n := range names {
		if _, visible := d.FromDisk(n); !visible || droppedXattrs[n] {
			continue
		}
		v, err := fsat.GetxattrValue(fd, "", n)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EPERM) {
			continue
		}
		if err != nil {
			return nil, st, err
		}
		a.xattrs = append(a.xattrs, xattr{name: n, value: string(v)})
	}
	return a, st, nil
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

// powers is what this process may do to files of the store.
type powers struct {
	privileged bool // trusted.* and any owner: the initial user namespace's root
	dialect    whiteout.Dialect
}

// apply sets the attributes of the object (dirfd, name), or of dirfd itself, in
// the order in which they do not undo each other: chown clears suid bits and
// capabilities, an ACL changes the group bits, and times come last. What the
// object has got by being made is not set again. apply reports whether
// everything could be applied; a store without privileges goes on with what it
// can do, and the tar-split record keeps the rest.
func (p powers) apply(dirfd int, name string, k kind, a *attrs, has *made) (complete bool, err error) {
	complete = true
	if has == nil || has.uid != a.uid || has.gid != a.gid {
		if err := fsat.Chown(dirfd, name, a.uid, a.gid); err != nil {
			if p.privileged {
				return false, fmt.Errorf("set owner %d:%d: %w", a.uid, a.gid, err)
			}
			complete = false
		}
	}
	if k != kindSymlink {
		mode := p.fileMode(k, a)
		complete = complete && mode == a.mode
		if has == nil || has.mode != mode {
			if err := fsat.Chmod(dirfd, name, mode); err != nil {
				return false, fmt.Errorf("set mode %#o: %w", mode, err)
			}
		}
	}
	for i, x := range a.xattrs {
		err := fsat.Setxattr(dirfd, name, x.name, []byte(x.value), 0)
		switch {
		case err == nil:
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES) && !p.privileged,
			errors.Is(err, unix.EINVAL) && strings.HasPrefix(x.name, "system."):
			complete, a.xattrs[i].lost = false, true
		default:
			return false, fmt.Errorf("set extended attribute %q (%d bytes): %w", x.name, len(x.value), err)
		}
	}
	if name == "" && k == kindFile {
		err = setTimes(dirfd, a.times())
	} else {
		err = fsat.Utimes(dirfd, name, a.times())
	}
	if err != nil {
		return false, fmt.Errorf("set times: %w", err)
	}
	return complete, nil
}

// fileMode is the mode that an object gets on disk.
func (p powers) fileMode(k kind, a *attrs) uint32 {
	switch {
	case p.privileged:
		return a.mode
	// Readable to us, whatever the image says: we have to read it back. Never
	// suid under a foreign owner.
	case k == kindDir:
		return a.mode&^(unix.S_ISUID|unix.S_ISGID) | 0o700
	}
	return a.mode&^(unix.S_ISUID|unix.S_ISGID) | 0o400
}

// tarXattr is the name that an attribute stored as name in a layer of dialect d
// has in a layer tar: the inverse of what import does.
func tarXattr(d whiteout.Dialect, name string) string {
	user, _ := d.FromDisk(name) // readAttrs has left out what is not visible
	return user
}
