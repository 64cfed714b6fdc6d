package chainindex

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// testRule is the union rule in its plainest form.
func testRule(dirs []LayerDir) ([]MergedEntry, error) {
	found := map[string]*MergedEntry{}
	closed := map[string]bool{}
	for i, d := range dirs {
		for j, e := range d.Entries {
			if !closed[e.Name] && e.Slot != 0 {
				m := found[e.Name]
				switch {
				case m == nil:
					found[e.Name] = &MergedEntry{Name: e.Name, Refs: []LayerRef{{i, j}}}
					closed[e.Name] = e.Type != modeDir>>12
				case e.Type == modeDir>>12:
					m.Refs = append(m.Refs, LayerRef{i, j})
				default:
					closed[e.Name] = true
				}
			}
			if e.Whiteout {
				closed[e.Name] = true
			}
		}
		if d.Opaque {
			break
		}
	}
	var out []MergedEntry
	for _, name := range slices.Sorted(maps.Keys(found)) {
		out = append(out, *found[name])
	}
	return out, nil
}

// applyLayers builds the merged tree the slow way: layer by layer from the bottom, as an extractor would.
func applyLayers(layers []*node) *node {
	var merged *node
	for i, l := range slices.Backward(layers) {
		merged = applyDir(merged, l, uint32(i))
	}
	return merged
}

func applyDir(below, top *node, layer uint32) *node {
	out := dirNode(0, nil)
	out.Object = top.Object
	out.Layer, out.Origin, out.Flags = layer, top.slot, 0
	if below != nil && top.Flags&FlagOpaque == 0 {
		if top.Flags&FlagImplicit != 0 && !below.allImplicit {
			b := below.Object
			out.Mode, out.UID, out.GID, out.Mtime, out.Xattrs = b.Mode, b.UID, b.GID, b.Mtime, b.Xattrs
		}
		out.allImplicit = top.Flags&FlagImplicit != 0 && below.allImplicit
		out.Flags, out.Ino = FlagMerged, below.Ino
		maps.Copy(out.children, below.children)
	} else {
		out.allImplicit = top.Flags&FlagImplicit != 0
	}
	for name, c := range top.children {
		old := out.children[name]
		if c.whiteout {
			delete(out.children, name)
			old = nil
		}
		switch {
		case c.link != nil:
			n := *c.link
			n.Layer, n.Origin = layer, c.slot
			out.children[name] = &n
		case c.children != nil:
			if old != nil && old.children == nil {
				old = nil
			}
			out.children[name] = applyDir(old, c, layer)
		case c.Mode != 0:
			n := *c
			n.Layer, n.Origin = layer, c.slot
			out.children[name] = &n
		}
	}
	return out
}

// sameTree compares the merged index with the model, object by object, and collects which slot stands for which object.
func sameTree(t fataler, x *Index, dir Slot, want *node, path string, slots map[string]Slot) {
	t.Helper()
	got, err := x.Object(dir)
	if err != nil {
		t.Fatalf("%q: %v", path, err)
	}
	if got.Mode != want.Mode || got.UID != want.UID || got.Layer != want.Layer || got.Origin != want.Origin ||
		got.Size != want.Size || got.Target != want.Target || got.Mtime != want.Mtime || got.Ino != want.Ino || got.Blocks != want.Blocks || got.Flags != want.Flags ||
		len(got.Xattrs) != len(want.Xattrs) {
		t.Fatalf("%q: got %+v, want %+v", path, got, want.Object)
	}
	key := fmt.Sprint(want.Layer, want.Origin)
	if old, ok := slots[key]; ok && old != dir && want.children == nil {
		t.Fatalf("%q: hard links of one object have inodes %d and %d", path, old, dir)
	}
	slots[key] = dir
	if want.children == nil {
		return
	}
	var buf DirBuf
	if err := x.ReadDir(dir, 0, 1000, &buf); err != nil {
		t.Fatalf("%q: %v", path, err)
	}
	names := slices.Sorted(maps.Keys(want.children))
	if len(names) != len(buf.Entries) {
		t.Fatalf("%q has %d entries, want %q", path, len(buf.Entries), names)
	}
	for i, e := range buf.Entries {
		if string(e.Name) != names[i] {
			t.Fatalf("%q: entry %q, want %q", path, e.Name, names[i])
		}
		sameTree(t, x, e.Slot, want.children[names[i]], path+"/"+names[i], slots)
	}
}

