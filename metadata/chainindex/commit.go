package chainindex

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteTo writes the index to dst and ends the Writer. It neither syncs nor renames; see Commit.
func (w *Writer) WriteTo(dst io.Writer) (int64, error) {
	if w.err == nil && w.count == 0 {
		return 0, w.fail(fmt.Errorf("%w: it has no root", ErrInvalid))
	}
	if w.err == nil {
		w.err = w.endDir()
	}
	if w.err != nil {
		return 0, w.err
	}
	defer w.Discard()
	h := header{
		kind: w.opt.Kind, id: w.opt.ID, layers: uint32(w.opt.Layers),
		inodes: w.count, entries: w.entryCount(), strings: uint64(w.strings.size()), attrs: uint64(w.attrs.size()),
	}
	h.layout()
	sums := blockSums{table: make([]byte, 0, h.tableSize())}
	if err := w.copyPayload(&sums); err != nil {
		return 0, err
	}
	table := sums.finish(int(h.tableSize()))
	h.tableCRC = crc32.Checksum(table, castagnoli)

	out := &countingWriter{w: dst}
	buf := bufio.NewWriterSize(out, 256<<10)
	for _, p := range [][]byte{h.encode(), table} {
		if _, err := buf.Write(p); err != nil {
			return out.n, err
		}
	}
	if err := w.copyPayload(buf); err != nil {
		return out.n, err
	}
	if err := buf.Flush(); err != nil {
		return out.n, err
	}
	if out.n != int64(h.fileSize) {
		return out.n, fmt.Errorf("%w: wrote %d bytes of %d", ErrInvalid, out.n, h.fileSize)
	}
	return out.n, nil
}

func (w *Writer) copyPayload(dst io.Writer) error {
	for _, s := range []*spool{&w.inodes, &w.entries, &w.strings, &w.attrs} {
		if err := s.copyTo(dst); err != nil {
			return err
		}
	}
	return nil
}

// Commit writes the index to path so that the file is either absent (or the old one) or whole and durable, and ends the Writer.
func (w *Writer) Commit(path string) (err error) {
	defer w.Discard()
	if w.err != nil {
		return w.err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("write index %q: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("write index %q: %w", path, err)
			if rerr := os.Remove(f.Name()); !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}()
	_, err = w.WriteTo(f)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync directory of the index: %w", err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// blockSums computes the checksum table of the payload that is written to it.
type blockSums struct {
	table []byte
	crc   uint32
	fill  int
}

func (s *blockSums) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part := p[:min(len(p), blockSize-s.fill)]
		s.crc = crc32.Update(s.crc, castagnoli, part)
		s.fill += len(part)
		p = p[len(part):]
		if s.fill == blockSize {
			s.end()
		}
	}
	return n, nil
}

func (s *blockSums) end() {
	s.table = binary.LittleEndian.AppendUint32(s.table, s.crc)
	s.crc, s.fill = 0, 0
}

// finish closes the last block and pads the table to size.
func (s *blockSums) finish(size int) []byte {
	if s.fill > 0 {
		s.end()
	}
	return append(s.table, make([]byte, size-len(s.table))...)
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
