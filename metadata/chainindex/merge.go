package chainindex

import (
	"fmt"
	"math"
	"slices"
)

// LayerDir is a directory as one layer has it: what a [Rule] decides on.
type LayerDir struct {
	Layer   int
	Opaque  bool
	Entries []LayerEntry // sorted by name
}

// LayerEntry is one name in a LayerDir.
type LayerEntry struct {
	Name string
	Entry
}

// LayerRef points into the directories given to a Rule.
type LayerRef struct {
	Dir   int
	Entry int
}

// MergedEntry is one name of a merged directory. Refs[0] is the object that shows; for a directory the others are the directories
// merged with it, topmost first.
type MergedEntry struct {
	Name string
	Refs []LayerRef
}

// Rule decides what a union shows of one directory which the given layers have, topmost first. It returns the names that remain,
// sorted. The index knows no rule of its own, so that it cannot disagree with the one that mounts use.
type Rule func(dirs []LayerDir) ([]MergedEntry, error)

// MergeOptions say how trees are merged.
type MergeOptions struct {
	Rule Rule
	// Step is called once for each directory; its error ends the work. May be nil.
	Step func() error
}

// Merge writes the merged tree of layers, the topmost first, to w, a Writer of KindChain for as many layers. It holds the
// directories from the root to the current one and their pending siblings in memory, never the tree.
//
// A directory of several layers is the topmost one, as Layer and Origin say, with three exceptions: what its layer has only as an
// implicit parent takes mode, owner, modification time and attributes from the topmost layer that names it; Ino is that of the
// lowest directory, which stays the same when layers are added; and it has FlagMerged. Objects that are hard links in one layer
// stay one inode.
func Merge(w *Writer, layers []*Index, o MergeOptions) error {
	if len(layers) != w.opt.Layers || w.opt.Kind != KindChain {
		return fmt.Errorf("%w: merge %d layers into the index of a %v of %d", ErrInvalid, len(layers), w.opt.Kind, w.opt.Layers)
	}
	m := merger{w: w, layers: layers, opt: o, links: map[LayerSlot]Slot{}}
	root := pendingDir{slot: Root}
	for i, x := range layers {
		if x.Kind() != KindLayer {
			return fmt.Errorf("%w: layer %d (%s) is the index of a %v", ErrInvalid, i, x.ID(), x.Kind())
		}
		root.parts = append(root.parts, LayerSlot{i, Root})
	}
	var err error
	if root.parts, err = m.visible(root.parts); err != nil {
		return err
	}
	top, err := m.dirObject(root.parts)
	if err != nil {
		return err
	}
	if err := w.SetRoot(top); err != nil {
		return err
	}
	for stack := []pendingDir{root}; len(stack) > 0; {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if o.Step != nil {
			if err := o.Step(); err != nil {
				return err
			}
		}
		subdirs, err := m.dir(d)
		if err != nil {
			return err
		}
		slices.Reverse(subdirs) // the first one is done first
		stack = append(stack, subdirs...)
	}
	return nil
}

// LayerSlot names an object of one layer.
type LayerSlot struct {
	Layer int
	Slot  Slot
}

// pendingDir is a directory of the merged tree whose children are not written yet.
type pendingDir struct {
	slot  Slot
	parts []LayerSlot // the layers' directories it consists of, topmost first
}

type merger struct {
	w      *Writer
	layers []*Index
	opt    MergeOptions
	links  map[LayerSlot]Slot // slots of objects with several names
	buf    DirBuf
}

func (m *merger) wrap(s LayerSlot, err error) error {
	return fmt.Errorf("merge layer %d (%s): %w", s.Layer, m.layers[s.Layer].ID(), err)
}

// dir writes the children of one directory and returns those that are directories.
func (m *merger) dir(d pendingDir) ([]pendingDir, error) {
	listings := make([]LayerDir, 0, len(d.parts))
	for _, p := range d.parts {
		l, err := m.listing(p)
		if err != nil {
			return nil, m.wrap(p, err)
		}
		listings = append(listings, l)
	}
	merged, err := m.opt.Rule(listings)
	if err != nil {
		return nil, fmt.Errorf("merge directory %d: %w", d.slot, err)
	}
	var subdirs []pendingDir
	for _, e := range merged {
		parts := make([]LayerSlot, 0, len(e.Refs))
		for _, r := range e.Refs {
			if r.Dir < 0 || r.Dir >= len(listings) || r.Entry < 0 || r.Entry >= len(listings[r.Dir].Entries) ||
				listings[r.Dir].Entries[r.Entry].Slot == 0 {
				return nil, fmt.Errorf("%w: the rule refers to an object that is not there, for %q", ErrInvalid, e.Name)
			}
			parts = append(parts, LayerSlot{listings[r.Dir].Layer, listings[r.Dir].Entries[r.Entry].Slot})
		}
		if parts, err = m.visible(parts); err != nil {
			return nil, err
		}
		if len(parts) == 0 {
			return nil, fmt.Errorf("%w: the rule gives no object for %q", ErrInvalid, e.Name)
		}
		top := e.Refs[0]
		isDir := listings[top.Dir].Entries[top.Entry].Type == modeDir>>12
		slot, err := m.child(d.slot, e.Name, parts, isDir)
		if err != nil {
			return nil, err
		}
		if isDir {
			subdirs = append(subdirs, pendingDir{slot, parts})
		}
	}
	return subdirs, nil
}

