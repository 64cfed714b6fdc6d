package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Diff lists what a container has changed against its image and init layer,
// in order of paths.
func (s *Store) Diff(ctx context.Context, nameOrID string) ([]Change, error) {
	st, err := s.ContainerStack(ctx, nameOrID)
	if err != nil {
		return nil, err
	}
	return diffStack(ctx, st)
}

func diffStack(ctx context.Context, st Stack) (_ []Change, err error) {
	d := differ{ctx: ctx}
	if d.union, err = openUnion(ctx, st); err != nil {
		return nil, err
	}
	defer d.union.Close()
	if d.lower, err = openView(ctx, st.Lowers); err != nil {
		return nil, err
	}
	defer d.lower.Close()
	if d.links, err = d.union.otherLinks(ctx, false); err != nil {
		return nil, err
	}
	root, err := d.union.root()
	if err != nil {
		return nil, err
	}
	below, err := d.lower.root()
	if err != nil {
		return nil, err
	}
	_, err = d.dir(root, below, false)
	return d.out, err
}

type differ struct {
	ctx          context.Context
	union, lower *view
	links        nameSet // names with changes that the upper does not have
	out          []Change
}

func (d *differ) add(kind, path string) { d.out = append(d.out, Change{kind, "/" + path}) }

// dir compares a directory of the union with what the lower layers have in its
// place, nil if nothing, and reports whether anything in it changed. Of a
// directory that is merged with it, only what the upper has can differ; whole
// says that this one is not.
func (d *differ) dir(n, below *vnode, whole bool) (changed bool, err error) {
	if err := d.ctx.Err(); err != nil {
		return false, err
	}
	names := map[string]bool{}
	if whole {
		for _, side := range []struct {
			v *view
			n *vnode
		}{{d.union, n}, {d.lower, below}} {
			if side.n == nil {
				continue
			}
			list, err := side.v.list(side.n)
			if err != nil {
				return false, err
			}
			for _, c := range list {
				names[c.name] = true
			}
		}
	} else {
		for name := range d.links[n.path] {
			names[name] = true
		}
		if n.layer == 0 {
			l, err := d.union.layers[0].listing(n.at)
			if err != nil {
				return false, fmt.Errorf("%q: %w", "/"+n.path, err)
			}
			for _, e := range l.Entries {
				names[e.Name] = true
			}
		}
	}
	for _, name := range sortedNames(names) {
		did, err := d.name(n, below, name, whole)
		if err != nil {
			return false, err
		}
		changed = changed || did
	}
	return changed, nil
}

func (d *differ) name(dir, lowerDir *vnode, name string, whole bool) (changed bool, err error) {
	n, err := d.union.child(dir, name)
	if err != nil {
		return false, err
	}
	var below *vnode
	if lowerDir != nil {
		if below, err = d.lower.child(lowerDir, name); err != nil {
			return false, err
		}
	}
	path := join(dir.path, name)
	switch {
	case n == nil:
		if below != nil {
			d.add("D", path)
		}
		return below != nil, nil
	case below == nil || !n.isDir() || !below.isDir():
		if below == nil {
			d.add("A", path)
		} else if below.st.Dev == n.st.Dev && below.st.Ino == n.st.Ino {
			return false, nil // one of several hard links
		} else {
			d.add("C", path)
		}
		if n.isDir() {
			_, err = d.dir(n, nil, true)
		}
		return true, err
	}
	at := len(d.out)
	d.add("C", path)
	inside, err := d.dir(n, below, whole || n.moved || n.parts[len(n.parts)-1].layer == 0)
	if err != nil {
		return false, err
	}
	same, err := d.sameDir(n, below)
	if err != nil {
		return false, fmt.Errorf("%q: %w", "/"+path, err)
	}
	if same && !inside {
		d.out = d.out[:at] // copied up, and nothing came of it
		return false, nil
	}
	return true, nil
}

func (d *differ) sameDir(n, below *vnode) (bool, error) {
	a, err := d.union.attrs(n)
	if err != nil {
		return false, err
	}
	b, err := d.lower.attrs(below)
	return err == nil && a.String() == b.String(), err
}

