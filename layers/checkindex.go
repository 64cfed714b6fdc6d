package layers

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout/override"
)

// index checks a layer's index, and when deep compares it with the directory, which
// has been compared with the layer's tar before.
func (c *checker) index(row metadata.Cache, l layerFiles, side Sidecar, object string, ls []metadata.Layer) error {
	d, err := c.s.layerDir(row)
	if err != nil {
		return nil // K5 tells
	}
	repair := func() error {
		dropDirectory(l.dir, indexName)
		return c.s.rebuildIndex(c.ctx, l, d)
	}
	x, err := readLayerIndex(l, d.indexID())
	if fsat.IsAbsent(err) {
		c.found("K23", object, "it has no index", "write it anew", repair)
		return nil
	}
	problem, path := "", ""
	if err == nil {
		defer func() { _ = x.Close() }() // a mapping
		if err = x.Verify(); err == nil && c.o.Deep {
			path, problem, err = c.compareIndex(x, l, d)
		}
	}
	if c.ctx.Err() != nil {
		return c.ctx.Err()
	}
	if err != nil {
		problem = err.Error()
	}
	if problem == "" {
		return nil
	}
	if !c.o.Deep && errors.Is(err, errChanged) {
		// An index that is made anew would say that all is well.
		if _, err := compareTar(c.ctx, l, row, d, side); err != nil {
			c.damaged("K20", object, err.Error(), row, ls)
			return c.ctx.Err()
		}
	}
	// Where the tar has its word, the directory is right. What the tar says nothing
	// of, only the index knows; unless it speaks of other inodes.
	if path != "" {
		if tree, err := l.readTree(c.ctx, true); err == nil {
			if n := tree.find(path); n == nil || n.attrs == nil {
				c.damaged("K20", object, problem, row, ls)
				return nil
			}
		}
	}
	c.found("K23", object+"/"+indexName, problem, "write it anew", repair)
	return nil
}

// compareIndex makes a layer's index anew in memory and returns the first
// difference, with the path of the object if it is one of what the object is.
func (c *checker) compareIndex(x *chainindex.Index, l layerFiles, d LayerDir) (path, problem string, err error) {
	disk, err := indexInMemory(c.ctx, l, d)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = disk.Close() }() // memory
	type pair struct {
		path string
		x, y chainindex.Slot
	}
	var bx, by chainindex.DirBuf
	for stack := []pair{{"", chainindex.Root, chainindex.Root}}; len(stack) > 0; {
		p := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if diff, same, err := compareObject(x, disk, p.x, p.y, d); diff != "" || err != nil {
			if diff = fmt.Sprintf("%q: %s", "/"+p.path, diff); same {
				return "", diff, err
			}
			return p.path, diff, err
		}
		if n, err := disk.Len(p.y); err != nil { // no directory
			continue
		} else if err := x.ReadDir(p.x, 0, math.MaxInt, &bx); err != nil {
			return "", "", err
		} else if err := disk.ReadDir(p.y, 0, n, &by); err != nil {
			return "", "", err
		}
		if len(bx.Entries) != len(by.Entries) {
			return p.path, fmt.Sprintf("%q: %d names, the directory has %d", "/"+p.path, len(bx.Entries), len(by.Entries)), nil
		}
		for i, ex := range bx.Entries {
			ey := by.Entries[i]
			if !bytes.Equal(ex.Name, ey.Name) || ex.Type != ey.Type && !d.Virtual || ex.Whiteout != ey.Whiteout {
				return join(p.path, string(ey.Name)), fmt.Sprintf("%q: entry %q, the directory has %q", "/"+p.path, ex.Name, ey.Name), nil
			}
			if ex.Slot != 0 {
				stack = append(stack, pair{join(p.path, string(ex.Name)), ex.Slot, ey.Slot})
			}
		}
	}
	return "", "", nil
}

// compareObject compares what an index says about an object with what the disk
// says. Access times may differ, and what files cannot tell: of that, the index
// may know more than one that is made anew.
// same says that the object is the same, and only its file another one.
func compareObject(x, disk *chainindex.Index, sx, sy chainindex.Slot, d LayerDir) (diff string, same bool, err error) {
	a, err := x.Object(sx)
	if err != nil {
		return "", false, err
	}
	b, err := disk.Object(sy)
	if err != nil {
		return "", false, err
	}
	// What only the tar knows, and what changes by reading.
	a.Flags, b.Flags = a.Flags&^chainindex.FlagImplicit, b.Flags&^chainindex.FlagImplicit
	a.Atime, b.Atime = chainindex.Time{}, chainindex.Time{}
	a.Origin, b.Origin = 0, 0
	if d.Virtual || d.Override != override.None && a.Type() == unix.DT_LNK {
		b.Mode, b.UID, b.GID, b.Rdev, b.Xattrs = a.Mode, a.UID, a.GID, a.Rdev, a.Xattrs
	}
	switch {
	case a.Inode != b.Inode:
		n := b.Inode
		n.Ino, n.Ctime, n.Blocks, n.Nlink = a.Ino, a.Ctime, a.Blocks, a.Nlink
		return fmt.Sprintf("%+v, the directory has %+v", a.Inode, b.Inode), a.Inode == n, nil
	case a.Target != b.Target:
		return fmt.Sprintf("link to %q, the directory has one to %q", a.Target, b.Target), false, nil
	case len(a.Xattrs) != len(b.Xattrs):
		return fmt.Sprintf("%d extended attributes, the directory has %d", len(a.Xattrs), len(b.Xattrs)), false, nil
	}
	for i, p := range a.Xattrs {
		if q := b.Xattrs[i]; p.Name != q.Name || !bytes.Equal(p.Value, q.Value) {
			return fmt.Sprintf("extended attribute %s=%q, the directory has %s=%q", p.Name, p.Value, q.Name, q.Value), false, nil
		}
	}
	return "", false, nil
}

// chains checks the merged indexes. They are a cache: what is wrong with one
// is no reason to keep it.
func (c *checker) chains() error {
	names, err := listDir(c.s.chainsFd)
	if err != nil {
		return err
	}
	stale, err := c.s.unusedChains(c.ctx, names)
	if err != nil {
		return err
	}
	remove := func(n string) func() error { return func() error { return fsat.Unlink(c.s.chainsFd, n) } }
	known := map[string]bool{}
	for _, n := range stale {
		known[n] = true
		c.found("K24", chainsName+"/"+n, "an index that no chain has a use for", "remove", remove(n))
	}
	for _, n := range names {
		if known[n] || filepath.Ext(n) != chainExt {
			continue
		}
		x, err := chainindex.Open(filepath.Join(c.s.root, chainsName, n))
		if fsat.IsAbsent(err) {
			continue
		}
		if err == nil {
			err = x.Verify()
			_ = x.Close() // a mapping
		}
		if err != nil {
			c.found("K24", chainsName+"/"+n, err.Error(), "remove: the next mount makes it anew", remove(n))
		}
	}
	return nil
}
