package layers

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc64"
	"io"
	"os"
	"strconv"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// A tar-split record holds every byte of a layer's tar that is not the content
// of a regular file, and for each such content its path, size and CRC. Put
// together with the files it gives back the tar, byte for byte.
//
// The records are tar-split's (storage.Entry as JSON, one a line), compressed
// with zstd. They are made here rather than by tar-split's reader because one
// parser must decide what an entry is: two that disagree about a hostile tar
// would unpack one thing and write out another. Contents that have no file
// (GNU sparse entries, whose stored form differs from the file) are kept as
// raw segments; a content whose file was replaced by a later entry of the same
// path is kept in the layer's dup directory under its position.

// segmentMax bounds the memory of one raw segment.
const segmentMax = 1 << 20

type splitWriter struct {
	src     io.Reader
	pos     int
	buf     []byte
	payload hash.Hash64 // not nil: bytes read are content
	zeros   int64       // trailing zero bytes of what was read outside contents

	// The records are encoded, compressed and written by a goroutine.
	batch   []storage.Entry
	batched int // bytes in batch
	batches chan []storage.Entry
	failed  atomic.Bool
	done    chan struct{} // closed: the goroutine has ended, and what follows is its result
	err     error
	sum     hash.Hash
	size    int64
}

// splitBatch is how many records are handed over at once.
const splitBatch = 64

// newSplitWriter returns a reader of src that records what passes into f.
func newSplitWriter(src io.Reader, f *os.File) (*splitWriter, error) {
	w := &splitWriter{src: src, sum: sha256.New(), batches: make(chan []storage.Entry, 16), done: make(chan struct{})}
	bw := bufio.NewWriterSize(f, 64<<10)
	zw, err := zstd.NewWriter(io.MultiWriter(countWriter{&w.size}, w.sum, bw), zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, err
	}
	batches := w.batches // the field is cleared by close
	go func() {
		defer close(w.done)
		w.err = w.encode(json.NewEncoder(zw), batches)
		if err := zw.Close(); w.err == nil {
			w.err = err
		}
		if err := bw.Flush(); w.err == nil {
			w.err = err
		}
	}()
	return w, nil
}

// encode writes what is handed over, to the end also after an error.
func (w *splitWriter) encode(enc *json.Encoder, batches <-chan []storage.Entry) (err error) {
	for batch := range batches {
		for _, e := range batch {
			if err == nil {
				if err = enc.Encode(e); err != nil {
					w.failed.Store(true)
				}
			}
		}
	}
	return err
}

type countWriter struct{ n *int64 }

func (c countWriter) Write(p []byte) (int, error) { *c.n += int64(len(p)); return len(p), nil }

func (w *splitWriter) Read(p []byte) (int, error) {
	n, err := w.src.Read(p)
	if w.payload != nil {
		_, _ = w.payload.Write(p[:n]) // hashes do not fail
		return n, err
	}
	w.buf = append(w.buf, p[:n]...)
	i := n
	for i > 0 && p[i-1] == 0 {
		i--
	}
	if i > 0 {
		w.zeros = 0
	}
	w.zeros += int64(n - i)
	if len(w.buf) >= segmentMax {
		if ferr := w.flush(); ferr != nil {
			return n, ferr
		}
	}
	return n, err
}

func (w *splitWriter) add(e storage.Entry) error {
	if w.batches == nil || w.failed.Load() {
		return w.close()
	}
	e.Position = w.pos
	w.pos++
	w.batch = append(w.batch, e)
	if w.batched += len(e.Payload); len(w.batch) == splitBatch || w.batched >= segmentMax {
		w.batches <- w.batch
		w.batch, w.batched = nil, 0
	}
	return nil
}

func (w *splitWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	err := w.add(storage.Entry{Type: storage.SegmentType, Payload: bytes.Clone(w.buf)})
	w.buf = w.buf[:0]
	return err
}

// beginPayload says that the next bytes are the content of a regular file.
func (w *splitWriter) beginPayload() error {
	err := w.flush()
	w.zeros = 0
	w.payload = crc64.New(storage.CRCTable)
	return err
}

// endPayload ends it and returns the content's position.
func (w *splitWriter) endPayload(path string, size int64) (int, error) {
	e := storage.Entry{Type: storage.FileType, Size: size, Payload: w.payload.Sum(nil)}
	e.SetName(path)
	w.payload = nil
	pos := w.pos
	return pos, w.add(e)
}

