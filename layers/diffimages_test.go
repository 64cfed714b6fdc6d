package layers

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// imageChanges is what differs between two images, as lines of a container's diff.
func imageChanges(t testing.TB, s *Store, a, b string) (out []Change) {
	t.Helper()
	list, err := s.DiffImages(t.Context(), a, b, DiffOptions{})
	must(t, err)
	for _, d := range list {
		out = append(out, Change{d.Kind, string(d.Path)})
	}
	return out
}

// TestDiffImagesThatShareNothing compares trees that say the same with other layers, and
// each way of being different.
func TestDiffImagesThatShareNothing(t *testing.T) {
	s := openStore(t)
	later := func(e ent) ent { e.time = epoch.Add(time.Hour); return e }
	with := func(e ent, f func(*ent)) ent { f(&e); return e }
	load(t, s, outerTar(t, oldDocker(t,
		img{refs: []string{"a"}, layers: [][]byte{layerTar(t,
			dir("d"), file("d/same", "1"), file("d/touched", "1"), file("d/content", "1"), file("d/longer", "1"), file("d/mode", "1"), file("d/owner", "1"),
			sym("d/sym", "x"), file("d/type", "1"), file("d/xattr", "1"), dir("gone"), dir("gone/sub"), file("gone/sub/f", "12345"),
			file("l1", "123"), hard("l2", "l1"), dir("dir-to-file"), file("dir-to-file/in", "1"), file("file-to-dir", "1"), dir("moded"), file("odd\n\xff", "1"),
		)}},
		img{refs: []string{"b"}, layers: [][]byte{
			layerTar(t, dir("d"), file("d/same", "other"), file("d/content", "2"), dir("hidden"), file("hidden/f", "1")),
			layerTar(t, wh("hidden"), later(dir("d")), file("d/same", "1"), later(file("d/touched", "1")), file("d/longer", "12"),
				with(file("d/mode", "1"), func(e *ent) { e.mode = 0o755 }), with(file("d/owner", "1"), func(e *ent) { e.uid, e.gid = 3, 4 }),
				sym("d/sym", "y"), sym("d/type", "x"), with(file("d/xattr", "1"), func(e *ent) { e.x = map[string]string{"user.k": "v"} }),
				file("l1", "123"), file("l2", "123"), file("dir-to-file", "1"), dir("file-to-dir"), file("file-to-dir/in", "12"),
				with(dir("moded"), func(e *ent) { e.mode = 0o700 }), file("odd\n\xff", "2"), dir("new"), file("new/f", "1234"), hard("new/g", "new/f"),
			),
		}},
	)))
	got, err := s.DiffImages(t.Context(), "a", "b", DiffOptions{})
	must(t, err)
	why := func(details ...string) []string { return details }
	want := []Difference{
		{Kind: "C", Path: "/d", Type: "directory"},
		{Kind: "C", Path: "/d/content", Type: "file", Size: 1, OldSize: 1, Why: why("content"), Details: why("content")},
		{Kind: "C", Path: "/d/longer", Type: "file", Size: 2, OldSize: 1, Why: why("size", "content"), Details: why("size 1 -> 2", "content")},
		{Kind: "C", Path: "/d/mode", Type: "file", Size: 1, OldSize: 1, Why: why("mode"), Details: why("mode 0644 -> 0755")},
		{Kind: "C", Path: "/d/owner", Type: "file", Size: 1, OldSize: 1, Why: why("owner"), Details: why("owner 0:0 -> 3:4")},
		{Kind: "C", Path: "/d/sym", Type: "symlink", Why: why("link"), Details: why(`link "x" -> "y"`)},
		{Kind: "C", Path: "/d/type", Type: "symlink", OldSize: 1, Why: why("type"), Details: why("type file -> symlink")},
		{Kind: "C", Path: "/d/xattr", Type: "file", Size: 1, OldSize: 1, Why: why("xattr"), Details: why("xattr +user.k")},
		{Kind: "C", Path: "/dir-to-file", Type: "file", Size: 1, Why: why("type"), Details: why("type directory -> file")},
		{Kind: "D", Path: "/dir-to-file/in", Type: "file", OldSize: 1},
		{Kind: "C", Path: "/file-to-dir", Type: "directory", OldSize: 1, Why: why("type"), Details: why("type file -> directory")},
		{Kind: "A", Path: "/file-to-dir/in", Type: "file", Size: 2},
		{Kind: "D", Path: "/gone", Type: "directory"},
		{Kind: "D", Path: "/gone/sub", Type: "directory"},
		{Kind: "D", Path: "/gone/sub/f", Type: "file", OldSize: 5},
		{Kind: "C", Path: "/l2", Type: "file", Size: 3, OldSize: 3, OldLinkTo: "/l1", Why: why("hardlink"), Details: why(`hardlink "/l1" -> "/l2"`)},
		{Kind: "C", Path: "/moded", Type: "directory", Why: why("mode"), Details: why("mode 0755 -> 0700")},
		{Kind: "A", Path: "/new", Type: "directory"},
		{Kind: "A", Path: "/new/f", Type: "file", Size: 4},
		{Kind: "A", Path: "/new/g", Type: "file", Size: 4, LinkTo: "/new/f"},
		{Kind: "C", Path: "/odd\n\xff", Type: "file", Size: 1, OldSize: 1, Why: why("content"), Details: why("content")},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	timed, err := s.DiffImages(t.Context(), "a", "b", DiffOptions{Times: true})
	must(t, err)
	if len(timed) != len(want)+1 || timed[6].Path != "/d/touched" || timed[6].Why[0] != WhyTime {
		t.Errorf("with times: %+v", timed)
	}
	clean(t, s)
}

// TestDiffImagesWithoutLayers compares with nothing.
func TestDiffImagesWithoutLayers(t *testing.T) {
	s := openStore(t)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"empty"}}, img{refs: []string{"one"}, layers: [][]byte{layerTar(t, dir("d"), file("d/f", "1"))}})))
	if d := cmp.Diff([]Change{{"A", "/d"}, {"A", "/d/f"}}, imageChanges(t, s, "empty", "one")); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]Change{{"D", "/d"}, {"D", "/d/f"}}, imageChanges(t, s, "one", "empty")); d != "" {
		t.Error(d)
	}
	for _, name := range []string{"empty", "one"} {
		if got := imageChanges(t, s, name, name); len(got) > 0 {
			t.Errorf("%s and itself: %v", name, got)
		}
	}
}
