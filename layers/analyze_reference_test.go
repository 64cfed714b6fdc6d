package layers

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// The reference for [Store.Analyze] and [Store.DiffImages] keeps whole trees in memory, one
// after each layer, and finds out everything by comparing them.

// refFile is one object of a layer; hard links are one.
type refFile struct {
	layer int
	dir   bool
	sym   bool
	data  string
	mode  int64
	uid   int
	first string // its first name in the layer
}

func (f *refFile) isFile() bool { return !f.dir && !f.sym }

func (f *refFile) size() int64 {
	if !f.isFile() {
		return 0
	}
	return int64(len(f.data))
}

// refTree maps paths to objects.
type refTree map[string]*refFile

func (t refTree) removeBelow(path string) {
	for p := range t {
		if strings.HasPrefix(p, path+"/") {
			delete(t, p)
		}
	}
}

// refLayer is a layer that was made up.
type refLayer struct {
	objects   map[string]*refFile
	implicit  map[string]bool // directories that the tar does not name
	opaque    map[string]bool
	whiteouts map[string]bool
}

// over is what the layer makes of a tree.
func (l refLayer) over(below refTree) refTree {
	out := maps.Clone(below)
	for p := range l.whiteouts {
		delete(out, p)
		out.removeBelow(p)
	}
	for p := range l.opaque {
		out.removeBelow(p)
	}
	for _, p := range slices.Sorted(maps.Keys(l.objects)) { // parents first
		o := l.objects[p]
		if !o.dir {
			out.removeBelow(p)
		}
		if was := out[p]; was == nil || !was.dir || !l.implicit[p] {
			out[p] = o
		}
	}
	return out
}

// entries is the layer as a tar.
func (l refLayer) entries() (out []ent) {
	for _, p := range slices.Sorted(maps.Keys(l.objects)) {
		o := l.objects[p]
		e := ent{name: p, data: o.data, mode: o.mode, uid: o.uid}
		switch {
		case l.implicit[p]:
			continue
		case o.dir:
			e.name, e.typ = p+"/", tar.TypeDir
		case o.sym:
			e.typ, e.link, e.data = tar.TypeSymlink, "to "+o.data, ""
		case o.first != p:
			e = hard(p, o.first)
		}
		out = append(out, e)
	}
	for _, p := range slices.Sorted(maps.Keys(l.opaque)) {
		out = append(out, opq(p))
	}
	for _, p := range slices.Sorted(maps.Keys(l.whiteouts)) {
		out = append(out, wh(p))
	}
	return out
}

// drawLayer makes a layer up, to lie on a tree.
func drawLayer(t *rapid.T, number int, below refTree) refLayer {
	l := refLayer{map[string]*refFile{}, map[string]bool{}, map[string]bool{}, map[string]bool{}}
	var files []string
	var fill func(dir string, depth int)
	fill = func(dir string, depth int) {
		for _, name := range []string{"a", "b\n", "c.d", "\xff"} {
			path := join(dir, name)
			o := &refFile{
				layer: number, first: path, mode: rapid.SampledFrom([]int64{0o644, 0o600}).Draw(t, "mode"), uid: rapid.SampledFrom([]int{0, 0, 7}).Draw(t, "uid"),
				data: rapid.SampledFrom([]string{"", "1", "2", "22", "333", "331"}).Draw(t, "data"),
			}
			what := rapid.SampledFrom([]string{"", "", "", "file", "file", "dir", "dir", "opaque", "symlink", "link", "whiteout", "whiteout"}).Draw(t, path)
			switch {
			case what == "" || depth == 3 && (what == "dir" || what == "opaque"):
				continue
			case what == "whiteout":
				l.whiteouts[path] = true
				continue
			case what == "symlink":
				o.sym = true
			case what == "link" && len(files) > 0:
				o = l.objects[rapid.SampledFrom(files).Draw(t, "target")]
			case what == "dir" || what == "opaque":
				o.dir, o.mode, o.data = true, o.mode|0o111, ""
				l.objects[path] = o
				if what == "opaque" {
					l.opaque[path] = true
				}
				before := len(l.objects)
				fill(path, depth+1)
				// A tar need not name a directory, if that is one below, or nothing.
				if was := below[path]; what == "dir" && len(l.objects) > before && (was == nil || was.dir) && rapid.Bool().Draw(t, "implicit") {
					l.implicit[path] = true
					o.mode, o.uid = 0o755, 0
				}
				continue
			default:
				files = append(files, path)
			}
			l.objects[path] = o
		}
	}
	fill("", 1)
	return l
}

