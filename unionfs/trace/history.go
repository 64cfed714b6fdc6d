package trace

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"
	"time"
)

// Copied is one line of a history: what has copied an object up.
type Copied struct {
	Time      time.Time `json:"time"`
	Path      string    `json:"path"`
	Op        string    `json:"op"`
	Detail    string    `json:"detail,omitempty"`
	Pid       uint32    `json:"pid,omitempty"`
	Command   string    `json:"command,omitempty"`
	Container string    `json:"container,omitempty"`
	UID       uint32    `json:"uid"`
	// From is the layer it came from, as Event.Layer.
	From string `json:"from,omitempty"`
	// Dirs is how many directories right above it were copied up for that.
	Dirs int `json:"dirs,omitempty"`
}

// MaxHistory bounds a history, in bytes. When it is full its older half goes.
const MaxHistory = 1 << 20

// History is a file that says what was copied up by whom: one JSON document a line. It is
// never synced; a line that is lost, or written in part, is one that explains less.
type History struct {
	mu   sync.Mutex
	file *os.File // open for appending and reading
	size int64
}

// NewHistory writes to a file that is open for reading and writing, and owns it.
func NewHistory(f *os.File) (*History, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("history of copies: %w", err)
	}
	return &History{file: f, size: size}, nil
}

// Add writes a line. What goes wrong is not worth failing a request.
func (h *History) Add(c Copied) {
	b, err := json.Marshal(c)
	if err != nil {
		return
	}
	b = append(b, '\n')
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.size+int64(len(b)) > MaxHistory {
		h.halve()
	}
	n, _ := h.file.WriteAt(b, h.size)
	h.size += int64(n)
}

// halve drops the older half. Preconditions: mu is held.
func (h *History) halve() {
	b := make([]byte, min(h.size, MaxHistory/2))
	n, err := h.file.ReadAt(b, h.size-int64(len(b)))
	if err != nil && !errors.Is(err, io.EOF) {
		n = 0
	}
	b = b[:n]
	if at := strings.IndexByte(string(b), '\n'); at >= 0 {
		b = b[at+1:]
	}
	n, _ = h.file.WriteAt(b, 0)
	h.size = int64(n)
	_ = h.file.Truncate(h.size) // what is left at the end is written over
}

// Close closes the file.
func (h *History) Close() error { return h.file.Close() }

// maxHistoryLine is that of a path of PATH_MAX bytes, escaped.
const maxHistoryLine = 64 << 10

// FindCopied returns what a history says of an object: the last line about it, or one about
// something below that took it along. ok is false if there is none. Lines that make no sense are skipped.
func FindCopied(r io.Reader, p string) (c Copied, ok bool) {
	in := bufio.NewReaderSize(io.LimitReader(r, 2*MaxHistory), maxHistoryLine)
	for {
		line, more, err := in.ReadLine()
		long := more
		for more && err == nil {
			_, more, err = in.ReadLine()
		}
		if err != nil {
			return c, ok
		}
		var e Copied
		if long || json.Unmarshal(line, &e) != nil {
			continue
		}
		at := e.Path
		for range min(e.Dirs, strings.Count(at, "/")) {
			if at == p {
				break
			}
			at = path.Dir(at)
		}
		if at == p {
			c, ok = e, true
		}
	}
}