// DiffImages lists what changed from image a to image b, in order of paths.
func (s *Store) DiffImages(ctx context.Context, a, b string) ([]Change, error) {
	lease, err := s.newLease(ctx)
	if err != nil {
		return nil, err
	}
	defer s.dropLease(lease)
	var views [2]*view
	for i, name := range []string{a, b} {
		var dirs []LayerDir
		err := s.update(ctx, func(tx *metadata.Tx) error {
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
		if err != nil {
			return nil, err
		}
		if views[i], err = openView(ctx, dirs); err != nil {
			return nil, err
		}
		defer views[i].Close()
	}
	c := comparer{ctx: ctx, a: views[0], b: views[1]}
	ra, err := views[0].root()
	if err != nil {
		return nil, err
	}
	rb, err := views[1].root()
	if err != nil {
		return nil, err
	}
	_, err = c.dir(ra, rb)
	return c.out, err
}

type comparer struct {
	ctx  context.Context
	a, b *view
	out  []Change
}

// dir compares two directories, either of which may be missing.
func (c *comparer) dir(na, nb *vnode) (changed bool, err error) {
	if err := c.ctx.Err(); err != nil {
		return false, err
	}
	left, right := map[string]*vnode{}, map[string]*vnode{}
	names := map[string]bool{}
	for _, side := range []struct {
		v *view
		n *vnode
		m map[string]*vnode
	}{{c.a, na, left}, {c.b, nb, right}} {
		if side.n == nil || !side.n.isDir() {
			continue
		}
		list, err := side.v.list(side.n)
		if err != nil {
			return false, err
		}
		for _, n := range list {
			side.m[n.name] = n
			names[n.name] = true
		}
	}
	for _, name := range sortedNames(names) {
		did, err := c.name(left[name], right[name])
		if err != nil {
			return false, err
		}
		changed = changed || did
	}
	return changed, nil
}

func (c *comparer) name(na, nb *vnode) (changed bool, err error) {
	switch {
	case nb == nil:
		c.out = append(c.out, Change{"D", "/" + na.path})
		return true, nil
	case na == nil:
		c.out = append(c.out, Change{"A", "/" + nb.path})
		if nb.isDir() {
			_, err = c.dir(nil, nb)
		}
		return true, err
	}
	same, err := c.same(na, nb)
	if err != nil {
		return false, fmt.Errorf("%q: %w", "/"+nb.path, err)
	}
	at := len(c.out)
	c.out = append(c.out, Change{"C", "/" + nb.path})
	if nb.isDir() {
		inside, err := c.dir(na, nb)
		if err != nil {
			return false, err
		}
		if inside {
			return true, nil
		}
	}
	if same {
		c.out = c.out[:at]
	}
	return !same, nil
}

func (c *comparer) same(na, nb *vnode) (bool, error) {
	if (na.st.Mode^nb.st.Mode)&unix.S_IFMT != 0 {
		return false, nil
	}
	if na.st.Dev == nb.st.Dev && na.st.Ino == nb.st.Ino {
		return true, nil
	}
	fa, err := c.a.open(na)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fa)
	fb, err := c.b.open(nb)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fb)
	aa, _, err := c.a.attrsOf(na, fa)
	if err != nil {
		return false, err
	}
	ab, _, err := c.b.attrsOf(nb, fb)
	if err != nil || aa.String() != ab.String() {
		return false, err
	}
	switch na.st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		ta, err := c.a.layers[na.layer].readlink(fa)
		if err != nil {
			return false, err
		}
		tb, err := c.b.layers[nb.layer].readlink(fb)
		return ta == tb, err
	case unix.S_IFCHR, unix.S_IFBLK:
		return na.st.Rdev == nb.st.Rdev, nil
	case unix.S_IFREG:
		if na.st.Size != nb.st.Size {
			return false, nil
		}
		return sameContent(c.ctx, fa, fb)
	}
	return true, nil
}

func sameContent(ctx context.Context, a, b int) (bool, error) {
	var f [2]*os.File
	for i, p := range []int{a, b} {
		fd, err := fsat.Reopen(p, unix.O_RDONLY)
		if err != nil {
			return false, err
		}
		f[i] = os.NewFile(uintptr(fd), "content")
		defer f[i].Close()
	}
	ba, bb := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		na, erra := io.ReadFull(ctxReader{ctx, f[0]}, ba)
		nb, errb := io.ReadFull(ctxReader{ctx, f[1]}, bb)
		if !bytes.Equal(ba[:na], bb[:nb]) {
			return false, nil
		}
		for _, err := range []error{erra, errb} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if erra != nil || errb != nil {
			return true, nil
		}
	}
}
