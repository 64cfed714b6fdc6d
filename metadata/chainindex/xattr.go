package chainindex

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
)

// encodeXattrs appends an attribute set to b.
func encodeXattrs(b []byte, xattrs []Xattr) ([]byte, error) {
	sorted := slices.SortedFunc(slices.Values(xattrs), func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	b = binary.LittleEndian.AppendUint32(b, uint32(len(sorted)))
	for i, x := range sorted {
		switch {
		case x.Name == "" || len(x.Name) > math.MaxUint16 || strings.IndexByte(x.Name, 0) >= 0:
			return nil, fmt.Errorf("%w: name %q of an attribute", ErrInvalid, x.Name)
		case i > 0 && x.Name == sorted[i-1].Name:
			return nil, fmt.Errorf("%w: attribute %q twice", ErrInvalid, x.Name)
		case len(x.Value) > math.MaxUint32:
			return nil, fmt.Errorf("%w: attribute %q is too large", ErrInvalid, x.Name)
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x.Name)))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(x.Value)))
		b = append(b, x.Name...)
		b = append(b, x.Value...)
	}
	if len(b) > refMaxLen {
		return nil, fmt.Errorf("%w: the attributes have %d bytes together, at most %d", ErrInvalid, len(b), refMaxLen)
	}
	return b, nil
}

// xattrSet walks an encoded attribute set.
type xattrSet struct {
	left uint32
	b    []byte
	last []byte
}

func newXattrSet(b []byte) (xattrSet, error) {
	if len(b) < 4 {
		return xattrSet{}, fmt.Errorf("%w: attribute set of %d bytes", ErrCorrupt, len(b))
	}
	s := xattrSet{left: binary.LittleEndian.Uint32(b), b: b[4:]}
	if s.left == 0 {
		return xattrSet{}, fmt.Errorf("%w: empty attribute set", ErrCorrupt)
	}
	return s, nil
}

// next returns the next attribute; ok is false at the end. Both slices lie in the mapping.
func (s *xattrSet) next() (name, value []byte, ok bool, err error) {
	if s.left == 0 {
		if len(s.b) != 0 {
			return nil, nil, false, fmt.Errorf("%w: bytes after an attribute set", ErrCorrupt)
		}
		return nil, nil, false, nil
	}
	if len(s.b) < 6 {
		return nil, nil, false, fmt.Errorf("%w: attribute set is cut off", ErrCorrupt)
	}
	nameLen := int64(binary.LittleEndian.Uint16(s.b))
	valueLen := int64(binary.LittleEndian.Uint32(s.b[2:]))
	s.b = s.b[6:]
	if nameLen == 0 || nameLen+valueLen > int64(len(s.b)) {
		return nil, nil, false, fmt.Errorf("%w: attribute set is cut off", ErrCorrupt)
	}
	name, value = s.b[:nameLen:nameLen], s.b[nameLen:nameLen+valueLen]
	if s.last != nil && string(name) <= string(s.last) {
		return nil, nil, false, fmt.Errorf("%w: attributes are not sorted", ErrCorrupt)
	}
	s.last, s.b = name, s.b[nameLen+valueLen:]
	s.left--
	return name, value, true, nil
}

// xattrs returns the attribute set of an inode and whether it has one.
func (x *Index) xattrs(s Slot) (set xattrSet, ok bool, err error) {
	var n raw
	if err := x.load(s, &n); err != nil || n.xattrs == 0 {
		return set, false, err
	}
	b, err := x.bytes(x.h.attrsAt(), x.h.attrs, n.xattrs)
	if err != nil {
		return set, false, err
	}
	set, err = newXattrSet(b)
	return set, err == nil, err
}

// Xattr returns a copy of one extended attribute; ok is false if the object does not have it.
func (x *Index) Xattr(s Slot, name string) (value []byte, ok bool, err error) {
	defer x.leave(enter(), &err)
	set, ok, err := x.xattrs(s)
	for ok && err == nil {
		var n, v []byte
		if n, v, ok, err = set.next(); ok && string(n) == name {
			return append([]byte{}, v...), true, nil
		}
	}
	return nil, false, err
}

// Xattrs returns copies of all extended attributes of an object, sorted by name.
func (x *Index) Xattrs(s Slot) (all []Xattr, err error) {
	defer x.leave(enter(), &err)
	set, ok, err := x.xattrs(s)
	for ok && err == nil {
		var n, v []byte
		if n, v, ok, err = set.next(); ok {
			all = append(all, Xattr{Name: string(n), Value: append([]byte{}, v...)})
		}
	}
	if err != nil {
		return nil, err
	}
	return all, nil
}

// HasXattrs reports whether an object has extended attributes, without touching them.
func (x *Index) HasXattrs(s Slot) (has bool, err error) {
	defer x.leave(enter(), &err)
	var n raw
	err = x.load(s, &n)
	return err == nil && n.xattrs != 0, err
}
