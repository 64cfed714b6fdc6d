package chainindex

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Index is an open index file. It is safe for concurrent use.
type Index struct {
	h       header // immutable
	data    []byte // immutable: the whole file
	table   []byte // immutable: the checksum table within data
	payload []byte // immutable: the payload within data
	mapped  bool   // immutable: data is a mapping
	// verified has one bit per payload block whose checksum was right.
	verified []atomic.Uint32
	closed   atomic.Bool
}

// Open maps the index at path and checks its header and checksum table.
func Open(path string) (*Index, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	x, err := OpenFile(f)
	return x, errors.Join(err, f.Close())
}

// OpenFile is Open for an open file. The index does not need the file afterwards.
func OpenFile(f *os.File) (*Index, error) {
	fail := func(err error) (*Index, error) { return nil, fmt.Errorf("open index %q: %w", f.Name(), err) }
	st, err := f.Stat()
	switch {
	case err != nil:
		return fail(err)
	case !st.Mode().IsRegular():
		return fail(fmt.Errorf("%w: it is no regular file", ErrCorrupt))
	case st.Size() < headerSize:
		return fail(fmt.Errorf("%w: %d bytes are too few for a header", ErrCorrupt, st.Size()))
	case int64(int(st.Size())) != st.Size():
		return fail(fmt.Errorf("%w: too large to map here", ErrFault))
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fail(fmt.Errorf("map: %w", err))
	}
	x, err := newIndex(data)
	if err != nil {
		return fail(errors.Join(err, unix.Munmap(data)))
	}
	x.mapped = true
	return x, nil
}

// New reads an index from memory. The bytes must not change while it is in use.
func New(data []byte) (*Index, error) {
	x, err := newIndex(data)
	if err != nil {
		return nil, fmt.Errorf("open index: %w", err)
	}
	return x, nil
}

func newIndex(data []byte) (x *Index, err error) {
	defer (*Index)(nil).leave(enter(), &err)
	h, err := decodeHeader(data, uint64(len(data)))
	if err != nil {
		return nil, err
	}
	table := data[headerSize:h.payloadAt]
	if crc32.Checksum(table, castagnoli) != h.tableCRC {
		return nil, fmt.Errorf("%w: wrong checksum of the checksum table", ErrCorrupt)
	}
	x = &Index{
		h: h, data: data, table: table, payload: data[h.payloadAt:],
		verified: make([]atomic.Uint32, (h.blocks()+31)/32),
	}
	root, err := x.dir(Root)
	if err != nil {
		return nil, err
	}
	if root.parent != Root {
		return nil, fmt.Errorf("%w: the root has parent %d", ErrCorrupt, root.parent)
	}
	return x, nil
}

// Close unmaps the index. No other call may be running; later ones fail with ErrClosed.
func (x *Index) Close() error {
	if x.closed.Swap(true) || !x.mapped {
		return nil
	}
	if err := unix.Munmap(x.data); err != nil {
		return fmt.Errorf("unmap index: %w", err)
	}
	return nil
}

// Kind says what the index describes.
func (x *Index) Kind() Kind { return x.h.kind }

// ID is what the writer was told the index describes.
func (x *Index) ID() string { return x.h.id }

// Layers is the number of layers of the chain.
func (x *Index) Layers() int { return int(x.h.layers) }

// Inodes is the number of objects; the slots are 1..Inodes.
func (x *Index) Inodes() int { return int(x.h.inodes) }

// enter makes a fault in the mapping a panic of this goroutine, which leave turns into an error. Every exported method that reads
// the mapping begins with
//
//	defer x.leave(enter(), &err)
//
// and nothing that lies in the mapping is handed out.
func enter() (old bool) { return debug.SetPanicOnFault(true) }

func (x *Index) leave(old bool, err *error) {
	r := recover()
	debug.SetPanicOnFault(old)
	if r == nil {
		return
	}
	if fault, ok := r.(interface{ Addr() uintptr }); ok {
		*err = fmt.Errorf("%w: memory fault at %#x (disk error, or the file was cut off)", ErrFault, fault.Addr())
		return
	}
	if re := runtime.Error(nil); errors.As(asError(r), &re) {
		*err = fmt.Errorf("%w: %w", ErrCorrupt, re)
		return
	}
	*err = fmt.Errorf("%w: %v", ErrCorrupt, r)
}

