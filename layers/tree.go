package layers

import (
	"fmt"
	"sort"
	"strings"

	"github.com/plyfs/plyfs/whiteout"
)

// kind of a node.
type kind uint8

const (
	kindDir kind = iota
	kindFile
	kindSymlink
	kindNode    // device or fifo
	kindPending // hard link to a file of a lower layer, made when the chain is known
)

// maxLinks bounds the symbolic links of one path, as the kernel's MAXSYMLINKS.
const maxLinks = 40

// node is one name of the layer being unpacked. The tree of nodes mirrors the
// stage directory, which nobody else touches, so that paths are resolved in
// memory: the kernel is only ever asked for canonical paths without links.
type node struct {
	name   string
	parent *node
	kind   kind

	target  string // of a symbolic link; of a pending link the path in the lower layers
	payload int    // tar-split position of a regular file's content, or -1
	size    int64  // of a file, in a tree that was read from a tar-split record

	// From the tar, or from the layers below. Of a directory they are applied
	// when the layer is finished; of others they are kept if the file does
	// not tell them.
	attrs *attrs

	// Directories only.
	children  map[string]*node
	implicit  bool // no tar entry: attributes come from the chain
	opaque    bool
	whiteouts map[string]struct{}
	since     *attrs // of the entry that made an implicit directory
}

func newRoot() *node {
	return &node{kind: kindDir, payload: -1, children: map[string]*node{}, implicit: true}
}

// path is the canonical path from the layer's root; "" is the root.
func (n *node) path() string {
	if n.parent == nil {
		return ""
	}
	size := 0
	for p := n; p.parent != nil; p = p.parent {
		size += len(p.name) + 1
	}
	buf := make([]byte, size)
	for p := n; p.parent != nil; p = p.parent {
		size -= len(p.name)
		copy(buf[size:], p.name)
		size--
		buf[size] = '/'
	}
	return string(buf[1:])
}

func (n *node) add(c *node) *node {
	c.parent = n
	n.children[c.name] = c
	return c
}

// each calls fn for the directory and every directory below it, deepest first,
// siblings in order.
func (n *node) eachDir(fn func(*node) error) error {
	for _, name := range sortedNames(n.children) {
		if c := n.children[name]; c.kind == kindDir {
			if err := c.eachDir(fn); err != nil {
				return err
			}
		}
	}
	return fn(n)
}

func sortedNames[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// tarPath checks a name of a tar entry and splits it into components. The
// root is no components. Names that climb above the root are refused, however
// they go on.
func tarPath(name string, depth int) ([]string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("%w: path %q contains a NUL byte", ErrCorrupt, name)
	}
	var out []string
	for c := range strings.SplitSeq(name, "/") {
		switch {
		case c == "" || c == ".":
		case c == "..":
			if len(out) == 0 {
				return nil, fmt.Errorf("%w: path %q leads out of the layer", ErrCorrupt, name)
			}
			out = out[:len(out)-1]
		case len(c) > 255 && (len(c) > 255+len(whiteout.MarkerPrefix) || !strings.HasPrefix(c, whiteout.MarkerPrefix)):
			return nil, fmt.Errorf("%w: path %.80q… has a name of %d bytes, 255 are possible", ErrUnsupported, name, len(c))
		default:
			out = append(out, c)
		}
	}
	if len(out) > depth {
		return nil, fmt.Errorf("%w: path %.80q… is %d levels deep, the limit is %d", ErrUnsupported, name, len(out), depth)
	}
	return out, nil
}

// mkdirFunc makes the directory of a new implicit node on disk.
type mkdirFunc func(parent *node, name string) (*node, error)

// walk follows components from the root through directories and the layer's
// own symbolic links, which never lead out: "/" and "..", as in a chroot, end
// at the root. What is missing is made by mkdir, or ends the walk with nil if
// mkdir is nil.
func (n *node) walk(components []string, mkdir mkdirFunc) (*node, error) {
	root, cur, links := n, n, 0
	todo := append([]string(nil), components...)
	for len(todo) > 0 {
		c := todo[0]
		todo = todo[1:]
		if c == "" || c == "." {
			continue
		}
		if c == ".." {
			if cur.parent != nil {
				cur = cur.parent
			}
			continue
		}
		next := cur.children[c]
		switch {
		case next == nil && mkdir == nil:
			return nil, nil
		case next == nil:
			made, err := mkdir(cur, c)
			if err != nil {
				return nil, err
			}
			cur = made
		case next.kind == kindDir:
			cur = next
		case next.kind == kindSymlink:
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%w: path %q goes through too many symbolic links", ErrCorrupt, strings.Join(components, "/"))
			}
			if strings.HasPrefix(next.target, "/") {
				cur = root
			}
			todo = append(strings.Split(next.target, "/"), todo...)
		default:
			if mkdir == nil {
				return nil, nil
			}
			return nil, fmt.Errorf("%w: path %q goes through %q, which is not a directory", ErrCorrupt, strings.Join(components, "/"), next.path())
		}
	}
	return cur, nil
}

// ghost reports whether a directory exists only because something below it is
// deleted: no entry of its own, no object anywhere below.
func (n *node) ghost() bool {
	if !n.implicit || n.opaque {
		return false
	}
	for _, c := range n.children {
		if c.kind != kindDir || !c.ghost() {
			return false
		}
	}
	return true
}

// checkMarkers says whether a path goes through the bookkeeping of aufs, which
// is skipped, or through something that cannot be a directory.
func checkMarkers(dir []string) (skip bool, err error) {
	for _, c := range dir {
		switch m, _ := whiteout.ParseMarker(c); m {
		case whiteout.NotMarker:
		case whiteout.MarkerMeta:
			return true, nil
		default:
			return false, fmt.Errorf("%w: path goes through the whiteout %q", ErrCorrupt, c)
		}
	}
	return false, nil
}
