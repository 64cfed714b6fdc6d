package layers

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// view reads a stack of layer directories as the union they make. It holds one
// descriptor per layer, and no other between calls.
type view struct {
	ctx    context.Context // of the work that the view was opened for
	layers []viewLayer     // topmost first
	// upper: layers[0] is a container's writable layer, in which objects may
	// say that a part of them is elsewhere. In other layers nothing may.
	upper bool
	index linkIndex
}

func openView(ctx context.Context, dirs []LayerDir) (*view, error) {
	v := &view{ctx: ctx}
	for _, d := range dirs {
		fd, err := d.open()
		if err != nil {
			v.Close()
			return nil, err
		}
		l, err := newViewLayer(fd, d)
		v.layers = append(v.layers, l)
		if err != nil {
			v.Close()
			return nil, fmt.Errorf("layer directory %s: %w", d.Path, err)
		}
	}
	return v, nil
}

func (v *view) Close() {
	for _, l := range v.layers {
		fsat.Close(l.fd)
		l.record.close()
	}
	v.layers = nil
	v.index.close()
}

// part is a place in a layer.
type part struct {
	layer int
	path  string
}

func (p part) in(name string) part { return part{p.layer, join(p.path, name)} }

// vnode is an object of the union.
type vnode struct {
	path  string // "" is the root
	name  string
	layer int         // that it shows from
	at    string      // its path there; another than path below a renamed directory
	st    unix.Stat_t // what the object is; owners of symbolic links only in attrs
	parts []part      // of a directory: the directories that are merged, topmost first
	indirection
}

func (n *vnode) isDir() bool { return n.st.Mode&unix.S_IFMT == unix.S_IFDIR }

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// root returns the root directory; nil if there are no layers.
func (v *view) root() (*vnode, error) {
	n := &vnode{}
	for i := range v.layers {
		n.parts = append(n.parts, part{layer: i})
	}
	if len(n.parts) == 0 {
		return nil, nil
	}
	return n, v.stat(n)
}

// stat sets what an object is.
func (v *view) stat(n *vnode) error {
	fd, err := v.open(n)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	if err := fsat.Fstat(fd, &n.st); err != nil {
		return err
	}
	return v.complete(part{n.layer, n.at}, fd, &n.st)
}

// complete completes st, which is what the kernel says about the file fd at p, by
// what the object is.
func (v *view) complete(p part, fd int, st *unix.Stat_t) error {
	l := &v.layers[p.layer]
	if l.virtual {
		a, _, err := l.record.attrs(v.ctx, p.path)
		if err != nil {
			return err
		}
		if a != nil {
			a.overrule(st)
			return nil
		}
	}
	return l.stat(fd, "", st)
}

// open opens the object in the layer it shows from, O_PATH.
func (v *view) open(n *vnode) (int, error) {
	if n.entry != "" {
		return fsat.OpenName(v.index.fd, n.entry, unix.O_PATH, 0)
	}
	return v.openPart(part{n.layer, n.at}, unix.O_PATH|unix.O_NOFOLLOW)
}

func (v *view) openPart(p part, flags int) (int, error) {
	return fsat.OpenBeneath(v.layers[p.layer].fd, p.path, flags)
}

// attrs returns the attributes of an object.
func (v *view) attrs(n *vnode) (*attrs, error) {
	fd, err := v.open(n)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(fd)
	a, _, err := v.attrsOf(n, fd)
	return a, err
}

// attrsOf returns the attributes of an object, whose file is fd, and what stat(2)
// says about the file, completed by what the object is.
func (v *view) attrsOf(n *vnode, fd int) (*attrs, unix.Stat_t, error) {
	l := &v.layers[n.layer]
	a, st, err := readAttrs(fd, l.encoding)
	if err != nil || !l.virtual && st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return a, st, err
	}
	known, err := v.recorded(n)
	if err != nil || known == nil {
		return a, st, err
	}
	known.overrule(&st)
	a.mode, a.uid, a.gid, a.xattrs = st.Mode&permBits, known.uid, known.gid, nil
	a.setType(st.Mode, st.Rdev)
	for _, x := range known.xattrs {
		a.xattrs = append(a.xattrs, xattr{name: x.name, value: x.value})
	}
	return a, st, nil
}

// recorded returns what is known of an object whose file tells nothing; nil if that
// is nothing, too, as in an upper.
func (v *view) recorded(n *vnode) (*attrs, error) {
	parts := n.parts
	if !n.isDir() {
		parts = []part{{n.layer, n.at}}
	}
	var first *attrs
	for _, p := range parts {
		a, bare, err := v.layers[p.layer].record.attrs(v.ctx, p.path)
		if err != nil {
			return nil, err
		}
		if a != nil && !bare {
			return a, nil
		}
		// A directory that the tar does not mention is what it is below.
		if first == nil {
			first = a
		}
	}
	return first, nil
}

// isOpaque reports whether a directory hides what lies below it.
func (v *view) isOpaque(n *vnode) (bool, error) {
	fd, err := v.open(n)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fd)
	return v.layers[n.layer].opaqueAt(fd)
}

// child looks a name up; nil if the union has none.
func (v *view) child(dir *vnode, name string) (*vnode, error) {
	n := &vnode{path: join(dir.path, name), name: name, layer: -1}
	var err error
	if v.upper && len(dir.parts) > 0 && dir.parts[0].layer == 0 {
		err = v.upperChild(n, dir)
	} else if _, err = v.find(n, dir.parts, name); err == nil {
		err = v.lookInIndex(n)
	}
	if err != nil {
		return nil, fmt.Errorf("look up %q: %w", "/"+n.path, err)
	}
	if n.layer < 0 {
		return nil, nil
	}
	return n, nil
}

