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

// decompress finds out by its first bytes how r is compressed, whatever name
// or media type it came with, and returns the plain stream. The caller closes
// it, and reads what is left of r afterwards.
func decompress(r *bufio.Reader) (plain io.ReadCloser, form string, err error) {
	magic, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, "", fmt.Errorf("%w: gzip: %w", ErrCorrupt, err)
		}
		return z, "gzip", nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(magic) >= 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:4], []byte{0x2a, 0x4d, 0x18}): // skippable frame
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(1<<30))
		if err != nil {
			return nil, "", fmt.Errorf("%w: zstd: %w", ErrCorrupt, err)
		}
		return z.IOReadCloser(), "zstd", nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(r)), "bzip2", nil
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, "", fmt.Errorf("%w: xz compression; recompress with gzip or zstd", ErrUnsupported)
	}
	return io.NopCloser(r), "none", nil
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
