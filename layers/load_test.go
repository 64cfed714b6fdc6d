package layers

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func sample(t testing.TB) img {
	return img{refs: []string{"example.com/a:1"}, layers: [][]byte{
		layerTar(t, dir("etc"), file("etc/passwd", "root"), file("big", strings.Repeat("x", 100_000))),
		layerTar(t, wh("etc/passwd"), file("etc/group", "g")),
		layerTar(t),
		layerTar(t, file("last", "1")),
		layerTar(t), // the same layer twice in one image
	}}
}

func TestLoadFormats(t *testing.T) {
	im := sample(t)
	id := digest.FromBytes(im.configJSON(t))
	reversed := func(f []memberFile) []memberFile { slices.Reverse(f); return f }
	for _, tc := range []struct {
		name string
		data []byte
	}{
		{"docker before 25", outerTar(t, oldDocker(t, im))},
		{"docker, manifest first", outerTar(t, reversed(oldDocker(t, im)))},
		{"docker, whole archive gzipped", gz(t, outerTar(t, oldDocker(t, im)))},
		{"oci plain", outerTar(t, ociFiles(t, plain, im))},
		{"oci gzip", outerTar(t, ociFiles(t, gz, im))},
		{"oci gzip, index first", outerTar(t, reversed(ociFiles(t, gz, im)))},
		{"oci zstd", outerTar(t, ociFiles(t, zst, im))},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			got := load(t, s, tc.data)
			want := []LoadedImage{{ID: id, Refs: []string{"example.com/a:1"}}}
			if d := cmp.Diff(want, got); d != "" {
				t.Fatal(d)
			}
			clean(t, s)
			// Once more: nothing changes.
			before := listLayers(t, s)
			load(t, s, tc.data)
			if d := cmp.Diff(before, listLayers(t, s)); d != "" {
				t.Errorf("layers changed: %s", d)
			}
			clean(t, s)
		})
	}
}

