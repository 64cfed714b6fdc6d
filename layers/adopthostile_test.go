package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"
)

// TestAdoptedChanges: content that somebody has changed, moved or made unsafe.
func TestAdoptedChanges(t *testing.T) {
	needRoot(t)
	root, _ := dockerRoot(t)
	s := openStore(t)
	adopt(t, s, root, AdoptOptions{})
	found := func() string {
		t.Helper()
		rep, err := s.Check(t.Context(), CheckOptions{Deep: true})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, f := range rep.Findings {
			out = append(out, f.Invariant)
		}
		slices.Sort(out)
		return strings.Join(out, " ")
	}
	if f := found(); f != "" {
		t.Fatalf("findings: %s", f)
	}
	put(t, root+"/aufs/diff/"+hexID("1")+"/etc/a", "b") // deep in the directory
	if f := found(); f != "K19" {
		t.Errorf("after a change of a file: %q", f)
	}
	put(t, root+"/aufs/diff/"+hexID("1")+"/new", "b") // in the directory itself
	if f := found(); f != "K28" {
		t.Errorf("after a change of the directory: %q", f)
	}
	if _, err := s.ImageStack(t.Context(), "app:1"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("mount of changed content: %v", err)
	}
	if err := os.Rename(root, root+".moved"); err != nil {
		t.Fatal(err)
	}
	if f := found(); f != "K28 K28 K28" {
		t.Errorf("after the store has gone: %q", f)
	}
	if _, err := s.GC(t.Context(), false); err != nil {
		t.Error(err)
	}
}

// TestAdoptUnsafe: content that somebody else could change is not used where it is.
func TestAdoptUnsafe(t *testing.T) {
	needRoot(t)
	open := func(root string) error { // the way of others to it
		return errors.Join(os.Chmod(root, 0o755), os.Chmod(filepath.Dir(root), 0o755), os.Chmod(filepath.Dir(filepath.Dir(root)), 0o755))
	}
	for name, spoil := range map[string]func(root string) error{
		"owner of the store": func(root string) error { return os.Chown(root, 12345, -1) },
		"writable store":     func(root string) error { return os.Chmod(root, 0o777) },
		"writable above":     func(root string) error { return os.Chmod(filepath.Dir(root), 0o777) },
		"owner of a file that others reach": func(root string) error {
			return errors.Join(open(root), os.Chown(root+"/aufs/diff/"+hexID("1")+"/etc/a", 12345, -1))
		},
		"directory for all that others reach": func(root string) error {
			return errors.Join(open(root), os.Chmod(root+"/aufs/diff/"+hexID("1")+"/etc", 0o777|os.ModeSticky))
		},
	} {
		t.Run(name, func(t *testing.T) {
			root, id := dockerRoot(t)
			if err := spoil(root); err != nil {
				t.Fatal(err)
			}
			s := openStore(t)
			_, err := s.Adopt(t.Context(), root, AdoptOptions{})
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "--copy") {
				t.Errorf("adopted: %v", err)
			}
			clean(t, s)
			adopt(t, s, root, AdoptOptions{Mode: AdoptCopy})
			if img, err := s.ResolveImage(t.Context(), "app:1"); err != nil || img.ID != id {
				t.Errorf("not copied: %v", err)
			}
		})
	}
}

