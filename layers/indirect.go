package layers

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// A container's upper may hold objects of which a part stays in the layers
// below (package unionfs writes them, as kernel overlayfs does):
//
//	redirect  a directory whose lower content is not that of its own name
//	metacopy  a file whose data is a lower file's
//	index     the copy of a lower file with several hard links shows under
//	          those of its names that the upper does not have, too
//
// No image layer can say that. So a view with an upper finds out what such
// objects show, and commit, diff and export go by that.

// indirection is what a view with an upper knows of an object besides.
type indirection struct {
	// moved: the lower content of this directory is not that of its own name.
	moved bool
	// meta: the data of this file is the lower file dataName of the merged
	// directories dataIn.
	meta     bool
	dataIn   []part
	dataName string
	// entry is the name in the index under which the object lies, if it
	// shows from there.
	entry string
}

// linkIndex is WORKDIR/index: one name for each lower object with several hard
// links that has been copied up, the hexadecimal form of its origin
// (kernel: ovl_get_index_name).
type linkIndex struct {
	fd    int
	names map[string]bool // nil: there is none, and fd means nothing
}

func (x *linkIndex) close() {
	if x.names != nil {
		fsat.Close(x.fd)
		x.names = nil
	}
}

// openUnion opens a container's stack.
func openUnion(ctx context.Context, st Stack) (*view, error) {
	v, err := openView(ctx, append([]LayerDir{{Path: st.Upper, Dialect: st.Dialect, Override: st.Override, ids: st.ids}}, st.Lowers...))
	if err != nil {
		return nil, err
	}
	v.upper = true
	if err := v.openIndex(st.Work); err != nil {
		v.Close()
		return nil, fmt.Errorf("link index of the writable layer: %w", err)
	}
	return v, nil
}

func (v *view) openIndex(work string) error {
	if work == "" {
		return nil
	}
	w, err := fsat.OpenTrusted(work)
	if err != nil {
		return err
	}
	defer fsat.Close(w)
	fd, err := fsat.OpenName(w, "index", unix.O_PATH|unix.O_DIRECTORY, 0)
	if fsat.IsAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	v.index = linkIndex{fd: fd, names: map[string]bool{}}
	err = fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { v.index.names[e.Name] = true; return nil })
	if err != nil {
		return err
	}
	for i := range v.layers {
		v.layers[i].uuid = fsat.FSUUID(v.layers[i].fd)
	}
	return nil
}

// upperChild is child for a directory that the upper has. The rules are those
// of the kernel's ovl_lookup: an opaque directory has no lower content, a
// redirect comes before the name, and what is missing there is missing.
func (v *view) upperChild(n, dir *vnode) error {
	stop, err := v.find(n, dir.parts[:1], n.name)
	if err != nil {
		return err
	}
	lower := dir.parts[1:]
	switch {
	case n.layer < 0 && stop: // a whiteout
		return nil
	case n.layer < 0:
		if _, err := v.find(n, lower, n.name); err != nil {
			return err
		}
		return v.lookInIndex(n)
	case stop && n.isDir():
		return nil
	case n.isDir():
		return v.mergeLower(n, lower)
	case n.st.Mode&unix.S_IFMT == unix.S_IFREG:
		return v.lookForData(n, lower)
	}
	return nil
}

// mergeLower adds the lower content of a directory of the upper, whose parent
// has the lower parts dirs.
func (v *view) mergeLower(n *vnode, dirs []part) error {
	redirect, err := v.attrOf(n, whiteout.Dialect.Redirect)
	if err != nil {
		return err
	}
	own, err := v.descend(dirs, n.name)
	if err != nil {
		return err
	}
	from := own
	if redirect != "" {
		if from, err = v.follow(dirs, redirect); err != nil {
			return err
		}
		n.moved = !slices.Equal(dirParts(from), dirParts(own))
	}
	n.parts = append(n.parts, dirParts(from)...)
	return nil
}

