package chainindex

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// fataler is what *testing.T and *rapid.T share.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// compareTree checks everything the index says against the model.
func compareTree(t fataler, x *Index, root *node) {
	t.Helper()
	type item struct {
		n    *node
		path string
	}
	names := map[Slot]uint32{}
	for stack := []item{{root, ""}}; len(stack) > 0; {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if d.n.children == nil {
			o := d.n
			if o.link != nil {
				o = o.link
			}
			compareObject(t, x, d.path, d.n.slot, o)
			continue
		}
		compareObject(t, x, d.path, d.n.slot, d.n)
		var buf DirBuf
		if err := x.ReadDir(d.n.slot, 0, len(d.n.children)+1, &buf); err != nil {
			t.Fatalf("ReadDir(%q): %v", d.path, err)
		}
		want := slices.Sorted(maps.Keys(d.n.children))
		if len(buf.Entries) != len(want) {
			t.Fatalf("ReadDir(%q) has %d entries, want %d", d.path, len(buf.Entries), len(want))
		}
		for i, name := range want {
			c := d.n.children[name]
			got := buf.Entries[i]
			if string(got.Name) != name || got.Slot != c.slot || got.Whiteout != c.whiteout || got.Next != uint64(i+1) {
				t.Fatalf("ReadDir(%q)[%d] = %+v, want %q of inode %d", d.path, i, got, name, c.slot)
			}
			e, ok, err := x.Lookup(d.n.slot, name)
			if err != nil || !ok || e != got.Entry {
				t.Fatalf("Lookup(%q, %q) = %+v, %v, %v", d.path, name, e, ok, err)
			}
			for _, missing := range []string{name + "\x01", name[:len(name)-1], name + "0"} {
				if _, there := d.n.children[missing]; there || missing == "" || len(missing) > maxName {
					continue
				}
				if _, ok, err := x.Lookup(d.n.slot, missing); ok || err != nil {
					t.Fatalf("Lookup(%q, %q) = %v, %v, want nothing", d.path, missing, ok, err)
				}
			}
			if c.slot == 0 {
				continue
			}
			names[c.slot]++
			path := strings.TrimPrefix(d.path+"/"+name, "/")
			stack = append(stack, item{c, path})
			if names[c.slot] == 1 && c.link == nil && c.children != nil {
				if p, err := x.Path(c.slot); err != nil || p != path {
					t.Fatalf("Path(%d) = %q, %v, want %q", c.slot, p, err, path)
				}
			}
		}
	}
}