func asError(r any) error {
	err, _ := r.(error)
	return err
}

// block returns payload[off:off+n] after its blocks were verified. The caller has checked that the range is in a section.
func (x *Index) block(off, n uint64) ([]byte, error) {
	if n > 0 {
		for b := off >> blockShift; b <= (off+n-1)>>blockShift; b++ {
			if x.verified[b/32].Load()&(1<<(b%32)) == 0 {
				if err := x.verify(b); err != nil {
					return nil, err
				}
			}
		}
	}
	return x.payload[off : off+n : off+n], nil
}

func (x *Index) verify(b uint64) error {
	start := b << blockShift
	end := min(start+blockSize, uint64(len(x.payload)))
	want := binary.LittleEndian.Uint32(x.table[b*4:])
	if got := crc32.Checksum(x.payload[start:end], castagnoli); got != want {
		return fmt.Errorf("%w: block %d at offset %d has checksum %#08x, expected %#08x",
			ErrCorrupt, b, x.h.payloadAt+start, got, want)
	}
	x.verified[b/32].Or(1 << (b % 32))
	return nil
}

// bytes returns what r refers to in the section of the given place and size.
func (x *Index) bytes(section, size uint64, r ref) ([]byte, error) {
	if r.offset() > size || r.len() > size-r.offset() {
		return nil, fmt.Errorf("%w: reference to %d bytes at %d of a section of %d", ErrCorrupt, r.len(), r.offset(), size)
	}
	return x.block(section+r.offset(), r.len())
}

func (x *Index) str(r ref) ([]byte, error) { return x.bytes(x.h.stringsAt(), x.h.strings, r) }

// load reads the record of a slot.
func (x *Index) load(s Slot, n *raw) error {
	if x.closed.Load() {
		return ErrClosed
	}
	if s == 0 || uint64(s) > x.h.inodes {
		return fmt.Errorf("%w: %d of %d", ErrNoSlot, s, x.h.inodes)
	}
	b, err := x.block(uint64(s-1)*inodeSize, inodeSize)
	if err == nil {
		err = n.decode(b)
	}
	if err != nil {
		return fmt.Errorf("inode %d: %w", s, err)
	}
	if n.Layer >= x.h.layers {
		return fmt.Errorf("inode %d: %w: layer %d of %d", s, ErrCorrupt, n.Layer, x.h.layers)
	}
	return nil
}

// dir reads the record of a directory and checks the range of its entries.
func (x *Index) dir(s Slot) (n raw, err error) {
	if err := x.load(s, &n); err != nil {
		return n, err
	}
	if !n.IsDir() {
		return n, fmt.Errorf("inode %d: %w", s, ErrNotDir)
	}
	if n.value > x.h.entries || uint64(n.count) > x.h.entries-n.value {
		return n, fmt.Errorf("inode %d: %w: entries %d+%d of %d", s, ErrCorrupt, n.value, n.count, x.h.entries)
	}
	return n, nil
}

// Inode fills n with the metadata of a slot.
func (x *Index) Inode(s Slot, n *Inode) (err error) {
	defer x.leave(enter(), &err)
	var r raw
	if err := x.load(s, &r); err != nil {
		return err
	}
	*n = r.Inode
	if n.Origin == 0 {
		n.Origin = s
	}
	return nil
}

// Readlink returns the target of a symbolic link.
func (x *Index) Readlink(s Slot) (target string, err error) {
	defer x.leave(enter(), &err)
	var n raw
	if err := x.load(s, &n); err != nil {
		return "", err
	}
	if n.Mode&modeType != modeSymlink {
		return "", fmt.Errorf("inode %d: %w: not a symbolic link", s, ErrInvalid)
	}
	b, err := x.str(ref(n.value))
	if err != nil {
		return "", err
	}
	if len(b) == 0 || len(b) > maxTarget {
		return "", fmt.Errorf("inode %d: %w: link target of %d bytes", s, ErrCorrupt, len(b))
	}
	return string(b), nil
}
