package layers

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// comparer compares two trees where they lie, as exactly as a layer that is made of the
// difference needs it: with times, and with one line for what is deleted as a whole.
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
		return sameFiles(c.ctx, fa, fb)
	}
	return true, nil
}

// sameFiles compares the contents of two files, opened with O_PATH.
func sameFiles(ctx context.Context, a, b int) (bool, error) {
	var f [2]*os.File
	for i, p := range []int{a, b} {
		fd, err := fsat.Reopen(p, unix.O_RDONLY)
		if err != nil {
			return false, err
		}
		f[i] = os.NewFile(uintptr(fd), "content")
		defer f[i].Close()
	}
	return sameContent(ctx, f[0], f[1], make([]byte, readBuffer))
}