func TestLoadDirectory(t *testing.T) {
	im := sample(t)
	root := t.TempDir()
	for _, f := range ociFiles(t, gz, im) {
		p := filepath.Join(root, f.name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, f.data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(t)
	got, err := s.Load(t.Context(), Source{Dir: root}, LoadOptions{})
	if err != nil || len(got) != 1 || got[0].ID != digest.FromBytes(im.configJSON(t)) {
		t.Fatal(got, err)
	}
	clean(t, s)
}

func listLayers(t testing.TB, s *Store) []string {
	t.Helper()
	names, err := listDir(s.layersFd)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func TestSharedLayersAreStoredOnce(t *testing.T) {
	s := openStore(t)
	base := layerTar(t, dir("."), dir("a"), file("a/f", "1"))
	top := layerTar(t, dir("."), dir("b"), file("b/f", "2"))
	a := img{refs: []string{"a"}, layers: [][]byte{base, top}}
	b := img{refs: []string{"b"}, layers: [][]byte{base, layerTar(t, file("c", "3"))}}
	// top at the bottom of another chain: the same content directory.
	c := img{refs: []string{"c"}, layers: [][]byte{top}}
	load(t, s, outerTar(t, oldDocker(t, a, b, c)))
	if n := len(listLayers(t, s)); n != 3 {
		t.Errorf("%d layer directories, expected 3", n)
	}
	clean(t, s)
	for _, ref := range []string{"a", "c", "b"} {
		if _, err := s.RemoveImage(t.Context(), ref, RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		clean(t, s)
	}
	if n := len(listLayers(t, s)); n != 0 {
		t.Errorf("%d layer directories left", n)
	}
}

// TestBoundContent: a layer whose content depends on what is below is not
// shared between chains that differ there.
func TestBoundContent(t *testing.T) {
	s := openStore(t)
	one := layerTar(t, dir("."), ent{name: "d/", typ: '5', mode: 0o700})
	two := layerTar(t, dir("."), ent{name: "d/", typ: '5', mode: 0o711})
	top := layerTar(t, file("d/f", "x"))
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"a"}, layers: [][]byte{one, top}}, img{refs: []string{"b"}, layers: [][]byte{two, top}})))
	clean(t, s)
	for ref, want := range map[string]os.FileMode{"a": 0o700, "b": 0o711} {
		st, err := s.ImageStack(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(filepath.Join(st.Lowers[0].Path, "d"))
		if err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v %v, expected %v", ref, fi.Mode(), err, want)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	im := sample(t)
	good := outerTar(t, oldDocker(t, im))
	edit := func(files []memberFile, name string, fn func(*memberFile)) []byte {
		for i := range files {
			if strings.HasSuffix(files[i].name, name) {
				fn(&files[i])
			}
		}
		return outerTar(t, files)
	}
	one := func(ents ...ent) []byte {
		return outerTar(t, oldDocker(t, img{layers: [][]byte{layerTar(t, ents...)}}))
	}
	badOCI := ociFiles(t, gz, im)
	badOCI[0].data = append(bytes.Clone(badOCI[0].data), 0)
	for _, tc := range []struct {
		name string
		data []byte
		is   error
		says string
	}{
		{"empty input", nil, ErrInvalid, "empty"},
		{"not a tar", bytes.Repeat([]byte("no tar"), 1000), ErrInvalid, "not an image archive"},
		{"xz", append([]byte{0xfd, '7', 'z', 'X', 'Z', 0}, make([]byte, 600)...), ErrCorrupt, "xz"},
		{"truncated", good[:len(good)/2], ErrCorrupt, "truncated"},
		{"truncated gzip", gz(t, good)[:400], ErrCorrupt, "truncated"},
		{"no manifest", outerTar(t, []memberFile{{name: "x", data: []byte("y")}}), ErrInvalid, "neither manifest.json"},
		{"manifest is no JSON", outerTar(t, []memberFile{{name: "manifest.json", data: []byte("[{")}}), ErrCorrupt, "manifest.json"},
		{"deep JSON", outerTar(t, []memberFile{{name: "manifest.json", data: bytes.Repeat([]byte("["), 100000)}}), ErrUnsupported, "nested"},
		{"missing config", outerTar(t, []memberFile{{name: "manifest.json", data: []byte(`[{"Config":"c.json","Layers":[]}]`)}}), ErrCorrupt, `no "c.json"`},
		{"missing layer", edit(oldDocker(t, im), "2/layer.tar", func(f *memberFile) { f.name = "elsewhere" }), ErrCorrupt, "layer 2: "},
		{"wrong layer", edit(oldDocker(t, im), "2/layer.tar", func(f *memberFile) { f.data = layerTar(t, file("evil", "1")) }), ErrCorrupt, "layer 2 "},
		{"wrong config digest", edit(oldDocker(t, im), ".json", func(f *memberFile) { f.data = append(f.data, ' ') }), ErrCorrupt, "wrong digest"},
		{"wrong blob digest", outerTar(t, badOCI), ErrCorrupt, "wrong digest"},
		{"circular links", edit(oldDocker(t, im), "2/layer.tar", func(f *memberFile) { f.link, f.data = "layer.tar", nil }), ErrCorrupt, "circle"},
		{"member outside", outerTar(t, []memberFile{{name: "../x", data: []byte("y")}}), ErrCorrupt, "leads out"},
		{"history too long", outerTar(t, oldDocker(t, img{config: func(i *ocispec.Image) { i.History = make([]ocispec.History, 3) }})), ErrCorrupt, "history"},
		{"bad reference", outerTar(t, oldDocker(t, img{refs: []string{"UPPER:x"}})), ErrInvalid, "UPPER"},
		{"path out of the layer", one(file("../../x", "1")), ErrCorrupt, "leads out"},
		{"absolute path out", one(file("/../x", "1")), ErrCorrupt, "leads out"},
		{"hard link out", one(hard("x", "../../etc/passwd")), ErrCorrupt, "leads out"},
		{"hard link to nothing", one(hard("x", "etc/passwd")), ErrCorrupt, "neither in this layer"},
		{"hard link to a directory", one(dir("d"), hard("x", "d")), ErrCorrupt, "directory"},
		{"root is a file", one(file(".", "1")), ErrCorrupt, "root"},
		{"whiteout of nothing", one(ent{name: "a/.wh."}), ErrCorrupt, "impossible name"},
		{"whiteout of ..", one(ent{name: "a/.wh..."}), ErrCorrupt, "impossible name"},
		{"file as directory", one(file("f", "1"), file("f/g", "2")), ErrCorrupt, "not a directory"},
		{"below a whiteout", one(file(".wh.a/b", "1")), ErrCorrupt, "whiteout"},
		{"symlink loop", one(sym("l", "l"), file("l/x", "1")), ErrCorrupt, "too many"},
		{"forged whiteout device", one(ent{name: "n", typ: '3'}), ErrUnsupported, "0:0"},
		{"long name", one(file(strings.Repeat("n", 256), "1")), ErrUnsupported, "256 bytes"},
		{"too deep", one(file(strings.Repeat("d/", 1100)+"f", "1")), ErrUnsupported, "levels deep"},
		{"damaged layer", edit(oldDocker(t, im), "1/layer.tar", func(f *memberFile) { f.data = f.data[:len(f.data)-1500] }), ErrCorrupt, "layer 1 "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			keep := img{refs: []string{"keep"}, layers: im.layers[:1]}
			load(t, s, outerTar(t, oldDocker(t, keep)))
			before := listLayers(t, s)
			_, err := s.Load(t.Context(), Source{Reader: onlyReader{bytes.NewReader(tc.data)}}, LoadOptions{})
			if !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %q, expected one that says %q and is %q", err, tc.says, tc.is)
			}
			if d := cmp.Diff(before, listLayers(t, s)); d != "" {
				t.Errorf("the store changed: %s", d)
			}
			clean(t, s)
			if list, err := s.Images(t.Context(), ""); err != nil || len(list) != 1 {
				t.Errorf("images: %v %v", list, err)
			}
		})
	}
}