func compareObject(t fataler, x *Index, path string, slot Slot, want *node) {
	t.Helper()
	if want.Mode == 0 {
		return
	}
	got, err := x.Object(slot)
	if err != nil {
		t.Fatalf("Object(%q): %v", path, err)
	}
	w := want.Object
	if w.Nlink == 0 {
		w.Nlink = got.Nlink // counted by the writer, compared by its own test
	}
	if w.Origin == 0 {
		w.Origin = slot
	}
	w.Xattrs = slices.SortedFunc(slices.Values(w.Xattrs), func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	if diff := cmp.Diff(&w, got); diff != "" {
		t.Fatalf("Object(%q): %s", path, diff)
	}
	for _, a := range w.Xattrs {
		if v, ok, err := x.Xattr(slot, a.Name); err != nil || !ok || !bytes.Equal(v, a.Value) {
			t.Fatalf("Xattr(%q, %q) = %q, %v, %v", path, a.Name, v, ok, err)
		}
	}
	if _, ok, err := x.Xattr(slot, "user.missing"); ok || err != nil {
		t.Fatalf("Xattr(%q, missing) = %v, %v", path, ok, err)
	}
}

func TestSampleTree(t *testing.T) {
	root := sample()
	x := mustNew(t, writeTree(t, layerOptions(), root))
	compareTree(t, x, root)
	if err := x.Verify(); err != nil {
		t.Fatal(err)
	}
	if x.ID() != "sha256:test" || x.Kind() != KindLayer || x.Layers() != 1 {
		t.Errorf("header: %q %v %d", x.ID(), x.Kind(), x.Layers())
	}
	var n Inode
	for path, want := range map[string]uint32{"hard-1": 2, "hard-2": 2, "moved": 1, "etc": 2} {
		e, ok, err := x.Lookup(Root, path)
		if err != nil || !ok {
			t.Fatal(path, ok, err)
		}
		if err := x.Inode(e.Slot, &n); err != nil || n.Nlink != want {
			t.Errorf("%s: nlink %d, %v, want %d", path, n.Nlink, err, want)
		}
	}
	if err := x.Inode(Root, &n); err != nil || n.Nlink != 5 {
		t.Errorf("root: nlink %d, %v, want 5", n.Nlink, err)
	}
	e, _, _ := x.Lookup(Root, "moved")
	if p, err := x.ContentPath(e.Slot); err != nil || p != "old/place" {
		t.Errorf("ContentPath = %q, %v", p, err)
	}
	if p, err := x.Path(e.Slot); err != nil || p != "moved" {
		t.Errorf("Path = %q, %v", p, err)
	}
}

func TestWrongUse(t *testing.T) {
	x := mustNew(t, writeTree(t, layerOptions(), sample()))
	e, _, err := x.Lookup(Root, "caps")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x.Lookup(e.Slot, "x"); !errors.Is(err, ErrNotDir) {
		t.Errorf("Lookup in a file: %v", err)
	}
	if err := x.ReadDir(e.Slot, 0, 1, &DirBuf{}); !errors.Is(err, ErrNotDir) {
		t.Errorf("ReadDir of a file: %v", err)
	}
	if _, err := x.Readlink(e.Slot); err == nil {
		t.Error("Readlink of a file succeeded")
	}
	for _, s := range []Slot{0, Slot(x.Inodes() + 1), 1<<32 - 1} {
		if err := x.Inode(s, &Inode{}); !errors.Is(err, ErrNoSlot) {
			t.Errorf("Inode(%d): %v", s, err)
		}
	}
	for _, name := range []string{"", strings.Repeat("x", 300)} {
		if _, ok, err := x.Lookup(Root, name); ok || err != nil {
			t.Errorf("Lookup(%q) = %v, %v", name, ok, err)
		}
	}
	if err := x.ReadDir(Root, 1<<63, 10, &DirBuf{}); err != nil {
		t.Errorf("ReadDir far beyond the end: %v", err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	if err := x.Inode(Root, &Inode{}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// treeGen draws random trees of a layer. Names come from a small alphabet so that prefixes collide.
func treeGen(depth int) *rapid.Generator[*node] {
	name := rapid.OneOf(
		rapid.StringMatching(`[ab]{1,20}`),
		rapid.StringMatching(`common-prefix-of-[ab]{1,3}`),
		rapid.StringMatching(`[^/\x00]{1,8}`).Filter(func(s string) bool { return checkName(s) == "" }),
	)
	return rapid.Custom(func(t *rapid.T) *node {
		d := dirNode(uint32(rapid.IntRange(0, 0o7777).Draw(t, "perm")), nil)
		d.UID, d.GID = rapid.Uint32().Draw(t, "uid"), rapid.Uint32().Draw(t, "gid")
		d.Ino, d.Blocks = rapid.Uint64().Draw(t, "ino"), rapid.Uint64().Draw(t, "blocks")
		if rapid.IntRange(0, 5).Draw(t, "opaque") == 0 {
			d.Flags |= FlagOpaque
		}
		if rapid.IntRange(0, 5).Draw(t, "implicit") == 0 {
			d.Flags |= FlagImplicit
		}
		var files []*node
		for _, n := range rapid.SliceOfNDistinct(name, 0, 8, rapid.ID[string]).Draw(t, "names") {
			var c *node
			switch kind := rapid.IntRange(0, 8).Draw(t, "kind"); {
			case kind <= 2 && depth > 0:
				c = treeGen(depth-1).Draw(t, "dir")
				c.whiteout = kind == 2
			case kind == 3:
				c = whiteoutNode()
			case kind == 4:
				c = symlinkNode(rapid.StringMatching(`[^\x00]{1,40}`).Draw(t, "target"))
			case kind == 5 && len(files) > 0:
				c = &node{link: rapid.SampledFrom(files).Draw(t, "link")}
			default:
				c = fileNode(rapid.Uint64().Draw(t, "size"))
				c.Ino, c.Blocks = rapid.Uint64().Draw(t, "ino"), rapid.Uint64().Draw(t, "blocks")
				c.Mtime = Time{rapid.Int64().Draw(t, "sec"), uint32(rapid.IntRange(0, 999_999_999).Draw(t, "nsec"))}
				for _, k := range rapid.SliceOfNDistinct(rapid.StringMatching(`user\.[a-d]{1,3}`), 0, 3, rapid.ID[string]).Draw(t, "xattrs") {
					c.Xattrs = append(c.Xattrs, Xattr{k, rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "value")})
				}
				files = append(files, c)
			}
			d.children[n] = c
		}
		return d
	})
}

func TestWriteReadIdentity(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		root := treeGen(3).Draw(rt, "tree")
		data := writeTree(t, layerOptions(), root)
		x := mustNew(t, data)
		compareTree(rt, x, root)
		if err := x.Verify(); err != nil {
			rt.Fatalf("Verify: %v", err)
		}
	})
}

// TestSpilledEqualsInMemory also shows that the bytes depend on the calls alone.
func TestSpilledEqualsInMemory(t *testing.T) {
	build := func(limit int) []byte {
		root := dirNode(0o755, nil)
		for d := range 20 {
			sub := dirNode(0o755, nil)
			for f := range 300 {
				n := fileNode(uint64(f))
				n.Xattrs = []Xattr{{"user.n", fmt.Appendf(nil, "%d-%d", d, f)}}
				sub.children[fmt.Sprintf("a-rather-long-file-name-%d-%d", d, f)] = n
			}
			root.children[fmt.Sprintf("dir%02d", d)] = sub
		}
		o := layerOptions()
		o.MemoryLimit, o.TempDir = limit, t.TempDir()
		data := writeTree(t, o, root)
		if err := mustNew(t, data).Verify(); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(o.TempDir); err != nil || len(left) != 0 {
			t.Errorf("left in the temporary directory: %v, %v", left, err)
		}
		return data
	}
	if !bytes.Equal(build(4096), build(0)) {
		t.Error("an index that was spilled to disk differs from one built in memory")
	}
}

func TestReadDirResumesAtEveryCookie(t *testing.T) {
	root := dirNode(0o755, nil)
	for i := range 1000 {
		root.children[fmt.Sprintf("entry-with-a-long-name-%04d", i)] = fileNode(uint64(i))
	}
	x := mustNew(t, writeTree(t, layerOptions(), root))
	var all DirBuf
	if err := x.ReadDir(Root, 0, 2000, &all); err != nil {
		t.Fatal(err)
	}
	var buf DirBuf
	for _, step := range []int{1, 7, 999, 1000, 1001} {
		i := 0
		for cookie := uint64(0); ; {
			if err := x.ReadDir(Root, cookie, step, &buf); err != nil {
				t.Fatal(err)
			}
			if len(buf.Entries) == 0 {
				break
			}
			for _, e := range buf.Entries {
				if !bytes.Equal(e.Name, all.Entries[i].Name) || e.Entry != all.Entries[i].Entry {
					t.Fatalf("step %d, entry %d: %q, want %q", step, i, e.Name, all.Entries[i].Name)
				}
				i++
				cookie = e.Next
			}
		}
		if i != 1000 {
			t.Errorf("step %d: %d entries", step, i)
		}
	}
}

func TestCommitReplacesTheFileWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "chain.idx")
	for _, id := range []string{"one", "two"} {
		w, err := NewWriter(WriterOptions{Kind: KindChain, ID: id, Layers: 3})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.SetRoot(&dirNode(0o755, nil).Object); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(path); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(path); !errors.Is(err, ErrClosed) {
			t.Errorf("second Commit: %v", err)
		}
		x, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if x.ID() != id || x.Layers() != 3 || x.Verify() != nil {
			t.Errorf("got %q of %d layers, %v", x.ID(), x.Layers(), x.Verify())
		}
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("files: %v, %v", files, err)
	}
	w, err := NewWriter(layerOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(path); !errors.Is(err, ErrInvalid) {
		t.Errorf("Commit without a root: %v", err)
	}
	if x, err := Open(path); err != nil || x.ID() != "two" {
		t.Errorf("a failed Commit touched the file: %v", err)
	} else if err := x.Close(); err != nil {
		t.Error(err)
	}
}
