package chainindex

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"
)

// WriterOptions describes the index to write.
type WriterOptions struct {
	Kind Kind
	// ID names what is described: the chainID, or the diffID or cacheID of a layer. At most 256 bytes.
	ID string
	// Layers is the number of layers (1 for KindLayer).
	Layers int
	// TempDir takes what does not fit into memory. Empty: os.TempDir.
	TempDir string
	// MemoryLimit bounds each of the four sections in memory, in bytes. 0 stands for 32 MiB.
	MemoryLimit int
}

// Child is one name to add to a directory. At least one of Object, Link and Whiteout is given, not both of the first two.
type Child struct {
	Name string
	// Object is a new object.
	Object *Object
	// Link is an object that was added before: another name of it.
	Link Slot
	// Whiteout says that the name hides whatever the layers below have under it. Together with an object it matters only if
	// that is a directory.
	Whiteout bool
}

// Writer builds an index. Call SetRoot, then Add for all children of one directory in the order of their names, then for all
// children of another directory, and so on; parents before children, otherwise in any order. Then Commit or WriteTo.
//
// The order decides the slots, so walk in an order that is a function of the tree: the children of a directory, then each of its
// subdirectories in turn.
type Writer struct {
	opt     WriterOptions
	inodes  spool
	entries spool
	strings spool
	attrs   spool
	count   uint64 // inodes
	err     error  // the first error; everything after it fails with it
	// Two bits per inode: is it a directory whose children may still be given, and does the writer count its names.
	unopened, counted bitset
	// The directory being filled.
	dir      Slot
	dirFirst uint64
	dirCount uint32
	dirDirs  uint32
	lastName string
	internS  interner
	internA  interner
	scratch  []byte
}

// NewWriter returns an empty Writer. Release it with Commit, WriteTo or Discard.
func NewWriter(o WriterOptions) (*Writer, error) {
	if o.MemoryLimit == 0 {
		o.MemoryLimit = 32 << 20
	}
	switch {
	case o.Kind != KindLayer && o.Kind != KindChain:
		return nil, fmt.Errorf("%w: unknown %v", ErrInvalid, o.Kind)
	case len(o.ID) > maxID:
		return nil, fmt.Errorf("%w: id of %d bytes, at most %d", ErrInvalid, len(o.ID), maxID)
	case o.Layers < 1 || o.Layers > maxLayers || o.Kind == KindLayer && o.Layers != 1:
		return nil, fmt.Errorf("%w: %d layers in the index of a %v", ErrInvalid, o.Layers, o.Kind)
	case o.MemoryLimit < 1<<12:
		return nil, fmt.Errorf("%w: memory limit of %d bytes is too small", ErrInvalid, o.MemoryLimit)
	}
	s := spool{dir: o.TempDir, limit: o.MemoryLimit}
	return &Writer{opt: o, inodes: s, entries: s, strings: s, attrs: s}, nil
}

// Discard releases what the Writer holds. It may be called at any time, also after Commit.
func (w *Writer) Discard() {
	for _, s := range []*spool{&w.inodes, &w.entries, &w.strings, &w.attrs} {
		s.close()
	}
	if w.err == nil {
		w.err = ErrClosed
	}
}

// SetRoot gives the root directory. It comes first, once.
func (w *Writer) SetRoot(o *Object) error {
	if w.err != nil {
		return w.err
	}
	if w.count != 0 {
		return w.fail(fmt.Errorf("%w: the root was given twice", ErrInvalid))
	}
	if !o.IsDir() {
		return w.fail(fmt.Errorf("%w: the root is no directory (mode %#o)", ErrInvalid, o.Mode))
	}
	_, err := w.object(o, Root, 0)
	return err
}

// Add adds a name to a directory and returns the slot of its object, 0 for a whiteout alone.
func (w *Writer) Add(dir Slot, c Child) (Slot, error) {
	if w.err != nil {
		return 0, w.err
	}
	slot, err := w.add(dir, c)
	if err != nil {
		return 0, w.fail(fmt.Errorf("add %q to inode %d: %w", c.Name, dir, err))
	}
	return slot, nil
}

