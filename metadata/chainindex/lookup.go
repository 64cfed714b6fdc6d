package chainindex

import (
	"encoding/binary"
	"fmt"
)

// Entry is what a name stands for.
type Entry struct {
	Slot Slot  // 0: no object, only a whiteout
	Type uint8 // DT_*; TypeWhiteout without an object
	// Whiteout says that the name hides what lies below the layer. Never set in a chain.
	Whiteout bool
}

// key is the fixed part of a name as entries store it, in two numbers that compare like the bytes.
type key struct{ hi, lo uint64 }

func keyOf(name string) (k key) {
	if len(name) >= prefixSize {
		return key{be64(name), be64(name[8:])}
	}
	var b [prefixSize]byte
	copy(b[:], name)
	return key{binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])}
}

func be64(s string) uint64 {
	_ = s[7]
	return uint64(s[0])<<56 | uint64(s[1])<<48 | uint64(s[2])<<40 | uint64(s[3])<<32 |
		uint64(s[4])<<24 | uint64(s[5])<<16 | uint64(s[6])<<8 | uint64(s[7])
}

// Lookup finds a name in a directory. ok is false if the directory does not have it. It allocates nothing.
func (x *Index) Lookup(dir Slot, name string) (e Entry, ok bool, err error) {
	defer x.leave(enter(), &err)
	d, err := x.dir(dir)
	if err != nil || name == "" || len(name) > maxName {
		return Entry{}, false, err
	}
	k := keyOf(name)
	for lo, hi := d.value, d.value+uint64(d.count); lo < hi; {
		mid := lo + (hi-lo)/2
		b, err := x.record(mid)
		if err != nil {
			return Entry{}, false, err
		}
		c, err := x.compare(b, k, name)
		switch {
		case err != nil:
			return Entry{}, false, err
		case c < 0:
			hi = mid
		case c > 0:
			lo = mid + 1
		default:
			e, err := x.entry(b)
			return e, err == nil, err
		}
	}
	return Entry{}, false, nil
}

// record returns the bytes of an entry. Preconditions: i is less than the number of entries.
func (x *Index) record(i uint64) ([]byte, error) {
	return x.block(x.h.entriesAt()+i*entrySize, entrySize)
}

// compare orders name (whose key is k) against the name of an entry.
func (x *Index) compare(b []byte, k key, name string) (int, error) {
	hi, lo := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	switch {
	case k.hi < hi || k.hi == hi && k.lo < lo:
		return -1, nil
	case k.hi != hi || k.lo != lo:
		return 1, nil
	}
	// The same first 16 bytes: the rests decide. A NUL cannot be in a name, so a padded prefix equals only itself.
	tail, err := x.tail(b)
	if err != nil {
		return 0, err
	}
	rest := name[min(len(name), prefixSize):]
	switch {
	case rest < string(tail):
		return -1, nil
	case rest > string(tail):
		return 1, nil
	}
	return 0, nil
}

// tail returns the bytes of a name beyond the prefix.
func (x *Index) tail(b []byte) ([]byte, error) {
	n := uint64(b[20])
	if n <= prefixSize {
		return nil, nil
	}
	off := binary.LittleEndian.Uint64(b[24:])
	if off > refMaxOffset {
		return nil, fmt.Errorf("%w: name at %d", ErrCorrupt, off)
	}
	return x.str(ref(off | (n-prefixSize)<<refOffsetBits))
}

// entry decodes what an entry record stands for.
func (x *Index) entry(b []byte) (Entry, error) {
	e := Entry{Slot: Slot(binary.LittleEndian.Uint32(b[16:])), Type: b[21], Whiteout: b[22] == entryWhiteout}
	switch {
	case b[20] == 0 || b[22]&^entryWhiteout != 0 || b[23] != 0:
		return Entry{}, fmt.Errorf("%w: directory entry", ErrCorrupt)
	case (e.Slot == 0) != (e.Type == TypeWhiteout) || e.Slot == 0 && !e.Whiteout:
		return Entry{}, fmt.Errorf("%w: directory entry of type %d with inode %d", ErrCorrupt, e.Type, e.Slot)
	case e.Slot == Root || uint64(e.Slot) > x.h.inodes:
		return Entry{}, fmt.Errorf("%w: directory entry names inode %d of %d", ErrCorrupt, e.Slot, x.h.inodes)
	case e.Whiteout && x.h.kind != KindLayer:
		return Entry{}, fmt.Errorf("%w: whiteout in a %v", ErrCorrupt, x.h.kind)
	}
	return e, nil
}

// appendName appends the name of an entry record.
func (x *Index) appendName(dst, b []byte) ([]byte, error) {
	n := int(b[20])
	dst = append(dst, b[:min(n, prefixSize)]...)
	tail, err := x.tail(b)
	return append(dst, tail...), err
}

// DirEntry is one name of a directory.
type DirEntry struct {
	Entry
	// Name is valid until the next ReadDir with the same DirBuf.
	Name []byte
	// Next is the cookie at which reading goes on after this entry.
	Next uint64
}

// DirBuf receives directory entries. Reused, it makes reading a directory free of allocations.
type DirBuf struct {
	Entries []DirEntry
	names   []byte
}

// ReadDir replaces the content of buf by at most limit entries of a directory, in the order of their names, from the given cookie
// on. Cookie 0 is the beginning; the others are found in DirEntry.Next, and stay right for as long as the index file exists. No
// entries: the end.
func (x *Index) ReadDir(dir Slot, cookie uint64, limit int, buf *DirBuf) (err error) {
	defer x.leave(enter(), &err)
	buf.Entries, buf.names = buf.Entries[:0], buf.names[:0]
	d, err := x.dir(dir)
	if err != nil {
		return err
	}
	for i := cookie; i < uint64(d.count) && len(buf.Entries) < limit; i++ {
		b, err := x.record(d.value + i)
		if err != nil {
			return err
		}
		e, err := x.entry(b)
		if err != nil {
			return err
		}
		start := len(buf.names)
		if buf.names, err = x.appendName(buf.names, b); err != nil {
			return err
		}
		// Growing names moves them, but what older entries point to stays as it is.
		buf.Entries = append(buf.Entries, DirEntry{Entry: e, Name: buf.names[start:len(buf.names):len(buf.names)], Next: i + 1})
	}
	return nil
}

// Len returns the number of entries of a directory, whiteouts included.
func (x *Index) Len(dir Slot) (n int, err error) {
	defer x.leave(enter(), &err)
	d, err := x.dir(dir)
	return int(d.count), err
}
