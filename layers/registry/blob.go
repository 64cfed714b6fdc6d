package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Blob reads the content of a descriptor from an offset on. Nothing is asked before
// the first Read. The reader gives exactly as many bytes as the descriptor says, or
// an error; whether they have its digest is for the caller to see. Close it.
func (r *Remote) Blob(ctx context.Context, d ocispec.Descriptor, offset int64) io.ReadCloser {
	return &blobReader{ctx: ctx, r: r, d: d, off: offset, todo: r.order()}
}

// progressReset is how much a connection must have brought for the attempts to be
// counted anew: who sends a byte a time would otherwise have us for ever.
const progressReset = 1 << 20

// rangeMin is what a range that ends too early must have brought to be no failure.
const rangeMin = 32 << 10

type blobReader struct {
	ctx  context.Context
	r    *Remote
	d    ocispec.Descriptor
	off  int64
	todo []*endpoint // the first is the one in use
	errs []error     // of those that were given up

	body   io.ReadCloser // nil: not connected
	open   bool          // the length of this body is not known: more may follow the end
	framed bool          // its end is marked, so a cut does not look like one
	tries  int           // since progress
	since  int64         // bytes since tries was reset
	part   bool          // the answer was a range, which may end before the blob does
	got    int64         // bytes of this body
}

func (b *blobReader) Close() error {
	b.drop()
	b.todo = nil
	return nil
}

func (b *blobReader) drop() {
	if b.body != nil {
		_ = b.body.Close() // what it says of the connection no longer matters
		b.body = nil
	}
}

// Read implements io.Reader.
func (b *blobReader) Read(p []byte) (int, error) {
	for {
		if b.off == b.d.Size {
			return 0, b.end()
		}
		if err := b.ctx.Err(); err != nil {
			return 0, err
		}
		if len(b.todo) == 0 {
			return 0, errors.New("read of a closed blob")
		}
		if b.body == nil {
			if err := b.connect(); err != nil {
				if err := b.failed(err); err != nil {
					return 0, err
				}
				continue
			}
		}
		n, err := b.body.Read(p[:min(int64(len(p)), b.d.Size-b.off)])
		b.off += int64(n)
		b.got += int64(n)
		if b.since += int64(n); b.since >= progressReset {
			b.tries, b.since = 0, 0
		}
		if err != nil && b.off < b.d.Size {
			if err := b.broken(err); err != nil {
				return n, err
			}
		}
		if n > 0 {
			return n, nil
		}
	}
}

// end looks for bytes behind the last one.
func (b *blobReader) end() error {
	if b.body != nil && b.open {
		var one [1]byte
		if n, _ := b.body.Read(one[:]); n > 0 {
			b.drop()
			return fmt.Errorf("%w: the registry sends more than the %d bytes that the manifest gives the blob", ErrCorrupt, b.d.Size)
		}
	}
	b.drop()
	return io.EOF
}

