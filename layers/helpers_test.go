package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
)

var epoch = time.Unix(1500000000, 0)

// ent is one entry of a test layer.
type ent struct {
	name string
	typ  byte // 0: regular
	data string
	link string
	mode int64
	uid  int
	gid  int
	maj  int64
	min  int64
	time time.Time
	x    map[string]string
}

func file(name, data string) ent { return ent{name: name, data: data, mode: 0o644} }
func dir(name string) ent        { return ent{name: name + "/", typ: tar.TypeDir, mode: 0o755} }
func sym(name, to string) ent {
	return ent{name: name, typ: tar.TypeSymlink, link: to, mode: 0o777}
}
func hard(name, to string) ent { return ent{name: name, typ: tar.TypeLink, link: to} }
func wh(path string) ent {
	d, b := filepath.Split(path)
	return ent{name: d + ".wh." + b}
}
func opq(d string) ent { return ent{name: filepath.Join(d, whiteout.OpaqueMarker)} }

func layerTar(t testing.TB, ents ...ent) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range ents {
		h := &tar.Header{
			Name: e.name, Typeflag: e.typ, Size: int64(len(e.data)), Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.gid,
			Devmajor: e.maj, Devminor: e.min, ModTime: epoch, Format: tar.FormatPAX, PAXRecords: map[string]string{},
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if !e.time.IsZero() {
			h.ModTime = e.time
		}
		for k, v := range e.x {
			h.PAXRecords[paxXattr+k] = v
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// img is an image to be put into an archive.
type img struct {
	refs   []string
	layers [][]byte
	config func(*ocispec.Image)
}

func (i img) configJSON(t testing.TB) []byte {
	t.Helper()
	spec := ocispec.Image{Created: &epoch, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}}
	for n, l := range i.layers {
		spec.RootFS.DiffIDs = append(spec.RootFS.DiffIDs, digest.FromBytes(l))
		spec.History = append(spec.History, ocispec.History{Created: &epoch, CreatedBy: fmt.Sprintf("step %d", n)})
	}
	if i.config != nil {
		i.config(&spec)
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

type memberFile struct {
	name string
	data []byte
	link string
}

func outerTar(t testing.TB, files []memberFile) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Size: int64(len(f.data)), Mode: 0o644}
		if f.link != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, f.link, 0
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// oldDocker is a docker-archive as Docker before 25 wrote it: one directory per
// layer, duplicate layers as links, the manifest last.
func oldDocker(t testing.TB, images ...img) []memberFile {
	t.Helper()
	var files []memberFile
	var items []dockerItem
	first := map[digest.Digest]string{}
	n := 0
	for _, i := range images {
		cfg := i.configJSON(t)
		it := dockerItem{Config: digest.FromBytes(cfg).Encoded() + ".json", RepoTags: i.refs}
		for _, l := range i.layers {
			n++
			d := fmt.Sprintf("%064x", n)
			name := d + "/layer.tar"
			files = append(files, memberFile{name: d + "/VERSION", data: []byte("1.0")}, memberFile{name: d + "/json", data: []byte(`{"id":"` + d + `"}`)})
			id := digest.FromBytes(l)
			if at, ok := first[id]; ok {
				files = append(files, memberFile{name: name, link: "../" + at})
			} else {
				first[id] = name
				files = append(files, memberFile{name: name, data: l})
			}
			it.Layers = append(it.Layers, name)
		}
		files = append(files, memberFile{name: it.Config, data: cfg})
		items = append(items, it)
	}
	raw, err := json.Marshal(items)
	if err != nil {
		t.Fatal(err)
	}
	return append(files, memberFile{name: "manifest.json", data: raw}, memberFile{name: "repositories", data: []byte("{}")})
}

// ociFiles is an OCI layout, its index last.
func ociFiles(t testing.TB, compress func(testing.TB, []byte) []byte, images ...img) []memberFile {
	t.Helper()
	var files []memberFile
	seen := map[digest.Digest]bool{}
	blob := func(media string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(b), Size: int64(len(b))}
		if !seen[d.Digest] {
			seen[d.Digest] = true
			files = append(files, memberFile{name: blobPath(d.Digest), data: b})
		}
		return d
	}
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	idx.SchemaVersion = 2
	for _, i := range images {
		man := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
		man.SchemaVersion = 2
		for _, l := range i.layers {
			man.Layers = append(man.Layers, blob("application/x-whatever", compress(t, l)))
		}
		man.Config = blob(ocispec.MediaTypeImageConfig, i.configJSON(t))
		raw, err := json.Marshal(man)
		if err != nil {
			t.Fatal(err)
		}
		d := blob(ocispec.MediaTypeImageManifest, raw)
		for _, r := range i.refs {
			d.Annotations = map[string]string{annotationName: r}
			idx.Manifests = append(idx.Manifests, d)
		}
		if len(i.refs) == 0 {
			idx.Manifests = append(idx.Manifests, d)
		}
	}
	raw, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	return append(files, memberFile{name: "oci-layout", data: []byte(`{"imageLayoutVersion":"1.0.0"}`)}, memberFile{name: "index.json", data: raw})
}

func plain(_ testing.TB, b []byte) []byte { return b }

func gz(t testing.TB, b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	// Two members, as parallel compressors write.
	if _, err := w.Write(b[:len(b)/2]); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	w.Reset(&buf)
	if _, err := w.Write(b[len(b)/2:]); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	skip := []byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4}
	return append(skip, w.EncodeAll(b, nil)...)
}

func openStore(t testing.TB) *Store {
	t.Helper()
	return openAt(t, filepath.Join(t.TempDir(), "store"))
}

// userStore is a store without privileges. As root, it is one that this process
// treats as if it had none.
func userStore(t testing.TB) *Store {
	t.Helper()
	s := openStore(t)
	asUser(t, s)
	return s
}

func asUser(t testing.TB, s *Store) {
	t.Helper()
	p, err := probeUser(s.stageFd)
	must(t, err)
	s.powers = p
}

func openAt(t testing.TB, root string) *Store {
	t.Helper()
	s, err := Open(context.Background(), root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Close()
		if fd, err := unix.Open(root, unix.O_PATH, 0); err == nil {
			openUp(fd) // so that the test's directory can be removed
			_ = unix.Close(fd)
		}
	})
	return s
}

