package unionfs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// layer is one opened directory of the union. All fields are immutable.
type layer struct {
	path    string
	dialect whiteout.Dialect
	root    int    // O_PATH
	dev     uint64 // of the root
	blksize uint32
	nodev   bool // devices in it cannot be opened
	*fileSystem
	owner    int // of the root
	override override.Form
	owners   *owners
	// mapped: the mount that the layer lies in maps ids, see Layer.Mapped.
	mapped bool
	// direct: nothing in the layer refers to another place, or has inode flags.
	direct bool
	// index is the layer's place in the stack; the topmost lower has 0.
	index int
}

// newLayer takes over fd, the root of a layer.
func newLayer(fd int, path string, d whiteout.Dialect, on fileSystems) (*layer, error) {
	var st unix.Stat_t
	err := fsat.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		fsat.Close(fd)
		return nil, fmt.Errorf("open layer %q: %w", path, err)
	}
	return &layer{
		fileSystem: on.of(fd, st.Dev), path: path, dialect: d, root: fd, dev: st.Dev, owner: int(st.Uid), blksize: uint32(st.Blksize),
	}, nil
}

// LeftUnsynced returns an error if a volatile mount has left the upper that belongs
// to the directory workdir behind without a sync.
func LeftUnsynced(workdir string) error {
	if cow.LeftUnsynced(workdir) {
		return cow.ErrVolatile
	}
	return nil
}

// open opens the regular file name in a directory of the layer.
func (l *layer) open(dirfd int, name string, flags int) (int, error) {
	if l.nodev {
		return fsat.OpenRegularNoDev(dirfd, name, flags)
	}
	return fsat.OpenRegular(dirfd, name, flags)
}

// openData is open for reading, without a trace in the access time where we may do
// that.
func (l *layer) openData(dirfd int, name string) (fd int, err error) {
	fd, err = l.open(dirfd, name, unix.O_RDONLY|unix.O_NOATIME)
	if err == unix.EPERM { // O_NOATIME is for owners and root
		fd, err = l.open(dirfd, name, unix.O_RDONLY)
	}
	return fd, err
}

func (l *layer) close() {
	fsat.Close(l.root)
	l.root = -1
}

// layerEntry is one name as a layer's directory has it, whiteouts decoded.
type layerEntry struct {
	name string
	ino  uint64
	typ  uint8 // DT_*
	// object: the layer has an object of this name. whiteout: it hides the
	// name below. entry: the whiteout is an entry of this very name, a device
	// or, with xform, an empty file with an attribute; else it is a marker.
	object, whiteout, entry, xform bool
}

// readDirAt opens the directory behind dirfd, which may be an O_PATH descriptor, and
// appends what is in it to entries.
func (l *layer) readDirAt(dirfd int, entries []layerEntry) (_ []layerEntry, opaque bool, err error) {
	fd, err := fsat.OpenDir(dirfd)
	if err != nil {
		return entries, false, err
	}
	defer fsat.Close(fd)
	mark, err := l.dialect.Mark(fd)
	if err != nil {
		return entries, false, fmt.Errorf("read opaque attribute: %w", err)
	}
	return l.readDir(fd, dirfd == l.root, mark, entries)
}

// markAt tells what the directory name in dirfd says about itself, in whatever form.
func (l *layer) markAt(dirfd int, name string) (whiteout.DirMark, error) {
	mark, err := l.dialect.MarkAt(dirfd, name)
	if err != nil || mark == whiteout.Opaque || !l.dialect.ReadsMarkers() {
		return mark, err
	}
	fd, err := fsat.OpenBeneath(dirfd, name+"/"+whiteout.OpaqueMarker, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		if fsat.IsAbsent(err) {
			err = nil
		}
		return mark, err
	}
	fsat.Close(fd)
	return whiteout.Opaque, nil
}

// readDir appends what is in the directory dirfd of the layer, which is open for reading
// and stands at its start; mark is what it says about itself. Markers and whiteouts are decoded by the layer's dialect; a
// name with both an object and a marker comes once with both flags.
func (l *layer) readDir(dirfd int, isRoot bool, mark whiteout.DirMark, entries []layerEntry) (_ []layerEntry, opaque bool, err error) {
	start := len(entries)
	// The attribute on the root of a layer says nothing (kernel: the roots are
	// merged unseen); a marker in it does.
	opaque = mark == whiteout.Opaque && !isRoot
	var markers map[string]bool
	err = fsat.ReadDir(dirfd, func(e fsat.Dirent) error {
		if len(e.Name) > unix.NAME_MAX {
			return nil // another FUSE server's; nobody can ask us for it
		}
		if l.dialect.ReadsMarkers() {
			switch m, target := whiteout.ParseMarker(e.Name); m {
			case whiteout.MarkerOpaque:
				opaque = true
				return nil
			case whiteout.MarkerWhiteout:
				if markers == nil {
					markers = make(map[string]bool)
				}
				markers[target] = true
				return nil
			case whiteout.MarkerMeta, whiteout.MarkerInvalid:
				return nil
			}
		}
		le := layerEntry{name: e.Name, ino: e.Ino, typ: e.Type, object: true}
		if err := l.classify(dirfd, mark, &le); err != nil {
			if err == unix.ENOENT { // went away while we looked
				return nil
			}
			return fmt.Errorf("look at %q: %w", e.Name, err)
		}
		entries = append(entries, le)
		return nil
	})
	if err != nil {
		return entries, false, err
	}
	for i := start; i < len(entries) && len(markers) > 0; i++ {
		if markers[entries[i].name] {
			entries[i].whiteout = true
			delete(markers, entries[i].name)
		}
	}
	for name := range markers {
		entries = append(entries, layerEntry{name: name, whiteout: true})
	}
	return entries, opaque, nil
}

// classify completes the type of an entry and turns the device and attribute
// forms of a whiteout into what they mean.
func (l *layer) classify(dirfd int, mark whiteout.DirMark, e *layerEntry) error {
	// A directory can be opaque and hold leftovers of whiteouts as well.
	xcheck := mark != whiteout.Plain && (e.typ == unix.DT_REG || e.typ == unix.DT_UNKNOWN)
	special := l.override != override.None && e.typ == unix.DT_REG // it may say that it is something else
	if e.typ != unix.DT_UNKNOWN && e.typ != unix.DT_CHR && !xcheck && !special {
		return nil
	}
	var st unix.Stat_t
	if err := fsat.Stat(dirfd, e.name, &st); err != nil {
		return err
	}
	e.typ = uint8(st.Mode & unix.S_IFMT >> 12)
	if l.dialect.ReadsDevices() && whiteout.IsDevice(st.Mode, st.Rdev) {
		e.object, e.whiteout, e.entry = false, true, true
		return nil
	}
	if xcheck && e.typ == unix.DT_REG && st.Size == 0 {
		fd, err := fsat.OpenName(dirfd, e.name, unix.O_PATH, 0)
		if err != nil {
			return err
		}
		defer fsat.Close(fd)
		wh, err := l.dialect.IsXWhiteout(fd)
		if err != nil {
			return err
		}
		if wh {
			e.object, e.whiteout, e.entry, e.xform = false, true, true, true
			return nil
		}
	}
	if l.override != override.None && e.typ == unix.DT_REG && st.Size == 0 {
		if err := l.describe(dirfd, e.name, &st); err != nil && !errors.Is(err, override.ErrInvalid) {
			return err // if it says nonsense, so does who looks it up
		}
		e.typ = uint8(st.Mode & unix.S_IFMT >> 12)
	}
	return nil
}
