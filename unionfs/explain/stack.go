package explain

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

const (
	// maxLooks bounds the work of one call: redirects can lead to each other.
	maxLooks = 1 << 17
	// maxPlaces bounds the places of one directory, hidden ones included.
	maxPlaces = 1 << 14
	// maxLinks is how many symbolic links a path may lead through (as in the kernel).
	maxLinks = 40
	// maxNames is how many names of one directory a tree keeps.
	maxNames = 1 << 20
	// maxXattrs and maxValue bound what is shown of private attributes.
	maxXattrs, maxValue = 64, 256
)

// Layer is one directory of a stack.
type Layer struct {
	unionfs.Layer
	Label
}

// Options describe a stack as unionfs.Options do, and mean the same.
type Options struct {
	Lowers   []Layer // topmost first
	Upper    *Layer  // nil: none
	Work     string
	Redirect unionfs.Redirect
	Metacopy bool
	NoIndex  bool
	Owners   unionfs.Owners
}

// Stack is an opened stack. It is for one goroutine at a time.
type Stack struct {
	layers   []*layer // the upper first, if there is one
	redirect bool
	metacopy bool
	owners   unionfs.Owners
	index    int // directory of the link index, or -1
	traps    []id
	looks    int // left in this call
}

// id tells objects apart.
type id struct{ dev, ino uint64 }

// layer is an opened layer. Immutable.
type layer struct {
	Layer
	root  int // O_PATH
	upper bool
	owner int // of the root
	uuid  fsat.UUID
	// path is what links of procfs show of the root.
	path string
}

// Open opens the layers. As root it does so through private copies of their mounts, as a
// mount does, so that it sees what that sees.
func Open(o Options) (*Stack, error) {
	s := &Stack{redirect: o.Redirect >= unionfs.RedirectFollow, owners: o.Owners, index: -1}
	s.metacopy = s.redirect && o.Metacopy
	if err := s.open(o); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Stack) open(o Options) error {
	if o.Upper != nil {
		if err := s.add(*o.Upper, true); err != nil {
			return err
		}
		if err := s.openWork(o); err != nil {
			return err
		}
	}
	for _, l := range o.Lowers {
		if err := s.add(l, false); err != nil {
			return err
		}
	}
	if len(s.layers) == 0 {
		return errors.New("explain: a stack needs at least one layer")
	}
	return nil
}

func (s *Stack) add(l Layer, upper bool) error {
	fd, err := fsat.CloneTree(l.Path, true, unix.MOUNT_ATTR_NOATIME)
	if err != nil {
		fd, err = fsat.OpenTrusted(l.Path)
	}
	if err != nil {
		return fmt.Errorf("open layer %q: %w", l.Path, err)
	}
	n := &layer{Layer: l, root: fd, upper: upper, path: l.Path}
	s.layers = append(s.layers, n)
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return fmt.Errorf("open layer %q: %w", l.Path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("open layer %q: %w", l.Path, unix.ENOTDIR)
	}
	n.owner, n.uuid = int(st.Uid), fsat.FSUUID(fd)
	if upper {
		s.traps = append(s.traps, id{st.Dev, st.Ino})
	}
	return nil
}

// openWork opens the link index, if the mount has one.
func (s *Stack) openWork(o Options) error {
	if o.Work == "" {
		return nil
	}
	fd, err := fsat.OpenTrusted(o.Work)
	if errors.Is(err, unix.ENOENT) {
		return nil // it was never mounted
	}
	if err != nil {
		return fmt.Errorf("open workdir %q: %w", o.Work, err)
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return fmt.Errorf("open workdir %q: %w", o.Work, err)
	}
	s.traps = append(s.traps, id{st.Dev, st.Ino})
	if o.NoIndex {
		return nil
	}
	s.index, err = fsat.OpenBeneath(fd, "index", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		s.index = -1
		if !fsat.IsAbsent(err) {
			return fmt.Errorf("open the link index in %q: %w", o.Work, err)
		}
	}
	return nil
}

// Close closes the layers.
func (s *Stack) Close() {
	for _, l := range s.layers {
		fsat.Close(l.root)
	}
	fsat.Close(s.index)
	s.layers, s.index = nil, -1
}

// Layers describes the layers, topmost first.
func (s *Stack) Layers() []LayerInfo {
	all := make([]LayerInfo, len(s.layers))
	for i, l := range s.layers {
		all[i] = LayerInfo{Index: i, Label: l.Label, Upper: l.upper, Dialect: l.Dialect.String(), Dir: Path(l.Path)}
	}
	return all
}

// describe completes what stat(2) says about the file fd by what the object is, as
// unionfs does, with the owner as the mount shows it.
func (s *Stack) describe(l *layer, fd int, st *unix.Stat_t) error {
	if l.Mapped {
		st.Uid, st.Gid = s.owners.UIDs.Stored(st.Uid), s.owners.GIDs.Stored(st.Gid)
	}
	self := -1
	if s.owners.FilesOfRoot {
		self = l.owner
	}
	var err error
	if l.Override != override.None {
		_, err = l.Override.Stat(fd, "", st, self)
	} else if self >= 0 && int(st.Uid) == self {
		st.Uid, st.Gid = 0, 0
	}
	st.Uid, st.Gid = s.owners.UIDs.Shown(st.Uid), s.owners.GIDs.Shown(st.Gid)
	return err
}

// private reports whether an attribute of a layer is not shown to users of a mount.
func (l *layer) private(typ uint32, attr string) bool {
	if typ == unix.S_IFLNK {
		if l.Override.Own(attr) {
			return true
		}
	} else {
		user, visible := l.Override.FromDisk(attr)
		if !visible {
			return true
		}
		attr = user
	}
	_, visible := l.Dialect.FromDisk(attr)
	return !visible
}

// forms are the dialects by whose attributes a layer of dialect d can be marked, one by
// one.
func forms(d whiteout.Dialect) []whiteout.Dialect {
	switch d {
	case whiteout.Auto, whiteout.AutoUser:
		return []whiteout.Dialect{whiteout.Overlay, whiteout.UserXattr}
	}
	return []whiteout.Dialect{d}
}
