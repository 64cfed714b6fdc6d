package layers

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata"
)

// blobsOf reads an archive's blobs.
func blobsOf(t testing.TB, archive []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	tr := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = b
	}
}

// roundTrip loads an image, saves it and compares every byte of its layers and
// config; then it loads what was saved into an empty store.
func roundTrip(t testing.TB, s *Store, im img) []byte {
	t.Helper()
	load(t, s, outerTar(t, ociFiles(t, gz, im)))
	id := digest.FromBytes(im.configJSON(t))
	var last []byte
	for _, format := range []string{FormatOldDocker, FormatOCI, FormatDocker} {
		var buf, again bytes.Buffer
		for _, w := range []*bytes.Buffer{&buf, &again} {
			if err := s.Save(t.Context(), w, []string{id.String()}, SaveOptions{Format: format}); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(buf.Bytes(), again.Bytes()) {
			t.Errorf("%s: two saves differ", format)
		}
		blobs := blobsOf(t, buf.Bytes())
		have := map[digest.Digest]bool{}
		for _, b := range blobs {
			have[digest.FromBytes(b)] = true
		}
		for i, l := range im.layers {
			if !have[digest.FromBytes(l)] {
				t.Errorf("%s: layer %d did not come back", format, i+1)
			}
		}
		if !have[id] {
			t.Errorf("%s: config did not come back", format)
		}
		fresh := openStore(t)
		if got := load(t, fresh, buf.Bytes()); len(got) != 1 || got[0].ID != id {
			t.Errorf("%s: loaded again: %v", format, got)
		}
		clean(t, fresh)
		last = buf.Bytes()
	}
	return last
}

// sparseTar is a tar with a GNU sparse file: 1 MiB with one block of data.
func sparseTar(t testing.TB) []byte {
	t.Helper()
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("needs tar")
	}
	d := t.TempDir()
	f, err := os.OpenFile(filepath.Join(d, "holes"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte("d"), 4096), 512<<10)
	if err == nil {
		err = f.Truncate(1 << 20)
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	out, err := exec.Command("tar", "-C", d, "--sparse", "--owner=0", "--group=0", "-cf", "-", "holes").Output()
	if err != nil {
		t.Skip("tar --sparse:", err)
	}
	return out
}

func TestSaveIsByteExact(t *testing.T) {
	trailing := append(layerTar(t, file("f", "1")), make([]byte, 9000)...)
	garbage := append(layerTar(t, file("f", "1")), []byte("not zero after the end")...)
	padded := layerTar(t, file("f", "12345"))
	padded[1024+600] = 0 // in the padding: no change, the tar stays valid
	copy(padded[512+5:], "dirty padding")
	for _, tc := range []struct {
		name   string
		layers [][]byte
	}{
		{"plain", sample(t).layers},
		{"duplicates", [][]byte{layerTar(t, file("x", "first"), file("y", "1"), hard("z", "x"), file("x", "second!"), dir("d"), file("d/e", "gone"), file("d", "now a file"), file("d", "and again"))}},
		{"through links", [][]byte{layerTar(t, dir("r"), sym("l", "r"), file("l/f", "content"))}},
		{"no end marks", [][]byte{bytes.TrimRight(layerTar(t, file("f", strings.Repeat("x", 512))), "\x00")}},
		{"long tail", [][]byte{trailing}},
		{"garbage after the end", [][]byte{garbage}},
		{"dirty padding", [][]byte{padded}},
		{"sparse", [][]byte{sparseTar(t)}},
		{"zero bytes", [][]byte{make([]byte, 1024)}},
		{"odd names", [][]byte{layerTar(t, file("./a//b", "1"), file("/abs", "2"), file("latin\xe9", "3"), file("x/../y", "4"))}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			roundTrip(t, s, img{refs: []string{"r"}, layers: tc.layers})
			clean(t, s)
		})
	}
}

// TestSkopeoAccepts has another tool read what Save writes.
func TestSkopeoAccepts(t *testing.T) {
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Skip("needs skopeo")
	}
	s := openStore(t)
	im := img{refs: []string{"localhost/a:1"}, layers: [][]byte{layerTar(t, file("f", "1")), layerTar(t, wh("f"))}}
	data := roundTrip(t, s, im)
	d := t.TempDir()
	in := filepath.Join(d, "in.tar")
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, src := range []string{"docker-archive:", "oci-archive:"} {
		out := filepath.Join(d, src[:3])
		if msg, err := exec.Command("skopeo", "--insecure-policy", "--tmpdir", d, "copy", "-q", src+in, "docker-archive:"+out+":x:1").CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", src, err, msg)
		}
		raw, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		fresh := openStore(t)
		st, err := fresh.ResolveImage(t.Context(), load(t, fresh, raw)[0].ID.String())
		if err != nil {
			t.Fatal(err)
		}
		want := []digest.Digest{digest.FromBytes(im.layers[0]), digest.FromBytes(im.layers[1])}
		if d := cmp.Diff(want, st.DiffIDs); d != "" {
			t.Error(d)
		}
	}
}

