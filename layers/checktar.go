package layers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout/merge"
	"github.com/plyfs/plyfs/whiteout/override"
)

// tarChecker compares the directory of a layer with what the layer's tar says: names,
// types, sizes, attributes, links, whiteouts. Of what the tar leaves to the layers
// below (directories it does not mention, hard links to lower files) only the names
// are compared; the layer's index tells the rest.
type tarChecker struct {
	ctx   context.Context
	v     *view
	dir   LayerDir
	bound bool // the directory also depends on the layers below
	lax   bool // the file system could not take all attributes
	// foreign: another engine has unpacked it. Times of directories are its own, and so
	// are attributes of its driver; whether those are obeyed was decided at adoption.
	foreign bool
	inode   map[*attrs]uint64
	named   map[uint64]*attrs
}

// mismatch is the first difference that was found.
type mismatch struct {
	inv, path, text string
}

func (m *mismatch) Error() string { return fmt.Sprintf("%q: %s", "/"+m.path, m.text) }

func differs(path, format string, a ...any) error {
	return &mismatch{"K20", path, fmt.Sprintf(format, a...)}
}

// compareTar returns the first difference between the layer's directory and its tar,
// and the tree of the tar.
func compareTar(ctx context.Context, files layerFiles, row metadata.Cache, d LayerDir, side Sidecar) (*node, error) {
	want, err := files.readTree(ctx, true)
	if err != nil {
		return nil, err
	}
	v, err := openView(ctx, []LayerDir{d})
	if err != nil {
		return nil, err
	}
	defer v.Close()
	root, err := v.root()
	if err != nil {
		return nil, err
	}
	t := tarChecker{ctx: ctx, v: v, dir: d, bound: row.Bind != "", lax: side.Incomplete, foreign: row.Adopted != nil, inode: map[*attrs]uint64{}, named: map[uint64]*attrs{}}
	if err := t.directory(want, root, false); err != nil {
		return want, err
	}
	return want, t.object(want, root)
}

// directory compares the names in a directory. hidden: it is in an opaque one, where
// there is nothing to delete.
func (t *tarChecker) directory(want *node, have *vnode, hidden bool) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	list, err := t.v.layers[0].listing(have.at)
	if err != nil {
		return differs(have.path, "it cannot be listed: %v", err)
	}
	opaque, err := t.v.layers[0].opaque(have.at)
	if err != nil {
		return err
	}
	top := have.path == ""
	wantOpaque := !top && (want.opaque || want.parent != nil && want.parent.hides(want.name))
	// Where an opaque root hides something, a directory of the same name does.
	either := want.parent != nil && want.parent.parent == nil && want.parent.opaque
	if opaque = opaque || list.Opaque; opaque != wantOpaque && !either {
		return differs(have.path, "opaque is %v, the tar says %v", opaque, wantOpaque)
	}
	hidden = hidden || opaque
	objects, gone := map[string]bool{}, map[string]bool{}
	for _, e := range list.Entries {
		if e.Kind == merge.Whiteout {
			gone[e.Name] = true
		} else {
			objects[e.Name] = true
		}
	}
	for _, name := range sortedNames(gone) {
		// An opaque root hides each name below it by itself.
		if !want.hides(name) && !(top && want.opaque) && !t.foreign { // fuse-overlayfs has some of its own
			return differs(join(have.path, name), "it is deleted, which the layer's tar does not say")
		}
	}
	for _, name := range sortedNames(want.whiteouts) {
		c := want.children[name]
		if (c == nil || c.kind == kindDir && c.ghost()) && !hidden && !t.bound && !gone[name] {
			return differs(join(have.path, name), "the layer's tar deletes it, but nothing here does")
		}
	}
	for _, name := range sortedNames(objects) {
		if want.children[name] == nil {
			return differs(join(have.path, name), "the layer's tar does not have it")
		}
	}
	for _, name := range sortedNames(want.children) {
		c := want.children[name]
		if !objects[name] {
			if c.kind == kindDir && c.ghost() {
				continue // left out where there was nothing below
			}
			return differs(join(have.path, name), "it is missing")
		}
		n, err := t.v.child(have, name)
		if err != nil {
			return differs(join(have.path, name), "%v", err)
		}
		if n == nil {
			return differs(join(have.path, name), "it is missing")
		}
		if c.kind == kindDir && n.isDir() { // its names first: they say more than its time
			if err := t.directory(c, n, hidden); err != nil {
				return err
			}
		}
		if err := t.object(c, n); err != nil {
			return err
		}
	}
	return nil
}

// hides reports whether the tar has a whiteout for a name.
func (n *node) hides(name string) bool {
	_, ok := n.whiteouts[name]
	return ok
}

