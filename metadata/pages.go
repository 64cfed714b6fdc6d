package metadata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/bits"
	"slices"
)

// This file reads a database without bbolt, which trusts what it maps: a page that
// is not what it should be ends the process, or worse, reads as something else. It
// is used to tell whether a file may be given to bbolt, and to get rows out of one
// that may not.

const (
	pageHeader   = 16
	elemSize     = 16 // of leaf and branch pages alike
	metaSize     = 64
	bucketHeader = 16

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element

	boltMagic   = 0xED0CDAED
	boltVersion = 2
	noFreelist  = ^uint64(0)

	// maxDepth bounds the tree of pages, maxPage one page with its overflow.
	maxDepth = 64
	maxPage  = 1 << 30
)

var order = binary.NativeEndian

type boltMeta struct {
	pageSize              uint32
	root, freelist, pages uint64
	txid                  uint64
}

// pages is a database file.
type pages struct {
	r      io.ReaderAt
	length int64
	size   int64 // of a page
	meta   boltMeta
	seen   map[uint64]bool
	report func(string)
}

// openPages finds the newest meta page that is whole.
func openPages(r io.ReaderAt, length int64) (*pages, error) {
	p := &pages{r: r, length: length, report: func(string) {}}
	found := false
	try := func(at int64) {
		m, err := readMeta(r, at)
		if err == nil && (!found || m.txid > p.meta.txid) {
			found, p.meta, p.size = true, m, int64(m.pageSize)
		}
	}
	try(0)
	if found {
		try(p.size)
	} else {
		for at := int64(1024); at <= 1<<24 && at < length; at <<= 1 {
			if try(at); found && p.size != at {
				found = false // the second page lies at the size of a page
			}
		}
	}
	switch {
	case !found:
		return nil, errors.New("neither meta page is whole")
	case bits.OnesCount64(uint64(p.size)) != 1 || p.size < 1024 || p.size > 1<<24:
		return nil, fmt.Errorf("pages of %d bytes", p.size)
	case p.meta.pages > uint64(1<<62)/uint64(p.size) || p.meta.root >= p.meta.pages:
		return nil, errors.New("the meta page names a page beyond the end")
	}
	return p, nil
}

func readMeta(r io.ReaderAt, at int64) (m boltMeta, err error) {
	var b [pageHeader + metaSize]byte
	if _, err := r.ReadAt(b[:], at); err != nil {
		return m, err
	}
	v := b[pageHeader:]
	sum := fnv.New64a()
	_, _ = sum.Write(v[:56]) // hashes do not fail
	if order.Uint32(v) != boltMagic || order.Uint32(v[4:]) != boltVersion || order.Uint64(v[56:]) != sum.Sum64() {
		return m, errors.New("not a meta page")
	}
	return boltMeta{
		pageSize: order.Uint32(v[8:]), root: order.Uint64(v[16:]), freelist: order.Uint64(v[32:]),
		pages: order.Uint64(v[40:]), txid: order.Uint64(v[48:]),
	}, nil
}

