package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/metadata/chainindex"
)

// DiffOptions configure [Store.DiffImages].
type DiffOptions struct {
	// Times: a modification time of its own makes a difference.
	Times bool
}

// Difference is one path that two images do not have alike.
type Difference struct {
	Kind string // A, C or D
	Path Path   // absolute
	// Type is what the path is; of one that is deleted, what it was.
	Type string
	// Size and OldSize are the bytes of files, in the second and in the first image.
	Size, OldSize int64
	// LinkTo is the name that stands for a file which has several, unless that is this
	// one: its bytes are counted there. OldLinkTo is that of what is changed, before.
	LinkTo, OldLinkTo Path
	// Why is empty for a directory that is listed for what is in it.
	Why     []string
	Details []string
}

// DiffImages lists what changed from image a to image b, in order of paths: every path
// that only one of them has, and those that differ in what they are, in attributes or in
// content. Contents are compared byte for byte, unless both are the same file of one layer.
func (s *Store) DiffImages(ctx context.Context, a, b string, o DiffOptions) ([]Difference, error) {
	lease, err := s.newLease(ctx)
	if err != nil {
		return nil, err
	}
	defer s.dropLease(lease)
	c := imageDiffer{ctx: ctx, opt: o, buf: make([]byte, readBuffer)}
	for i, name := range []string{a, b} {
		dirs, err := s.leasedStack(ctx, lease, name)
		if err != nil {
			return nil, err
		}
		t := &c.trees[i]
		if t.index, err = s.mergedIndex(ctx, dirs); err != nil {
			return nil, fmt.Errorf("image %q: %w", name, err)
		}
		if t.index != nil {
			defer t.index.Close() // was only read
		}
		t.files = newFileReader(dirs)
		defer t.files.Close()
	}
	err = c.roots()
	return c.out, err
}

// leasedStack returns the directories of an image, topmost first, which stay as long as
// the lease.
func (s *Store) leasedStack(ctx context.Context, lease, name string) (dirs []LayerDir, err error) {
	err = s.update(ctx, func(tx *metadata.Tx) error {
		dirs = nil
		r, err := resolve(tx, name)
		if err != nil {
			return err
		}
		row, err := tx.Image(r.id)
		if err != nil || row.TopChain == "" {
			return err
		}
		if dirs, err = s.stackTx(tx, row.TopChain); err != nil {
			return err
		}
		return tx.LeaseLayer(lease, row.TopChain)
	})
	return dirs, err
}

// mergedTree is what an image shows.
type mergedTree struct {
	index *chainindex.Index // nil: an image without layers
	files *fileReader
}

// object is one object of a merged tree; of slot 0 there is none.
type mergedObject struct {
	slot chainindex.Slot
	chainindex.Inode
}

func (o *mergedObject) none() bool { return o.slot == 0 }

func (t *mergedTree) object(slot chainindex.Slot) (o mergedObject, err error) {
	if o.slot = slot; slot != 0 {
		err = t.index.Inode(slot, &o.Inode)
	}
	return o, err
}

// list returns the names of what o is, if it is a directory.
func (t *mergedTree) list(o mergedObject) (map[string]chainindex.Slot, error) {
	if o.none() || !o.IsDir() {
		return nil, nil
	}
	var buf chainindex.DirBuf
	if err := t.index.ReadDir(o.slot, 0, math.MaxInt, &buf); err != nil {
		return nil, err
	}
	out := make(map[string]chainindex.Slot, len(buf.Entries))
	for _, e := range buf.Entries {
		out[string(e.Name)] = e.Slot
	}
	return out, nil
}

// origin is the file on disk that an object shows: two with the same are one.
func (t *mergedTree) origin(o mergedObject) (cacheID string, slot chainindex.Slot) {
	if slot = o.Origin; slot == 0 {
		slot = o.slot
	}
	return t.files.dirs[o.Layer].CacheID, slot
}

func (t *mergedTree) open(o mergedObject) (*os.File, error) {
	path, err := t.index.ContentPath(o.slot)
	if err != nil {
		return nil, err
	}
	return t.files.open(int(o.Layer), path)
}

// firstName is the first name of an object with several, "" of one that has no other.
func (t *mergedTree) firstName(o mergedObject) (string, error) {
	if o.none() || o.IsDir() || o.Nlink < 2 {
		return "", nil
	}
	return t.index.Path(o.slot)
}

// linkTo is the first name of what is at path, "" if that is this one.
func (t *mergedTree) linkTo(o mergedObject, path string) (Path, error) {
	first, err := t.firstName(o)
	if first == "" || first == path || err != nil {
		return "", err
	}
	return Path("/" + first), nil
}

type imageDiffer struct {
	ctx   context.Context
	opt   DiffOptions
	trees [2]mergedTree
	buf   []byte
	out   []Difference
}

func (c *imageDiffer) roots() error {
	var o [2]mergedObject
	for i := range c.trees {
		if c.trees[i].index == nil {
			continue
		}
		var err error
		if o[i], err = c.trees[i].object(chainindex.Root); err != nil {
			return err
		}
	}
	if !o[0].none() && !o[1].none() {
		r, err := c.compare(o[0], o[1], "")
		if err != nil {
			return err
		}
		if len(r.why) > 0 {
			c.out = append(c.out, Difference{Kind: "C", Path: "/", Type: TypeDirectory, Why: r.why, Details: r.details})
		}
	}
	_, err := c.dir(o[0], o[1], "")
	return err
}

