package layers

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// everything is an analysis with all lists.
var everything = AnalyzeOptions{Files: true, Largest: -1, Directories: -1, Wasted: -1, Duplicates: -1, Why: true}

func analyze(t testing.TB, s *Store, name string, o AnalyzeOptions) *Analysis {
	t.Helper()
	a, err := s.Analyze(t.Context(), name, o)
	must(t, err)
	if a.Size != a.Visible+a.Wasted {
		t.Errorf("of %d bytes %d are visible and %d wasted", a.Size, a.Visible, a.Wasted)
	}
	infos, err := s.Layers(t.Context(), name)
	must(t, err)
	for i, l := range a.Layers {
		if l.Size != infos[i].Size || l.Size != l.Added.Bytes+l.Changed.Bytes {
			t.Errorf("layer %d has %d bytes, was unpacked with %d, and %d are added and %d changed", i+1, l.Size, infos[i].Size, l.Added.Bytes, l.Changed.Bytes)
		}
	}
	return a
}

// lines are what the layers do, a line for each name.
func (a *Analysis) lines() (out []string) {
	for _, l := range a.Layers {
		var b strings.Builder
		for _, f := range l.Files {
			b.WriteString(f.Kind + " " + string(f.Path))
			if f.LinkTo != "" {
				b.WriteString(" = " + string(f.LinkTo))
			}
			if len(f.Why) > 0 {
				b.WriteString(" (" + strings.Join(f.Why, " ") + ")")
			}
			b.WriteString("; ")
		}
		out = append(out, strings.TrimSuffix(b.String(), "; "))
	}
	return out
}

func TestAnalyze(t *testing.T) {
	for _, kind := range []string{"root", "user"} {
		t.Run(kind, func(t *testing.T) {
			s := openStore(t)
			if kind == "user" {
				asUser(t, s)
			}
			testAnalyze(t, s)
		})
	}
}

