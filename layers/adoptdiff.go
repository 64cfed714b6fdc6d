package layers

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/plyfs/plyfs/whiteout"
)

// writeDifference writes the layer that turns the tree base into the tree top, both of
// which are plain directories: what a storage driver has in place of layers that has
// none. empty says that there is no difference.
func writeDifference(ctx context.Context, w io.Writer, base, top LayerDir) (empty bool, err error) {
	var views [2]*view
	for i, d := range []LayerDir{base, top} {
		d.Dialect = whiteout.Overlay
		if views[i], err = openView(ctx, []LayerDir{d}); err != nil {
			return false, err
		}
		defer views[i].Close()
	}
	c := comparer{ctx: ctx, a: views[0], b: views[1]}
	ra, err := c.a.root()
	if err != nil {
		return false, err
	}
	rb, err := c.b.root()
	if err != nil {
		return false, err
	}
	if _, err := c.dir(ra, rb); err != nil {
		return false, err
	}
	t := newTreeWriter(ctx, w)
	for _, ch := range c.out {
		path := strings.TrimPrefix(ch.Path, "/")
		dir, name := "", path
		if i := strings.LastIndexByte(path, '/'); i >= 0 {
			dir, name = path[:i], path[i+1:]
		}
		if m, _ := whiteout.ParseMarker(name); m != whiteout.NotMarker {
			return false, fmt.Errorf("%q: %w: an image layer cannot hold a name that begins with %q: it would delete something", ch.Path, ErrUnsupported, whiteout.MarkerPrefix)
		}
		if ch.Kind == "D" {
			if err := t.marker(join(dir, whiteout.MarkerPrefix+name)); err != nil {
				return false, err
			}
			continue
		}
		n, err := c.b.resolve(path, false)
		if err != nil {
			return false, err
		}
		if n == nil {
			return false, fmt.Errorf("%q: it was removed while it was read", ch.Path)
		}
		if err := t.object(c.b, n); err != nil {
			return false, fmt.Errorf("%q: %w", ch.Path, err)
		}
	}
	return len(c.out) == 0, t.close()
}
