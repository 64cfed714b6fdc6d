package chainindex

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
)

const (
	magic   = "plyfsidx"
	version = 2

	headerSize = 4096
	headerCRC  = headerSize - 4
	idAt       = 128
	maxID      = 256
	pageSize   = 4096
	inodeSize  = 128
	entrySize  = 32
	prefixSize = 16
	blockShift = 14
	blockSize  = 1 << blockShift

	maxName   = 255
	maxTarget = 4095 // PATH_MAX without its NUL
	maxLayers = 1 << 20

	entryWhiteout = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Kind says what an index describes.
type Kind uint32

const (
	// KindLayer is the index of one layer.
	KindLayer Kind = 1
	// KindChain is the merged index of a chain of layers.
	KindChain Kind = 2
)

// String returns the word used in messages.
func (k Kind) String() string {
	switch k {
	case KindLayer:
		return "layer"
	case KindChain:
		return "chain"
	}
	return fmt.Sprintf("kind(%d)", uint32(k))
}

// header is the first page of an index.
type header struct {
	kind      Kind
	fileSize  uint64
	payloadAt uint64
	payload   uint64
	inodes    uint64
	entries   uint64
	strings   uint64
	attrs     uint64
	layers    uint32
	tableCRC  uint32
	id        string
}

// Offsets of the sections in the payload.
func (h *header) entriesAt() uint64 { return h.inodes * inodeSize }
func (h *header) stringsAt() uint64 { return h.entriesAt() + h.entries*entrySize }
func (h *header) attrsAt() uint64   { return h.stringsAt() + h.strings }
func (h *header) blocks() uint64    { return (h.payload + blockSize - 1) / blockSize }
func (h *header) tableSize() uint64 { return alignUp(h.blocks()*4, pageSize) }

func alignUp(n, to uint64) uint64 { return (n + to - 1) / to * to }

// layout fills in the offsets that follow from the counts.
func (h *header) layout() {
	h.payload = h.attrsAt() + h.attrs
	h.payloadAt = headerSize + h.tableSize()
	h.fileSize = h.payloadAt + h.payload
}

func (h *header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, headerSize)
	copy(b, magic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], uint32(h.kind))
	le.PutUint64(b[16:], h.fileSize)
	le.PutUint64(b[24:], h.payloadAt)
	le.PutUint64(b[32:], h.payload)
	le.PutUint64(b[40:], h.inodes)
	le.PutUint64(b[48:], h.entries)
	le.PutUint64(b[56:], h.strings)
	le.PutUint64(b[64:], h.attrs)
	le.PutUint32(b[72:], h.layers)
	le.PutUint32(b[76:], h.tableCRC)
	le.PutUint32(b[80:], uint32(len(h.id)))
	copy(b[idAt:], h.id)
	le.PutUint32(b[headerCRC:], crc32.Checksum(b[:headerCRC], castagnoli))
	return b
}

// decodeHeader reads and checks the header of an index file of size bytes.
func decodeHeader(b []byte, size uint64) (header, error) {
	le := binary.LittleEndian
	var h header
	switch {
	case len(b) < headerSize:
		return h, fmt.Errorf("%w: %d bytes are too few for a header", ErrCorrupt, size)
	case string(b[:8]) != magic:
		return h, fmt.Errorf("%w: it does not begin with %q", ErrCorrupt, magic)
	case le.Uint32(b[headerCRC:]) != crc32.Checksum(b[:headerCRC], castagnoli):
		return h, fmt.Errorf("%w: wrong checksum of the header", ErrCorrupt)
	case le.Uint32(b[8:]) != version:
		return h, fmt.Errorf("%w: %d, expected %d", ErrVersion, le.Uint32(b[8:]), version)
	}
	h = header{
		kind: Kind(le.Uint32(b[12:])), fileSize: le.Uint64(b[16:]), payloadAt: le.Uint64(b[24:]), payload: le.Uint64(b[32:]),
		inodes: le.Uint64(b[40:]), entries: le.Uint64(b[48:]), strings: le.Uint64(b[56:]), attrs: le.Uint64(b[64:]),
		layers: le.Uint32(b[72:]), tableCRC: le.Uint32(b[76:]),
	}
	idLen := le.Uint32(b[80:])
	switch {
	case h.kind != KindLayer && h.kind != KindChain:
		return h, fmt.Errorf("%w: unknown %v", ErrCorrupt, h.kind)
	case h.fileSize != size:
		return h, fmt.Errorf("%w: it has %d bytes, its header says %d", ErrCorrupt, size, h.fileSize)
	case h.inodes == 0 || h.inodes > math.MaxUint32 || h.inodes > size/inodeSize || h.entries > size/entrySize ||
		h.strings > size || h.attrs > size || h.strings > refMaxOffset || h.attrs > refMaxOffset:
		return h, fmt.Errorf("%w: counts in the header do not fit the file", ErrCorrupt)
	case h.layers == 0 || h.layers > maxLayers || h.kind == KindLayer && h.layers != 1:
		return h, fmt.Errorf("%w: %d layers", ErrCorrupt, h.layers)
	case idLen > maxID:
		return h, fmt.Errorf("%w: id of %d bytes", ErrCorrupt, idLen)
	}
	want := h
	want.layout()
	if want != h {
		return h, fmt.Errorf("%w: sections in the header do not add up", ErrCorrupt)
	}
	h.id = string(b[idAt : idAt+idLen])
	return h, nil
}
