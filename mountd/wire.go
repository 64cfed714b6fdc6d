package mountd

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/plyfs/plyfs/layers"
)

// The API of the daemon is HTTP/1.1 with JSON over a unix socket:
//
//	POST /v1/CALL              request and answer are JSON; errors have the
//	                           body {"code", "message"} and a matching status
//	POST /v1/STREAM?r=JSON     the body, if any, is the archive to read; the
//	                           answer is a sequence of frames
//	GET /v1/events?r=JSON      the answer is a JSON object a line, see lines.go
//	GET /metrics               text for Prometheus, see prometheus.go
//
// A frame is one byte of kind, four bytes of length (big endian) and content:
// data of an archive, a progress record, and last either the result or an
// error. A stream that ends without either was cut off.
const (
	apiVersion = "v1"

	frameData     = 'D'
	frameProgress = 'P'
	frameResult   = 'R'
	frameError    = 'E'

	maxJSON      = 16 << 20  // of a request or a record
	dataChunk    = 256 << 10 // of a data frame
	progressTick = 50 * time.Millisecond
)

// frameWriter writes frames; its methods may be called from several goroutines.
type frameWriter struct {
	mu    sync.Mutex
	w     io.Writer
	flush func() error
	last  map[string]time.Time // of progress, by ID: guarded by mu
}

func newFrameWriter(w io.Writer, flush func() error) *frameWriter {
	return &frameWriter{w: w, flush: flush, last: map[string]time.Time{}}
}

func (f *frameWriter) frame(kind byte, body []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frameLocked(kind, body)
}

func (f *frameWriter) frameLocked(kind byte, body []byte) error {
	var head [5]byte
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(body)))
	if _, err := f.w.Write(head[:]); err != nil {
		return err
	}
	if _, err := f.w.Write(body); err != nil {
		return err
	}
	if kind == frameData { // the buffers below are flushed when full
		return nil
	}
	return f.flush()
}

func (f *frameWriter) json(kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return f.frame(kind, b)
}

// progress sends p, except where the last one of the same ID was sent a moment ago.
func (f *frameWriter) progress(p layers.Progress) {
	b, err := json.Marshal(p)
	if err != nil {
		return // nothing in it can fail
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if !p.Done && now.Sub(f.last[p.ID]) < progressTick {
		return
	}
	f.last[p.ID] = now
	_ = f.frameLocked(frameProgress, b) // a client that is gone shows at the next data or result
}

// Write sends data frames.
func (f *frameWriter) Write(b []byte) (int, error) {
	n := 0
	for n < len(b) {
		c := b[n:min(n+dataChunk, len(b))]
		if err := f.frame(frameData, c); err != nil {
			return n, err
		}
		n += len(c)
	}
	return n, nil
}

// readFrames reads an answer to its end. data and progress may be nil; result
// receives the result unless nil.
func readFrames(r io.Reader, data io.Writer, progress layers.ProgressFunc, result any) error {
	br := bufio.NewReaderSize(r, 64<<10)
	for {
		var head [5]byte
		if _, err := io.ReadFull(br, head[:]); err != nil {
			return markedf(ErrUnavailable, "the daemon went away in the middle of the answer: %w", err)
		}
		n := int64(binary.BigEndian.Uint32(head[1:]))
		if n > maxJSON {
			return markedf(ErrUnavailable, "the daemon sent a record of %d bytes: too long", n)
		}
		body := io.LimitReader(br, n)
		if head[0] == frameData {
			if data == nil {
				data = io.Discard
			}
			if m, err := io.Copy(data, body); err != nil {
				return err // of the reader's file, or a cut: both say so
			} else if m < n {
				return markedf(ErrUnavailable, "the daemon went away in the middle of the data")
			}
			continue
		}
		b, err := io.ReadAll(body)
		if err == nil && int64(len(b)) < n {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return markedf(ErrUnavailable, "the daemon went away in the middle of the answer: %w", err)
		}
		switch head[0] {
		case frameProgress:
			var p layers.Progress
			if json.Unmarshal(b, &p) == nil && progress != nil {
				progress(p)
			}
		case frameError:
			var e ErrorBody
			if err := json.Unmarshal(b, &e); err != nil {
				return fmt.Errorf("error of the daemon: %w", err)
			}
			return decodeError(e)
		case frameResult:
			if result == nil {
				return nil
			}
			if err := json.Unmarshal(b, result); err != nil {
				return fmt.Errorf("answer of the daemon: %w", err)
			}
			return nil
		default:
			return markedf(ErrUnavailable, "the daemon sent a record of unknown kind %q", head[0])
		}
	}
}
