package layers

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// formOf tells from the first bytes how something is compressed: "none", or the
// name of the format.
func formOf(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return "gzip"
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}): // skippable frame
		return "zstd"
	case bytes.HasPrefix(head, []byte("BZh")):
		return "bzip2"
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return "xz"
	}
	return "none"
}

// decompress finds out by its first bytes how r is compressed, whatever name
// or media type it came with, and returns the plain stream. The caller closes
// it, and reads what is left of r afterwards.
func decompress(r *bufio.Reader) (plain io.ReadCloser, form string, err error) {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", err
	}
	form = formOf(head)
	var z io.Reader = r
	switch form {
	case "gzip":
		if z, err = gzip.NewReader(r); err != nil {
			return nil, "", fmt.Errorf("%w: gzip: %w", ErrCorrupt, err)
		}
	case "zstd":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(1<<28))
		if err != nil {
			return nil, "", fmt.Errorf("%w: zstd: %w", ErrCorrupt, err)
		}
		return d.IOReadCloser(), form, nil
	case "bzip2":
		z = bzip2.NewReader(r)
	case "xz":
		if z, err = newXZReader(r); err != nil {
			return nil, "", err
		}
	}
	return io.NopCloser(z), form, nil
}

// decompressError tells damage to the compressed stream from other errors.
func decompressError(form string, err error) error {
	var structural bzip2.StructuralError
	switch {
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader),
		errors.Is(err, zstd.ErrCRCMismatch), errors.Is(err, zstd.ErrMagicMismatch),
		errors.As(err, &structural), form != "none" && errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: %s stream is damaged or truncated: %w", ErrCorrupt, form, err)
	}
	return err
}