// find adds to n what directories, topmost first, have under a name, and
// reports whether directories below could not add anything.
func (v *view) find(n *vnode, dirs []part, name string) (stop bool, err error) {
	for _, d := range dirs {
		fd, err := v.openPart(d.in(name), unix.O_PATH|unix.O_NOFOLLOW)
		if err == nil {
			stop, err = v.consider(n, d, name, fd)
			fsat.Close(fd)
		} else if fsat.IsAbsent(err) {
			err = nil
		}
		if err == nil && !stop {
			stop, err = v.layers[d.layer].hasMarker(d.path, name)
		}
		if stop || err != nil {
			return true, err
		}
	}
	return false, nil
}

// consider adds the object fd, which the directory d has under a name, to n
// and reports whether it ends the search.
func (v *view) consider(n *vnode, d part, name string, fd int) (stop bool, err error) {
	l := v.layers[d.layer]
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return true, err
	}
	at := d.in(name)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if n.layer >= 0 {
			return true, nil
		}
		marked := false
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 {
			if marked, err = l.marked(d.path); err != nil {
				return true, err
			}
		}
		w, err := l.isWhiteout(fd, &st, marked)
		if err == nil && !w {
			err = v.complete(at, fd, &st)
			n.layer, n.at, n.st = at.layer, at.path, st
		}
		return true, err
	}
	if n.layer < 0 {
		if err := v.complete(at, fd, &st); err != nil {
			return true, err
		}
		n.layer, n.at, n.st = at.layer, at.path, st
	}
	n.parts = append(n.parts, at)
	return l.opaqueAt(fd)
}

// list returns the names of a directory, sorted.
func (v *view) list(dir *vnode) ([]*vnode, error) {
	listings := make([]merge.Listing, 0, len(dir.parts))
	for _, p := range dir.parts {
		l, err := v.layers[p.layer].listing(p.path)
		if err != nil {
			return nil, fmt.Errorf("list %q: %w", "/"+dir.path, err)
		}
		listings = append(listings, l)
	}
	var out []*vnode
	for _, m := range merge.Merge(listings) {
		n, err := v.merged(dir, m)
		if err != nil {
			return nil, err
		}
		if n != nil {
			out = append(out, n)
		}
	}
	return out, nil
}

// merged makes the object of a name in the merged listing of a directory.
func (v *view) merged(dir *vnode, m merge.Merged) (*vnode, error) {
	top := dir.parts[m.Refs[0].Listing].in(m.Name)
	if v.upper && top.layer == 0 {
		return v.child(dir, m.Name) // its lower part may be elsewhere
	}
	n := &vnode{path: join(dir.path, m.Name), name: m.Name, layer: top.layer, at: top.path}
	if err := v.stat(n); err != nil {
		return nil, fmt.Errorf("stat %q: %w", "/"+n.path, err)
	}
	if !n.isDir() {
		if err := v.lookInIndex(n); err != nil {
			return nil, fmt.Errorf("look up %q: %w", "/"+n.path, err)
		}
		return n, nil
	}
	for _, r := range m.Refs {
		n.parts = append(n.parts, dir.parts[r.Listing].in(m.Name))
	}
	return n, v.cut(n)
}

// cut ends a directory's parts after the first opaque one.
func (v *view) cut(n *vnode) error {
	for k, p := range n.parts {
		fd, err := v.openPart(p, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return fmt.Errorf("open %q: %w", "/"+n.path, err)
		}
		opaque, err := v.layers[p.layer].opaqueAt(fd)
		fsat.Close(fd)
		if err != nil {
			return fmt.Errorf("open %q: %w", "/"+n.path, err)
		}
		if opaque {
			n.parts = n.parts[:k+1]
			return nil
		}
	}
	return nil
}

// walk calls fn for every object of the union, parents first, siblings in
// order.
func (v *view) walk(n *vnode, fn func(*vnode) error) error {
	if err := fn(n); err != nil {
		return fmt.Errorf("%q: %w", "/"+n.path, err)
	}
	if !n.isDir() {
		return nil
	}
	names, err := v.list(n)
	if err != nil {
		return err
	}
	for _, c := range names {
		if err := v.walk(c, fn); err != nil {
			return err
		}
	}
	return nil
}

// resolve finds the object a path names, following the symbolic links of its
// directories, and of its last component if last is set, inside the union's
// root. nil: there is none.
func (v *view) resolve(path string, last bool) (*vnode, error) {
	root, err := v.root()
	if root == nil || err != nil {
		return nil, err
	}
	stack := []*vnode{root}
	todo := strings.Split(path, "/")
	links := 0
	for len(todo) > 0 {
		c := todo[0]
		todo = todo[1:]
		cur := stack[len(stack)-1]
		switch {
		case c == "" || c == ".":
			continue
		case c == "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		case !cur.isDir():
			return nil, nil
		}
		n, err := v.child(cur, c)
		if n == nil || err != nil {
			return nil, err
		}
		if n.st.Mode&unix.S_IFMT != unix.S_IFLNK || (len(todo) == 0 && !last) {
			stack = append(stack, n)
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("%w: path %q goes through too many symbolic links", ErrCorrupt, path)
		}
		fd, err := v.open(n)
		if err != nil {
			return nil, err
		}
		target, err := v.layers[n.layer].readlink(fd)
		fsat.Close(fd)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(target, "/") {
			stack = stack[:1]
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return stack[len(stack)-1], nil
}