func mergeTrees(tb testing.TB, layers []*node) []byte {
	tb.Helper()
	var indexes []*Index
	for i, l := range layers {
		o := layerOptions()
		o.ID = fmt.Sprint("layer ", i)
		indexes = append(indexes, mustNew(tb, writeTree(tb, o, l)))
	}
	w, err := NewWriter(WriterOptions{Kind: KindChain, ID: "chain", Layers: len(layers)})
	if err != nil {
		tb.Fatal(err)
	}
	defer w.Discard()
	if err := Merge(w, indexes, MergeOptions{Rule: testRule}); err != nil {
		tb.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := w.WriteTo(&buf); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func TestMergeEqualsApplyingTheLayers(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		layers := rapid.SliceOfN(treeGen(2), 1, 5).Draw(rt, "layers")
		data := mergeTrees(t, layers)
		x := mustNew(t, data)
		if err := x.Verify(); err != nil {
			rt.Fatalf("Verify: %v", err)
		}
		sameTree(rt, x, Root, applyLayers(layers), "", map[string]Slot{})
		if !bytes.Equal(data, mergeTrees(t, layers)) {
			rt.Fatalf("merging the same layers again gave other bytes")
		}
	})
}

func TestMergeKeepsHardLinksWhoseFirstNameIsHidden(t *testing.T) {
	hard := fileNode(42)
	lower := dirNode(0o755, map[string]*node{"a": hard, "b": {link: hard}, "z": {link: hard}})
	upper := dirNode(0o755, map[string]*node{"a": whiteoutNode()})
	x := mustNew(t, mergeTrees(t, []*node{upper, lower}))
	b, _, err := x.Lookup(Root, "b")
	if err != nil {
		t.Fatal(err)
	}
	z, _, err := x.Lookup(Root, "z")
	if err != nil || b.Slot == 0 || b.Slot != z.Slot {
		t.Fatalf("b is %d, z is %d, %v", b.Slot, z.Slot, err)
	}
	if _, ok, _ := x.Lookup(Root, "a"); ok {
		t.Error("a is there")
	}
	if p, err := x.ContentPath(b.Slot); err != nil || p != "b" {
		t.Errorf("content at %q, %v", p, err)
	}
	var n Inode
	if err := x.Inode(b.Slot, &n); err != nil || n.Nlink != 3 || n.Layer != 1 {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestMergeRefuses(t *testing.T) {
	layer := mustNew(t, writeTree(t, layerOptions(), sample()))
	chain := mustNew(t, mergeTrees(t, []*node{dirNode(0o755, nil)}))
	newWriter := func(o WriterOptions) *Writer {
		w, err := NewWriter(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Discard)
		return w
	}
	one := WriterOptions{Kind: KindChain, Layers: 1}
	broken := func(refs ...LayerRef) Rule {
		return func([]LayerDir) ([]MergedEntry, error) { return []MergedEntry{{Name: "x", Refs: refs}}, nil }
	}
	for name, err := range map[string]error{
		"layer writer": Merge(newWriter(layerOptions()), []*Index{layer}, MergeOptions{Rule: testRule}),
		"count":        Merge(newWriter(one), []*Index{layer, layer}, MergeOptions{Rule: testRule}),
		"chain in":     Merge(newWriter(one), []*Index{chain}, MergeOptions{Rule: testRule}),
		"no object":    Merge(newWriter(one), []*Index{layer}, MergeOptions{Rule: broken()}),
		"wild dir":     Merge(newWriter(one), []*Index{layer}, MergeOptions{Rule: broken(LayerRef{7, 0})}),
		"wild entry":   Merge(newWriter(one), []*Index{layer}, MergeOptions{Rule: broken(LayerRef{0, 700})}),
		"negative":     Merge(newWriter(one), []*Index{layer}, MergeOptions{Rule: broken(LayerRef{-1, 0})}),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantErr := errors.New("rule failed")
	err := Merge(newWriter(one), []*Index{layer}, MergeOptions{Rule: func([]LayerDir) ([]MergedEntry, error) { return nil, wantErr }})
	if !errors.Is(err, wantErr) {
		t.Errorf("failing rule: %v", err)
	}
}
