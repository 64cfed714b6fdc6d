package layers

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
)

// view reads a stack of layer directories as the union they make. It holds one
// descriptor per layer, and no other between calls.
type view struct {
	layers []viewLayer // topmost first
}

type viewLayer struct {
	fd      int
	dialect whiteout.Dialect
}

func openView(dirs []LayerDir) (*view, error) {
	v := &view{}
	for _, d := range dirs {
		fd, err := fsat.OpenTrusted(d.Path)
		if err != nil {
			v.Close()
			return nil, fmt.Errorf("%w: open layer directory %s: %w", ErrCorrupt, d.Path, err)
		}
		v.layers = append(v.layers, viewLayer{fd, d.Dialect})
	}
	return v, nil
}

func (v *view) Close() {
	for _, l := range v.layers {
		fsat.Close(l.fd)
	}
	v.layers = nil
}

// vnode is an object of the union.
type vnode struct {
	path  string // "" is the root
	name  string
	layer int // that it shows from
	st    unix.Stat_t
	parts []int // of a directory: the layers that are merged, layer first
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
		n.parts = append(n.parts, i)
	}
	if len(n.parts) == 0 {
		return nil, nil
	}
	return n, fsat.Fstat(v.layers[0].fd, &n.st)
}

// open opens the object in the layer it shows from, O_PATH.
func (v *view) open(n *vnode) (int, error) {
	return fsat.OpenBeneath(v.layers[n.layer].fd, n.path, unix.O_PATH|unix.O_NOFOLLOW)
}

// isWhiteout looks at one object of a layer; marked says that its directory
// may hold whiteouts in attribute form.
func (l viewLayer) isWhiteout(fd int, st *unix.Stat_t, marked bool) (bool, error) {
	if l.dialect.ReadsDevices() && whiteout.IsDevice(st.Mode, st.Rdev) {
		return true, nil
	}
	if marked && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 {
		return l.dialect.IsXWhiteout(fd)
	}
	return false, nil
}

// child looks a name up; nil if the union has none.
func (v *view) child(dir *vnode, name string) (*vnode, error) {
	n := &vnode{path: join(dir.path, name), name: name, layer: -1}
	for _, i := range dir.parts {
		l := v.layers[i]
		fd, err := fsat.OpenBeneath(l.fd, n.path, unix.O_PATH|unix.O_NOFOLLOW)
		if fsat.IsAbsent(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look up %q: %w", n.path, err)
		}
		stop, err := v.consider(n, i, fd, dir.path)
		fsat.Close(fd)
		if err != nil {
			return nil, fmt.Errorf("look up %q: %w", n.path, err)
		}
		if stop {
			break
		}
	}
	if n.layer < 0 {
		return nil, nil
	}
	return n, nil
}

// consider adds layer i's object fd to n and reports whether it ends the search.
func (v *view) consider(n *vnode, i, fd int, dir string) (stop bool, err error) {
	l := v.layers[i]
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return true, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if n.layer >= 0 {
			return true, nil
		}
		marked := false
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 {
			if marked, err = v.marked(l, dir); err != nil {
				return true, err
			}
		}
		w, err := l.isWhiteout(fd, &st, marked)
		if err == nil && !w {
			n.layer, n.st = i, st
		}
		return true, err
	}
	if n.layer < 0 {
		n.layer, n.st = i, st
	}
	n.parts = append(n.parts, i)
	m, err := l.dialect.Mark(fd)
	return m == whiteout.Opaque, err
}

func (v *view) marked(l viewLayer, dir string) (bool, error) {
	fd, err := fsat.OpenBeneath(l.fd, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fd)
	m, err := l.dialect.Mark(fd)
	return m == whiteout.XWhiteouts, err
}

// list returns the names of a directory, sorted.
func (v *view) list(dir *vnode) ([]*vnode, error) {
	listings := make([]merge.Listing, 0, len(dir.parts))
	for _, i := range dir.parts {
		l, err := v.layers[i].listing(dir.path)
		if err != nil {
			return nil, fmt.Errorf("list %q: %w", "/"+dir.path, err)
		}
		listings = append(listings, l)
	}
	var out []*vnode
	for _, m := range merge.Merge(listings) {
		n := &vnode{path: join(dir.path, m.Name), name: m.Name, layer: dir.parts[m.Refs[0].Listing]}
		for _, r := range m.Refs {
			n.parts = append(n.parts, dir.parts[r.Listing])
		}
		fd, err := v.open(n)
		if err == nil {
			err = fsat.Fstat(fd, &n.st)
			fsat.Close(fd)
		}
		if err != nil {
			return nil, fmt.Errorf("stat %q: %w", n.path, err)
		}
		if n.isDir() {
			if err := v.cut(n); err != nil {
				return nil, err
			}
		} else {
			n.parts = nil
		}
		out = append(out, n)
	}
	return out, nil
}

// cut ends a directory's parts after the first opaque one.
func (v *view) cut(n *vnode) error {
	for k, i := range n.parts {
		fd, err := fsat.OpenBeneath(v.layers[i].fd, n.path, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return fmt.Errorf("open %q: %w", n.path, err)
		}
		m, err := v.layers[i].dialect.Mark(fd)
		fsat.Close(fd)
		if err != nil {
			return fmt.Errorf("open %q: %w", n.path, err)
		}
		if m == whiteout.Opaque {
			n.parts = n.parts[:k+1]
			return nil
		}
	}
	return nil
}

// listing reads one layer's directory.
func (l viewLayer) listing(path string) (merge.Listing, error) {
	var out merge.Listing
	fd, err := fsat.OpenBeneath(l.fd, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return out, err
	}
	defer fsat.Close(fd)
	mark, err := l.dialect.Mark(fd)
	if err != nil {
		return out, err
	}
	marked := mark == whiteout.XWhiteouts
	err = fsat.ReadDir(fd, func(e fsat.Dirent) error {
		if l.dialect.ReadsMarkers() {
			switch m, target := whiteout.ParseMarker(e.Name); m {
			case whiteout.NotMarker:
			case whiteout.MarkerWhiteout:
				out.Entries = append(out.Entries, merge.Entry{Name: target, Kind: merge.Whiteout})
				return nil
			case whiteout.MarkerOpaque:
				out.Opaque = true
				return nil
			default:
				return nil
			}
		}
		k := merge.Other
		typ := e.Type
		if typ == unix.DT_CHR || typ == unix.DT_UNKNOWN || (marked && typ == unix.DT_REG) {
			p, err := fsat.OpenName(fd, e.Name, unix.O_PATH, 0)
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			if err != nil {
				return err
			}
			defer fsat.Close(p)
			var st unix.Stat_t
			if err := fsat.Fstat(p, &st); err != nil {
				return err
			}
			w, err := l.isWhiteout(p, &st, marked)
			if err != nil {
				return err
			}
			if w {
				k = merge.Whiteout
			} else if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				k = merge.Dir
			}
		} else if typ == unix.DT_DIR {
			k = merge.Dir
		}
		out.Entries = append(out.Entries, merge.Entry{Name: e.Name, Kind: k})
		return nil
	})
	return out, err
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
		target, err := fsat.Readlink(fd, "")
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
