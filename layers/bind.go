package layers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// bind resolves what the layer takes from the layers below it and returns a
// digest of that: two chains that yield the same may share the directory. It
// is empty if the layer takes nothing.
//
//   - A directory the tar does not mention takes the attributes it has below;
//     where there is none, 0755 and root, and the time of the entry that needed it.
//   - Such a directory that holds nothing but whiteouts and does not exist below
//     is left out: deleting in it must not make it appear.
//   - A hard link to a file of a lower layer becomes a copy of that file.
//   - An opaque root hides everything below. Overlay file systems do not look
//     at the root's mark, so each name below is hidden by itself.
func (u *unpacker) bind(ctx context.Context, v *view) (string, error) {
	defer u.dropDir()
	sum := sha256.New()
	bound := false
	note := func(format string, a ...any) { bound = true; fmt.Fprintf(sum, format+"\n", a...) }
	if err := u.bindRoot(v, note); err != nil {
		return "", err
	}
	if err := u.settle(u.root, false); err != nil {
		return "", err
	}
	var below func(n *node, lower *vnode) error
	below = func(n *node, lower *vnode) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if n.implicit {
			if lower == nil && n.parent != nil && n.ghost() {
				note("ghost %q", n.path())
				return u.removeGhost(n)
			}
			if err := u.inherit(v, n, lower, note); err != nil {
				return fmt.Errorf("attributes of %q: %w", n.path(), err)
			}
		}
		if lower == nil && len(n.whiteouts) > 0 {
			// Nothing to delete. The kernel lists whiteouts of a directory
			// that only one layer has.
			note("idle whiteouts in %q", n.path())
			n.whiteouts = nil
		}
		if n.opaque {
			lower = nil
		}
		for _, name := range sortedNames(n.children) {
			c := n.children[name]
			if c.kind != kindDir {
				continue
			}
			var lc *vnode
			if lower != nil && needsLower(c) {
				var err error
				if lc, err = v.child(lower, name); err != nil {
					return err
				}
				if lc != nil && !lc.isDir() {
					lc = nil
				}
			}
			if err := below(c, lc); err != nil {
				return err
			}
		}
		return nil
	}
	root, err := v.root()
	if err != nil {
		return "", err
	}
	if err := below(u.root, root); err != nil {
		return "", err
	}
	if u.pending > 0 {
		if err := u.bindLinks(ctx, v, note); err != nil {
			return "", err
		}
	}
	if !bound {
		return "", nil
	}
	return digest.NewDigest(digest.SHA256, sum).String(), nil
}

// settle decides what the markers of the whole tar come to. A whiteout beside
// an object hides nothing but what is below: of a directory it makes an opaque
// one; of a directory that is there only for whiteouts inside it, it is all
// that is left. In and below an opaque directory there is nothing to delete.
func (u *unpacker) settle(n *node, hidden bool) error {
	hidden = hidden || n.opaque
	for _, name := range sortedNames(n.whiteouts) {
		c := n.children[name]
		if c == nil {
			continue
		}
		if c.kind == kindDir && c.ghost() {
			if err := u.removeGhost(c); err != nil {
				return err
			}
			continue
		}
		if c.kind == kindDir {
			c.opaque = true
		}
		delete(n.whiteouts, name)
	}
	if hidden {
		n.whiteouts = nil
	}
	for _, name := range sortedNames(n.children) {
		if c := n.children[name]; c.kind == kindDir {
			if err := u.settle(c, hidden); err != nil {
				return err
			}
		}
	}
	return nil
}

// needsLower reports whether n or a directory below it depends on what the
// lower layers have in its place.
func needsLower(n *node) bool {
	if n.implicit || len(n.whiteouts) > 0 {
		return true
	}
	for _, c := range n.children {
		if c.kind == kindDir && needsLower(c) {
			return true
		}
	}
	return false
}

func (u *unpacker) bindRoot(v *view, note func(string, ...any)) error {
	if !u.root.opaque {
		return nil
	}
	u.root.opaque = false
	root, err := v.root()
	if root == nil || err != nil {
		return err
	}
	names, err := v.list(root)
	if err != nil {
		return err
	}
	for _, n := range names {
		note("hide %q", n.name)
		if u.root.whiteouts == nil {
			u.root.whiteouts = map[string]struct{}{}
		}
		u.root.whiteouts[n.name] = struct{}{}
	}
	return nil
}

// inherit gives an implicit directory its attributes.
func (u *unpacker) inherit(v *view, n *node, lower *vnode, note func(string, ...any)) error {
	if lower == nil {
		n.attrs = &attrs{mode: 0o755}
		if n.since != nil {
			n.attrs.mtime = n.since.mtime
		} else {
			n.attrs.mtime = time.Unix(0, 0)
		}
		// Nothing was taken from below, but a chain that has the directory
		// must not share this one.
		note("new %q", n.path())
		return nil
	}
	a, err := v.attrs(lower)
	if err != nil {
		return err
	}
	a.atime = time.Time{}
	n.attrs = a
	note("dir %q %s", n.path(), a)
	return nil
}

