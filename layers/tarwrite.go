package layers

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// treeWriter writes objects of layers into a tar whose bytes depend on nothing
// but the tree: no names of owners, no access or change times.
type treeWriter struct {
	ctx   context.Context
	tw    *tar.Writer
	links map[linkKey]string // hard-linked inode → first name written
	buf   []byte
	count int
}

type linkKey struct {
	layer    int
	dev, ino uint64
}

func newTreeWriter(ctx context.Context, w io.Writer) *treeWriter {
	return &treeWriter{ctx: ctx, tw: tar.NewWriter(w), links: map[linkKey]string{}, buf: make([]byte, 256<<10)}
}

// object writes an object of a union. Sockets, which mean nothing without
// their process, are left out.
func (t *treeWriter) object(v *view, n *vnode) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	fd, err := v.open(n)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	d := v.layers[n.layer].dialect
	a, st, err := v.attrsOf(n, fd)
	if err != nil {
		return err
	}
	h := &tar.Header{
		Name: n.path, Mode: int64(a.mode), Uid: a.uid, Gid: a.gid, ModTime: a.mtime, Format: tar.FormatPAX,
		PAXRecords: map[string]string{},
	}
	for _, x := range a.xattrs {
		h.PAXRecords[paxXattr+x.name] = x.value
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if n.path == "" {
			h.Name = "./"
		}
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = v.layers[n.layer].readlink(fd); err != nil {
			return err
		}
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	if h.Typeflag != tar.TypeDir && (st.Nlink > 1 || n.entry != "") {
		k := linkKey{n.layer, st.Dev, st.Ino}
		if first, ok := t.links[k]; ok {
			h.Typeflag, h.Linkname, h.Size, h.PAXRecords = tar.TypeLink, first, 0, nil
		} else {
			t.links[k] = n.path
		}
	}
	data := fd
	if n.meta {
		if data, err = v.openData(n); err != nil {
			return err
		}
		defer fsat.Close(data)
	} else if h.Size > 0 {
		if meta, err := d.Metacopy(fd, ""); err != nil || meta {
			return errors.Join(err, fmt.Errorf("%w: a layer of an image must have the data of its files (metacopy)", ErrUnsupported))
		}
	}
	if err := t.tw.WriteHeader(h); err != nil {
		return err
	}
	t.count++
	if h.Size == 0 {
		return nil
	}
	return t.content(data, h.Size)
}

func (t *treeWriter) content(p int, size int64) error {
	fd, err := reopenQuietly(p)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "content")
	defer f.Close()
	n, err := io.CopyBuffer(onlyWriter{t.tw}, ctxReader{t.ctx, io.LimitReader(f, size)}, t.buf)
	if err == nil && n != size {
		err = fmt.Errorf("it has shrunk from %d to %d bytes while it was read", size, n)
	}
	return err
}

// marker writes a whiteout or opaque marker.
func (t *treeWriter) marker(path string) error {
	t.count++
	return t.tw.WriteHeader(&tar.Header{Name: path, Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
}

// close ends the tar.
func (t *treeWriter) close() error { return t.tw.Close() }
