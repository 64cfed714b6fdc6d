package layers

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/layers/foreign"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// encoding is how a layer says what its objects are where their files cannot:
// that a name is deleted, that a user's file is somebody else's, an attribute
// whose name means something here or is not for everybody to set.
type encoding struct {
	dialect  whiteout.Dialect
	override override.Form
	// mapped: the files are those of a user without privileges, self. One of
	// which nothing else is said belongs to root.
	mapped bool
	self   uint32
	// ids, if not nil, says who owners are: the files are those of another user, seen
	// from outside of that user's namespace.
	ids *foreign.IDs
}

// toDisk returns the name under which an attribute that an image or a user calls
// name is stored. The dialect escapes first: it is what a layer would be without
// an override, whose prefix then covers the result.
func (e encoding) toDisk(name string) string { return e.override.ToDisk(e.dialect.ToDisk(name)) }

// fromDisk is the inverse of toDisk. visible is false for what belongs to the
// encoding itself.
func (e encoding) fromDisk(disk string) (name string, visible bool) {
	if name, visible = e.override.FromDisk(disk); !visible {
		return "", false
	}
	return e.dialect.FromDisk(name)
}

// readlink reads the target of a symbolic link, which may be an empty file in an
// upper.
func (e encoding) readlink(fd int) (string, error) {
	target, err := fsat.Readlink(fd, "") // of another file it says ENOENT
	if errors.Is(err, unix.ENOENT) && e.override != override.None {
		if target, err = e.override.Readlink(fd, ""); errors.Is(err, override.ErrInvalid) {
			err = fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
	}
	return target, err
}

// stat completes st, which is what the kernel says about the file (dirfd, name),
// by what the object is. Whether a file is a whiteout must be asked before.
func (e encoding) stat(dirfd int, name string, st *unix.Stat_t) error {
	if e.ids != nil {
		if err := inside(e.ids, st); err != nil {
			return err
		}
	}
	if !e.mapped {
		return nil
	}
	if e.override == override.None {
		if st.Uid == e.self {
			st.Uid, st.Gid = 0, 0
		}
		return nil
	}
	_, err := e.override.Stat(dirfd, name, st, int(e.self))
	if errors.Is(err, override.ErrInvalid) {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}

// inside replaces the owner of a file by who that is in the user's namespace.
func inside(ids *foreign.IDs, st *unix.Stat_t) error {
	uid, ok1 := foreign.Inside(ids.UIDs, st.Uid)
	gid, ok2 := foreign.Inside(ids.GIDs, st.Gid)
	if !ok1 || !ok2 {
		return fmt.Errorf("%w: it belongs to %d:%d, which is nobody in the user namespace of its store's owner", ErrUnsupported, st.Uid, st.Gid)
	}
	st.Uid, st.Gid = uid, gid
	return nil
}