func (u *unpacker) removeGhost(n *node) error {
	dirfd, err := u.open(n.parent)
	if err != nil {
		return err
	}
	delete(n.parent.children, n.name)
	return fsat.RemoveAll(dirfd, n.name)
}

// bindLinks materialises hard links to files of lower layers. Links to one
// file are links to one copy.
func (u *unpacker) bindLinks(ctx context.Context, v *view, note func(string, ...any)) error {
	var links []*node
	var find func(*node)
	find = func(n *node) {
		for _, name := range sortedNames(n.children) {
			switch c := n.children[name]; c.kind {
			case kindPending:
				links = append(links, c)
			case kindDir:
				find(c)
			}
		}
	}
	find(u.root)
	sort.SliceStable(links, func(i, j int) bool { return links[i].target < links[j].target })
	made := map[string]*node{} // canonical lower path → first copy
	for _, n := range links {
		src, err := v.resolve(n.target, false)
		if err != nil {
			return fmt.Errorf("entry %q: hard link to %q: %w", n.path(), n.target, err)
		}
		if src == nil || src.isDir() {
			return fmt.Errorf("entry %q: %w: hard link to %q, which is neither in this layer nor a file of a layer below", n.path(), ErrCorrupt, n.target)
		}
		note("link %q %q layer %d inode %d", n.path(), src.path, len(v.layers)-src.layer, src.st.Ino)
		if first := made[src.path]; first != nil {
			if err := u.linkTo(first, n); err != nil {
				return fmt.Errorf("entry %q: %w", n.path(), err)
			}
			continue
		}
		if err := u.copyUp(ctx, v, src, n); err != nil {
			return fmt.Errorf("entry %q: copy of %q: %w", n.path(), src.path, err)
		}
		made[src.path] = n
	}
	u.pending = 0
	return nil
}

func (u *unpacker) linkTo(first, n *node) error {
	from, err := fsat.OpenBeneath(u.diff, first.parent.path(), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer fsat.Close(from)
	dirfd, err := u.open(n.parent)
	if err != nil {
		return err
	}
	n.kind, n.target, n.attrs = first.kind, first.target, first.attrs
	return fsat.Link(from, first.name, dirfd, n.name)
}

func (u *unpacker) copyUp(ctx context.Context, v *view, src *vnode, n *node) error {
	p, err := v.open(src)
	if err != nil {
		return err
	}
	defer fsat.Close(p)
	a, st, err := v.attrsOf(src, p)
	if err != nil {
		return err
	}
	dirfd, err := u.open(n.parent)
	if err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.kind = kindFile
		err = copyFile(ctx, p, dirfd, n.name)
	case unix.S_IFLNK:
		n.kind = kindSymlink
		var target string
		if target, err = v.layers[src.layer].readlink(p); err == nil {
			n.target = target
			err = fsat.Symlink(target, dirfd, n.name)
		}
	default:
		n.kind = kindNode
		err = u.powers.mknod(dirfd, n.name, st.Mode&unix.S_IFMT, st.Rdev)
	}
	if err != nil {
		return err
	}
	n.attrs = a
	return u.applyName(dirfd, n.name, n.kind, a)
}

// copyFile copies the content of the file behind the O_PATH descriptor p, by
// sharing extents where the file system can.
func copyFile(ctx context.Context, p, dirfd int, name string) (err error) {
	in, err := fsat.Reopen(p, unix.O_RDONLY)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(in), name)
	defer src.Close()
	out, err := fsat.OpenName(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(out), name)
	defer func() {
		if cerr := dst.Close(); err == nil {
			err = cerr
		}
	}()
	if unix.IoctlFileClone(out, in) == nil {
		return nil
	}
	_, err = io.Copy(dst, ctxReader{ctx, src})
	return err
}

// finish writes what had to wait for the end of the tar: whiteouts and opaque
// marks, then the attributes of directories, children first, so that nothing
// changes a directory after its times are set.
func (u *unpacker) finish(ctx context.Context) error {
	defer u.dropDir()
	return u.root.eachDir(func(n *node) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := u.finishDir(n); err != nil {
			return fmt.Errorf("directory %q: %w", n.path(), err)
		}
		return nil
	})
}

func (u *unpacker) finishDir(n *node) error {
	fd, err := u.open(n)
	if err != nil {
		return err
	}
	for _, name := range sortedNames(n.whiteouts) {
		if err := u.powers.hide(fd, name); err != nil {
			return fmt.Errorf("whiteout of %q: %w", name, err)
		}
	}
	if n.opaque {
		if err := u.powers.markOpaque(fd); err != nil {
			return fmt.Errorf("mark opaque: %w", err)
		}
	}
	if n.attrs == nil {
		return errors.New("internal error: directory without attributes")
	}
	complete, err := u.powers.apply(fd, "", kindDir, n.attrs, nil)
	u.stats.incomplete = u.stats.incomplete || !complete
	return err
}