func TestSaveNoticesDamage(t *testing.T) {
	s := openStore(t)
	st := loadLayers(t, s, layerTar(t, file("f", "content")))
	id := firstImage(t, s)
	p := filepath.Join(st.Lowers[0].Path, "f")
	if err := os.Chmod(p, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte("CONTENT"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := s.Save(t.Context(), io.Discard, []string{id}, SaveOptions{})
	if err == nil || !strings.Contains(err.Error(), `"f" has changed`) {
		t.Error(err)
	}
	rep, err := s.Check(t.Context(), CheckOptions{Deep: true})
	if err != nil || len(rep.Findings) != 1 || rep.Findings[0].Invariant != "K19" {
		t.Errorf("%+v %v", rep, err)
	}
}

func firstImage(t testing.TB, s *Store) string {
	t.Helper()
	list, err := s.Images(t.Context(), "")
	if err != nil || len(list) == 0 {
		t.Fatal(list, err)
	}
	return list[0].ID.String()
}

func TestSaveSeveral(t *testing.T) {
	s := openStore(t)
	shared := layerTar(t, file("f", "1"))
	load(t, s, outerTar(t, oldDocker(t,
		img{refs: []string{"a:1", "a:2"}, layers: [][]byte{shared}},
		img{refs: []string{"b:1"}, layers: [][]byte{shared, layerTar(t, file("g", "2"))}})))
	for _, format := range []string{FormatDocker, FormatOldDocker, FormatOCI} {
		var buf bytes.Buffer
		if err := s.Save(t.Context(), &buf, []string{"a:1", "b:1", "a:2"}, SaveOptions{Format: format}); err != nil {
			t.Fatal(err)
		}
		fresh := openStore(t)
		var refs []string
		for _, l := range load(t, fresh, buf.Bytes()) {
			refs = append(refs, l.Refs...)
		}
		if d := cmp.Diff([]string{"a:1", "a:2", "b:1"}, refs); d != "" {
			t.Error(format, d)
		}
		if n := len(listLayers(t, fresh)); n != 2 {
			t.Errorf("%s: %d layers", format, n)
		}
	}
}

// TestSaveRepository saves all that has a name, as docker does, and no digests.
func TestSaveRepository(t *testing.T) {
	s := openStore(t)
	one := img{refs: []string{"app:1", "app:2", "x/app:1"}, layers: [][]byte{layerTar(t, file("f", "1"))}}
	two := img{refs: []string{"app:3", "latest"}, layers: [][]byte{layerTar(t, file("f", "2"))}}
	loaded := load(t, s, outerTar(t, oldDocker(t, one, two)))
	d := "docker.io/library/app@" + digest.FromString("manifest").String()
	must(t, s.update(t.Context(), func(tx *metadata.Tx) error {
		_, err := tx.SetRef(d, metadata.Ref{ImageID: loaded[0].ID, Updated: time.Now()})
		return err
	}))
	first, second := loaded[0].ID, loaded[1].ID
	for _, tc := range []struct {
		names []string
		want  map[digest.Digest][]string
	}{
		{[]string{"app"}, map[digest.Digest][]string{first: {"app:1", "app:2"}, second: {"app:3"}}},
		{[]string{"app:1"}, map[digest.Digest][]string{first: {"app:1"}}},
		{[]string{"docker.io/library/app", "x/app"}, map[digest.Digest][]string{first: {"app:1", "app:2", "x/app:1"}, second: {"app:3"}}},
		{[]string{"latest"}, map[digest.Digest][]string{second: {"latest:latest"}}},
		{[]string{d}, map[digest.Digest][]string{first: nil}},
		{[]string{ShortID(second), "x/app:1"}, map[digest.Digest][]string{first: {"x/app:1"}, second: nil}},
	} {
		for _, format := range []string{FormatDocker, FormatOldDocker, FormatOCI} {
			var buf bytes.Buffer
			must(t, s.Save(t.Context(), &buf, tc.names, SaveOptions{Format: format}))
			got := map[digest.Digest][]string{}
			for _, l := range load(t, openStore(t), buf.Bytes()) {
				got[l.ID] = l.Refs
			}
			if diff := cmp.Diff(tc.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("%q as %s: %s", tc.names, format, diff)
			}
		}
	}
	if err := s.Save(t.Context(), io.Discard, []string{"nothing"}, SaveOptions{}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}
