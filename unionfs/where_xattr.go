package unionfs

import (
	"fmt"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/trace"
)

// Attributes that no file has, and that tell where an object is (Options.TellLayers). They are in no
// list, so that no program copies them, and cannot be set.
const (
	// layerXattr is the name of the layer, as in traces.
	layerXattr = "user.plyfs.layer"
	// explainXattr is all that is known, a line for each thing.
	explainXattr = "user.plyfs.explain"
)

// tells reports whether an attribute is one of these.
func (fs *FS) tells(attr string) bool {
	return fs.tellLayers && (attr == layerXattr || attr == explainXattr)
}

// tellXattr answers a request for one of them, as getxattr(2) would. Precondition: n.mu is not held.
func (fs *FS) tellXattr(n *inode, attr string, dest []byte) (uint32, fuse.Status) {
	path, layer := fs.Where(n.id)
	text := trace.LayerName(layer)
	if attr == explainXattr {
		text = fs.explainText(n, path, layer)
	}
	if len(dest) < len(text) {
		return uint32(len(text)), fuse.Status(unix.ERANGE)
	}
	return uint32(copy(dest, text)), fuse.OK
}

// explainText is the value of explainXattr.
func (fs *FS) explainText(n *inode, path string, layer int) string {
	var b strings.Builder
	line := func(key, format string, args ...any) { fmt.Fprintf(&b, "%s: %s\n", key, fmt.Sprintf(format, args...)) }
	if path == "" {
		line("path", "none: it was removed")
	} else {
		line("path", "%q", path)
	}
	line("layer", "%s", trace.LayerName(layer))
	l := fs.upper
	if layer > 0 {
		l = fs.layers[layer-1]
	}
	if l != nil {
		line("directory", "%q", l.path)
	}
	n.mu.RLock()
	upper, meta, origin := n.upper, n.meta, n.origin
	n.mu.RUnlock()
	switch {
	case n.low == nil:
	case !upper && n.isDir() && fs.lowers.merged(n.low):
		line("merged", "with the directories of layers below")
	case upper && n.isDir():
		line("merged", "with %q of the lowers", fs.lowers.path(n.low))
	case upper && origin:
		line("copied up", "from %s, %q", trace.LayerName(fs.layerNumber(n)), fs.lowers.path(n.low))
	}
	if meta {
		line("data", "in %s: only its attributes were copied up", trace.LayerName(fs.layerNumber(n)))
	}
	return b.String()
}
