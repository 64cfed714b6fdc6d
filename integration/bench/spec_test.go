package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMerged(t *testing.T) {
	layer := func(entries ...entry) layerSpec {
		b := newBuilder()
		for _, e := range entries {
			b.add(e)
		}
		return b.spec
	}
	s := stackSpec{
		layer(entry{path: "a/x", size: 1}, entry{path: "a/y"}, entry{path: "b/c/z"}, entry{path: "d/one"}, entry{path: "e/f"}),
		layer(
			entry{path: "a/x", size: 2}, entry{path: "a/y", kind: aWhiteout}, entry{path: "b/c", kind: aWhiteout},
			entry{path: "d", kind: anOpaqueDir}, entry{path: "d/two"}, entry{path: "e", kind: aSymlink, target: "a"},
		),
	}
	got := s.merged()
	want := []string{"a", "a/x", "b", "d", "d/two", "e"}
	if diff := cmp.Diff(want, got.paths(func(entry) bool { return true })); diff != "" {
		t.Error(diff)
	}
	if i := slices.IndexFunc(got, func(e entry) bool { return e.path == "a/x" }); got[i].size != 2 {
		t.Errorf("a/x is that of the lower layer: %+v", got[i])
	}
}

// TestImageSpec: the tree has the size that the documentation says, is the same
// each time, and nothing is in it twice.
func TestImageSpec(t *testing.T) {
	s := imageSpec(1)
	tree := s.merged()
	if n := len(tree); n < 16_000 || n > 18_000 {
		t.Errorf("%d names in the merged tree", n)
	}
	size := int64(0)
	kinds := map[entryKind]int{}
	for _, l := range s {
		for _, e := range l {
			kinds[e.kind]++
			size += e.size
		}
	}
	if size < 100<<20 || size > 400<<20 {
		t.Errorf("%d bytes in all layers", size)
	}
	for k := aFile; k <= aWhiteout; k++ {
		if kinds[k] == 0 {
			t.Errorf("no entry of kind %d", k)
		}
	}
	again := imageSpec(1)
	if !slices.EqualFunc(s, again, slices.Equal) {
		t.Error("the tree is another one each time")
	}
	t.Logf("%d names, %d MiB, %v", len(tree), size>>20, kinds)
}

func TestTarball(t *testing.T) {
	b := newBuilder()
	b.file("d/file", 5<<20)
	b.add(entry{path: "d/link", kind: aHardlink, target: "d/file"})
	b.add(entry{path: "o", kind: anOpaqueDir, mode: 0o755})
	b.add(entry{path: "d/gone", kind: aWhiteout})
	raw, err := b.spec.tarball()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, r); err != nil || n != h.Size {
			t.Errorf("%s: %d bytes, %v", h.Name, n, err)
		}
		names = append(names, h.Name)
	}
	want := []string{"d/", "d/file", "d/link", "o/", "o/.wh..wh..opq", "d/.wh.gone"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
}
