package chainindex

import (
	"fmt"
)

// VerifySums reads the whole index and checks every checksum. It costs one sequential pass, after which no block can turn out to
// be damaged in the middle of something.
func (x *Index) VerifySums() (err error) {
	defer x.leave(enter(), &err)
	if x.closed.Load() {
		return ErrClosed
	}
	for b := range x.h.blocks() {
		if err := x.verify(b); err != nil {
			return err
		}
	}
	return nil
}

// Verify reads the whole index and checks every checksum and every invariant. It is for `check`, not for mounts.
func (x *Index) Verify() (err error) {
	defer x.leave(enter(), &err)
	if x.closed.Load() {
		return ErrClosed
	}
	if err := x.VerifySums(); err != nil {
		return err
	}
	v := verifier{x: x, names: make([]uint32, x.h.inodes+1)}
	// Each directory but the root has one name and each entry belongs to one directory; walking from the root, every inode and
	// every entry must be met.
	stack := []Slot{Root}
	seen := uint64(1)
	for len(stack) > 0 {
		s := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		dirs, fresh, err := v.dir(s)
		if err != nil {
			return fmt.Errorf("directory %d: %w", s, err)
		}
		stack = append(stack, dirs...)
		seen += fresh
	}
	if seen != x.h.inodes || v.entries != x.h.entries {
		return fmt.Errorf("%w: %d of %d inodes and %d of %d entries can be reached",
			ErrCorrupt, seen, x.h.inodes, v.entries, x.h.entries)
	}
	return nil
}

type verifier struct {
	x       *Index
	names   []uint32 // names met so far, by slot
	entries uint64
}

// dir checks one directory and returns its subdirectories and the number of inodes that were met for the first time.
func (v *verifier) dir(s Slot) (dirs []Slot, fresh uint64, err error) {
	d, err := v.x.dir(s)
	if err != nil {
		return nil, 0, err
	}
	if d.count == 0 && d.value != 0 {
		return nil, 0, fmt.Errorf("%w: empty, but it has a first entry", ErrCorrupt)
	}
	if err := v.object(s, &d); err != nil {
		return nil, 0, err
	}
	var last, name []byte
	for i := range uint64(d.count) {
		b, err := v.x.record(d.value + i)
		if err != nil {
			return nil, 0, err
		}
		e, err := v.x.entry(b)
		if err != nil {
			return nil, 0, err
		}
		if name, err = v.x.appendName(name[:0], b); err != nil {
			return nil, 0, err
		}
		switch {
		case checkName(string(name)) != "":
			return nil, 0, fmt.Errorf("%w: %q: %s", ErrCorrupt, name, checkName(string(name)))
		case i > 0 && string(name) <= string(last):
			return nil, 0, fmt.Errorf("%w: %q comes after %q", ErrCorrupt, name, last)
		case len(name) <= prefixSize && !paddedWithZeros(b, len(name)):
			return nil, 0, fmt.Errorf("%w: %q is not padded with zeros", ErrCorrupt, name)
		}
		last = append(last[:0], name...)
		if v.entries++; v.entries > v.x.h.entries {
			return nil, 0, fmt.Errorf("%w: directories share entries", ErrCorrupt)
		}
		if e.Slot == 0 {
			continue
		}
		first, err := v.child(s, d.value+i, e)
		if err != nil {
			return nil, 0, fmt.Errorf("entry %q: %w", name, err)
		}
		if first {
			fresh++
			if e.Type == modeDir>>12 {
				dirs = append(dirs, e.Slot)
			}
		}
	}
	return dirs, fresh, nil
}

func paddedWithZeros(b []byte, n int) bool {
	for _, c := range b[n:prefixSize] {
		if c != 0 {
			return false
		}
	}
	for _, c := range b[24:entrySize] {
		if c != 0 {
			return false
		}
	}
	return true
}

// child checks the inode behind an entry and reports whether it was met for the first time.
func (v *verifier) child(dir Slot, entryNo uint64, e Entry) (first bool, err error) {
	var n raw
	if err := v.x.load(e.Slot, &n); err != nil {
		return false, err
	}
	if n.Type() != e.Type {
		return false, fmt.Errorf("%w: type %d, its inode %d has %d", ErrCorrupt, e.Type, e.Slot, n.Type())
	}
	first = v.names[e.Slot] == 0
	v.names[e.Slot]++
	if !first && n.IsDir() {
		return false, fmt.Errorf("%w: second name of directory %d", ErrCorrupt, e.Slot)
	}
	if n.entry == entryNo && n.parent != dir {
		return false, fmt.Errorf("%w: inode %d says that this entry is in directory %d", ErrCorrupt, e.Slot, n.parent)
	}
	if !first {
		return false, nil
	}
	if _, err := v.x.firstName(e.Slot, &n); err != nil {
		return false, err
	}
	if n.IsDir() {
		return true, nil // when its turn comes
	}
	return true, v.object(e.Slot, &n)
}

// object checks what an inode refers to.
func (v *verifier) object(s Slot, n *raw) error {
	switch n.Mode & modeType {
	case modeSymlink:
		if b, err := v.x.str(ref(n.value)); err != nil {
			return err
		} else if len(b) == 0 || len(b) > maxTarget {
			return fmt.Errorf("inode %d: %w: link target of %d bytes", s, ErrCorrupt, len(b))
		}
	case modeRegular, modeFIFO, modeSocket:
		if n.value != 0 {
			return fmt.Errorf("inode %d: %w: value in a %#o", s, ErrCorrupt, n.Mode)
		}
	}
	if n.path != 0 {
		if _, err := v.x.str(n.path); err != nil {
			return err
		}
	}
	set, ok, err := v.x.xattrs(s)
	for ok && err == nil {
		_, _, ok, err = set.next()
	}
	return err
}