// broken deals with a body that ended too early.
func (b *blobReader) broken(err error) error {
	framed, part := b.framed, b.part
	b.drop()
	if err == io.EOF && part && b.got >= rangeMin {
		return nil // a server of short ranges: the next one
	}
	if err == io.EOF && framed && !part {
		return b.failed(fmt.Errorf("%w: truncated: the manifest gives the blob %d bytes, the registry has sent %d and says that is all", ErrCorrupt, b.d.Size, b.off))
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return b.failed(fmt.Errorf("%w: connection to %s lost after %d of %d bytes: %w", ErrUnavailable, b.todo[0].Host, b.off, b.d.Size, err))
}

// failed decides after an error whether to try again, elsewhere, or not: then it
// returns the error.
func (b *blobReader) failed(err error) error {
	if b.ctx.Err() != nil {
		return b.ctx.Err()
	}
	if b.tries++; temporary(err) && b.tries < b.todo[0].o.Attempts {
		return b.todo[0].o.wait(b.ctx, b.tries)
	}
	e := b.todo[0]
	if e.Mirror {
		err = fmt.Errorf("mirror %s: %w", e.Host, err)
	}
	b.errs = append(b.errs, err)
	b.todo, b.tries, b.since = b.todo[1:], 0, 0
	switch {
	case len(b.todo) > 0:
		return nil
	case len(b.errs) == 1:
		return err
	}
	return several(b.errs)
}

// connect asks for what is missing.
func (b *blobReader) connect() error {
	e := b.todo[0]
	ctx, cancel := context.WithCancelCause(b.ctx)
	h := http.Header{}
	if b.off > 0 {
		h.Set("Range", "bytes="+strconv.FormatInt(b.off, 10)+"-")
	}
	resp, err := e.call(ctx, http.MethodGet, "/blobs/"+b.d.Digest.String(), h, nil, []string{auth.ActionPull},
		http.StatusOK, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable)
	if err != nil {
		cancel(context.Canceled)
		return err
	}
	body := e.o.pace(ctx, cancel, resp.Body)
	if err := b.accept(resp, body); err != nil {
		_ = body.Close() // refused
		if b.ctx.Err() != nil {
			return b.ctx.Err()
		}
		return err
	}
	b.body, b.got, b.part = body, 0, resp.StatusCode == http.StatusPartialContent
	b.open = resp.ContentLength < 0
	b.framed = b.open && len(resp.TransferEncoding) > 0 || b.open && resp.ProtoMajor >= 2 || resp.ContentLength >= 0
	return nil
}

// accept checks that an answer is what was asked for, and skips what we have.
func (b *blobReader) accept(resp *http.Response, body io.Reader) error {
	name := where(resp.Request.URL)
	left := b.d.Size - b.off
	switch resp.StatusCode {
	case http.StatusOK:
		if l := resp.ContentLength; l >= 0 && l != b.d.Size {
			return fmt.Errorf("%w: %s: the manifest gives the blob %d bytes, the registry says it has %d", ErrCorrupt, name, b.d.Size, l)
		}
		if b.off > 0 { // it knows no ranges
			if n, err := io.CopyN(io.Discard, body, b.off); err != nil {
				return fmt.Errorf("%w: %s: after %d bytes: %w", ErrUnavailable, name, n, err)
			}
		}
		return nil
	case http.StatusPartialContent:
		from, total, ok := contentRange(resp.Header.Get("Content-Range"))
		switch {
		case b.off == 0 || !ok || from != b.off:
			return fmt.Errorf("%w: %s: asked for the bytes from %d on, got the range %q", ErrCorrupt, name, b.off, printable(resp.Header.Get("Content-Range")))
		case total >= 0 && total != b.d.Size:
			return fmt.Errorf("%w: %s: the manifest gives the blob %d bytes, the registry says it has %d", ErrCorrupt, name, b.d.Size, total)
		case resp.ContentLength > left:
			return fmt.Errorf("%w: %s: %d bytes are missing, the registry sends %d", ErrCorrupt, name, left, resp.ContentLength)
		}
		return nil
	}
	return fmt.Errorf("%w: %s: the manifest gives the blob %d bytes, the registry has no more than %d", ErrCorrupt, name, b.d.Size, b.off)
}

// contentRange reads "bytes FROM-TO/TOTAL"; total is -1 for "*".
func contentRange(h string) (from, total int64, ok bool) {
	spec, ok := strings.CutPrefix(h, "bytes ")
	span, size, ok2 := strings.Cut(spec, "/")
	first, last, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, false
	}
	from, err1 := strconv.ParseInt(strings.TrimSpace(first), 10, 64)
	to, err2 := strconv.ParseInt(strings.TrimSpace(last), 10, 64)
	total = -1
	var err3 error
	if size != "*" {
		if total, err3 = strconv.ParseInt(strings.TrimSpace(size), 10, 64); total < 0 {
			return 0, 0, false
		}
	}
	return from, total, err1 == nil && err2 == nil && err3 == nil && from >= 0 && to >= from
}
