package foreign

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// A bolt file (go.etcd.io/bbolt) is read here page by page instead of with bbolt,
// which locks the file, maps it, and trusts what it finds there: in a damaged or
// hostile file it faults or never ends. What is needed is little:
//
//	page     id 8, flags 2, count 2, overflow 4; then elements; little endian
//	meta     magic 4, version 4, page size 4, flags 4, root page 8, root sequence 8,
//	         freelist 8, pages 8, transaction 8, FNV-1a of what is before 8
//	branch   position 4, key size 4, page 8
//	leaf     flags 4, position 4, key size 4, value size 4; positions are relative to
//	         the element
//	bucket   a leaf's value: root page 8, sequence 8; if the root is 0, a page follows
//
// Of the two meta pages the valid one with the higher transaction counts. Nothing is
// locked: if a daemon writes meanwhile, what is read may contradict itself, which is
// an error, or be of the moment before.
const (
	boltMagic    = 0xED0CDAED
	boltVersion  = 2
	boltBranch   = 0x01
	boltLeaf     = 0x02
	boltHeader   = 16
	boltDepth    = 64        // pages from the root of a bucket to its leaves
	boltPageMax  = 256 << 20 // with overflow
	boltIsBucket = 0x01
)

var errBolt = fmt.Errorf("%w: no valid bolt database", ErrDamaged)

type boltFile struct {
	r      io.ReaderAt
	page   int64 // bytes
	pages  uint64
	budget int64 // bytes that may still be read
}

// boltBucket is one bucket, its keys in memory.
type boltBucket struct {
	f      *boltFile
	values map[string][]byte
	below  map[string][]byte // buckets, as they stand in the leaf
}

// openBolt reads the outermost bucket.
func openBolt(file *os.File) (*boltBucket, error) {
	st, err := file.Stat()
	if err != nil {
		return nil, err
	}
	b, err := readBolt(file, st.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file.Name(), err)
	}
	return b, nil
}

func readBolt(r io.ReaderAt, size int64) (*boltBucket, error) {
	// A page is read once, unless it is of the path to several leaves.
	f := &boltFile{r: r, budget: 4*size + 1<<20}
	var root, best uint64
	for _, at := range []int64{0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536} {
		buf := make([]byte, boltHeader+64)
		if _, err := r.ReadAt(buf, at); err != nil {
			continue // beyond the end
		}
		m := buf[boltHeader:]
		h := fnv.New64a()
		_, _ = h.Write(m[:56]) // hashes do not fail
		page := int64(binary.LittleEndian.Uint32(m[8:]))
		switch {
		case binary.LittleEndian.Uint32(m) != boltMagic, binary.LittleEndian.Uint32(m[4:]) != boltVersion,
			binary.LittleEndian.Uint64(m[56:]) != h.Sum64(), at != 0 && at != page, page < 512, page > 1<<20:
			continue
		}
		if tx := binary.LittleEndian.Uint64(m[48:]); f.page == 0 || tx > best {
			best, f.page, root, f.pages = tx, page, binary.LittleEndian.Uint64(m[16:]), binary.LittleEndian.Uint64(m[40:])
		}
	}
	if f.page == 0 {
		return nil, errBolt
	}
	return f.bucket(root, nil)
}

// bucket reads a bucket whose root is a page, or is inline.
func (f *boltFile) bucket(root uint64, inline []byte) (*boltBucket, error) {
	b := &boltBucket{f: f, values: map[string][]byte{}, below: map[string][]byte{}}
	if root == 0 {
		return b, b.add(inline, 0)
	}
	p, err := f.read(root)
	if err != nil {
		return nil, err
	}
	return b, b.add(p, 0)
}

// read reads a page with its overflow.
func (f *boltFile) read(id uint64) ([]byte, error) {
	if id < 2 || id >= f.pages || id > uint64(1<<62/f.page) {
		return nil, fmt.Errorf("%w: page %d of %d", errBolt, id, f.pages)
	}
	head := make([]byte, boltHeader)
	if _, err := f.r.ReadAt(head, int64(id)*f.page); err != nil {
		return nil, fmt.Errorf("%w: page %d: %w", errBolt, id, err)
	}
	size := (int64(binary.LittleEndian.Uint32(head[12:])) + 1) * f.page
	if f.budget -= size; binary.LittleEndian.Uint64(head) != id || size > boltPageMax || f.budget < 0 {
		return nil, fmt.Errorf("%w: page %d of %d bytes", errBolt, id, size)
	}
	p := make([]byte, size)
	if _, err := f.r.ReadAt(p, int64(id)*f.page); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: page %d: %w", errBolt, id, err)
	}
	return p, nil
}

// add takes in the elements of a page, and of those below it.
func (b *boltBucket) add(p []byte, depth int) error {
	if depth > boltDepth || len(p) < boltHeader {
		return errBolt
	}
	flags, count := binary.LittleEndian.Uint16(p[8:]), int(binary.LittleEndian.Uint16(p[10:]))
	if len(p) < boltHeader+16*count {
		return errBolt
	}
	part := func(at, n uint64) ([]byte, bool) {
		return p[min(at, uint64(len(p))):min(at+n, uint64(len(p)))], at+n <= uint64(len(p))
	}
	for i := range count {
		at := uint64(boltHeader + 16*i)
		e := p[at:]
		switch flags {
		case boltBranch:
			below, err := b.f.read(binary.LittleEndian.Uint64(e[8:]))
			if err == nil {
				err = b.add(below, depth+1)
			}
			if err != nil {
				return err
			}
		case boltLeaf:
			pos, ks, vs := uint64(binary.LittleEndian.Uint32(e[4:])), uint64(binary.LittleEndian.Uint32(e[8:])), uint64(binary.LittleEndian.Uint32(e[12:]))
			key, ok1 := part(at+pos, ks)
			value, ok2 := part(at+pos+ks, vs)
			if !ok1 || !ok2 {
				return errBolt
			}
			if binary.LittleEndian.Uint32(e)&boltIsBucket != 0 {
				b.below[string(key)] = value
			} else {
				b.values[string(key)] = value
			}
		default:
			return fmt.Errorf("%w: a page of type %#x", errBolt, flags)
		}
	}
	return nil
}

// bucket returns a bucket below b; nil if there is none.
func (b *boltBucket) bucket(names ...string) (*boltBucket, error) {
	for _, name := range names {
		v, ok := b.below[name]
		if !ok {
			return nil, nil
		}
		if len(v) < 16 {
			return nil, errBolt
		}
		next, err := b.f.bucket(binary.LittleEndian.Uint64(v), v[16:])
		if err != nil {
			return nil, err
		}
		b = next
	}
	return b, nil
}

// buckets are the names of the buckets in b, in order.
func (b *boltBucket) buckets() []string {
	if b == nil {
		return nil
	}
	return sortedKeys(b.below)
}

func (b *boltBucket) text(key string) string {
	if b == nil {
		return ""
	}
	return string(b.values[key])
}