// page reads a page with its overflow.
func (p *pages) page(id uint64) (flags, count uint16, body []byte, err error) {
	var h [pageHeader]byte
	if id < 2 || id >= p.meta.pages {
		return 0, 0, nil, fmt.Errorf("page %d is beyond the end (%d pages)", id, p.meta.pages)
	}
	if _, err := p.r.ReadAt(h[:], int64(id)*p.size); err != nil {
		return 0, 0, nil, fmt.Errorf("page %d: %w", id, err)
	}
	flags, count = order.Uint16(h[8:]), order.Uint16(h[10:])
	n := uint64(order.Uint32(h[12:])) + 1
	if got := order.Uint64(h[:]); got != id {
		return 0, 0, nil, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	if id+n > p.meta.pages || n*uint64(p.size) > maxPage {
		return 0, 0, nil, fmt.Errorf("page %d of %d pages goes beyond the end", id, n)
	}
	for i := range n {
		if p.seen[id+i] {
			return 0, 0, nil, fmt.Errorf("page %d is used twice", id+i)
		}
		p.seen[id+i] = true
	}
	body = make([]byte, int64(n)*p.size)
	if _, err := p.r.ReadAt(body, int64(id)*p.size); err != nil {
		return 0, 0, nil, fmt.Errorf("page %d: %w", id, err)
	}
	return flags, count, body, nil
}

// walk reads all rows of all buckets of the first level. What cannot be read is
// reported, and the rest gone on with.
func (p *pages) walk(row func(bucket string, k, v []byte), report func(string)) {
	p.seen, p.report = map[uint64]bool{0: true, 1: true}, report
	p.tree(p.meta.root, 0, func(k, v []byte, bucket bool) {
		if !bucket {
			report(fmt.Sprintf("key %.40q beside the buckets", k))
			return
		}
		name := string(k)
		leaf := func(k, v []byte, bucket bool) {
			if bucket {
				report(fmt.Sprintf("bucket %.40q in bucket %.40q", k, name))
				return
			}
			row(name, k, v)
		}
		if len(v) < bucketHeader {
			report(fmt.Sprintf("bucket %.40q has no root", name))
			return
		}
		if root := order.Uint64(v); root != 0 {
			p.tree(root, 0, leaf)
		} else if len(v) >= bucketHeader+pageHeader {
			in := v[bucketHeader:]
			p.elements("bucket "+name, order.Uint16(in[8:]), order.Uint16(in[10:]), in, 0, leaf)
		}
	})
	if f := p.meta.freelist; f != noFreelist {
		flags, count, body, err := p.page(f)
		switch {
		case err != nil:
			report("freelist: " + err.Error())
		case flags != flagFreelist:
			report(fmt.Sprintf("page %d has flags %#x, expected a freelist", f, flags))
		default:
			p.freelist(count, body[pageHeader:])
		}
	}
}

func (p *pages) freelist(count uint16, body []byte) {
	n := uint64(count)
	if count == 0xFFFF && len(body) >= 8 {
		n, body = order.Uint64(body), body[8:]
	}
	if n > uint64(len(body))/8 {
		p.report(fmt.Sprintf("the freelist has %d pages, more than it can hold", n))
		return
	}
	for i := range n {
		if id := order.Uint64(body[i*8:]); id < 2 || id >= p.meta.pages || p.seen[id] {
			p.report(fmt.Sprintf("page %d is free and in use, or does not exist", id))
		}
	}
}

func (p *pages) tree(id uint64, depth int, leaf func(k, v []byte, bucket bool)) {
	flags, count, body, err := p.page(id)
	if err != nil {
		p.report(err.Error())
		return
	}
	p.elements(fmt.Sprintf("page %d", id), flags, count, body, depth, leaf)
}

// elements reads the elements of a page; body includes its header.
func (p *pages) elements(what string, flags, count uint16, body []byte, depth int, leaf func(k, v []byte, bucket bool)) {
	if flags != flagBranch && flags != flagLeaf || depth > maxDepth {
		p.report(fmt.Sprintf("%s has flags %#x, expected rows", what, flags))
		return
	}
	var last []byte
	for i := range int(count) {
		at := pageHeader + i*elemSize
		if at+elemSize > len(body) {
			p.report(what + " has more elements than it can hold")
			return
		}
		e := body[at:]
		var pos, klen, vlen uint64
		if flags == flagLeaf {
			pos, klen, vlen = uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		} else {
			pos, klen = uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
		}
		if pos+klen+vlen > uint64(len(e)) {
			p.report(fmt.Sprintf("%s: element %d lies outside", what, i))
			continue
		}
		k := e[pos : pos+klen]
		if i > 0 && bytes.Compare(last, k) >= 0 {
			p.report(fmt.Sprintf("%s: key %.40q is out of order", what, k))
		}
		last = k
		if flags == flagLeaf {
			v := e[pos+klen : pos+klen+vlen]
			leaf(slices.Clone(k), slices.Clone(v), order.Uint32(e)&flagBucket != 0)
			continue
		}
		p.tree(order.Uint64(e[8:]), depth+1, leaf)
	}
}
