package chainindex

import (
	"bytes"
	"maps"
	"slices"
	"testing"
)

// node is a tree in memory, the model that an index is compared with.
type node struct {
	Object
	whiteout    bool // with no object if Mode is 0
	children    map[string]*node
	link        *node // another name of this node
	allImplicit bool  // model of a merge: no layer names it
	slot        Slot
}

func dirNode(perm uint32, children map[string]*node) *node {
	if children == nil {
		children = map[string]*node{}
	}
	return &node{Object: Object{Inode: Inode{Mode: modeDir | perm}}, children: children}
}

func fileNode(size uint64) *node {
	return &node{Object: Object{Inode: Inode{Mode: modeRegular | 0o644, Size: size, Mtime: Time{1700000000, 5}}}}
}

func symlinkNode(target string) *node {
	return &node{Object: Object{Inode: Inode{Mode: modeSymlink | 0o777, Size: uint64(len(target))}, Target: target}}
}

func whiteoutNode() *node { return &node{whiteout: true} }

// sample has every kind of object, names on both sides of the inline limit, attributes and hard links.
func sample() *node {
	hard := fileNode(7)
	withAttrs := fileNode(9)
	withAttrs.Xattrs = []Xattr{{"user.b", []byte("2")}, {"security.capability", []byte{1, 0, 0, 2}}, {"user.empty", []byte{}}}
	device := &node{Object: Object{Inode: Inode{Mode: modeChar | 0o600, Rdev: 0x0103}}}
	moved := fileNode(3)
	moved.Path = "old/place"
	return dirNode(0o755, map[string]*node{
		"etc": dirNode(0o755, map[string]*node{
			"passwd":                               fileNode(100),
			"exactly-16-bytes":                     fileNode(16),
			"exactly-17-bytes!":                    fileNode(17),
			"a-name-with-a-long-common-pre-1":      fileNode(1),
			"a-name-with-a-long-common-pre-2":      fileNode(2),
			"link":                                 symlinkNode("passwd"),
			string(bytes.Repeat([]byte("n"), 255)): fileNode(255),
		}),
		"hard-1": hard,
		"hard-2": {link: hard},
		"dev":    dirNode(0o755, map[string]*node{"null": device, "fifo": {Object: Object{Inode: Inode{Mode: modeFIFO | 0o644}}}}),
		"caps":   withAttrs,
		"empty":  dirNode(0o700|0o1000, nil),
		"moved":  moved,
		"\xff":   fileNode(1),
	})
}

func writeTree(tb testing.TB, o WriterOptions, root *node) []byte {
	tb.Helper()
	w, err := NewWriter(o)
	if err != nil {
		tb.Fatal(err)
	}
	defer w.Discard()
	if err := w.SetRoot(&root.Object); err != nil {
		tb.Fatal(err)
	}
	forgetSlots(root)
	root.slot = Root
	for stack := []*node{root}; len(stack) > 0; {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, name := range slices.Sorted(maps.Keys(d.children)) {
			c := d.children[name]
			child := Child{Name: name, Whiteout: c.whiteout}
			switch {
			case c.link != nil && c.link.slot != 0:
				child.Link = c.link.slot
			case c.slot != 0: // one of its other names came first
				child.Link = c.slot
			case c.link != nil:
				child.Object = &c.link.Object
			case c.Mode != 0:
				child.Object = &c.Object
			}
			slot, err := w.Add(d.slot, child)
			if err != nil {
				tb.Fatal(err)
			}
			if c.link != nil {
				c.link.slot = slot
			}
			c.slot = slot
			if c.children != nil {
				stack = append(stack, c)
			}
		}
	}
	var buf bytes.Buffer
	if _, err := w.WriteTo(&buf); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func forgetSlots(n *node) {
	n.slot = 0
	if n.link != nil {
		n.link.slot = 0
	}
	for _, c := range n.children {
		forgetSlots(c)
	}
}

func layerOptions() WriterOptions {
	return WriterOptions{Kind: KindLayer, ID: "sha256:test", Layers: 1}
}

func mustNew(tb testing.TB, data []byte) *Index {
	tb.Helper()
	x, err := New(data)
	if err != nil {
		tb.Fatal(err)
	}
	return x
}
