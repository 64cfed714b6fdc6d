package layers

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout/override"
)

// record is what is known of a layer of a store without privileges beside its
// files: its index, or the tree of a stage, which has none yet. It tells what
// files cannot: everything if the layer is virtual, otherwise the owner and the
// attributes of symbolic links.
type record struct {
	dir   LayerDir
	index *chainindex.Index // opened when something is asked
}

// newRecord returns nil for a layer whose files tell everything there is.
func newRecord(d LayerDir) *record {
	if d.Override == override.None && !d.Virtual || d.CacheID == "" && d.tree == nil {
		return nil
	}
	return &record{dir: d}
}

func (r *record) close() {
	if r != nil && r.index != nil {
		_ = r.index.Close() // a mapping
		r.index = nil
	}
}

// attrs returns the attributes of the object at path, without times; nil if there
// is no word about it. bare says that the layer's tar does not mention it.
func (r *record) attrs(ctx context.Context, path string) (a *attrs, bare bool, err error) {
	if r == nil {
		return nil, false, nil
	}
	if r.dir.tree != nil {
		if n := r.dir.tree.find(path); n != nil {
			return n.attrs, false, nil
		}
		return nil, false, nil
	}
	if r.index == nil {
		if r.index, err = openIndexOf(ctx, r.dir); err != nil {
			return nil, false, fmt.Errorf("index of layer %s: %w", r.dir.CacheID, err)
		}
	}
	slot := chainindex.Root
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		e, found, err := r.index.Lookup(slot, name)
		if err != nil || !found || e.Slot == 0 {
			return nil, false, err
		}
		slot = e.Slot
	}
	o, err := r.index.Object(slot)
	if err != nil {
		return nil, false, err
	}
	a = &attrs{mode: o.Mode & permBits, uid: int(o.UID), gid: int(o.GID)}
	a.setType(o.Mode, o.Rdev)
	for _, x := range o.Xattrs {
		a.xattrs = append(a.xattrs, xattr{name: x.Name, value: string(x.Value)})
	}
	return a, o.Flags&chainindex.FlagImplicit != 0, nil
}

// openIndexOf opens the index of a layer that lies in the store. One that is
// missing or damaged is made anew in memory: whoever mounts the layer writes it.
func openIndexOf(ctx context.Context, d LayerDir) (x *chainindex.Index, err error) {
	l := layerFiles{dir: -1, diff: -1}
	defer func() { l.Close() }()
	if l.dir, err = fsat.OpenTrusted(filepath.Dir(d.Path)); err != nil {
		return nil, err
	}
	if l.diff, err = openContent(l.dir); err != nil {
		return nil, err
	}
	if x, err = readLayerIndex(l, d.indexID()); err != nil {
		return indexInMemory(ctx, l, d)
	}
	return x, nil
}