// object compares one object.
func (t *tarChecker) object(want *node, have *vnode) error {
	fd, err := t.v.open(have)
	if err != nil {
		return differs(have.path, "%v", err)
	}
	defer fsat.Close(fd)
	if err := t.private(fd, have); err != nil {
		return err
	}
	if want.attrs == nil {
		return nil
	}
	a, st, err := t.v.attrsOf(have, fd)
	if err != nil {
		return differs(have.path, "%v", err)
	}
	w := want.attrs
	if got, should := kindOf(&st, a), want.kind; got != should {
		return differs(have.path, "it is a %s, the tar says %s", got, should)
	}
	switch {
	case want.kind == kindFile && st.Size != want.size:
		return differs(have.path, "%d bytes, the tar says %d", st.Size, want.size)
	case want.kind == kindNode && (a.special != w.special || a.special&unix.S_IFMT != unix.S_IFIFO && a.rdev != w.rdev):
		return differs(have.path, "it is another device than the tar says")
	case want.kind != kindSymlink && a.mode != w.mode && !(w.hasACL() && (a.mode^w.mode)&^0o777 == 0):
		return differs(have.path, "mode %#o, the tar says %#o", a.mode, w.mode)
	case a.uid != w.uid || a.gid != w.gid:
		return differs(have.path, "it belongs to %d:%d, the tar says %d:%d", a.uid, a.gid, w.uid, w.gid)
	case !sameTime(a.mtime, w.mtime) && !(t.foreign && want.kind == kindDir):
		return differs(have.path, "modified %s, the tar says %s", a.mtime.UTC().Format(time.RFC3339Nano), w.mtime.UTC().Format(time.RFC3339Nano))
	}
	if want.kind == kindSymlink {
		target, err := t.v.layers[0].readlink(fd)
		if err != nil || target != want.target {
			return differs(have.path, "a link to %q, the tar says %q", target, want.target)
		}
	}
	if want.kind != kindDir {
		// Names of one object in the tar are names of one here, and no others.
		if ino, ok := t.inode[w]; ok && ino != st.Ino {
			return differs(have.path, "it is a file of its own, the tar says a hard link")
		}
		if o, ok := t.named[st.Ino]; ok && o != w {
			return differs(have.path, "it is a hard link, the tar says a file of its own")
		}
		t.inode[w], t.named[st.Ino] = st.Ino, w
	}
	return t.xattrs(a, w, have)
}

// hasACL reports whether the tar gives the object an access control list, which also
// sets the permissions.
func (a *attrs) hasACL() bool {
	return slices.ContainsFunc(a.xattrs, func(x xattr) bool { return x.name == "system.posix_acl_access" })
}

// xattrs compares extended attributes. Of those in which the kernel has a say it is
// enough that they are there.
func (t *tarChecker) xattrs(a, w *attrs, have *vnode) error {
	got := map[string]string{}
	for _, x := range a.xattrs {
		got[x.name] = x.value
	}
	for _, x := range w.xattrs {
		v, ok := got[x.name]
		delete(got, x.name)
		kernel := strings.HasPrefix(x.name, "security.") || strings.HasPrefix(x.name, "system.")
		switch {
		case !ok && (t.lax || strings.HasPrefix(x.name, "system.")):
		case !ok:
			return differs(have.path, "extended attribute %s is missing", x.name)
		case !kernel && v != x.value:
			return differs(have.path, "extended attribute %s is %q, the tar says %q", x.name, v, x.value)
		}
	}
	for _, name := range sortedNames(got) {
		if strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.") || name == "security.capability" {
			return differs(have.path, "extended attribute %s, which the tar does not have", name)
		}
	}
	return nil
}

// private looks at attributes that belong to the dialect. Of those, a layer has the
// marks of whiteouts and opaque directories only: that a file is elsewhere, or was
// something else, no image can say.
func (t *tarChecker) private(fd int, have *vnode) error {
	if t.foreign {
		return nil
	}
	names, err := fsat.Listxattr(fd, "")
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
		return nil
	}
	if err != nil {
		return differs(have.path, "%v", err)
	}
	e := t.v.layers[0].encoding
	for _, n := range names {
		if _, visible := e.fromDisk(n); visible || e.override != override.None && n == e.override.Attr() {
			continue
		}
		if what, ok := strings.CutPrefix(n, e.dialect.Prefix()); ok && slices.Contains([]string{"opaque", "whiteout", "whiteouts"}, what) {
			continue
		}
		return &mismatch{"K29", have.path, fmt.Sprintf("it has the attribute %s, which no layer of an image can have", n)}
	}
	return nil
}

func (k kind) String() string {
	return [...]string{kindDir: "directory", kindFile: "file", kindSymlink: "symbolic link", kindNode: "device or fifo", kindPending: "hard link"}[k]
}

// kindOf is what an object is; a.special tells what the file that stands for it
// cannot.
func kindOf(st *unix.Stat_t, a *attrs) kind {
	switch t := st.Mode & unix.S_IFMT; {
	case a.special != 0:
		return kindNode
	case t == unix.S_IFDIR:
		return kindDir
	case t == unix.S_IFLNK:
		return kindSymlink
	case t == unix.S_IFREG:
		return kindFile
	}
	return kindNode
}

// sameTime compares times as far as file systems keep them: some have whole seconds
// only, and none of them all the seconds that a tar can name.
func sameTime(have, want time.Time) bool {
	w := timespec(want)
	if w.Sec < 0 || w.Sec >= 1<<31 {
		return true
	}
	ns := int64(have.Nanosecond())
	return have.Unix() == w.Sec && (ns == w.Nsec || ns == w.Nsec/1000*1000 || ns == 0)
}