func load(t testing.TB, s *Store, archive []byte) []LoadedImage {
	t.Helper()
	out, err := s.Load(context.Background(), Source{Reader: onlyReader{bytes.NewReader(archive)}}, LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// onlyReader is a pipe: it cannot seek.
type onlyReader struct{ io.Reader }

// loadLayers loads one image made of layers and returns its stack.
func loadLayers(t testing.TB, s *Store, layers ...[]byte) Stack {
	t.Helper()
	out := load(t, s, outerTar(t, oldDocker(t, img{layers: layers})))
	st, err := s.ImageStack(context.Background(), out[0].ID.String())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// clean checks that the store is consistent and nothing is left over.
func clean(t testing.TB, s *Store) {
	t.Helper()
	rep, err := s.Check(context.Background(), CheckOptions{Deep: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range rep.Findings {
		if f.Severity != SeverityWarning {
			t.Errorf("check: %+v", f)
		}
	}
	for _, d := range []string{stageName, trashName} {
		names, err := os.ReadDir(filepath.Join(s.root, d))
		if err != nil || len(names) > 0 {
			t.Errorf("%s is not empty: %v %v", d, names, err)
		}
	}
	err = s.view(context.Background(), func(tx *metadata.Tx) error {
		i, err1 := tx.Ingests()
		l, err2 := tx.Leases()
		tr, err3 := tx.TrashRows()
		if len(i)+len(l)+len(tr) > 0 {
			t.Errorf("left over: ingests %v, leases %v, trash %v", i, l, tr)
		}
		return errors.Join(err1, err2, err3)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// dump describes everything below a directory, one line per object, in the
// terms of the disk: whiteouts and private attributes show.
func dump(t testing.TB, root string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		out = append(out, describeObject(t, p, rel))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n") + "\n"
}

func describeObject(t testing.TB, p, rel string) string {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("%q %o", rel, st.Mode&0o7777)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		line += " dir"
	case unix.S_IFREG:
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 20 {
			b = []byte(digest.FromBytes(b).Encoded()[:12])
		}
		line += fmt.Sprintf(" file %q links %d", b, st.Nlink)
	case unix.S_IFLNK:
		to, _ := os.Readlink(p)
		line += fmt.Sprintf(" symlink %q", to)
	case unix.S_IFCHR:
		if st.Rdev == 0 {
			return fmt.Sprintf("%q whiteout", rel)
		}
		line += fmt.Sprintf(" char %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFBLK:
		line += fmt.Sprintf(" block %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		line += " fifo"
	}
	if os.Geteuid() == 0 && (st.Uid != 0 || st.Gid != 0) {
		line += fmt.Sprintf(" owner %d:%d", st.Uid, st.Gid)
	}
	buf := make([]byte, 4096)
	n, _ := unix.Llistxattr(p, buf)
	names := strings.Split(strings.TrimSuffix(string(buf[:max(n, 0)]), "\x00"), "\x00")
	sort.Strings(names)
	for _, x := range names {
		if x == "" || x == "security.selinux" {
			continue
		}
		v := make([]byte, 4096)
		n, _ := unix.Lgetxattr(p, x, v)
		line += fmt.Sprintf(" %s=%q", x, v[:max(n, 0)])
	}
	return line
}

func needRoot(t testing.TB) {
	t.Helper()
	if !openStore(t).powers.privileged {
		t.Skip("needs root: owners, devices and trusted.* attributes")
	}
}

// upperOf returns a container's upper directory.
func upperOf(t testing.TB, s *Store, name string) Stack {
	t.Helper()
	st, err := s.ContainerStack(context.Background(), name)
	if err != nil {
		t.Fatal(err)
	}
	return st
}
