package chainindex

import (
	"encoding/binary"
	"fmt"
)

// Slot names an inode of an index. Slots begin at 1 and are dense, so that a mount can use them as node ids.
type Slot uint32

// Root is the slot of the root directory.
const Root Slot = 1

// Bits of st_mode, as everywhere on Linux.
const (
	modeType    = 0o170000
	modeSocket  = 0o140000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFIFO    = 0o010000
)

// TypeWhiteout is the Type of an entry that is only a whiteout (DT_WHT). All other types are DT_*, that is mode >> 12.
const TypeWhiteout uint8 = 14

// Flags of an inode.
type Flags uint32

const (
	// FlagOpaque marks a directory of a layer that hides everything below it.
	FlagOpaque Flags = 1 << iota
	// FlagImplicit marks a directory that the layer's archive did not name: it exists because something lies in it, and owner,
	// mode and times are those of the directory below it, if there is one.
	FlagImplicit
	// FlagMerged marks a directory of a chain that more than one layer has.
	FlagMerged

	flagsKnown = FlagOpaque | FlagImplicit | FlagMerged
)

// Time is a moment as stat reports it.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Inode is the metadata of one object. It holds no pointers, so filling one allocates nothing.
type Inode struct {
	Mode  uint32 // type and permissions, as st_mode
	Flags Flags
	UID   uint32
	GID   uint32
	// Nlink is st_nlink. The writer counts the names when it is 0.
	Nlink uint32
	// Layer is the number of the layer that holds the content, 0 the topmost.
	Layer uint32
	// Origin is the slot of the object in the index of its layer. Two names with the same Layer and Origin are hard links.
	// 0 stands for the slot itself.
	Origin Slot
	Size   uint64
	Rdev   uint64 // character and block devices only
	// Ino is the inode number of the content in its layer directory, 0 if not known. Of a merged directory it is that of the
	// lowest directory.
	Ino uint64
	// Blocks is st_blocks of the content in its layer directory.
	Blocks uint64
	Mtime  Time
	Ctime  Time
	Atime  Time
}

// IsDir reports whether the object is a directory.
func (n *Inode) IsDir() bool { return n.Mode&modeType == modeDir }

// Type returns the DT_* type of the object.
func (n *Inode) Type() uint8 { return uint8(n.Mode & modeType >> 12) }

// Xattr is one extended attribute.
type Xattr struct {
	Name  string
	Value []byte
}

// Object is everything an index keeps about one object.
type Object struct {
	Inode
	Target string  // symbolic links only
	Xattrs []Xattr // in any order, names unique
	// Path is where the content lies in its layer, relative to the layer's root. Leave it empty if that is the path which the
	// object's first name has in this tree.
	Path string
}

// raw is an inode record in memory.
type raw struct {
	Inode
	parent Slot
	entry  uint64
	value  uint64
	count  uint32
	xattrs ref
	path   ref
}

// ref is a range of the strings or of the attributes.
type ref uint64

const (
	refOffsetBits = 40
	refMaxOffset  = 1<<refOffsetBits - 1
	refMaxLen     = 1<<(64-refOffsetBits) - 1
)

func (r ref) offset() uint64 { return uint64(r) & refMaxOffset }
func (r ref) len() uint64    { return uint64(r) >> refOffsetBits }

func (n *raw) encode(b *[inodeSize]byte) {
	le := binary.LittleEndian
	*b = [inodeSize]byte{}
	le.PutUint32(b[0:], n.Mode)
	le.PutUint32(b[4:], uint32(n.Flags))
	le.PutUint32(b[8:], n.UID)
	le.PutUint32(b[12:], n.GID)
	le.PutUint32(b[16:], n.Nlink)
	le.PutUint32(b[20:], n.Layer)
	le.PutUint64(b[24:], n.Size)
	le.PutUint64(b[32:], uint64(n.Mtime.Sec))
	le.PutUint64(b[40:], uint64(n.Ctime.Sec))
	le.PutUint64(b[48:], uint64(n.Atime.Sec))
	le.PutUint32(b[56:], n.Mtime.Nsec)
	le.PutUint32(b[60:], n.Ctime.Nsec)
	le.PutUint32(b[64:], n.Atime.Nsec)
	le.PutUint32(b[68:], uint32(n.parent))
	le.PutUint64(b[72:], n.entry)
	le.PutUint64(b[80:], n.value)
	le.PutUint32(b[88:], n.count)
	le.PutUint32(b[92:], uint32(n.Origin))
	le.PutUint64(b[96:], uint64(n.xattrs))
	le.PutUint64(b[104:], n.Ino)
	le.PutUint64(b[112:], uint64(n.path))
	le.PutUint64(b[120:], n.Blocks)
}

// decode fills n from a record of inodeSize bytes and rejects what no writer of this version writes.
func (n *raw) decode(b []byte) error {
	le := binary.LittleEndian
	_ = b[inodeSize-1]
	n.Mode = le.Uint32(b[0:])
	n.Flags = Flags(le.Uint32(b[4:]))
	n.UID = le.Uint32(b[8:])
	n.GID = le.Uint32(b[12:])
	n.Nlink = le.Uint32(b[16:])
	n.Layer = le.Uint32(b[20:])
	n.Size = le.Uint64(b[24:])
	n.Mtime = Time{int64(le.Uint64(b[32:])), le.Uint32(b[56:])}
	n.Ctime = Time{int64(le.Uint64(b[40:])), le.Uint32(b[60:])}
	n.Atime = Time{int64(le.Uint64(b[48:])), le.Uint32(b[64:])}
	n.parent = Slot(le.Uint32(b[68:]))
	n.entry = le.Uint64(b[72:])
	n.value = le.Uint64(b[80:])
	n.count = le.Uint32(b[88:])
	n.Origin = Slot(le.Uint32(b[92:]))
	n.xattrs = ref(le.Uint64(b[96:]))
	n.Ino = le.Uint64(b[104:])
	n.path = ref(le.Uint64(b[112:]))
	n.Blocks = le.Uint64(b[120:])
	n.Rdev = 0
	if n.Mode&modeType == modeChar || n.Mode&modeType == modeBlock {
		n.Rdev = n.value
	}
	return n.check(ErrCorrupt)
}

// check holds the rules for a single inode, for the writer (class ErrInvalid) and the reader (class ErrCorrupt).
func (n *raw) check(class error) error {
	const second = 1_000_000_000
	switch n.Mode & modeType {
	case modeSocket, modeSymlink, modeRegular, modeBlock, modeDir, modeChar, modeFIFO:
	default:
		return fmt.Errorf("%w: mode %#o has no file type", class, n.Mode)
	}
	switch {
	case n.Mode&^(modeType|0o7777) != 0:
		return fmt.Errorf("%w: mode %#o has unknown bits", class, n.Mode)
	case n.Flags&^flagsKnown != 0:
		return fmt.Errorf("%w: unknown flags %#x", class, n.Flags)
	case n.Flags != 0 && !n.IsDir():
		return fmt.Errorf("%w: flags %#x on an object that is no directory", class, n.Flags)
	case n.Mtime.Nsec >= second || n.Ctime.Nsec >= second || n.Atime.Nsec >= second:
		return fmt.Errorf("%w: a time has more than 999999999 nanoseconds", class)
	case n.count != 0 && !n.IsDir():
		return fmt.Errorf("%w: entries in an object that is no directory", class)
	}
	return nil
}