func (w *Writer) add(dir Slot, c Child) (Slot, error) {
	if dir != w.dir {
		if err := w.open(dir); err != nil {
			return 0, err
		}
	}
	switch {
	case checkName(c.Name) != "":
		return 0, fmt.Errorf("%w: %s", ErrInvalid, checkName(c.Name))
	case w.dirCount > 0 && c.Name <= w.lastName:
		return 0, fmt.Errorf("%w: it comes after %q, names must ascend", ErrInvalid, w.lastName)
	case c.Whiteout && w.opt.Kind != KindLayer:
		return 0, fmt.Errorf("%w: a whiteout in the index of a %v", ErrInvalid, w.opt.Kind)
	case c.Object != nil && c.Link != 0:
		return 0, fmt.Errorf("%w: both a new object and a link", ErrInvalid)
	case w.dirCount == math.MaxUint32:
		return 0, fmt.Errorf("%w: too many entries in one directory", ErrInvalid)
	}
	e := entry{Entry: Entry{Type: TypeWhiteout, Whiteout: c.Whiteout}}
	switch {
	case c.Object != nil:
		slot, err := w.object(c.Object, dir, w.entryCount())
		if err != nil {
			return 0, err
		}
		e.Slot, e.Type = slot, c.Object.Type()
		if c.Object.IsDir() {
			w.dirDirs++
		}
	case c.Link != 0:
		typ, err := w.link(c.Link)
		if err != nil {
			return 0, err
		}
		e.Slot, e.Type = c.Link, typ
	case !c.Whiteout:
		return 0, fmt.Errorf("%w: neither an object nor a whiteout", ErrInvalid)
	}
	e.nameLen = uint8(len(c.Name))
	n := copy(e.prefix[:], c.Name)
	if tail := c.Name[n:]; tail != "" {
		r, err := w.internS.put(&w.strings, []byte(tail))
		if err != nil {
			return 0, err
		}
		e.tail = r.offset()
	}
	var b [entrySize]byte
	e.encode(&b)
	if err := w.entries.append(b[:]); err != nil {
		return 0, err
	}
	w.dirCount++
	w.lastName = c.Name
	return e.Slot, nil
}

// checkName returns what is wrong with a name, "" if nothing.
func checkName(name string) string {
	switch {
	case name == "" || name == "." || name == "..":
		return "it is no name"
	case len(name) > maxName:
		return fmt.Sprintf("the name has %d bytes, at most %d", len(name), maxName)
	case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
		return "the name contains '/' or NUL"
	}
	return ""
}

func (w *Writer) entryCount() uint64 { return uint64(w.entries.size()) / entrySize }

// open ends the directory being filled and begins another.
func (w *Writer) open(dir Slot) error {
	if err := w.endDir(); err != nil {
		return err
	}
	if dir == 0 || uint64(dir) > w.count || !w.unopened.get(dir) {
		return fmt.Errorf("%w: inode %d is no directory, or its children were given before", ErrInvalid, dir)
	}
	w.unopened.clear(dir)
	w.dir, w.dirFirst, w.dirCount, w.dirDirs, w.lastName = dir, w.entryCount(), 0, 0, ""
	return nil
}

func (w *Writer) endDir() error {
	if w.dir == 0 || w.dirCount == 0 {
		return nil
	}
	return w.patch(w.dir, func(n *raw) {
		n.value, n.count = w.dirFirst, w.dirCount
		if w.counted.get(w.dir) {
			n.Nlink += w.dirDirs
		}
	})
}

// link counts another name of an object and returns its type.
func (w *Writer) link(s Slot) (uint8, error) {
	if uint64(s) > w.count {
		return 0, fmt.Errorf("%w: link to inode %d, which was not added", ErrInvalid, s)
	}
	var n raw
	if err := w.load(s, &n); err != nil {
		return 0, err
	}
	if n.IsDir() {
		return 0, fmt.Errorf("%w: link to directory %d", ErrInvalid, s)
	}
	if !w.counted.get(s) {
		return n.Type(), nil
	}
	return n.Type(), w.patch(s, func(n *raw) { n.Nlink++ })
}

