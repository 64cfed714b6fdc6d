package layers

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func (u *unpacker) file(parent *node, base string, dirfd int, a *attrs, h *tar.Header, tr *tar.Reader) (err error) {
	if u.stats.contents += h.Size; u.stats.contents > u.limits.LayerBytes {
		return fmt.Errorf("%w: more than %d bytes of files in one layer", ErrUnsupported, u.limits.LayerBytes)
	}
	n := &node{name: base, kind: kindFile, payload: -1, parent: parent}
	mode, has := u.maker.mode(u.powers.fileMode(kindFile, a))
	j := fileJob{attrs: a, made: has, node: n}
	if j.fd, err = fsat.OpenName(dirfd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, mode); err != nil {
		return fmt.Errorf("create file: %w", err)
	}
	j.data = sinkBufs.Get().(*[]byte)
	if err := u.content(j, h, tr); err != nil {
		_ = j.end() // it is not the first error
		return err
	}
	n.attrs = u.keep(a)
	parent.add(n)
	u.sink.put(j)
	return nil
}

// content takes in the content of a file. A small one is left in j.data, of
// others what is not written yet.
func (u *unpacker) content(j fileJob, h *tar.Header, tr *tar.Reader) error {
	switch {
	case sparse(h):
		// The stored form differs from the content: it stays in the record.
		return fileError(copySparse(j.fd, tr, h.Size))
	case h.Size <= 0:
		return nil
	}
	if err := u.split.beginPayload(); err != nil {
		return err
	}
	for left := h.Size; left > 0; {
		*j.data = (*j.data)[:min(left, sinkFile)]
		if n, err := io.ReadFull(tr, *j.data); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("%w: expected %d bytes, got %d: %w", ErrCorrupt, h.Size, h.Size-left+int64(n), io.ErrUnexpectedEOF)
			}
			return fileError(err)
		}
		if left -= int64(len(*j.data)); left > 0 {
			if err := writeAll(j.fd, *j.data); err != nil {
				return fmt.Errorf("write file: %w", err)
			}
		}
	}
	pos, err := u.split.endPayload(j.node.path(), h.Size)
	j.node.payload = pos
	return err
}

func childPath(parent *node, base string) string {
	if p := parent.path(); p != "" {
		return p + "/" + base
	}
	return base
}

func fileError(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: tar is truncated in the middle of the file: %w", ErrCorrupt, err)
	}
	return err
}

// copySparse writes size bytes of r and leaves holes for blocks of zeros.
func copySparse(fd int, r io.Reader, size int64) error {
	buf := make([]byte, 64<<10)
	var off int64
	for {
		n, err := io.ReadFull(r, buf)
		for at := 0; at < n; at += 4096 {
			block := buf[at:min(at+4096, n)]
			if !zero(block) {
				if err := writeAllAt(fd, block, off+int64(at)); err != nil {
					return err
				}
			}
		}
		off += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			if off != size {
				return fmt.Errorf("%w: expected %d bytes, got %d", ErrCorrupt, size, off)
			}
			return unix.Ftruncate(fd, size)
		}
		if err != nil {
			return err
		}
	}
}

func writeAllAt(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, off)
		if err != nil && err != unix.EINTR {
			return err
		}
		n = max(n, 0)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
