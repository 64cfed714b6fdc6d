package crash

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// Kind says what an entry of the log is.
type Kind byte

// The kinds. Zero is a write of zeros: the loop device asks for it by punching
// a hole.
const (
	Write Kind = 'W'
	Zero  Kind = 'Z'
	Flush Kind = 'F'
	Mark  Kind = 'M'
)

// Entry is one thing that happened to the disk.
type Entry struct {
	Kind Kind
	Off  int64
	Len  int64
	Data []byte // of a write; the text of a mark
}

// Log is what happened to a disk, in order.
type Log []Entry

// logWriter appends entries to a file. Its caller serialises the calls.
type logWriter struct {
	f   *os.File
	buf *bufio.Writer
}

// header is kind, offset, length and whether data follows.
const headerLen = 1 + 8 + 8

func newLogWriter(path string) (*logWriter, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	return &logWriter{f, bufio.NewWriterSize(f, 1<<20)}, nil
}

func (w *logWriter) add(e Entry) error {
	var h [headerLen]byte
	h[0] = byte(e.Kind)
	binary.LittleEndian.PutUint64(h[1:], uint64(e.Off))
	binary.LittleEndian.PutUint64(h[9:], uint64(e.Len))
	_, err := w.buf.Write(h[:])
	if err == nil && hasData(e.Kind) {
		_, err = w.buf.Write(e.Data)
	}
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return nil
}

func (w *logWriter) close() error {
	return errors.Join(w.buf.Flush(), w.f.Close())
}

func hasData(k Kind) bool { return k == Write || k == Mark }

// readLog reads what a logWriter has written.
func readLog(path string) (Log, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 1<<20)
	var l Log
	for {
		var h [headerLen]byte
		if _, err := io.ReadFull(in, h[:]); errors.Is(err, io.EOF) {
			return l, nil
		} else if err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
		e := Entry{Kind: Kind(h[0]), Off: int64(binary.LittleEndian.Uint64(h[1:])), Len: int64(binary.LittleEndian.Uint64(h[9:]))}
		if hasData(e.Kind) {
			e.Data = make([]byte, e.Len)
			if _, err := io.ReadFull(in, e.Data); err != nil {
				return nil, fmt.Errorf("read log: %w", err)
			}
		}
		l = append(l, e)
	}
}

// Find returns the place of the first mark with this text, -1 if there is none.
func (l Log) Find(text string) int {
	return slices.IndexFunc(l, func(e Entry) bool { return e.Kind == Mark && string(e.Data) == text })
}

// Marks returns the places of all marks from place from on.
func (l Log) Marks(from int) []int {
	var places []int
	for i := from; i < len(l); i++ {
		if l[i].Kind == Mark {
			places = append(places, i)
		}
	}
	return places
}

// String sums the log up.
func (l Log) String() string {
	count := make(map[Kind]int)
	bytes := int64(0)
	for _, e := range l {
		count[e.Kind]++
		if e.Kind == Write {
			bytes += e.Len
		}
	}
	return fmt.Sprintf("%d writes (%d KiB), %d of zeros, %d flushes, %d marks", count[Write], bytes>>10, count[Zero], count[Flush], count[Mark])
}