func dirParts(n *vnode) []part {
	if n == nil {
		return nil
	}
	return n.parts // none unless it is a directory
}

// lookForData finds out whether a file of the upper has its data elsewhere.
// Nothing is read from there before openData: a diff does not need it.
func (v *view) lookForData(n *vnode, dirs []part) (err error) {
	if n.meta, err = v.isMetacopy(n); err != nil || !n.meta {
		return err
	}
	n.dataIn, n.dataName = dirs, n.name
	redirect, err := v.attrOf(n, whiteout.Dialect.Redirect)
	if redirect != "" {
		n.dataName = redirect
	}
	return err
}

func (v *view) isMetacopy(n *vnode) (bool, error) {
	fd, err := v.open(n)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fd)
	return v.layers[n.layer].dialect.Metacopy(fd, "")
}

// attrOf reads an attribute of an object of the upper.
func (v *view) attrOf(n *vnode, read func(whiteout.Dialect, int, string) (string, error)) (string, error) {
	fd, err := v.open(n)
	if err != nil {
		return "", err
	}
	defer fsat.Close(fd)
	return read(v.layers[n.layer].dialect, fd, "")
}

// follow returns what a redirect of an object leads to, whose parent has the
// lower parts dirs; nil if there is nothing.
func (v *view) follow(dirs []part, redirect string) (*vnode, error) {
	rest, absolute := strings.CutPrefix(redirect, "/")
	if !absolute {
		return v.descend(dirs, redirect)
	}
	roots := make([]part, 0, len(v.layers))
	for i := 1; i < len(v.layers); i++ {
		roots = append(roots, part{layer: i})
	}
	return v.descend(roots, strings.Split(rest, "/")...)
}

// descend walks down from the merged directories dirs, which are lower ones;
// nil if there is no such object. Symbolic links are not followed.
func (v *view) descend(dirs []part, names ...string) (*vnode, error) {
	var n *vnode
	for _, name := range names {
		n = &vnode{layer: -1, name: name}
		if _, err := v.find(n, dirs, name); err != nil || n.layer < 0 {
			return nil, err
		}
		n.path = n.at
		dirs = n.parts
	}
	return n, nil
}

// openData opens the file that has the data of a metacopied one, O_PATH. Data
// that is not there is an error: it must never be taken for zeros.
func (v *view) openData(n *vnode) (fd int, err error) {
	data, err := v.follow(n.dataIn, n.dataName)
	if err != nil {
		return -1, err
	}
	missing := func(why string) (int, error) {
		return -1, fmt.Errorf("%w: its data should be that of %q in the layers below, %s", ErrCorrupt, n.dataName, why)
	}
	switch {
	case data == nil:
		return missing("where there is no such file")
	case data.st.Mode&unix.S_IFMT != unix.S_IFREG:
		return missing("which is no regular file")
	case data.st.Size < n.st.Size:
		return missing(fmt.Sprintf("which has %d bytes instead of %d", data.st.Size, n.st.Size))
	}
	if again, err := v.isMetacopy(data); err != nil || again {
		return -1, errors.Join(err, fmt.Errorf("%w: its data should be that of %q in the layers below, which has none itself (metacopy)", ErrUnsupported, n.dataName))
	}
	return v.open(data)
}

