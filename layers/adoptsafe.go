package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// Content is used where it lies only if nobody else can change it: it belongs to root
// or to us, and so does every directory on the way to it. A tree whose objects belong
// to others, as images have them, must lie below a directory that others cannot enter.

// errNotOurs says that content can only be copied.
var errNotOurs = errors.New("somebody else could change it")

// guarded looks at the directories on the way to path, which has no symbolic links.
// private: nobody but root and us gets as far as path.
func guarded(path string) (private bool, err error) {
	self := uint32(os.Geteuid())
	for at := path; ; at = filepath.Dir(at) {
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			return false, fmt.Errorf("%q: %w", at, err)
		}
		hasACL := func() bool { _, err := unix.Lgetxattr(at, accessACL, nil); return err == nil }
		switch {
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return false, fmt.Errorf("%q: %w", at, unix.ENOTDIR)
		case st.Uid != 0 && st.Uid != self:
			return false, fmt.Errorf("%w: %q belongs to user %d", errNotOurs, at, st.Uid)
		case at != path && st.Mode&unix.S_ISVTX == 0 && forOthers(&st, hasACL):
			return false, fmt.Errorf("%w: %q has mode %#o", errNotOurs, at, st.Mode&0o7777)
		}
		ofGroup := st.Mode&0o010 != 0 && (st.Gid != 0 || hasACL())
		if at != path && st.Mode&0o001 == 0 && !ofGroup {
			private = true
		}
		if at == "/" {
			return private, nil
		}
	}
}

// forOthers reports whether somebody but root and the owner can write an object. Where
// there is an ACL, the bits of the group are what it gives at most, to anybody.
func forOthers(st *unix.Stat_t, hasACL func() bool) bool {
	return st.Mode&0o002 != 0 || st.Mode&0o020 != 0 && (st.Gid != 0 || hasACL())
}

const accessACL = "system.posix_acl_access"

// inspection is what a look at every object of adopted content has found.
type inspection struct {
	treeUse
	// indirect: the path of an object that says that a part of it is elsewhere.
	indirect string
}

// inspect measures the directory fd. Unless it is private, everything in it must
// belong to root or to us, and be writable by nobody else.
func inspect(ctx context.Context, fd int, d whiteout.Dialect, private bool) (in inspection, err error) {
	if in.treeUse, err = measure(fd); err != nil {
		return in, err
	}
	self := uint32(os.Geteuid())
	var walk func(fd int, path string) error
	look := func(fd int, path string) error {
		var st unix.Stat_t
		if err := fsat.Fstat(fd, &st); err != nil {
			return err
		}
		typ := st.Mode & unix.S_IFMT
		if !private && (st.Uid != 0 && st.Uid != self || typ != unix.S_IFLNK && forOthers(&st, func() bool { _, err := fsat.Getxattr(fd, "", accessACL, nil); return err == nil })) {
			return fmt.Errorf("%w: %q belongs to user %d and has mode %#o", errNotOurs, "/"+path, st.Uid, st.Mode&0o7777)
		}
		if in.indirect == "" && (typ == unix.S_IFDIR || typ == unix.S_IFREG) {
			redirect, err := d.Redirect(fd, "")
			meta := false
			if err == nil && redirect == "" && typ == unix.S_IFREG {
				meta, err = d.Metacopy(fd, "")
			}
			if err != nil && !errors.Is(err, whiteout.ErrMalformed) {
				return err
			}
			if redirect != "" || meta || err != nil {
				in.indirect = "/" + path
			}
		}
		if typ == unix.S_IFDIR {
			return walk(fd, path)
		}
		return nil
	}
	walk = func(fd int, path string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error {
			c, err := fsat.OpenName(fd, e.Name, unix.O_PATH, 0)
			if err != nil {
				return fmt.Errorf("%q: %w", "/"+join(path, e.Name), err)
			}
			defer fsat.Close(c)
			return look(c, join(path, strings.Clone(e.Name)))
		})
	}
	return in, look(fd, "")
}

// namesIn lists the directory behind an O_PATH descriptor.
func namesIn(fd int) (names []string, err error) {
	err = fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { names = append(names, e.Name); return nil })
	return names, err
}
