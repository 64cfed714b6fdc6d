package unionfs

import (
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// Hundreds of layers mostly lie side by side. To open each by itself, as a private copy
// of its mount, takes a quarter of a millisecond; so one copy of the mount is made for
// the directory above them all.

// openLowers opens the lowers, topmost first. What it returns besides keeps their mount
// and is to be closed after them; -1: nothing.
func openLowers(lowers []Layer, owners *owners) (layers []*layer, mount int, err error) {
	mount, on := -1, make(fileSystems)
	defer func() {
		if err != nil {
			for _, l := range layers {
				l.close()
			}
			fsat.Close(mount)
		}
	}()
	above := ""
	if len(lowers) > 1 {
		if above = commonDir(lowers); above != "/" {
			if mount, err = fsat.CloneTree(above, true, unix.MOUNT_ATTR_NOATIME); err != nil {
				mount = -1 // the same will be said of each
			}
		}
	}
	for i, w := range lowers {
		l, err := openBelow(mount, above, w, on)
		if l == nil && err == nil {
			l, err = openLower(w.Path, w.Dialect, on)
		}
		if err != nil {
			return layers, mount, err
		}
		l.direct, l.index, l.override, l.mapped, l.owners = w.Direct, i, w.Override, w.Mapped, owners
		layers = append(layers, l)
	}
	useHandles(layers, on)
	return layers, mount, nil
}

// commonDir returns the directory that all lowers lie below.
func commonDir(lowers []Layer) string {
	dir := filepath.Dir(filepath.Clean(lowers[0].Path))
	for _, l := range lowers[1:] {
		for !within(filepath.Clean(l.Path), dir) || filepath.Clean(l.Path) == dir {
			dir = filepath.Dir(dir)
			if dir == "/" || dir == "." {
				return "/"
			}
		}
	}
	return dir
}

// openBelow opens a lower in the copy of the mount of the directory above; nil if that
// shows something else there: another mount lies on the way, or a link.
func openBelow(mount int, above string, w Layer, on fileSystems) (*layer, error) {
	if mount < 0 {
		return nil, nil
	}
	rel, err := filepath.Rel(above, filepath.Clean(w.Path))
	if err != nil {
		return nil, nil //nolint:nilerr // by its own path, then
	}
	fd, err := fsat.OpenBeneath(mount, rel, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, nil //nolint:nilerr // by its own path, then
	}
	var want, have unix.Stat_t
	if unix.Stat(w.Path, &want) != nil || fsat.Fstat(fd, &have) != nil || want.Dev != have.Dev || want.Ino != have.Ino {
		fsat.Close(fd)
		return nil, nil
	}
	l, err := newLayer(fd, w.Path, w.Dialect, on)
	if err == nil {
		l.nodev = true
	}
	return l, err
}

// openLower opens a lower as a private, read-only copy of its mount, so that
// what is mounted below it later does not show and nobody, not even we, can
// change it; without the privilege for that, as it is.
func openLower(path string, d whiteout.Dialect, on fileSystems) (*layer, error) {
	fd, err := fsat.CloneTree(path, true, unix.MOUNT_ATTR_NOATIME)
	cloned := err == nil
	if err != nil {
		fd, err = fsat.OpenTrusted(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open layer %q: %w", path, err)
	}
	l, err := newLayer(fd, path, d, on)
	if err == nil {
		l.nodev = cloned
	}
	return l, err
}

// fileSystem is what layers on one file system have in common.
type fileSystem struct {
	uuid fsat.UUID
	// handles: an object can be described by its file handle, for good and
	// unlike any of another file system. See useHandles.
	handles bool
	// remote: a file without a name may be gone on the other side, though we hold a
	// descriptor of it.
	remote bool
	// inMemory: its files have no other place than the page cache.
	inMemory bool
}

// fileSystems are those of a union's layers, by device number.
type fileSystems map[uint64]*fileSystem

// remoteTypes are file systems that have another side.
var remoteTypes = []int64{
	unix.NFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.V9FS_MAGIC,
	unix.AFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC,
}

// of returns the file system that fd lies on.
func (on fileSystems) of(fd int, dev uint64) *fileSystem {
	f := on[dev]
	if f == nil {
		f = &fileSystem{uuid: fsat.FSUUID(fd)}
		var st unix.Statfs_t
		if unix.Fstatfs(fd, &st) == nil {
			f.inMemory = st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC
			f.remote = slices.Contains(remoteTypes, st.Type)
			if st.Type != unix.FUSE_SUPER_MAGIC {
				_, err := fsat.Origin(fd, "", f.uuid)
				f.handles = err == nil
			}
		}
		on[dev] = f
	}
	return f
}

// useHandles finds out which layers have file handles that can be relied on: those
// of a FUSE server mean nothing after its next mount, and those of two file systems
// with the same name, or without one, cannot be told apart (kernel:
// ovl_get_fsid, ovl_lower_uuid_ok).
func useHandles(layers []*layer, on fileSystems) {
	devs := make(map[fsat.UUID]uint64)
	shared := make(map[fsat.UUID]bool)
	for _, l := range layers {
		if dev, ok := devs[l.uuid]; ok && dev != l.dev {
			shared[l.uuid] = true
		}
		devs[l.uuid] = l.dev
	}
	for _, f := range on {
		f.handles = f.handles && !shared[f.uuid]
	}
}
