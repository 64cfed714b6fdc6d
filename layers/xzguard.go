package layers

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/ulikunitz/xz"
)

// xzDictMax is the largest dictionary that a decoder gets memory for: four
// times that of xz -9.
const xzDictMax = 256 << 20

// xzGuard passes an xz stream through and ends it before a block that asks for
// a larger dictionary: the decoder would make it. It follows the structure of
// the container (https://tukaani.org/xz/xz-file-format.txt, sections 2 to 4)
// without decoding; what it does not understand it leaves to the decoder.
type xzGuard struct {
	r    *bufio.Reader
	next func(*xzGuard) error // looks at what comes, says how much to pass
	pass int64                // bytes to hand on before next is asked
	err  error                // of Read

	check   int64 // size of a block's check
	block   int64 // bytes of the block's compressed data so far
	numbers int64 // of the index, to come; -1: their count comes first
	varint  uint  // bits of the one being read
	value   uint64
	index   int64 // bytes of the index so far
}

// newXZReader decompresses r.
func newXZReader(r *bufio.Reader) (io.Reader, error) {
	g := &xzGuard{r: r, next: (*xzGuard).stream}
	z, err := xz.NewReader(g)
	return xzReader{g, z}, g.blame(err)
}

type xzReader struct {
	g *xzGuard
	r *xz.Reader
}

func (z xzReader) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	return n, z.g.blame(err)
}

// blame tells errors of the input, which have passed through us, from what the
// decoder says of its content.
func (g *xzGuard) blame(err error) error {
	if err == nil || errors.Is(err, io.EOF) || g.err != nil && !errors.Is(g.err, io.EOF) {
		return err
	}
	return fmt.Errorf("%w: xz stream is damaged or truncated: %w", ErrCorrupt, err)
}

func (g *xzGuard) Read(p []byte) (n int, err error) {
	for g.pass == 0 && err == nil {
		err = g.next(g)
	}
	if err == nil {
		n, err = g.r.Read(p[:min(int64(len(p)), g.pass)])
		g.pass -= int64(n)
	}
	if err != nil {
		g.err = err
	}
	return n, err
}

// blind hands on the rest as it is.
func (g *xzGuard) blind() error {
	g.pass, g.next = 1<<62, (*xzGuard).blind
	return nil
}

// peek looks at the next bytes; fewer are the end of the input.
func (g *xzGuard) peek(n int) ([]byte, error) {
	b, err := g.r.Peek(n)
	if errors.Is(err, io.EOF) && len(b) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

// stream is a stream header, or the padding before it.
func (g *xzGuard) stream() error {
	b, err := g.peek(4)
	switch {
	case err != nil:
		return err
	case [4]byte(b) == [4]byte{}:
		g.pass = 4
		return nil
	}
	if b, err = g.peek(12); err != nil {
		return err
	}
	switch c := b[7] & 0x0f; {
	case c == 0:
		g.check = 0
	default:
		g.check = 4 << ((c - 1) / 3) // section 2.1.1.2: 1–3 are 4 bytes, 4–6 8, … 13–15 64
	}
	g.pass, g.next = 12, (*xzGuard).header
	return nil
}

// header is a block header, or the index.
func (g *xzGuard) header() error {
	b, err := g.peek(1)
	if err != nil {
		return err
	}
	if b[0] == 0 {
		g.pass, g.index, g.numbers, g.next = 1, 1, -1, (*xzGuard).number
		return nil
	}
	size := (int(b[0]) + 1) * 4
	if b, err = g.peek(size); err != nil {
		return err
	}
	dict, ok := xzDict(b[1 : size-4])
	switch {
	case !ok:
		return g.blind()
	case dict > xzDictMax:
		return fmt.Errorf("%w: xz with a dictionary of %d MiB, the limit is %d; recompress with xz -9 or zstd", ErrUnsupported, dict>>20, xzDictMax>>20)
	}
	g.pass, g.block, g.next = int64(size), 0, (*xzGuard).chunk
	return nil
}

// xzDict reads the dictionary size of a block header without its first byte and
// its checksum (section 3.1). ok is false for filters other than LZMA2 alone.
func xzDict(b []byte) (size int64, ok bool) {
	flags, b := b[0], b[1:]
	skip := 0
	for _, bit := range []byte{0x40, 0x80} { // sizes that are there
		if flags&bit != 0 {
			skip++
		}
	}
	for ; skip > 0; skip-- {
		for len(b) > 0 && b[0]&0x80 != 0 {
			b = b[1:]
		}
		if len(b) == 0 {
			return 0, false
		}
		b = b[1:]
	}
	if flags&3 != 0 || len(b) < 3 || b[0] != 0x21 || b[1] != 1 || b[2] > 40 {
		return 0, false
	}
	bits := b[2]
	if bits == 40 {
		return 1<<32 - 1, true
	}
	return int64(2|bits&1) << (bits/2 + 11), true
}

// chunk is a chunk of LZMA2.
func (g *xzGuard) chunk() error {
	b, err := g.peek(1)
	if err != nil {
		return err
	}
	control := b[0]
	switch {
	case control == 0:
		g.block++
		g.pass, g.next = 1+(4-g.block%4)%4+g.check, (*xzGuard).header
		return nil
	case control <= 2:
		if b, err = g.peek(3); err != nil {
			return err
		}
		g.pass = 3 + int64(b[1])<<8 + int64(b[2]) + 1
	case control < 0x80:
		return g.blind()
	default:
		if b, err = g.peek(5); err != nil {
			return err
		}
		g.pass = 5 + int64(b[3])<<8 + int64(b[4]) + 1
		if control >= 0xc0 {
			g.pass++
		}
	}
	g.block += g.pass
	return nil
}

// number is one byte of the numbers of an index; behind them it is padded, and
// checksum and stream footer follow.
func (g *xzGuard) number() error {
	if g.numbers == 0 {
		g.pass, g.next = (4-g.index%4)%4+4+12, (*xzGuard).stream
		return nil
	}
	b, err := g.peek(1)
	if err != nil {
		return err
	}
	g.pass = 1
	g.index++
	if g.varint < 63 {
		g.value |= uint64(b[0]&0x7f) << g.varint
	}
	g.varint += 7
	if b[0]&0x80 != 0 {
		return nil
	}
	if g.numbers < 0 {
		if g.value > 1<<60 {
			return g.blind()
		}
		g.numbers = int64(2 * g.value)
	} else {
		g.numbers--
	}
	g.varint, g.value = 0, 0
	return nil
}
