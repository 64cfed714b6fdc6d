package layers

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// tarAttrs reads from the tar-split record which attributes the layer's tar
// gives to the objects of the layer. Contents are not looked at.
func (l layerFiles) tarAttrs(ctx context.Context) (*node, error) { return l.readTree(ctx, false) }

// readTree is tarAttrs; with marks, the tree also has whiteouts, opaque directories,
// and a pending node for each hard link into a lower layer.
func (l layerFiles) readTree(ctx context.Context, marks bool) (*node, error) {
	fd, err := fsat.OpenRegular(l.dir, splitName, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", splitName, err)
	}
	f := os.NewFile(uintptr(fd), splitName)
	defer f.Close()
	zr, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer zr.Close()
	root := newRoot()
	tr := tar.NewReader(&hollowTar{ctx: ctx, dec: json.NewDecoder(zr)})
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return root, nil
		}
		if err == nil || errors.Is(err, tar.ErrInsecurePath) {
			err = root.note(h, marks)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, splitName, err)
		}
	}
}

// note adds an entry of a tar to a tree that has attributes only.
func (n *node) note(h *tar.Header, marks bool) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	comps, err := tarPath(h.Name, 1<<20)
	if err != nil {
		return err
	}
	a, err := headerAttrs(h, 1<<40)
	if err != nil {
		return err
	}
	if len(comps) == 0 {
		n.attrs, n.implicit = a, false
		return nil
	}
	dirs, base := comps[:len(comps)-1], comps[len(comps)-1]
	if skip, err := checkMarkers(dirs); skip || err != nil {
		return err
	}
	mark, deleted := whiteout.ParseMarker(base)
	if mark != whiteout.NotMarker && (!marks || mark != whiteout.MarkerWhiteout && mark != whiteout.MarkerOpaque) {
		return nil
	}
	parent, err := n.walk(dirs, func(p *node, name string) (*node, error) {
		return p.add(&node{name: name, kind: kindDir, children: map[string]*node{}, implicit: true}), nil
	})
	if err != nil {
		return err
	}
	switch mark {
	case whiteout.MarkerWhiteout:
		if parent.whiteouts == nil {
			parent.whiteouts = map[string]struct{}{}
		}
		parent.whiteouts[deleted] = struct{}{}
		return nil
	case whiteout.MarkerOpaque:
		parent.opaque = true
		return nil
	}
	c := &node{name: base, attrs: a, size: h.Size}
	switch h.Typeflag {
	case tar.TypeDir:
		if old := parent.children[base]; old != nil && old.kind == kindDir {
			old.attrs, old.implicit = a, false
			return nil
		}
		c.kind, c.children = kindDir, map[string]*node{}
	case tar.TypeSymlink:
		c.kind, c.target = kindSymlink, h.Linkname
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		c.kind = kindNode
		a.setType(specialOf(h))
	case tar.TypeLink:
		comps, err := tarPath(h.Linkname, 1<<20)
		if err != nil || len(comps) == 0 {
			return errors.Join(err, fmt.Errorf("hard link to %q", h.Linkname))
		}
		dir, err := n.walk(comps[:len(comps)-1], nil)
		if err != nil {
			return err
		}
		delete(parent.children, base)
		if dir == nil || dir.children[comps[len(comps)-1]] == nil {
			if marks {
				parent.add(&node{name: base, kind: kindPending})
			}
			return nil // a copy of a file of a lower layer
		}
		to := dir.children[comps[len(comps)-1]]
		c.kind, c.attrs, c.target, c.size = to.kind, to.attrs, to.target, to.size
	default:
		c.kind = kindFile
	}
	parent.add(c)
	return nil
}

// specialOf returns the type (S_IFMT) and the number of the device or fifo that an
// entry is.
func specialOf(h *tar.Header) (typ uint32, rdev uint64) {
	rdev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	switch h.Typeflag {
	case tar.TypeChar:
		return unix.S_IFCHR, rdev
	case tar.TypeBlock:
		return unix.S_IFBLK, rdev
	}
	return unix.S_IFIFO, 0
}

// find returns the node at a canonical path; nil if there is none.
func (n *node) find(path string) *node {
	for name := range strings.SplitSeq(path, "/") {
		if n == nil {
			return nil
		}
		if name != "" {
			n = n.children[name]
		}
	}
	return n
}

// hollowTar is the tar of a tar-split record with zeros for contents.
type hollowTar struct {
	ctx   context.Context
	dec   *json.Decoder
	data  []byte // rest of a raw segment
	zeros int64  // rest of a content
}

func (t *hollowTar) Read(p []byte) (int, error) {
	for len(t.data) == 0 && t.zeros == 0 {
		if err := t.ctx.Err(); err != nil {
			return 0, err
		}
		var e storage.Entry
		if err := t.dec.Decode(&e); err != nil {
			return 0, err
		}
		if e.Type == storage.FileType {
			t.zeros = max(e.Size, 0)
		} else {
			t.data = e.Payload
		}
	}
	if t.zeros > 0 {
		n := int(min(int64(len(p)), t.zeros))
		clear(p[:n])
		t.zeros -= int64(n)
		return n, nil
	}
	n := copy(p, t.data)
	t.data = t.data[n:]
	return n, nil
}
