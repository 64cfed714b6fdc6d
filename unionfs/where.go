package unionfs

import (
	"slices"
	"strings"
)

// maxDepth bounds the way to the root: a path has no more names than PATH_MAX allows, but
// directories can lie deeper.
const maxDepth = 1 << 14

// Where returns the path of an object that the kernel knows, by one of its names, and the
// number of its layer: 0 is the upper, 1 the topmost lower. The path is "" if the object has
// no name, the layer -1 if nothing is known. It is for those who watch (package trace).
func (fs *FS) Where(node uint64) (path string, layer int) {
	n := fs.node(node)
	if n == nil {
		return "", -1
	}
	n.mu.RLock()
	at, upper := n.where, n.upper
	n.mu.RUnlock()
	if !upper {
		layer = fs.layerNumber(n)
	}
	return fs.pathOf(n, at), layer
}

// layerNumber is the layer that a lower object is in; of a merged directory the topmost.
func (fs *FS) layerNumber(n *inode) int {
	if n.low == nil {
		return -1
	}
	// Without a lower at all there is no such object.
	return slices.Index(fs.layers, fs.lowers.layer(n.low)) + 1
}

// pathOf is the path of n at the place at.
func (fs *FS) pathOf(n *inode, at alias) string {
	if n == fs.root {
		return "/"
	}
	fs.renameMu.RLock()
	defer fs.renameMu.RUnlock()
	var names []string
	for len(names) < maxDepth {
		if at.parent == nil {
			return "" // removed
		}
		names = append(names, at.name)
		if at.parent == fs.root {
			slices.Reverse(names)
			return "/" + strings.Join(names, "/")
		}
		at = at.parent.where
	}
	return ""
}

// Child returns the object that has a name in a directory, if the kernel knows both; else 0.
func (fs *FS) Child(node uint64, name string) uint64 {
	p := fs.nodes.get(node)
	if p == nil || !p.isDir() {
		return 0
	}
	d := p.dir
	d.mu.RLock()
	defer d.mu.RUnlock()
	var child *inode
	if e := d.names[name]; e != nil {
		child = e.child
	} else if pos, ok := findIn(d.list, name); ok && d.kids != nil {
		child = d.kids[pos]
	}
	if child == nil {
		return 0
	}
	return child.id
}

// Lower reports whether an object that the kernel knows is in a lower of a writable union,
// and how many of the directories above it are.
func (fs *FS) Lower(node uint64) (lower bool, above int) {
	if fs.readOnly() {
		return false, 0
	}
	n := fs.nodes.get(node)
	if n == nil {
		return false, 0
	}
	n.mu.RLock()
	at, upper := n.where.parent, n.upper
	n.mu.RUnlock()
	if upper {
		return false, 0
	}
	for at != nil && above < maxDepth { // what is in the upper has nothing but the upper above it
		at.mu.RLock()
		up, next := at.upper, at.where.parent
		at.mu.RUnlock()
		if up {
			break
		}
		above++
		at = next
	}
	return true, above
}