// refAnalysis is what analyses are compared by.
type refAnalysis struct {
	Size, Visible, Wasted, Deleted, Duplicated int64
	Files, Directories                         int
	Counts                                     [][3]LayerCount
	LayerWasted, LayerWastes                   []int64
	WastedFiles                                []int
	Names                                      []string // kind, layer and path of all that layers do
	WastedPaths                                map[string]int64
	Largest                                    map[string]int64
}

func refAnalyze(layers []refLayer, trees []refTree) refAnalysis {
	n := len(layers)
	r := refAnalysis{
		Counts: make([][3]LayerCount, n), LayerWasted: make([]int64, n), LayerWastes: make([]int64, n), WastedFiles: make([]int, n),
		WastedPaths: map[string]int64{}, Largest: map[string]int64{},
	}
	shown := func(t refTree) map[*refFile]bool {
		out := map[*refFile]bool{}
		for _, o := range t {
			out[o] = true
		}
		return out
	}
	final := shown(trees[n])
	contents := map[string]int{}
	for i, l := range layers {
		before, after := trees[i], trees[i+1]
		count := func(kind int, o *refFile, path string) {
			c := &r.Counts[i][kind]
			if o.dir {
				c.Directories++
			} else {
				c.Files++
			}
			if kind < 2 && o.isFile() && o.first == path {
				c.Bytes += o.size()
			}
			r.Names = append(r.Names, fmt.Sprintf("%c %d %q", "ACD"[kind], i+1, "/"+path))
		}
		ended := map[*refFile]int{} // files of which this layer takes a name, and whether it deletes one
		for p, was := range before {
			is := after[p]
			switch {
			case is == nil:
				count(2, was, p)
				ended[was] = 2
			case is != was && is.dir && was.dir:
				if is.mode != was.mode || is.uid != was.uid {
					count(1, is, p)
				}
			case is != was:
				count(1, is, p)
				ended[was] = max(ended[was], 1)
			}
		}
		for p, is := range after {
			if before[p] == nil {
				count(0, is, p)
			}
		}
		alive := shown(after)
		for o, how := range ended {
			if !o.isFile() || alive[o] {
				continue
			}
			r.LayerWastes[i] += o.size()
			if how == 2 {
				r.Counts[i][2].Bytes += o.size()
				r.Deleted += o.size()
			}
		}
		for p, o := range l.objects {
			if !o.isFile() || o.first != p {
				continue
			}
			r.Size += o.size()
			if o.size() > 0 {
				if contents[o.data]++; contents[o.data] > 1 {
					r.Duplicated += o.size()
				}
			}
			if final[o] {
				r.Visible += o.size()
				continue
			}
			r.Wasted += o.size()
			r.LayerWasted[i] += o.size()
			r.WastedFiles[i]++
			if o.size() > 0 {
				r.WastedPaths["/"+p] += o.size()
			}
		}
	}
	done := map[*refFile]bool{}
	for _, p := range slices.Sorted(maps.Keys(trees[n])) {
		o := trees[n][p]
		if o.dir {
			r.Directories++
			continue
		}
		r.Files++
		if o.isFile() && !done[o] {
			done[o] = true
			r.Largest["/"+p] = o.size()
		}
	}
	slices.Sort(r.Names)
	return r
}

