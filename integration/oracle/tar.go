package oracle

import (
	"archive/tar"
	"bytes"
	"fmt"
	"path"
	"time"
)

// Tar writes the layer as an image layer: whiteouts as .wh. files, times with
// nanoseconds and extended attributes in PAX records. Sockets, which no tar
// can hold, are an error; a hard link keeps its name.
func (l Layer) Tar() ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range l.Entries {
		if err := writeTarEntry(tw, e); err != nil {
			return nil, fmt.Errorf("tar entry %q: %w", e.Path, err)
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func writeTarEntry(tw *tar.Writer, e Entry) error {
	when := e.Mtime
	if when == "" {
		when = defaultTime
	}
	ts, err := parseTime(when)
	if err != nil {
		return err
	}
	h := &tar.Header{
		Name: string(e.Path), Mode: int64(e.Mode), Uid: e.UID, Gid: e.GID, ModTime: time.Unix(ts.Sec, ts.Nsec),
		Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if e.Kind == Dir || e.Kind == Opaque {
			h.Mode = 0o755
		}
	}
	for k, v := range e.Xattrs {
		b, err := EncodeValue(v)
		if err != nil {
			return err
		}
		h.PAXRecords["SCHILY.xattr."+k] = string(b)
	}
	var content []byte
	switch e.Kind {
	case Dir, Opaque:
		h.Typeflag, h.Name = tar.TypeDir, string(e.Path)+"/"
		if e.Path == "" {
			h.Name = "./"
		}
	case File:
		h.Typeflag, content = tar.TypeReg, []byte(e.Text)
		if e.Text == "" {
			content = e.content()
		}
		h.Size = int64(len(content))
	case Symlink:
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, string(e.Target), 0o777
	case Hardlink:
		h.Typeflag, h.Linkname = tar.TypeLink, string(e.Target)
	case Fifo:
		h.Typeflag = tar.TypeFifo
	case Char, Block:
		h.Typeflag = tar.TypeChar
		if e.Kind == Block {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(e.Rdev[0]), int64(e.Rdev[1])
	case Whiteout, XWhiteout:
		h.Typeflag, h.Name = tar.TypeReg, path.Join(path.Dir(string(e.Path)), ".wh."+path.Base(string(e.Path)))
	default:
		return fmt.Errorf("a tar has no %s", e.Kind)
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	if _, err := tw.Write(content); err != nil {
		return err
	}
	if e.Kind != Opaque {
		return nil
	}
	return tw.WriteHeader(&tar.Header{Name: path.Join(string(e.Path), ".wh..wh..opq"), Typeflag: tar.TypeReg, Mode: 0o644, ModTime: h.ModTime, Format: tar.FormatPAX})
}

// content is what writeContent writes.
func (e Entry) content() []byte {
	if !e.Sparse {
		return Pattern(e.Seed, e.Size)
	}
	const edge = 4096
	b := make([]byte, e.Size)
	copy(b, Pattern(e.Seed, edge))
	if e.Size > 2*edge {
		copy(b[(e.Size-edge)&^(edge-1):], Pattern(e.Seed+1, edge))
	}
	return b
}
