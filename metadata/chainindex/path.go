package chainindex

import (
	"fmt"
	"slices"
)

// Parent returns the directory in which an object has its first name; the root is its own parent.
func (x *Index) Parent(s Slot) (dir Slot, err error) {
	defer x.leave(enter(), &err)
	var n raw
	err = x.load(s, &n)
	return n.parent, err
}

// Path returns the path of an object's first name in this tree, "" for the root, without a leading slash.
func (x *Index) Path(s Slot) (path string, err error) {
	defer x.leave(enter(), &err)
	b, err := x.path(s)
	return string(b), err
}

// ContentPath returns where the content of an object lies in its layer, relative to the root of the layer.
func (x *Index) ContentPath(s Slot) (path string, err error) {
	path, _, err = x.Content(s)
	return path, err
}

// Content is ContentPath that also says whether that is elsewhere than where the object's first name lies in this tree.
func (x *Index) Content(s Slot) (path string, elsewhere bool, err error) {
	defer x.leave(enter(), &err)
	var n raw
	if err := x.load(s, &n); err != nil {
		return "", false, err
	}
	var b []byte
	if elsewhere = n.path != 0; elsewhere {
		b, err = x.str(n.path)
	} else {
		b, err = x.path(s)
	}
	return string(b), elsewhere, err
}

// path collects names up to the root, last first.
func (x *Index) path(s Slot) ([]byte, error) {
	var names [][]byte
	size := 0
	for depth := 0; s != Root; depth++ {
		var n raw
		if err := x.load(s, &n); err != nil {
			return nil, err
		}
		name, err := x.firstName(s, &n)
		if err != nil {
			return nil, err
		}
		if uint64(depth) >= x.h.inodes {
			return nil, fmt.Errorf("inode %d: %w: its path does not end", s, ErrCorrupt)
		}
		names = append(names, name)
		size += len(name) + 1
		s = n.parent
	}
	b := make([]byte, 0, size)
	for i, name := range slices.Backward(names) {
		b = append(b, name...)
		if i > 0 {
			b = append(b, '/')
		}
	}
	return b, nil
}

// firstName returns the name in the entry which an inode calls its first, after checking that it is an entry of this inode in the
// directory which the inode calls its parent.
func (x *Index) firstName(s Slot, n *raw) ([]byte, error) {
	d, err := x.dir(n.parent)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w: parent: %w", s, ErrCorrupt, err)
	}
	if n.entry < d.value || n.entry-d.value >= uint64(d.count) {
		return nil, fmt.Errorf("inode %d: %w: its name is not in directory %d", s, ErrCorrupt, n.parent)
	}
	b, err := x.record(n.entry)
	if err != nil {
		return nil, err
	}
	e, err := x.entry(b)
	if err != nil {
		return nil, err
	}
	if e.Slot != s {
		return nil, fmt.Errorf("inode %d: %w: its name belongs to inode %d", s, ErrCorrupt, e.Slot)
	}
	return x.appendName(nil, b)
}