// TestAdoptDamaged: what is damaged is left out, whatever it is, and nothing outside of
// the store is reached.
func TestAdoptDamaged(t *testing.T) {
	needRoot(t)
	one := "image/aufs/layerdb/sha256/"
	chains := func(root string) (base, top string) {
		for _, e := range func() []os.DirEntry { l, _ := os.ReadDir(filepath.Join(root, one)); return l }() {
			if _, err := os.Stat(filepath.Join(root, one, e.Name(), "parent")); err == nil {
				top = filepath.Join(root, one, e.Name())
			} else {
				base = filepath.Join(root, one, e.Name())
			}
		}
		return base, top
	}
	for name, c := range map[string]struct {
		spoil func(root, base, top string, id digest.Digest)
		want  string
	}{
		"cache-id leads out": {func(_, base, _ string, _ digest.Digest) { put(t, base+"/cache-id", "../../../etc") }, "its cache-id is"},
		"cache-id is a link": {func(_, base, _ string, _ digest.Digest) {
			_ = os.Remove(base + "/cache-id")
			_ = os.Symlink("/etc/hostname", base+"/cache-id")
		}, "cache-id"},
		"content is a link": {func(root, _, _ string, _ digest.Digest) {
			_ = os.Rename(root+"/aufs/diff/"+hexID("1"), root+"/aufs/diff/"+hexID("3"))
			_ = os.Symlink(hexID("3"), root+"/aufs/diff/"+hexID("1"))
		}, "is missing"},
		"other diffID": {func(_, base, _ string, _ digest.Digest) { put(t, base+"/diff", digest.FromString("x").String()) }, "the layerdb has the diffID"},
		"other parent": {func(_, _, top string, _ digest.Digest) { put(t, top+"/parent", digest.FromString("x").String()) }, "in the layerdb it lies on"},
		"no layer":     {func(_, base, _ string, _ digest.Digest) { _ = os.RemoveAll(base) }, "layer 1"},
		"empty layerdb": {func(_, base, _ string, _ digest.Digest) {
			_ = os.Remove(base + "/diff")
			_ = os.Remove(base + "/cache-id")
		}, "diff"},
		"record of junk": {func(_, base, _ string, _ digest.Digest) { put(t, base+"/tar-split.json.gz", "junk") }, "tar-split.json.gz"},
		"record leads out": {func(_, base, _ string, _ digest.Digest) {
			e, _ := json.Marshal(storage.Entry{Type: storage.FileType, Name: "../../../../etc/passwd", Size: 10, Payload: make([]byte, 8)})
			put(t, base+"/tar-split.json.gz", string(gz(t, e)))
		}, "leads out of the layer"},
		"config of another": {func(root, _, _ string, id digest.Digest) {
			put(t, root+"/image/aufs/imagedb/content/sha256/"+id.Encoded(), `{"rootfs":{"type":"layers","diff_ids":[]}}`)
		}, "its config has the digest"},
		"config is a pipe": {func(root, _, _ string, id digest.Digest) {
			p := root + "/image/aufs/imagedb/content/sha256/" + id.Encoded()
			_ = os.Remove(p)
			_ = unix.Mkfifo(p, 0o600)
		}, "no regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, mode := range []string{AdoptReference, AdoptCopy} {
				root, id := dockerRoot(t)
				// Beside it an image without layers, which is in order.
				plain := `{"os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`
				put(t, root+"/image/aufs/imagedb/content/sha256/"+digest.FromString(plain).Encoded(), plain)
				base, top := chains(root)
				c.spoil(root, base, top, id)
				s := openStore(t)
				rep := adopt(t, s, root, AdoptOptions{Mode: mode})
				if !strings.Contains(skipped(rep), c.want) || len(rep.Images) != 1 {
					t.Errorf("%s: expected %q, %d images: %s", mode, c.want, len(rep.Images), skipped(rep))
				}
				clean(t, s)
			}
		})
	}
}

// TestAdoptContentChecked: content that is not what the store says is found out by a copy
// and by --verify.
func TestAdoptContentChecked(t *testing.T) {
	needRoot(t)
	for _, o := range []AdoptOptions{{Verify: true}, {Mode: AdoptCopy}} {
		root, _ := dockerRoot(t)
		put(t, root+"/aufs/diff/"+hexID("1")+"/etc/a", "b")
		s := openStore(t)
		if _, err := s.Adopt(t.Context(), root, o); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%+v: %v", o, err)
		}
		clean(t, s)
	}
}

// TestAdoptMoved: a store that has moved is adopted again, and what was lost is found;
// an archive, too, brings back what it has.
func TestAdoptMoved(t *testing.T) {
	needRoot(t)
	for _, mode := range []string{AdoptReference, AdoptCopy} {
		root, id := dockerRoot(t)
		s := openStore(t)
		adopt(t, s, root, AdoptOptions{})
		var archive bytes.Buffer
		must(t, s.Save(t.Context(), &archive, []string{"app:1"}, SaveOptions{}))
		must(t, os.Rename(root, root+".moved"))
		if _, err := s.ImageStack(t.Context(), "app:1"); !errors.Is(err, ErrCorrupt) {
			t.Errorf("a stack of nothing: %v", err)
		}
		rep := adopt(t, s, root+".moved", AdoptOptions{Mode: mode})
		if len(rep.Skipped) > 0 || rep.Referenced+rep.Copied != 3 || !rep.Containers[0].Present {
			t.Errorf("%s: %+v", mode, rep)
		}
		shows(t, s, "app:1", "/ /d/ /d/new=new /etc/ /etc/a=a /l")
		st, err := s.ContainerStack(t.Context(), "box")
		must(t, err)
		if got := contents(t, Stack{Lowers: st.Lowers[1:]}); got != "/ /d/ /d/new=new /etc/ /etc/a=a /made=here" {
			t.Errorf("container shows %s", got)
		}
		clean(t, s)

		if mode == AdoptReference {
			must(t, os.RemoveAll(root+".moved"))
			load(t, s, archive.Bytes())
			shows(t, s, "app:1", "/ /d/ /d/new=new /etc/ /etc/a=a /l")
			rep, err := s.Check(t.Context(), CheckOptions{Deep: true})
			must(t, err)
			if len(rep.Findings) != 1 || rep.Findings[0].Invariant != "K28" { // what the container had written
				t.Errorf("%+v", rep.Findings)
			}
			if img, err := s.ResolveImage(t.Context(), "app:2"); err != nil || img.ID != id {
				t.Errorf("%+v %v", img, err)
			}
		}
	}
}
