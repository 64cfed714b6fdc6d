package unionfs

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// An object of the upper says by private attributes where it comes from:
//
//	origin    the lower object it was copied from: keeps its inode number
//	impure    this directory holds objects with an origin
//	redirect  where the lowers have a renamed directory's content, or the data
//	          of a metacopied file
//	metacopy  the data is still in the lowers
//	nlink     see linkIndex
//
// They are those of kernel overlayfs, and mean the same.

// keepsOrigin reports whether an object of the type can have our attributes:
// those of users are for regular files and directories only (xattr(7)).
func (fs *FS) keepsOrigin(typ uint32) bool {
	return fs.xattrs && (typ == unix.S_IFREG || typ == unix.S_IFDIR || fs.upper.dialect.Prefix() != whiteout.UserPrefix)
}

// markImpure notes that a directory of the upper will hold an object with an
// origin, so that the next mount looks for inode numbers in it.
func (fs *FS) markImpure(p *inode, dirfd int) error {
	if !fs.xattrs || p.dir.impure.Load() {
		return nil
	}
	if err := fsat.Setxattr(dirfd, "", fs.upper.dialect.Attr("impure"), []byte{'y'}, 0); err != nil {
		return fmt.Errorf("mark the directory impure: %w", err)
	}
	p.dir.impure.Store(true)
	return nil
}

// originXattr describes the original of a copy, if that can be done.
func (fs *FS) originXattr(low lowerObj) ([]cow.Xattr, error) {
	if !fs.xattrs {
		return nil, nil
	}
	o, err := fs.lowers.origin(low)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	return []cow.Xattr{{Name: fs.upper.dialect.Attr("origin"), Value: o}}, err
}

// readOrigin returns the origin of (dirfd, name), nil if it has none.
func (fs *FS) readOrigin(dirfd int, name string) ([]byte, error) {
	v, err := fsat.GetxattrValue(dirfd, name, fs.upper.dialect.Attr("origin"))
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	return v, err
}

// copyIno returns the inode number that an object of the upper has from its
// original, if it was copied up. low is the lower object of its name in the
// directory p.
func (fs *FS) copyIno(p *inode, dirfd int, e *layerEntry, low lowerObj) (ino uint64, ok bool) {
	if e.typ == unix.DT_DIR {
		low, err := fs.mergedWith(p, dirfd, e.name, low)
		if err != nil || low == nil {
			return 0, false
		}
		f, err := fs.lowers.admit(low)
		return f.ino, err == nil
	}
	o, err := fs.readOrigin(dirfd, e.name)
	if err != nil || len(o) == 0 {
		return 0, false
	}
	var f lowerFacts
	if low != nil && low.typ() == e.typ {
		if have, err := fs.lowers.origin(low); err == nil && bytes.Equal(have, o) {
			if f, err = fs.lowers.admit(low); err != nil {
				return 0, false
			}
			ok = true
		}
	}
	if !ok {
		f, ok = fs.lowers.byOrigin(o)
	}
	// A copy of one of several hard links that is not the one in the index
	// has left the others behind (kernel: ovl_getattr).
	return f.ino, ok && (f.links < 2 || fs.isIndexed(dirfd, e.name, o))
}

// isIndexed reports whether the object (dirfd, name), which has the given
// origin, is what the link index has for that.
func (fs *FS) isIndexed(dirfd int, name string, origin []byte) bool {
	entry := hex.EncodeToString(origin)
	if fs.index == nil || !fs.index.has(entry) {
		return false
	}
	dir, err := fs.index.dir()
	if err != nil {
		return false
	}
	var a, b unix.Stat_t
	return fsat.Stat(dir, entry, &a) == nil && fsat.Stat(dirfd, name, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// mergedWith returns the lower directory that the directory name of the upper
// is merged with, nil if none: its redirect's, or low, the one of its name.
// What is missing is missing (kernel: ovl_lookup).
func (fs *FS) mergedWith(p *inode, dirfd int, name string, low lowerObj) (lowerObj, error) {
	fd, err := fsat.OpenName(dirfd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(fd)
	if opaque, err := fs.upperOpaque(fd); err != nil || opaque {
		return nil, err
	}
	redirect, _, err := fs.rules.read(fs.upper.dialect, dirfd, name, unix.DT_DIR)
	if err != nil {
		return nil, err
	}
	if redirect != "" {
		if low, err = fs.followRedirect(p, redirect); err != nil {
			return nil, err
		}
	}
	if low != nil && low.typ() != unix.DT_DIR {
		low = nil
	}
	return low, nil
}

// upperOpaque reports whether a directory of the upper hides the lowers, in
// any form that the upper's dialect has.
func (fs *FS) upperOpaque(fd int) (bool, error) {
	mark, err := fs.upper.dialect.Mark(fd)
	if err != nil || mark == whiteout.Opaque || !fs.upper.dialect.ReadsMarkers() {
		return mark == whiteout.Opaque, err
	}
	var st unix.Stat_t
	err = fsat.Stat(fd, whiteout.OpaqueMarker, &st)
	if fsat.IsAbsent(err) {
		return false, nil
	}
	return err == nil, err
}

// followRedirect returns the lower object that a redirect of an object in the
// directory p leads to, nil if there is none.
func (fs *FS) followRedirect(p *inode, redirect string) (lowerObj, error) {
	if strings.HasPrefix(redirect, "/") {
		low, err := fs.lowers.lookup(redirect)
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		return low, err
	}
	if p.low == nil {
		return nil, nil
	}
	list, err := fs.lowers.list(p.low)
	if err != nil {
		return nil, err
	}
	pos, ok := list.find(redirect)
	if !ok {
		return nil, nil
	}
	_, low := list.at(pos)
	return low, nil
}

// setRedirect writes down where the lowers have the object (dirfd, name),
// before it moves from the place where they would be found without.
func (fs *FS) setRedirect(low lowerObj, dirfd int, name string) error {
	path := fs.lowers.path(low)
	if len(path) >= unix.PathMax {
		return unix.EXDEV // nobody would read it (kernel: ovl_set_redirect, which stops at 256)
	}
	err := fsat.Setxattr(dirfd, name, fs.upper.dialect.Attr("redirect"), []byte(path), 0)
	if err != nil {
		return fmt.Errorf("set redirect: %w", err)
	}
	return nil
}