func testAnalyze(t *testing.T, s *Store) {
	ten := strings.Repeat("x", 10)
	mode := func(e ent, m int64) ent { e.mode = m; return e }
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"i"}, layers: [][]byte{
		layerTar(t, dir("d"), file("d/a", ten), file("d/b", ten), hard("d/b2", "d/b"), dir("o"), file("o/x", "123"), file("o/y", "1"),
			dir("gone"), dir("gone/sub"), file("gone/sub/f", "12345"), file("was-file", "1"), dir("was-dir"), file("was-dir/in", "12"),
			file("l", "1234"), hard("l2", "l")),
		layerTar(t, dir("d"), mode(file("d/a", ten), 0o600), wh("gone"), dir("o"), opq("o"), file("o/x", "321"), file("was-dir", "1"),
			dir("was-file"), file("was-file/in", "12"), wh("l"), wh("nothing")),
		layerTar(t),
		layerTar(t, mode(dir("d"), 0o700), file("d/b", "new"), file("copy", ten), wh("l2")),
	}, config: func(i *ocispec.Image) {
		h := i.History
		i.History = []ocispec.History{h[0], {CreatedBy: "ENV x=y", EmptyLayer: true}, h[1], h[2], {CreatedBy: "CMD", EmptyLayer: true}, h[3]}
	}})))
	a := analyze(t, s, "i", everything)
	want := []string{
		"A /d; A /d/a; A /d/b; A /d/b2 = /d/b; A /gone; A /gone/sub; A /gone/sub/f; A /l; A /l2 = /l; A /o; A /o/x; A /o/y; A /was-dir; A /was-dir/in; A /was-file",
		"C /d/a (mode); D /gone; D /gone/sub; D /gone/sub/f; D /l; C /o/x (content); D /o/y; C /was-dir (type); D /was-dir/in; C /was-file (type); A /was-file/in",
		"",
		"A /copy; C /d (mode); C /d/b (size content); D /l2",
	}
	if d := cmp.Diff(want, a.lines()); d != "" {
		t.Error(d)
	}
	type counts struct {
		A, C, D             LayerCount
		Wasted, Wastes      int64
		WastedFiles, Images int
		By                  string
	}
	var got []counts
	for _, l := range a.Layers {
		got = append(got, counts{l.Added, l.Changed, l.Deleted, l.Wasted, l.Wastes, l.WastedFiles, l.Images, l.CreatedBy})
	}
	if d := cmp.Diff([]counts{
		{LayerCount{10, 5, 10 + 10 + 5 + 4 + 3 + 1 + 2 + 1}, LayerCount{}, LayerCount{}, 10 + 5 + 3 + 1 + 2 + 1 + 4, 0, 7, 1, "step 0"},
		{LayerCount{1, 0, 2}, LayerCount{3, 1, 10 + 3 + 1}, LayerCount{4, 2, 5 + 1 + 2}, 0, 10 + 5 + 3 + 1 + 2 + 1, 0, 1, "step 1"},
		{Images: 1, By: "step 2"},
		{LayerCount{1, 0, 10}, LayerCount{1, 1, 3}, LayerCount{1, 0, 4}, 0, 4, 0, 1, "step 3"},
	}, got); d != "" {
		t.Error(d)
	}
	var steps []string
	for _, h := range a.History {
		steps = append(steps, strings.Repeat("#", h.Layer)+h.CreatedBy)
	}
	if d := cmp.Diff([]string{"#step 0", "ENV x=y", "##step 1", "###step 2", "CMD", "####step 3"}, steps); d != "" {
		t.Error(d)
	}
	wasted := []WastedPath{
		{"/d/a", 10, []WastedFile{{1, 10, 2, "C", []string{WhyMode}}}, true},
		{"/gone/sub/f", 5, []WastedFile{{1, 5, 2, "D", nil}}, false},
		{"/l", 4, []WastedFile{{1, 4, 4, "D", nil}}, false},
		{"/o/x", 3, []WastedFile{{1, 3, 2, "C", []string{WhyContent}}}, true},
		{"/was-dir/in", 2, []WastedFile{{1, 2, 2, "D", nil}}, false},
		{"/o/y", 1, []WastedFile{{1, 1, 2, "D", nil}}, false},
		{"/was-file", 1, []WastedFile{{1, 1, 2, "C", []string{WhyType}}}, true},
	}
	if d := cmp.Diff(wasted, a.WastedPaths); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]LargeDirectory{{"/d", 10, 1}, {"/gone/sub", 5, 1}, {"/o", 4, 2}, {"/was-dir", 2, 1}}, a.WastedDirectories); d != "" {
		t.Error(d)
	}
	large := []LargeFile{{"/copy", 10, 4}, {"/d/a", 10, 2}, {"/d/b2", 10, 1}, {"/d/b", 3, 4}, {"/o/x", 3, 2}, {"/was-file/in", 2, 2}, {"/was-dir", 1, 2}}
	if d := cmp.Diff(large, a.Largest); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]LargeDirectory{{"/d", 23, 3}, {"/o", 3, 1}, {"/was-file", 2, 1}}, a.LargestDirectories); d != "" {
		t.Error(d)
	}
	var same [][]DuplicateFile
	for _, d := range a.Duplicates {
		same = append(same, d.Files)
	}
	if d := cmp.Diff([][]DuplicateFile{
		{{"/copy", 4, true}, {"/d/a", 1, false}, {"/d/a", 2, true}, {"/d/b", 1, true}},
		{{"/was-dir/in", 1, false}, {"/was-file/in", 2, true}},
		{{"/o/y", 1, false}, {"/was-dir", 2, true}, {"/was-file", 1, false}},
	}, same, cmpopts.SortSlices(func(a, b []DuplicateFile) bool { return a[0].Path < b[0].Path })); d != "" {
		t.Error(d)
	}
	if a.Duplicated != 3*10+2+2*1 {
		t.Error(a.Duplicated)
	}
	few := analyze(t, s, "i", AnalyzeOptions{Largest: 1, Wasted: 2, Directories: 1, Files: true, Layer: 4})
	if len(few.Largest) != 1 || len(few.WastedPaths) != 2 || len(few.LargestDirectories) != 1 || few.Duplicates != nil || len(few.Layers[1].Files) > 0 || len(few.Layers[3].Files) != 4 {
		t.Errorf("%+v", few)
	}
	clean(t, s)
}

