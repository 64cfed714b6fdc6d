package layers

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers/foreign"
	"github.com/plyfs/plyfs/whiteout"
)

func FuzzTarPath(f *testing.F) {
	for _, s := range []string{"", ".", "/", "a/b", "../x", "a/../../b", "/a//./b/", "a\x00b", ".wh.x", "..wh..", strings.Repeat("d/", 2000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		comps, err := tarPath(name, 100)
		if err != nil {
			return
		}
		for _, c := range comps {
			if c == "" || c == "." || c == ".." || strings.ContainsAny(c, "/\x00") {
				t.Fatalf("%q gives %q", name, comps)
			}
		}
		again, err := tarPath(strings.Join(comps, "/"), 100)
		if err != nil || strings.Join(again, "/") != strings.Join(comps, "/") {
			t.Fatalf("%q is not stable: %q %v", name, again, err)
		}
		root := newRoot()
		root.add(&node{name: "l", kind: kindSymlink, target: name})
		if n, err := root.walk([]string{"l"}, nil); err == nil && n != nil && strings.Contains(n.path(), "..") {
			t.Fatalf("%q leads to %q", name, n.path())
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("0", 64) + `"]},"history":[{}]}`))
	f.Add([]byte(`{"history":[{"empty_layer":true}]}`))
	f.Add([]byte(`[[[`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		l := Limits{}.withDefaults()
		spec, err := parseConfig(raw, l)
		if err != nil {
			return
		}
		_ = chainOf(spec.RootFS.DiffIDs)
	})
}

// FuzzArchive feeds archives to a whole store: whatever they hold, there is an
// error or an image, and never a change to the store without one.
func FuzzArchive(f *testing.F) {
	small := img{refs: []string{"a"}, layers: [][]byte{layerTar(f, file("a", "1"), wh("b"), hard("c", "a"))}}
	f.Add(outerTar(f, oldDocker(f, small)))
	f.Add(outerTar(f, ociFiles(f, gz, small)))
	f.Add(gz(f, outerTar(f, ociFiles(f, plain, small))))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := Open(t.Context(), filepath.Join(t.TempDir(), "s"), Options{Limits: Limits{LayerBytes: 1 << 20, Entries: 1000}})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_, err = s.Load(t.Context(), Source{Reader: bytes.NewReader(raw)}, LoadOptions{})
		if n := len(listLayers(t, s)); err != nil && n > 0 {
			t.Fatalf("%d layers after %v", n, err)
		}
		clean(t, s)
	})
}

func FuzzChanges(f *testing.F) {
	for _, s := range []string{"CMD x", `CMD ["a"]`, "ENV A=1 B=2", "ENV A b", `LABEL a="b c"`, "EXPOSE 80 90/udp", `VOLUME ["/a"]`, "USER x"} {
		f.Add(s)
	}
	f.Fuzz(func(_ *testing.T, s string) { _, _ = changed(`{"Env":["A=1"]}`, s) })
}

// FuzzAdoptedRecord feeds tar-split records of other engines: nothing outside of the
// layer is reached, and the record that comes out can be read.
func FuzzAdoptedRecord(f *testing.F) {
	small := layerTar(f, dir("d"), file("d/a", "12345"), sym("l", "d"), file("l/b", "1"))
	f.Add(spliced(f, small))
	f.Add(gz(f, []byte(`{"type":1,"name":"../x","size":3,"payload":""}`)))
	f.Add(gz(f, []byte(`{"type":2,"payload":"AAAA"}`+"\n"+`{"type":1,"name":"l/../../b","size":9223372036854775807}`)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		root := t.TempDir()
		put(t, root+"/store/graph/x", "")
		put(t, root+"/store/aufs/diff/a/d/a", "12345")
		put(t, root+"/store/record", string(raw))
		put(t, root+"/secret", "1")
		if err := os.Symlink("d", root+"/store/aufs/diff/a/l"); err != nil {
			t.Fatal(err)
		}
		s := &Store{limits: Limits{LayerBytes: 1 << 20, Entries: 1000}.withDefaults()}
		src, err := foreign.Open(t.Context(), root+"/store", foreign.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		l := &foreign.Layer{Split: "record", Tree: &foreign.Tree{Dir: "aufs/diff/a", Dialect: whiteout.AUFS}}
		tree, err := src.OpenTree(l.Tree)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(tree)
		var direct bytes.Buffer
		werr := s.writeForeign(t.Context(), &direct, src, l, tree)
		dir, err := os.MkdirTemp(root, "layer")
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(dir + "/" + splitName)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		if _, err := s.convertRecord(t.Context(), src, l, tree, out); err != nil {
			if werr == nil {
				t.Fatalf("converted with %v, written without an error", err)
			}
			return
		}
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		var again bytes.Buffer
		err = layerFiles{dir: fd, diff: tree}.join(t.Context(), &again, nil)
		if (err == nil) != (werr == nil) || err == nil && !bytes.Equal(direct.Bytes(), again.Bytes()) {
			t.Fatalf("converted: %v, %d bytes; directly: %v, %d bytes", err, again.Len(), werr, direct.Len())
		}
	})
}