// close ends the record.
func (w *splitWriter) close() error {
	if w.batches == nil { // it has ended with an error
		return w.err
	}
	if len(w.buf) > 0 && !w.failed.Load() {
		w.batch = append(w.batch, storage.Entry{Type: storage.SegmentType, Payload: w.buf, Position: w.pos})
		w.pos++
	}
	w.batches <- w.batch
	close(w.batches)
	w.batches = nil
	<-w.done
	return w.err
}

func (w *splitWriter) digest() digest.Digest { return digest.NewDigest(digest.SHA256, w.sum) }

// abort ends the goroutine; the file is thrown away.
func (w *splitWriter) abort() { _ = w.close() }

// layerFiles is an open layer directory.
type layerFiles struct {
	dir  int // layers/<cacheID>
	diff int
	// adopted: diff is in another engine's store.
	adopted bool
}

func (l layerFiles) Close() {
	fsat.Close(l.diff)
	fsat.Close(l.dir)
}

// assemble writes a layer's tar as it was, and fails if what it wrote does not
// have the digest.
func (l layerFiles) assemble(ctx context.Context, w io.Writer, want digest.Digest, displaced map[int]bool) (size int64, err error) {
	sum := want.Algorithm().Hash()
	if err := l.join(ctx, io.MultiWriter(countWriter{&size}, sum, w), displaced); err != nil {
		return size, err
	}
	return size, isLayer(digest.NewDigest(want.Algorithm(), sum), want)
}

func isLayer(got, want digest.Digest) error {
	if got != want {
		return fmt.Errorf("%w: layer content has changed: expected diffID %s, got %s", ErrCorrupt, want, got)
	}
	return nil
}

// join puts the tar together.
func (l layerFiles) join(ctx context.Context, out io.Writer, displaced map[int]bool) error {
	fd, err := fsat.OpenRegular(l.dir, splitName, unix.O_RDONLY)
	if fsat.IsAbsent(err) && l.adopted {
		return fmt.Errorf("%w: nobody has kept the form of this layer's tar (its content is in another engine's store): adopt it with --copy, or load the image", ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", splitName, err)
	}
	f := os.NewFile(uintptr(fd), splitName)
	defer f.Close()
	zr, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer zr.Close()
	dec := json.NewDecoder(zr)
	buf := make([]byte, 256<<10)
	for {
		var e storage.Entry
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrCorrupt, splitName, err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		switch {
		case e.Type == storage.SegmentType:
			if _, err := out.Write(e.Payload); err != nil {
				return err
			}
		case e.Type == storage.FileType && e.Size > 0:
			if err := l.content(out, &e, displaced[e.Position], buf); err != nil {
				return err
			}
		}
	}
}

// place is where the content of an entry lies: a path below a directory.
func (l layerFiles) place(e *storage.Entry, displaced bool) (dir int, path string) {
	if displaced {
		return l.dir, dupName + "/" + strconv.Itoa(e.Position)
	}
	return l.diff, e.GetName()
}

// isContent says whether a file can be the content of an entry.
func isContent(e *storage.Entry, st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != e.Size {
		return fmt.Errorf("%w: content of %q: expected a file of %d bytes, got mode %#o, %d bytes", ErrCorrupt, e.GetName(), e.Size, st.Mode, st.Size)
	}
	return nil
}

func (l layerFiles) content(w io.Writer, e *storage.Entry, displaced bool, buf []byte) error {
	at, path := l.place(e, displaced)
	p, err := fsat.OpenBeneath(at, path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("%w: content of %q: %w", ErrCorrupt, e.GetName(), err)
	}
	defer fsat.Close(p)
	var st unix.Stat_t
	if err := fsat.Fstat(p, &st); err != nil {
		return err
	}
	if err := isContent(e, &st); err != nil {
		return err
	}
	fd, err := reopenQuietly(p)
	if err != nil {
		return fmt.Errorf("content of %q: %w", e.GetName(), err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	crc := crc64.New(storage.CRCTable)
	n, err := io.CopyBuffer(onlyWriter{io.MultiWriter(w, crc)}, io.LimitReader(f, e.Size), buf)
	switch {
	case err != nil:
		return fmt.Errorf("content of %q: %w", e.GetName(), err)
	case n != e.Size || !bytes.Equal(crc.Sum(nil), e.Payload):
		return fmt.Errorf("%w: content of %q has changed since it was unpacked", ErrCorrupt, e.GetName())
	}
	return nil
}

// onlyWriter hides ReadFrom, so that io.CopyBuffer uses its buffer.
type onlyWriter struct{ io.Writer }
