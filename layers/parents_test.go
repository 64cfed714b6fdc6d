package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestParentsInArchive saves a chain of images and loads it elsewhere.
func TestParentsInArchive(t *testing.T) {
	from := openStore(t)
	baseImage(t, from)
	step := build(t, from, "base", "", "make all")
	top := build(t, from, step.ID.String(), "top", "make install")
	base, err := from.ResolveImage(t.Context(), "base")
	must(t, err)
	for _, format := range []string{FormatDocker, FormatOldDocker} {
		for _, tc := range []struct {
			name  string
			saved []string
			want  map[digest.Digest]digest.Digest // parents
		}{
			{"all", []string{"base", step.ID.String(), "top"}, map[digest.Digest]digest.Digest{base.ID: "", step.ID: base.ID, top.ID: step.ID}},
			{"child first", []string{"top", step.ID.String()}, map[digest.Digest]digest.Digest{step.ID: "", top.ID: step.ID}},
			{"a step is missing", []string{"base", "top"}, map[digest.Digest]digest.Digest{base.ID: "", top.ID: ""}},
		} {
			var archive bytes.Buffer
			must(t, from.Save(t.Context(), &archive, tc.saved, SaveOptions{Format: format}))
			to := openStore(t)
			load(t, to, archive.Bytes())
			load(t, to, archive.Bytes()) // changes nothing
			got := map[digest.Digest]digest.Digest{}
			for id := range tc.want {
				i, err := to.ResolveImage(t.Context(), id.String())
				must(t, err)
				got[id] = i.Parent
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("%s: %s: %s", format, tc.name, d)
			}
			clean(t, to)
		}
	}
	// A step that has come with its result goes with it.
	var archive bytes.Buffer
	must(t, from.Save(t.Context(), &archive, []string{"base", step.ID.String(), "top"}, SaveOptions{}))
	to := openStore(t)
	load(t, to, archive.Bytes())
	if list, err := to.Images(t.Context(), ""); err != nil || len(list) != 2 {
		t.Errorf("%+v %v", list, err)
	}
	_, err = to.RemoveImage(t.Context(), "top", RemoveOptions{})
	must(t, err)
	if _, err := to.ResolveImage(t.Context(), step.ID.String()); !errors.Is(err, ErrNotFound) {
		t.Error("the step is still there:", err)
	}
}

// TestParentThatIsNone: an archive cannot make one image keep another.
func TestParentThatIsNone(t *testing.T) {
	layer := layerTar(t, file("f", "1"))
	one, two := img{refs: []string{"one:1"}, layers: [][]byte{layer}}, img{refs: []string{"two:1"}, layers: [][]byte{layer}}
	two.config = func(i *ocispec.Image) {
		i.History = append(i.History, ocispec.History{CreatedBy: "a step", EmptyLayer: true})
	}
	other := img{refs: []string{"other:1"}, layers: [][]byte{layerTar(t, file("f", "2"))}}
	id := func(i img) digest.Digest { return digest.FromBytes(i.configJSON(t)) }
	for _, tc := range []struct {
		name          string
		child, parent img
		want          digest.Digest
	}{
		{"a step", two, one, id(one)},
		{"the reverse", one, two, ""},
		{"itself", one, one, ""},
		{"other layers", two, other, ""},
	} {
		s := openStore(t)
		load(t, s, outerTar(t, withParent(t, oldDocker(t, one, two, other), id(tc.child), id(tc.parent))))
		got, err := s.ResolveImage(t.Context(), id(tc.child).String())
		must(t, err)
		if got.Parent != tc.want {
			t.Errorf("%s: parent %q, not %q", tc.name, got.Parent, tc.want)
		}
	}
}

// TestLoadSaysWhatLosesItsName loads images under names that others have.
func TestLoadSaysWhatLosesItsName(t *testing.T) {
	s := openStore(t)
	one := img{refs: []string{"app:1", "app:2"}, layers: [][]byte{layerTar(t, file("f", "1"))}}
	two := img{refs: []string{"app:2", "app:3"}, layers: [][]byte{layerTar(t, file("f", "2"))}}
	old := load(t, s, outerTar(t, oldDocker(t, one)))[0]
	if old.Replaced != nil {
		t.Errorf("%+v", old)
	}
	got := load(t, s, outerTar(t, oldDocker(t, two)))[0]
	if d := cmp.Diff(map[string]digest.Digest{"app:2": old.ID}, got.Replaced); d != "" {
		t.Error(d)
	}
	if got = load(t, s, outerTar(t, oldDocker(t, two)))[0]; got.Replaced != nil {
		t.Errorf("loaded again: %+v", got)
	}
}

// withParent says in an archive that one of its images was made from another.
func withParent(t testing.TB, files []memberFile, child, parent digest.Digest) []memberFile {
	t.Helper()
	for i, f := range files {
		if f.name != "manifest.json" {
			continue
		}
		var items []dockerItem
		must(t, json.Unmarshal(f.data, &items))
		for i := range items {
			if items[i].Config == child.Encoded()+".json" {
				items[i].Parent = parent
			}
		}
		raw, err := json.Marshal(items)
		must(t, err)
		files[i].data = raw
	}
	return files
}