// visible cuts off what lies below the first opaque directory.
func (m *merger) visible(parts []LayerSlot) ([]LayerSlot, error) {
	for i, p := range parts {
		var n Inode
		if err := m.layers[p.Layer].Inode(p.Slot, &n); err != nil {
			return nil, m.wrap(p, err)
		}
		if n.Flags&FlagOpaque != 0 {
			return parts[:i+1], nil
		}
	}
	return parts, nil
}

// listing reads one directory of one layer.
func (m *merger) listing(p LayerSlot) (LayerDir, error) {
	x := m.layers[p.Layer]
	var n Inode
	if err := x.Inode(p.Slot, &n); err != nil {
		return LayerDir{}, err
	}
	if err := x.ReadDir(p.Slot, 0, math.MaxInt, &m.buf); err != nil {
		return LayerDir{}, err
	}
	l := LayerDir{Layer: p.Layer, Opaque: n.Flags&FlagOpaque != 0, Entries: make([]LayerEntry, len(m.buf.Entries))}
	for i, e := range m.buf.Entries {
		l.Entries[i] = LayerEntry{Name: string(e.Name), Entry: e.Entry}
	}
	return l, nil
}

func (m *merger) child(dir Slot, name string, parts []LayerSlot, isDir bool) (Slot, error) {
	if isDir {
		o, err := m.dirObject(parts)
		if err != nil {
			return 0, err
		}
		return m.w.Add(dir, Child{Name: name, Object: o})
	}
	p := parts[0]
	if slot := m.links[p]; slot != 0 {
		return m.w.Add(dir, Child{Name: name, Link: slot})
	}
	o, err := m.object(p)
	if err != nil {
		return 0, err
	}
	slot, err := m.w.Add(dir, Child{Name: name, Object: o})
	if err == nil && o.Nlink > 1 {
		m.links[p] = slot
	}
	return slot, err
}

// dirObject makes the metadata of a directory out of its parts.
func (m *merger) dirObject(parts []LayerSlot) (*Object, error) {
	var top *Object
	var lowest Inode
	named := false
	for i, p := range parts {
		if err := m.layers[p.Layer].Inode(p.Slot, &lowest); err != nil {
			return nil, m.wrap(p, err)
		}
		if !lowest.IsDir() {
			return nil, fmt.Errorf("%w: the rule merges inode %d of layer %d, which is no directory", ErrInvalid, p.Slot, p.Layer)
		}
		if i > 0 && (named || lowest.Flags&FlagImplicit != 0) {
			continue
		}
		named = lowest.Flags&FlagImplicit == 0
		o, err := m.object(p)
		if err != nil {
			return nil, err
		}
		if top == nil {
			top = o
			continue
		}
		top.Mode, top.UID, top.GID, top.Mtime, top.Xattrs = o.Mode, o.UID, o.GID, o.Mtime, o.Xattrs
	}
	top.Ino, top.Flags = lowest.Ino, 0
	if len(parts) > 1 {
		top.Flags = FlagMerged
	}
	return top, nil
}

// object reads everything about an object of a layer.
func (m *merger) object(p LayerSlot) (*Object, error) {
	o, err := m.layers[p.Layer].Object(p.Slot)
	if err != nil {
		return nil, m.wrap(p, err)
	}
	o.Layer, o.Origin = uint32(p.Layer), p.Slot
	return o, nil
}

// Object returns everything about a slot, as it was given to the Writer.
func (x *Index) Object(s Slot) (*Object, error) {
	o := &Object{}
	if err := x.Inode(s, &o.Inode); err != nil {
		return nil, err
	}
	var err error
	if o.Mode&modeType == modeSymlink {
		if o.Target, err = x.Readlink(s); err != nil {
			return nil, err
		}
	}
	if o.Xattrs, err = x.Xattrs(s); err != nil {
		return nil, err
	}
	o.Path, err = x.explicitPath(s)
	return o, err
}

func (x *Index) explicitPath(s Slot) (path string, err error) {
	defer x.leave(enter(), &err)
	var n raw
	if err := x.load(s, &n); err != nil || n.path == 0 {
		return "", err
	}
	b, err := x.str(n.path)
	return string(b), err
}