// asReference is an analysis in the terms of the reference.
func asReference(a *Analysis) refAnalysis {
	r := refAnalysis{
		Size: a.Size, Visible: a.Visible, Wasted: a.Wasted, Deleted: a.Deleted, Duplicated: a.Duplicated, Files: a.Files, Directories: a.Directories,
		WastedPaths: map[string]int64{}, Largest: map[string]int64{},
	}
	for _, l := range a.Layers {
		r.Counts = append(r.Counts, [3]LayerCount{l.Added, l.Changed, l.Deleted})
		r.LayerWasted, r.LayerWastes, r.WastedFiles = append(r.LayerWasted, l.Wasted), append(r.LayerWastes, l.Wastes), append(r.WastedFiles, l.WastedFiles)
		for _, f := range l.Files {
			r.Names = append(r.Names, fmt.Sprintf("%s %d %q", f.Kind, l.Number, string(f.Path)))
		}
	}
	for _, p := range a.WastedPaths {
		r.WastedPaths[string(p.Path)] = p.Wasted
	}
	for _, f := range a.Largest {
		r.Largest[string(f.Path)] = f.Size
	}
	slices.Sort(r.Names)
	return r
}

// refDiff lists what differs between two trees, and by how much the second is larger.
func refDiff(a, b refTree) (out []string, growth int64) {
	group := func(t refTree, o *refFile) (names []string) {
		for p, q := range t {
			if q == o {
				names = append(names, p)
			}
		}
		slices.Sort(names)
		return names
	}
	for p, was := range a {
		is := b[p]
		switch {
		case is == nil:
			out = append(out, "D /"+p)
		case is.dir != was.dir || is.sym != was.sym || is.uid != was.uid || !is.sym && is.mode != was.mode || is.data != was.data:
			out = append(out, "C /"+p)
		}
	}
	for p := range b {
		if a[p] == nil {
			out = append(out, "A /"+p)
		}
	}
	slices.Sort(out)
	for i, t := range []refTree{a, b} {
		for p, o := range t {
			if o.isFile() && group(t, o)[0] == p {
				growth += o.size() * int64(2*i-1)
			}
		}
	}
	return out, growth
}

// TestAnalyzeReference compares analyses and differences of images that are made up with
// the reference, in stores of root and of users.
func TestAnalyzeReference(t *testing.T) {
	tb := t // of the helpers: what they report is an end of the test, and not made smaller
	stores := []*Store{openStore(t), openStore(t)}
	asUser(t, stores[1])
	rapid.Check(t, func(t *rapid.T) {
		var layers []refLayer
		var tars [][]byte
		trees := []refTree{{}}
		for i := range rapid.IntRange(1, 5).Draw(t, "layers") {
			l := drawLayer(t, i, trees[i])
			layers, tars = append(layers, l), append(tars, layerTar(tb, l.entries()...))
			trees = append(trees, l.over(trees[i]))
		}
		k := rapid.IntRange(1, len(layers)).Draw(t, "k")
		archive := outerTar(tb, oldDocker(tb, img{refs: []string{"i"}, layers: tars}, img{refs: []string{"k"}, layers: tars[:k]}))
		s := stores[rapid.IntRange(0, 1).Draw(t, "store")]
		if _, err := s.Load(tb.Context(), Source{Reader: bytes.NewReader(archive)}, LoadOptions{}); err != nil {
			for i, l := range layers {
				t.Logf("layer %d: %+v", i+1, l.entries())
			}
			t.Fatal(err)
		}
		if d := cmp.Diff(refAnalyze(layers, trees), asReference(analyze(tb, s, "i", everything))); d != "" {
			t.Fatal(d)
		}
		list, err := s.DiffImages(tb.Context(), "k", "i", DiffOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		var growth int64
		for _, d := range list {
			if len(d.Why) > 0 && !slices.Equal(d.Why, []string{WhyHardlink}) || d.Kind != "C" {
				got = append(got, d.Kind+" "+string(d.Path))
			}
			if d.Kind != "D" && d.LinkTo == "" {
				growth += d.Size
			}
			if d.Kind == "D" && d.LinkTo == "" || d.Kind == "C" && d.OldLinkTo == "" {
				growth -= d.OldSize
			}
		}
		slices.Sort(got)
		want, grown := refDiff(trees[k], trees[len(layers)])
		if d := cmp.Diff(want, got); d != "" || growth != grown {
			t.Fatalf("%s\ngrown by %d, not %d", d, growth, grown)
		}
	})
	for _, s := range stores {
		clean(t, s)
	}
}