// TestAnalyzeRepeatedLayers has one layer twice, and images that share layers.
func TestAnalyzeRepeatedLayers(t *testing.T) {
	s := openStore(t)
	base := layerTar(t, dir("d"), file("d/f", "12345"), hard("d/g", "d/f"))
	load(t, s, outerTar(t, oldDocker(t,
		img{refs: []string{"once"}, layers: [][]byte{base}},
		img{refs: []string{"twice"}, layers: [][]byte{base, base}},
		img{refs: []string{"none"}},
	)))
	a := analyze(t, s, "twice", everything)
	if d := cmp.Diff([]string{"A /d; A /d/f; A /d/g = /d/f", "C /d/f; C /d/g = /d/f"}, a.lines()); d != "" {
		t.Error(d)
	}
	if a.Layers[0].Images != 2 || a.Layers[1].Images != 1 || a.Efficiency != 0.5 || a.Layers[0].Wasted != 5 || a.Duplicated != 5 {
		t.Errorf("%+v", a)
	}
	none := analyze(t, s, "none", everything)
	if none.Efficiency != 1 || len(none.Layers) != 0 || none.Directories != 0 {
		t.Errorf("%+v", none)
	}
	if _, err := s.Analyze(t.Context(), "nobody", everything); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if _, err := s.Analyze(t.Context(), "once", AnalyzeOptions{Layer: 2}); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

// TestAnalyzeAdopted reads layers where another engine has them, in another dialect.
func TestAnalyzeAdopted(t *testing.T) {
	needRoot(t)
	root, _ := dockerRoot(t)
	before := trace(t, root)
	for _, o := range []AdoptOptions{{}, {Mode: AdoptCopy}} {
		s := openStore(t)
		adopt(t, s, root, o)
		a := analyze(t, s, "app:1", everything)
		if d := cmp.Diff([]string{
			"A /d; A /d/dot; A /d/old; A /d/through; A /etc; A /etc/a; A /gone; A /l",
			"D /d/dot; A /d/new; D /d/old; D /d/through; D /gone",
		}, a.lines()); d != "" {
			t.Errorf("%+v: %s", o, d)
		}
		if a.Size != 17 || a.Wasted != 1+3+6+3 {
			t.Errorf("%+v: %d bytes, %d wasted", o, a.Size, a.Wasted)
		}
	}
	if after := trace(t, root); after != before {
		t.Errorf("the source has changed:\n%s", after)
	}
}

// TestAnalyzeChangedLayers: what somebody has put in the place of a file is not read.
func TestAnalyzeChangedLayers(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "f")
	put(t, secret, "secret")
	for what, change := range map[string]func(dir string) error{
		"removed":            func(dir string) error { return os.Remove(dir + "/f") },
		"fifo":               func(dir string) error { return errors.Join(os.Remove(dir+"/f"), unix.Mkfifo(dir+"/f", 0o644)) },
		"link":               func(dir string) error { return errors.Join(os.Remove(dir+"/f"), os.Symlink(secret, dir+"/f")) },
		"link for directory": func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Symlink(filepath.Dir(secret), dir)) },
	} {
		s := openStore(t)
		load(t, s, outerTar(t, oldDocker(t,
			img{refs: []string{"i"}, layers: [][]byte{layerTar(t, dir("d"), dir("d/e"), file("d/e/f", "public"), file("g", "secret"))}},
			img{refs: []string{"k"}, layers: [][]byte{layerTar(t, dir("d"), dir("d/e"), file("d/e/f", "secret"), file("g", "secret"))}},
		)))
		st, err := s.ImageStack(t.Context(), "i")
		must(t, err)
		must(t, change(st.Lowers[0].Path+"/d/e"))
		if _, err := s.Analyze(t.Context(), "i", AnalyzeOptions{Largest: 1}); err != nil {
			t.Errorf("%s: without content: %v", what, err)
		}
		if _, err := s.Analyze(t.Context(), "i", everything); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), `"d/e/f"`) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := s.DiffImages(t.Context(), "i", "k", DiffOptions{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestAnalyzeDamagedIndex: an index is a cache; one that is damaged is made anew.
func TestAnalyzeDamagedIndex(t *testing.T) {
	s := openStore(t)
	st := loadLayers(t, s, layerTar(t, dir("d"), file("d/f", "12345")), layerTar(t, dir("d"), file("d/f", "1")))
	for _, d := range st.Lowers {
		b, err := os.ReadFile(indexPath(s, d))
		must(t, err)
		b[len(b)-40] ^= 1 // in the names and entries
		must(t, os.WriteFile(indexPath(s, d), b, 0o600))
	}
	list, err := s.Images(t.Context(), "")
	must(t, err)
	if a := analyze(t, s, list[0].ID.String(), everything); a.Wasted != 5 || a.Size != 6 {
		t.Errorf("%+v", a)
	}
	clean(t, s)
}
