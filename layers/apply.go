package layers

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// powers is what this process may do to files of the store, and how it writes
// down what it may not.
type powers struct {
	privileged bool // trusted.* and any owner: the initial user namespace's root
	// guest is set where what we make gets another owner than the store has: root in
	// the store of a user.
	guest error
	encoding
}

// upperDialect is the dialect of writable layers: where there are no attributes a mount
// may find that devices can be made.
func (p powers) upperDialect() whiteout.Dialect {
	if p.dialect == whiteout.AUFS {
		return whiteout.AutoUser
	}
	return p.dialect
}

// owners is what the row of a layer made with these powers says about owners.
func (p powers) owners() string {
	switch {
	case p.privileged:
		return ownersReal
	case p.override != override.None:
		return ownersOverride
	}
	return ownersVirtual
}

// apply sets the attributes of the object (dirfd, name), or of dirfd itself, in
// the order in which they do not undo each other: chown clears suid bits and
// capabilities, an ACL changes the group bits, and times come last. What the
// object has got by being made is not set again. apply reports whether
// everything could be applied; a store without privileges goes on with what it
// can do, and the index and the tar-split record keep the rest.
func (p powers) apply(dirfd int, name string, k kind, a *attrs, has *made) (complete bool, err error) {
	if p.privileged && (has == nil || has.uid != a.uid || has.gid != a.gid) {
		if err := fsat.Chown(dirfd, name, a.uid, a.gid); err != nil {
			return false, fmt.Errorf("set owner %d:%d: %w", a.uid, a.gid, err)
		}
	}
	if mode := p.fileMode(k, a); k != kindSymlink && (has == nil || has.mode != mode) {
		if err := fsat.Chmod(dirfd, name, mode); err != nil {
			return false, fmt.Errorf("set mode %#o: %w", mode, err)
		}
	}
	if complete, err = p.applyXattrs(dirfd, name, k, a); err != nil {
		return false, err
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

// applyXattrs sets the extended attributes, and that which says what the object
// is if its file is something else.
func (p powers) applyXattrs(dirfd int, name string, k kind, a *attrs) (complete bool, err error) {
	complete = true
	if !p.privileged {
		is := a.stat(k)
		if k == kindSymlink || p.override == override.None {
			// The file can tell nothing: it can have no user attribute.
			for i := range a.xattrs {
				a.xattrs[i].lost = true
			}
			return len(a.xattrs) == 0 && a.uid == 0 && a.gid == 0 && !is.Needed(), nil
		}
		if is.Needed() {
			if err := fsat.Setxattr(dirfd, name, p.override.Attr(), is.Format(), 0); err != nil {
				return false, fmt.Errorf("set %s to %q: %w", p.override.Attr(), is.Format(), err)
			}
		}
	}
	for i, x := range a.xattrs {
		disk := p.toDisk(x.name)
		err := fsat.Setxattr(dirfd, name, disk, []byte(x.value), 0)
		switch {
		case err == nil:
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES) && !p.privileged,
			errors.Is(err, unix.EINVAL) && strings.HasPrefix(x.name, "system."),
			errors.Is(err, unix.ERANGE) && !p.privileged: // the prefix has made the name too long
			complete, a.xattrs[i].lost = false, true
		default:
			return false, fmt.Errorf("set extended attribute %q (%d bytes): %w", disk, len(x.value), err)
		}
	}
	return complete, nil
}

// hide makes a whiteout of name in a directory.
func (p powers) hide(dirfd int, name string) error {
	if !p.dialect.ReadsMarkers() {
		return whiteout.CreateDevice(dirfd, name)
	}
	return makeMarker(dirfd, whiteout.MarkerPrefix+name)
}

// markOpaque makes a directory hide what lies below it.
func (p powers) markOpaque(dirfd int) error {
	if !p.dialect.ReadsMarkers() {
		return p.dialect.SetOpaque(dirfd)
	}
	return makeMarker(dirfd, whiteout.OpaqueMarker)
}

func makeMarker(dirfd int, name string) error {
	fd, err := fsat.OpenName(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err == nil {
		fsat.Close(fd)
	}
	return err
}

// fileMode is the mode that an object gets on disk.
func (p powers) fileMode(k kind, a *attrs) uint32 {
	if p.privileged {
		return a.mode
	}
	return override.RealMode(a.stat(k).Mode)
}

// mknod makes a device or fifo, or the empty file that a store without privileges
// has in its place: one of that name in a lower layer must not show.
func (p powers) mknod(dirfd int, name string, typ uint32, rdev uint64) error {
	if !p.privileged {
		typ, rdev = override.RealType(typ), 0
	}
	return fsat.Mknod(dirfd, name, typ|0o600, rdev)
}