// lookInIndex turns the lower object n into its copy, if it was copied up
// through another of its hard links (kernel: ovl_lookup_index).
func (v *view) lookInIndex(n *vnode) error {
	if len(v.index.names) == 0 || n.layer < 0 || n.isDir() || n.st.Nlink < 2 {
		return nil
	}
	fd, err := v.open(n)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	origin, err := fsat.Origin(fd, "", v.layers[n.layer].uuid)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("file handle: %w", err)
	}
	entry := hex.EncodeToString(origin)
	if !v.index.names[entry] {
		return nil
	}
	var st unix.Stat_t
	err = fsat.Stat(v.index.fd, entry, &st)
	if err == nil {
		err = v.layers[0].stat(v.index.fd, entry, &st)
	}
	if err != nil {
		return fmt.Errorf("link index: %w", err)
	}
	if st.Mode&unix.S_IFMT != n.st.Mode&unix.S_IFMT {
		return fmt.Errorf("%w: entry %s of the link index is of another type than its original", ErrCorrupt, entry)
	}
	lower := part{n.layer, n.at}
	n.layer, n.at, n.st, n.entry = 0, "", st, entry
	if n.meta, err = v.isMetacopy(n); err != nil || !n.meta {
		return err
	}
	n.dataName = lower.path
	if i := strings.LastIndexByte(lower.path, '/'); i >= 0 {
		lower.path, n.dataName = lower.path[:i], lower.path[i+1:]
	} else {
		lower.path = ""
	}
	n.dataIn = []part{lower}
	return nil
}

// redirects reports whether any directory of the upper has a redirect.
func (v *view) redirects(ctx context.Context, path string) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	l := v.layers[0]
	list, err := l.listing(path)
	if err != nil {
		return false, fmt.Errorf("list %q: %w", "/"+path, err)
	}
	for _, e := range list.Entries {
		p := join(path, e.Name)
		fd, err := fsat.OpenBeneath(l.fd, p, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if fsat.IsAbsent(err) {
			continue // no directory
		}
		if err != nil {
			return false, fmt.Errorf("open %q: %w", "/"+p, err)
		}
		redirect, err := l.dialect.Redirect(fd, "")
		fsat.Close(fd)
		if err != nil {
			return false, fmt.Errorf("%q: %w", "/"+p, err)
		}
		if redirect != "" {
			return true, nil
		}
		if found, err := v.redirects(ctx, p); found || err != nil {
			return found, err
		}
	}
	return false, nil
}

// nameSet holds, for some directories, some of their names.
type nameSet map[string]map[string]bool

// add adds a path, and the directories on the way to it.
func (s nameSet) add(path string) {
	for path != "" {
		dir, name := "", path
		if i := strings.LastIndexByte(path, '/'); i >= 0 {
			dir, name = path[:i], path[i+1:]
		}
		if s[dir] == nil {
			s[dir] = map[string]bool{}
		}
		s[dir][name] = true
		path = dir
	}
}

// otherLinks returns the names of the union that the upper does not have, but
// that show an object it has: names of a lower file that was copied up through
// another hard link. With moved, also those that are hard links of a lower file
// below a renamed directory, which a layer has to have a copy of.
//
// Only a walk through the whole union finds them. It is left out where nothing
// can be found.
func (v *view) otherLinks(ctx context.Context, moved bool) (nameSet, error) {
	if moved && len(v.layers) > 0 {
		var err error
		if moved, err = v.redirects(ctx, ""); err != nil {
			return nil, err
		}
	}
	root, err := v.root()
	if err != nil || root == nil || !moved && len(v.index.names) == 0 {
		return nil, err
	}
	found := nameSet{}
	type group struct {
		copied bool // into the layer
		names  []string
	}
	groups := map[linkKey]*group{}
	var walk func(dir *vnode, whole bool) error
	walk = func(dir *vnode, whole bool) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		names, err := v.list(dir)
		if err != nil {
			return err
		}
		for _, n := range names {
			switch {
			case n.isDir():
				if err := walk(n, whole || n.moved); err != nil {
					return err
				}
			case n.entry != "" && !whole:
				found.add(n.path)
			case moved && n.layer > 0 && n.st.Nlink > 1:
				k := linkKey{n.layer, n.st.Dev, n.st.Ino}
				g := groups[k]
				if g == nil {
					g = &group{}
					groups[k] = g
				}
				if whole {
					g.copied = true
				} else {
					g.names = append(g.names, n.path)
				}
			}
		}
		return nil
	}
	if err := walk(root, false); err != nil {
		return nil, err
	}
	for _, g := range groups {
		for _, p := range g.names {
			if g.copied {
				found.add(p)
			}
		}
	}
	return found, nil
}