// object appends an inode record.
func (w *Writer) object(o *Object, parent Slot, entryNo uint64) (Slot, error) {
	n := raw{Inode: o.Inode, parent: parent, entry: entryNo}
	if w.count == math.MaxUint32 {
		return 0, fmt.Errorf("%w: too many inodes", ErrInvalid)
	}
	if err := n.check(ErrInvalid); err != nil {
		return 0, err
	}
	isLink := n.Mode&modeType == modeSymlink
	isDevice := n.Mode&modeType == modeChar || n.Mode&modeType == modeBlock
	switch {
	case isLink != (o.Target != "") || len(o.Target) > maxTarget || strings.IndexByte(o.Target, 0) >= 0:
		return 0, fmt.Errorf("%w: link target of %d bytes for mode %#o", ErrInvalid, len(o.Target), n.Mode)
	case n.Rdev != 0 && !isDevice:
		return 0, fmt.Errorf("%w: device number for mode %#o", ErrInvalid, n.Mode)
	case int64(n.Layer) >= int64(w.opt.Layers):
		return 0, fmt.Errorf("%w: layer %d of %d", ErrInvalid, n.Layer, w.opt.Layers)
	case n.Flags&(FlagOpaque|FlagImplicit) != 0 && w.opt.Kind != KindLayer, n.Flags&FlagMerged != 0 && w.opt.Kind != KindChain:
		return 0, fmt.Errorf("%w: flags %#x in the index of a %v", ErrInvalid, n.Flags, w.opt.Kind)
	}
	if isDevice {
		n.value = n.Rdev
	}
	if err := w.refs(&n, o); err != nil {
		return 0, err
	}
	w.count++
	slot := Slot(w.count)
	if n.Nlink == 0 {
		n.Nlink = 1
		if n.IsDir() {
			n.Nlink = 2
		}
		w.counted.set(slot)
	}
	if n.IsDir() {
		w.unopened.set(slot)
	}
	var b [inodeSize]byte
	n.encode(&b)
	return slot, w.inodes.append(b[:])
}

// refs writes what an object keeps outside its record.
func (w *Writer) refs(n *raw, o *Object) (err error) {
	if o.Target != "" {
		r, err := w.internS.put(&w.strings, []byte(o.Target))
		if err != nil {
			return err
		}
		n.value = uint64(r)
	}
	if o.Path != "" {
		if n.path, err = w.internS.put(&w.strings, []byte(o.Path)); err != nil {
			return err
		}
	}
	if len(o.Xattrs) == 0 {
		return nil
	}
	if w.scratch, err = encodeXattrs(w.scratch[:0], o.Xattrs); err != nil {
		return err
	}
	n.xattrs, err = w.internA.put(&w.attrs, w.scratch)
	return err
}

func (w *Writer) load(s Slot, n *raw) error {
	var b [inodeSize]byte
	if err := w.inodes.readAt(b[:], int64(s-1)*inodeSize); err != nil {
		return err
	}
	return n.decode(b[:])
}

func (w *Writer) patch(s Slot, change func(*raw)) error {
	var n raw
	if err := w.load(s, &n); err != nil {
		return err
	}
	change(&n)
	var b [inodeSize]byte
	n.encode(&b)
	return w.inodes.writeAt(b[:], int64(s-1)*inodeSize)
}

func (w *Writer) fail(err error) error {
	w.err = err
	return err
}

// bitset is a set of slots.
type bitset []uint64

func (b bitset) get(s Slot) bool { return int(s/64) < len(b) && b[s/64]&(1<<(s%64)) != 0 }

func (b *bitset) set(s Slot) {
	for int(s/64) >= len(*b) {
		*b = append(*b, 0)
	}
	(*b)[s/64] |= 1 << (s % 64)
}

func (b bitset) clear(s Slot) { b[s/64] &^= 1 << (s % 64) }

// interner stores equal byte strings once. It remembers a bounded number of short ones, which is where the repetition is (file
// names, targets of alternatives, the one attribute of many files); what it forgets is stored again.
type interner struct {
	seen  map[string]ref
	bytes int
}

const internMaxBytes, internMaxLen = 8 << 20, 512

func (in *interner) put(s *spool, p []byte) (ref, error) {
	if r, ok := in.seen[string(p)]; ok {
		return r, nil
	}
	off := s.size()
	if off > refMaxOffset-int64(len(p)) || len(p) > refMaxLen {
		return 0, fmt.Errorf("%w: too many strings or attributes", ErrInvalid)
	}
	if err := s.append(p); err != nil {
		return 0, err
	}
	r := ref(uint64(off) | uint64(len(p))<<refOffsetBits)
	if len(p) <= internMaxLen && in.bytes < internMaxBytes {
		if in.seen == nil {
			in.seen = map[string]ref{}
		}
		in.seen[string(p)] = r
		in.bytes += len(p) + 64
	}
	return r, nil
}

// entry is a directory entry record in memory.
type entry struct {
	Entry
	prefix  [prefixSize]byte
	nameLen uint8
	tail    uint64
}

func (e *entry) encode(b *[entrySize]byte) {
	*b = [entrySize]byte{}
	copy(b[:], e.prefix[:])
	binary.LittleEndian.PutUint32(b[16:], uint32(e.Slot))
	b[20], b[21] = e.nameLen, e.Type
	if e.Whiteout {
		b[22] = entryWhiteout
	}
	binary.LittleEndian.PutUint64(b[24:], e.tail)
}
