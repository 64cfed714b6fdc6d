package chainindex

import (
	"fmt"
	"io"
	"os"
)

// spool collects one section. It stays in memory up to limit bytes and goes on in an unlinked temporary file after that, so that
// an index of many millions of inodes needs no memory for them.
type spool struct {
	dir   string
	limit int
	// buf holds the bytes from flushed on.
	buf     []byte
	flushed int64
	file    *os.File
}

func (s *spool) size() int64 { return s.flushed + int64(len(s.buf)) }

func (s *spool) append(p []byte) error {
	if len(s.buf)+len(p) > s.limit {
		if err := s.flush(); err != nil {
			return err
		}
	}
	s.buf = append(s.buf, p...)
	return nil
}

func (s *spool) flush() error {
	if s.file == nil {
		f, err := os.CreateTemp(s.dir, "index.tmp-*")
		if err != nil {
			return fmt.Errorf("spool index: %w", err)
		}
		s.file = f
		if err := os.Remove(f.Name()); err != nil {
			return fmt.Errorf("spool index: %w", err)
		}
	}
	if _, err := s.file.WriteAt(s.buf, s.flushed); err != nil {
		return fmt.Errorf("spool index: %w", err)
	}
	s.flushed += int64(len(s.buf))
	s.buf = s.buf[:0]
	return nil
}

// readAt and writeAt work on one record, which lies either in the file or in memory, since append flushes whole ones.
func (s *spool) readAt(p []byte, off int64) error {
	if off >= s.flushed {
		copy(p, s.buf[off-s.flushed:])
		return nil
	}
	if _, err := s.file.ReadAt(p, off); err != nil {
		return fmt.Errorf("spool index: %w", err)
	}
	return nil
}

func (s *spool) writeAt(p []byte, off int64) error {
	if off >= s.flushed {
		copy(s.buf[off-s.flushed:], p)
		return nil
	}
	if _, err := s.file.WriteAt(p, off); err != nil {
		return fmt.Errorf("spool index: %w", err)
	}
	return nil
}

// copyTo writes the whole section; it may be called more than once.
func (s *spool) copyTo(w io.Writer) error {
	if s.flushed > 0 {
		if _, err := io.Copy(w, io.NewSectionReader(s.file, 0, s.flushed)); err != nil {
			return fmt.Errorf("spool index: %w", err)
		}
	}
	_, err := w.Write(s.buf)
	return err
}

func (s *spool) close() {
	if s.file != nil {
		_ = s.file.Close() // unlinked: nothing is kept of it
		s.file = nil
	}
	s.buf = nil
}
