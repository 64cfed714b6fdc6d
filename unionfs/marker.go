package unionfs

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// Where the upper's file system has no extended attributes, a directory is made opaque
// by a file in it, ".wh..wh..opq". Where it can make no devices, or shall not, and the
// upper is one in which markers are read, a file ".wh.NAME" hides the name. It is the
// form of image layers and of fuse-overlayfs, which can read such an upper; kernel
// overlayfs cannot. Names that begin with ".wh." are refused then. One that leaves no
// space for the marker gets a whiteout with an attribute, or cannot be removed.

// markOpaque makes a directory of the upper opaque.
func (fs *FS) markOpaque(fd int) error {
	if fs.xattrs {
		return fs.upper.dialect.SetOpaque(fd)
	}
	var st unix.Stat_t
	err := fsat.Fstat(fd, &st)
	if err == nil {
		err = touch(fd, whiteout.OpaqueMarker)
	}
	if err == nil { // its users do not see what has changed
		err = fsat.Utimes(fd, "", [2]unix.Timespec{st.Atim, st.Mtim})
	}
	return err
}

// buildOpaque is build of a directory that hides what lies below it.
func (fs *FS) buildOpaque(src cow.Source) (*cow.Temp, error) {
	if fs.xattrs {
		src.Xattrs = append(src.Xattrs, cow.Xattr{Name: fs.upper.dialect.Attr("opaque"), Value: []byte{'y'}})
		return fs.build(src)
	}
	t, err := fs.build(src)
	if err != nil {
		return nil, err
	}
	fd, err := fsat.OpenName(fs.work.Fd(), t.Name(), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err == nil {
		err = fs.markOpaque(fd)
		fsat.Close(fd)
	}
	if err != nil {
		t.Discard()
		return nil, fmt.Errorf("mark as opaque: %w", err)
	}
	return t, nil
}

// hideByMarker puts a marker before a name of the lowers, if whiteouts have that form
// and the name needs one. An object of the upper with the name still shows; so this
// comes before it goes, and whatever happens in between changes nothing.
func (fs *FS) hideByMarker(c *change, f *found) error {
	if !fs.markers {
		return nil
	}
	if fs.xwhite && len(whiteout.MarkerPrefix)+len(f.name) > unix.NAME_MAX {
		return nil // it gets a whiteout with an attribute
	}
	return fs.putMarker(c, f)
}

// putMarker puts a marker before a name of the lowers, if it needs a whiteout.
func (fs *FS) putMarker(c *change, f *found) error {
	if !f.needsWhiteout() {
		return nil
	}
	if len(whiteout.MarkerPrefix)+len(f.name) > unix.NAME_MAX {
		return unix.ENAMETOOLONG
	}
	if err := touch(c.h.fd, whiteout.MarkerPrefix+f.name); err != nil {
		return fmt.Errorf("hide the name in the lowers: %w", err)
	}
	c.p.dir.mark(f.name)
	f.white, f.entry = true, false
	return nil
}

// touch makes sure of an empty file.
func touch(dirfd int, name string) error {
	fd, err := fsat.OpenName(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err == unix.EEXIST {
		return nil
	}
	if err == nil {
		fsat.Close(fd)
	}
	return err
}