// TestDiskFull unpacks into a file system that is too small.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	mnt := t.TempDir()
	if err := unix.Mount("none", mnt, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("needs a tmpfs of its own:", err)
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	s, err := Open(t.Context(), filepath.Join(mnt, "store"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	big := img{refs: []string{"big"}, layers: [][]byte{layerTar(t, file("f", strings.Repeat("x", 4<<20)))}}
	_, err = s.Load(t.Context(), Source{Reader: bytes.NewReader(outerTar(t, oldDocker(t, big)))}, LoadOptions{})
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	clean(t, s)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"small"}, layers: [][]byte{layerTar(t, file("f", "1"))}})))
	clean(t, s)
}

// TestRemoveOnFullDisk: with not a byte left, images can be listed and removed.
func TestRemoveOnFullDisk(t *testing.T) {
	needRoot(t)
	mnt := t.TempDir()
	if err := unix.Mount("none", mnt, "tmpfs", 0, "size=8m"); err != nil {
		t.Skip("needs a tmpfs of its own:", err)
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	root := filepath.Join(mnt, "store")
	s, err := Open(t.Context(), root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"big"}, layers: [][]byte{layerTar(t, file("f", strings.Repeat("x", 2<<20)))}})))
	_ = s.Close()
	f, err := os.OpenFile(filepath.Join(mnt, "fill"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	_ = f.Close()
	if s, err = Open(t.Context(), root, Options{}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if list, err := s.Images(t.Context(), ""); err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if _, err := s.RemoveImage(t.Context(), "big", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"small"}, layers: [][]byte{layerTar(t, file("f", "1"))}})))
	clean(t, s)
}

func TestLoadIsCancelled(t *testing.T) {
	s := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	data := outerTar(t, oldDocker(t, sample(t)))
	r := io.MultiReader(bytes.NewReader(data[:4096]), readFunc(func([]byte) (int, error) { cancel(); return 0, ctx.Err() }))
	if _, err := s.Load(ctx, Source{Reader: r}, LoadOptions{}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	clean(t, s)
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }
