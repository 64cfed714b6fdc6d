package layers

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// indexDirectory writes the index of a layer from what lies in its directory.
// It says the same as the index that was written when the layer was made, but
// for one thing: which directories the tar does not mention. They have got
// their attributes then, so it makes no difference to a mount.
func indexDirectory(ctx context.Context, l layerFiles, d LayerDir, w *chainindex.Writer) error {
	layer, err := newViewLayer(l.diff, d)
	if err != nil {
		return err
	}
	t := dirIndexer{layer: layer, w: w, links: map[uint64]chainindex.Slot{}}
	if layer.mapped {
		if t.tar, err = l.tarAttrs(ctx); err != nil {
			return err
		}
	}
	root, listing, err := t.object(l.diff, "", "")
	if err != nil {
		return err
	}
	if err := w.SetRoot(root); err != nil {
		return err
	}
	for stack := []listedDir{{"", chainindex.Root, listing}}; len(stack) > 0; {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if err := ctx.Err(); err != nil {
			return err
		}
		subdirs, err := t.dir(d)
		if err != nil {
			return fmt.Errorf("%q: %w", d.path, err)
		}
		slices.Reverse(subdirs) // the first one is done first
		stack = append(stack, subdirs...)
	}
	return nil
}

type listedDir struct {
	path    string
	slot    chainindex.Slot
	listing *merge.Listing
}

type dirIndexer struct {
	layer viewLayer
	tar   *node // attributes in the tar; nil: the files have them all
	w     *chainindex.Writer
	links map[uint64]chainindex.Slot // by inode number, of objects with several names
}

// dir writes the names of a directory.
func (t *dirIndexer) dir(d listedDir) (subdirs []listedDir, err error) {
	fd, err := fsat.OpenBeneath(t.layer.fd, d.path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(fd)
	// At most two entries have a name: an object, and a whiteout.
	type has struct{ object, whiteout bool }
	names := map[string]has{}
	for _, e := range d.listing.Entries {
		h := names[e.Name]
		if e.Kind == merge.Whiteout {
			h.whiteout = true
		} else {
			h.object = true
		}
		names[e.Name] = h
	}
	for _, name := range sortedNames(names) {
		child := chainindex.Child{Name: name, Whiteout: names[name].whiteout}
		var listing *merge.Listing
		if names[name].object {
			if child.Object, listing, err = t.object(fd, name, join(d.path, name)); err != nil {
				return nil, fmt.Errorf("%q: %w", name, err)
			}
		}
		linked := child.Object != nil && !child.Object.IsDir() && child.Object.Nlink > 1
		var ino uint64
		if linked {
			ino = child.Object.Ino
			if slot := t.links[ino]; slot != 0 {
				child.Object, child.Link = nil, slot
			}
		}
		slot, err := t.w.Add(d.slot, child)
		if err != nil {
			return nil, err
		}
		if linked {
			t.links[ino] = slot
		}
		if listing != nil {
			subdirs = append(subdirs, listedDir{join(d.path, name), slot, listing})
		}
	}
	return subdirs, nil
}

// object describes the object (dirfd, name), which lies at path, and lists it
// if it is a directory.
func (t *dirIndexer) object(dirfd int, name, path string) (o *chainindex.Object, listing *merge.Listing, err error) {
	var st unix.Stat_t
	if err := fsat.Stat(dirfd, name, &st); err != nil {
		return nil, nil, err
	}
	typ := st.Mode & unix.S_IFMT
	if err := t.layer.stat(dirfd, name, &st); err != nil {
		return nil, nil, err
	}
	n := t.tar.find(path)
	named := n != nil && n.attrs != nil && (n.kind == kindDir) == (typ == unix.S_IFDIR)
	silent := named && (t.layer.virtual || typ == unix.S_IFLNK) // the file tells nothing
	if silent {
		n.attrs.overrule(&st)
	}
	o = &chainindex.Object{Inode: inodeOf(&st)}
	switch typ {
	case unix.S_IFLNK:
		if o.Target, err = fsat.Readlink(dirfd, name); err != nil {
			return nil, nil, err
		}
	case unix.S_IFDIR:
		l, err := t.layer.listing(path)
		if err != nil {
			return nil, nil, err
		}
		opaque, err := t.layer.opaque(path)
		if err != nil {
			return nil, nil, err
		}
		if opaque || l.Opaque {
			o.Flags |= chainindex.FlagOpaque
		}
		if t.tar != nil && !named {
			o.Flags |= chainindex.FlagImplicit
		}
		listing = &l
	}
	if !silent {
		o.Xattrs, err = userXattrs(dirfd, name, t.layer.encoding)
		return o, listing, err
	}
	for _, x := range n.attrs.xattrs {
		o.Xattrs = append(o.Xattrs, chainindex.Xattr{Name: x.name, Value: []byte(x.value)})
	}
	return o, listing, nil
}

// opaque reports whether a directory has the mark of its dialect.
func (l viewLayer) opaque(dir string) (bool, error) {
	fd, err := fsat.OpenBeneath(l.fd, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fd)
	return l.opaqueAt(fd)
}
