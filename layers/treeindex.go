package layers

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout/override"
)

// index describes the finished tree: it writes the layer's index and computes
// the sizes. Names, links and attributes are in memory; the rest takes one
// lstat per object, which comes after the tree was synced, because until then a
// file system does not know how many blocks a file will occupy.
func (u *unpacker) index(ctx context.Context, w *chainindex.Writer) error {
	defer u.dropDir()
	t := treeIndexer{u: u, w: w, links: map[uint64]chainindex.Slot{}}
	var st unix.Stat_t
	if err := fsat.Fstat(u.diff, &st); err != nil {
		return err
	}
	u.stats.apparent, u.stats.inodes, u.stats.allocated = 0, 0, st.Blocks*512
	o, err := t.object(u.root, u.diff, "", &st)
	if err != nil {
		return err
	}
	if err := w.SetRoot(o); err != nil {
		return err
	}
	for stack := []indexedDir{{u.root, chainindex.Root}}; len(stack) > 0; {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if err := ctx.Err(); err != nil {
			return err
		}
		subdirs, err := t.dir(d)
		if err != nil {
			return fmt.Errorf("index %q: %w", d.node.path(), err)
		}
		slices.Reverse(subdirs) // the first one is done first
		stack = append(stack, subdirs...)
	}
	return nil
}

type indexedDir struct {
	node *node
	slot chainindex.Slot
}

type treeIndexer struct {
	u     *unpacker
	w     *chainindex.Writer
	links map[uint64]chainindex.Slot // by inode number, of objects with several names
	names []string
}

// dir writes the names of a directory.
func (t *treeIndexer) dir(d indexedDir) (subdirs []indexedDir, err error) {
	if d.node.opaque && t.u.powers.dialect.ReadsMarkers() {
		t.u.stats.inodes++ // the marker
	}
	if len(d.node.children)+len(d.node.whiteouts) == 0 {
		return nil, nil
	}
	fd, err := t.u.open(d.node)
	if err != nil {
		return nil, err
	}
	t.names = t.names[:0]
	for n := range d.node.children {
		t.names = append(t.names, n)
	}
	for n := range d.node.whiteouts { // bind has seen to it that no object has the name, too
		t.names = append(t.names, n)
	}
	slices.Sort(t.names)
	for _, name := range t.names {
		n := d.node.children[name]
		if n == nil {
			t.u.stats.inodes++
			if _, err := t.w.Add(d.slot, chainindex.Child{Name: name, Whiteout: true}); err != nil {
				return nil, err
			}
			continue
		}
		slot, err := t.child(d.slot, n, fd)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		if n.kind == kindDir {
			subdirs = append(subdirs, indexedDir{n, slot})
		}
	}
	return subdirs, nil
}

func (t *treeIndexer) child(dir chainindex.Slot, n *node, dirfd int) (chainindex.Slot, error) {
	var st unix.Stat_t
	if err := fsat.Stat(dirfd, n.name, &st); err != nil {
		return 0, err
	}
	linked := st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1
	if slot := t.links[st.Ino]; linked && slot != 0 {
		return t.w.Add(dir, chainindex.Child{Name: n.name, Link: slot})
	}
	t.u.stats.inodes++
	t.u.stats.allocated += st.Blocks * 512
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		t.u.stats.apparent += st.Size
	}
	o, err := t.object(n, dirfd, n.name, &st)
	if err != nil {
		return 0, err
	}
	slot, err := t.w.Add(dir, chainindex.Child{Name: n.name, Object: o})
	if linked {
		t.links[st.Ino] = slot
	}
	return slot, err
}

func (t *treeIndexer) object(n *node, dirfd int, name string, st *unix.Stat_t) (*chainindex.Object, error) {
	told := *st
	if n.attrs != nil && !t.u.powers.privileged {
		n.attrs.overrule(&told)
	}
	o := &chainindex.Object{Inode: inodeOf(&told)}
	if n.opaque {
		o.Flags |= chainindex.FlagOpaque
	}
	if n.implicit && n.kind == kindDir {
		o.Flags |= chainindex.FlagImplicit
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		o.Target = n.target
	}
	var err error
	o.Xattrs, err = t.u.shownXattrs(n, dirfd, name)
	return o, err
}

// shownXattrs are the extended attributes of an object: those that it has on disk
// and shows, or, where a file can have none, those of the tar. Those in which the
// kernel has a say are read again.
func (u *unpacker) shownXattrs(n *node, dirfd int, name string) (out []chainindex.Xattr, err error) {
	a := n.attrs
	if u.powers.privileged {
		reread := u.foreignXattrs
		for i := 0; a != nil && i < len(a.xattrs); i++ {
			x := a.xattrs[i].name
			reread = reread || !strings.HasPrefix(x, "user.") && !strings.HasPrefix(x, "trusted.")
		}
		if reread {
			return userXattrs(dirfd, name, u.powers.encoding)
		}
	}
	if a == nil {
		return nil, nil
	}
	all := !u.powers.privileged && (n.kind == kindSymlink || u.powers.override == override.None)
	for _, x := range a.xattrs {
		if all || !x.lost {
			out = append(out, chainindex.Xattr{Name: x.name, Value: []byte(x.value)})
		}
	}
	return out, nil
}