// dir compares two directories, of which either may be missing or something else.
func (c *imageDiffer) dir(a, b mergedObject, path string) (changed bool, err error) {
	if err := c.ctx.Err(); err != nil {
		return false, err
	}
	left, err := c.trees[0].list(a)
	if err != nil {
		return false, err
	}
	right, err := c.trees[1].list(b)
	if err != nil {
		return false, err
	}
	names := make(map[string]bool, max(len(left), len(right)))
	for n := range left {
		names[n] = true
	}
	for n := range right {
		names[n] = true
	}
	for _, n := range sortedNames(names) {
		did, err := c.name(left[n], right[n], join(path, n))
		if err != nil {
			return false, err
		}
		changed = changed || did
	}
	return changed, nil
}

func (c *imageDiffer) name(sa, sb chainindex.Slot, path string) (changed bool, err error) {
	a, err := c.trees[0].object(sa)
	if err != nil {
		return false, err
	}
	b, err := c.trees[1].object(sb)
	if err != nil {
		return false, err
	}
	d, err := c.difference(a, b, path)
	if err != nil {
		return false, fmt.Errorf("%q: %w", "/"+path, err)
	}
	at := len(c.out)
	c.out = append(c.out, d)
	inside, err := c.dir(a, b, path)
	if err != nil {
		return false, err
	}
	if d.Kind == "C" && len(d.Why) == 0 && !inside {
		c.out = c.out[:at]
		return false, nil
	}
	return true, nil
}

// difference describes a path that both, or one of the two, have.
func (c *imageDiffer) difference(a, b mergedObject, path string) (d Difference, err error) {
	d = Difference{Kind: "C", Path: Path("/" + path)}
	shown, tree := b, &c.trees[1]
	var r reasons
	switch {
	case b.none():
		d.Kind, shown, tree = "D", a, &c.trees[0]
	case a.none():
		d.Kind = "A"
	default:
		if r, err = c.compare(a, b, path); err != nil {
			return d, err
		}
	}
	d.Type, d.Why, d.Details = typeName(shown.Mode), r.why, r.details
	d.OldSize, d.Size = contentSize(&a.Inode), contentSize(&b.Inode)
	if d.LinkTo, err = tree.linkTo(shown, path); err != nil || d.Kind != "C" {
		return d, err
	}
	d.OldLinkTo, err = c.trees[0].linkTo(a, path)
	return d, err
}

// contentSize is the size of a file, 0 of anything else.
func contentSize(n *chainindex.Inode) int64 {
	if n.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}
	return int64(n.Size)
}

// compare says why two objects of one path differ.
func (c *imageDiffer) compare(a, b mergedObject, path string) (r reasons, err error) {
	ta, tb := &c.trees[0], &c.trees[1]
	ca, sa := ta.origin(a)
	cb, sb := tb.origin(b)
	if ca != cb || sa != sb || a.IsDir() { // a directory may have its attributes from elsewhere
		oa, err := ta.index.Object(a.slot)
		if err != nil {
			return r, err
		}
		ob, err := tb.index.Object(b.slot)
		if err != nil {
			return r, err
		}
		r.metadata(oa, ob, c.opt.Times)
		if a.Mode&b.Mode&unix.S_IFMT == unix.S_IFREG && a.Type() == b.Type() && a.Size == b.Size {
			same, err := c.sameContent(a, b)
			if err != nil {
				return r, err
			}
			if !same {
				r.add(WhyContent, "")
			}
		}
	}
	if a.Type() != b.Type() {
		return r, nil
	}
	na, err := ta.firstName(a)
	if err != nil {
		return r, err
	}
	nb, err := tb.firstName(b)
	if err != nil {
		return r, err
	}
	if na == "" {
		na = path
	}
	if nb == "" {
		nb = path
	}
	if na != nb {
		r.add(WhyHardlink, "%q -> %q", "/"+na, "/"+nb)
	}
	return r, nil
}

func (c *imageDiffer) sameContent(a, b mergedObject) (bool, error) {
	if a.Size == 0 {
		return true, nil
	}
	fa, err := c.trees[0].open(a)
	if err != nil {
		return false, err
	}
	defer fa.Close() // was only read
	fb, err := c.trees[1].open(b)
	if err != nil {
		return false, err
	}
	defer fb.Close() // was only read
	return sameContent(c.ctx, fa, fb, c.buf)
}

// sameContent reads both into one half of buf each.
func sameContent(ctx context.Context, a, b io.Reader, buf []byte) (bool, error) {
	ba, bb := buf[:len(buf)/2], buf[len(buf)/2:]
	for {
		na, erra := io.ReadFull(ctxReader{ctx, a}, ba)
		nb, errb := io.ReadFull(ctxReader{ctx, b}, bb)
		for _, err := range []error{erra, errb} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if !bytes.Equal(ba[:na], bb[:nb]) {
			return false, nil
		}
		if erra != nil || errb != nil {
			return true, nil
		}
	}
}
