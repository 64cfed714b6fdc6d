package foreign

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// sound checks what holds for every store that could be read: no name leads out of it,
// and images are complete.
func sound(t testing.TB, s *Store) {
	t.Helper()
	local := func(p string) {
		if p != "" && !filepath.IsLocal(p) {
			t.Errorf("%q leads out of the store", p)
		}
	}
	tree := func(tr *Tree) {
		if tr != nil {
			local(tr.Dir)
			local(tr.Work)
		}
	}
	for _, i := range s.Images {
		if (i.Config == nil) == (i.Steps == nil) || i.Config != nil && digest.FromBytes(i.Config) != i.ID || i.Steps != nil && len(i.Steps) != len(i.Layers) {
			t.Errorf("image %+v", i)
		}
		for _, l := range i.Layers {
			tree(l.Tree)
			local(l.Split)
			if l.Blob != nil {
				local(l.Blob.File)
			}
			if l.Tree == nil && l.Blob == nil {
				t.Errorf("layer %+v", l)
			}
		}
	}
	for _, c := range s.Containers {
		tree(c.Upper)
		tree(c.Base)
		if !isHex(c.ID, 64) || c.Upper == nil || c.Upper.Whole != (c.Base != nil) {
			t.Errorf("container %+v", c)
		}
	}
}

// open reads a store that a fuzzer has had a hand in.
func open(t testing.TB, root string) *Store {
	t.Helper()
	s, err := Open(t.Context(), root, Limits{Layers: 50, Objects: 1000})
	if err != nil {
		return nil
	}
	t.Cleanup(s.Close)
	sound(t, s)
	return s
}

const (
	hexA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	hexB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func FuzzDocker(f *testing.F) {
	config := `{"rootfs":{"type":"layers","diff_ids":["sha256:` + hexA + `"]}}`
	f.Add([]byte(config), []byte(`{"Repositories":{"a":{"a:1":"`+digest.FromString(config).String()+`"}}}`), []byte(`{"ID":"x","Name":"/c","Image":"y","State":{"Running":true}}`), hexB)
	f.Add([]byte(`{"rootfs":{"diff_ids":["x"]}}`), []byte(`[`), []byte(`{"Name":1}`), "../x")
	f.Fuzz(func(t *testing.T, config, repositories, container []byte, word string) {
		root := t.TempDir()
		image := root + "/image/overlay2/"
		put(t, image+"imagedb/content/sha256/"+digest.FromBytes(config).Encoded(), string(config))
		put(t, image+"repositories.json", string(repositories))
		layer := image + "layerdb/sha256/" + hexA + "/"
		put(t, layer+"diff", "sha256:"+hexA)
		put(t, layer+"cache-id", word)
		put(t, layer+"size", word)
		put(t, image+"layerdb/mounts/"+hexA+"/mount-id", word)
		put(t, image+"layerdb/mounts/"+hexA+"/parent", word)
		put(t, root+"/containers/"+hexA+"/config.v2.json", string(container))
		put(t, root+"/overlay2/"+hexB+"/diff/x", "")
		open(t, root)
	})
}

func FuzzGraph(f *testing.F) {
	f.Add([]byte(`{"id":"`+hexA+`","parent":"`+hexB+`","created":"2013-05-01T10:00:00Z","container_config":{"Cmd":["a","b"]}}`), []byte(`{"Repositories":{"u":{"1":"`+hexA+`"}}}`), hexB)
	f.Add([]byte(`{"parent":"`+hexA+`"}`), []byte(`{}`), "")
	f.Fuzz(func(t *testing.T, document, repositories []byte, parent string) {
		root := t.TempDir()
		put(t, root+"/graph/"+hexA+"/json", string(document))
		put(t, root+"/graph/"+hexA+"/parent", parent)
		put(t, root+"/graph/"+hexB+"/json", `{"id":"`+hexB+`"}`)
		put(t, root+"/repositories-aufs", string(repositories))
		put(t, root+"/aufs/diff/"+hexA+"/x", "")
		put(t, root+"/aufs/diff/"+hexB+"/x", "")
		s := open(t, root)
		if s == nil {
			return
		}
		for _, i := range s.Images {
			diffIDs := make([]digest.Digest, len(i.Layers))
			for n := range diffIDs {
				diffIDs[n] = digest.FromString("x")
			}
			raw, err := ConfigFromSteps(i.Steps, diffIDs, 64)
			if err != nil {
				continue
			}
			var c imageConfig
			if err := json.Unmarshal(raw, &c); err != nil || len(c.RootFS.DiffIDs) != len(diffIDs) {
				t.Fatalf("config %s: %v", raw, err)
			}
		}
	})
}

func FuzzContainers(f *testing.F) {
	config := `{"rootfs":{"type":"layers","diff_ids":["sha256:` + hexA + `"]}}`
	id := digest.FromString(config).Encoded()
	f.Add([]byte(`[{"id":"`+hexB+`","diff-digest":"sha256:`+hexA+`"}]`), []byte(`[{"id":"`+id+`","names":["localhost/a:1"],"layer":"`+hexB+`"}]`),
		[]byte(`[{"id":"`+hexA+`","names":["c"],"image":"`+id+`","layer":"`+hexB+`","metadata":"{}"}]`), []byte(config))
	f.Add([]byte(`[{"id":"../..","flags":{"incomplete":true}}]`), []byte(`[null]`), []byte(`[{"id":""}]`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, layers, images, containers, config []byte) {
		root := t.TempDir()
		put(t, root+"/overlay-layers/layers.json", string(layers))
		put(t, root+"/overlay-images/images.json", string(images))
		put(t, root+"/overlay-containers/containers.json", string(containers))
		r := containersReader{driver: "overlay"}
		id := digest.FromBytes(config)
		put(t, filepath.Join(root, r.bigData(id.Encoded(), id.String())), string(config))
		put(t, root+"/overlay/"+hexB+"/diff/x", "")
		open(t, root)
	})
}

func FuzzRegistry(f *testing.F) {
	f.Add([]byte(`{"id":"`+hexA+`"}`), []byte(`["`+hexA+`"]`), `["sha256:`+hexB+`"]`, hexA)
	f.Fuzz(func(t *testing.T, document, ancestry []byte, checksum, tag string) {
		root := t.TempDir()
		put(t, root+"/images/"+hexA+"/json", string(document))
		put(t, root+"/images/"+hexA+"/ancestry", string(ancestry))
		put(t, root+"/images/"+hexA+"/_checksum", checksum)
		put(t, root+"/images/"+hexA+"/layer", "")
		put(t, root+"/repositories/library/x/tag_1", tag)
		open(t, root)
	})
}

// FuzzBolt reads databases to their last bucket.
func FuzzBolt(f *testing.F) {
	raw, err := os.ReadFile("testdata/meta.db") // made by bbolt, with pages of 512 bytes
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := readBolt(bytes.NewReader(raw), int64(len(raw)))
		if err != nil {
			return
		}
		left := 10_000
		var walk func(b *boltBucket, depth int)
		walk = func(b *boltBucket, depth int) {
			for _, n := range b.buckets() {
				if left--; left < 0 || depth > 100 {
					return
				}
				if c, err := b.bucket(n); err == nil && c != nil {
					walk(c, depth+1)
				}
			}
		}
		walk(b, 0)
	})
}

func FuzzTables(f *testing.F) {
	f.Add([]byte(`36 35 98:0 / /var/lib/x\040y rw - overlay overlay rw,lowerdir=/a,upperdir=/var/lib/z/diff`), []byte("1: FLOCK  ADVISORY  WRITE 708 00:13:1234 0 EOF"), []byte("u:100000:65536\n1000:1:1"))
	f.Fuzz(func(t *testing.T, mounts, locks, ids []byte) {
		out := map[string]bool{}
		mountPoints(mounts, "/var/lib", out)
		for p := range out {
			if !strings.HasPrefix(p, "/var/lib/") {
				t.Fatalf("%q", p)
			}
		}
		_ = lockers(locks, &unix.Stat_t{})
		var next uint64 = 1
		for _, r := range subordinates(ids, []string{"1000", "u"}) {
			if uint64(r.Inside) != next || r.Length == 0 {
				t.Fatalf("%+v", r)
			}
			next += uint64(r.Length)
		}
	})
}

func TestBolt(t *testing.T) {
	raw, err := os.ReadFile("testdata/meta.db")
	if err != nil {
		t.Fatal(err)
	}
	b, err := readBolt(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	images, err := b.bucket("v1", "default", "images")
	if err != nil || len(images.buckets()) != 12 {
		t.Fatalf("%v %v", images.buckets(), err)
	}
	target, err := images.bucket("localhost/image-7:latest", "target")
	if err != nil || target.text("digest") != "sha256:"+strings.Repeat("0", 64) || target.text("mediatype") != "application/vnd.oci.image.manifest.v1+json" {
		t.Errorf("%+v %v", target, err)
	}
	if none, err := b.bucket("v2", "x"); none != nil || err != nil {
		t.Errorf("%v %v", none, err)
	}
	// The newer of the meta pages counts, and one that is torn does not.
	for _, at := range []int{16, 512 + 16} {
		torn := bytes.Clone(raw)
		torn[at+50] ^= 1
		if _, err := readBolt(bytes.NewReader(torn), int64(len(torn))); err != nil {
			t.Errorf("one meta page is torn: %v", err)
		}
	}
	both := bytes.Clone(raw)
	both[16+50] ^= 1
	both[512+16+50] ^= 1
	if _, err := readBolt(bytes.NewReader(both), int64(len(both))); !errors.Is(err, ErrDamaged) {
		t.Errorf("both meta pages are torn: %v", err)
	}
	if _, err := readBolt(bytes.NewReader(raw[:700]), 700); !errors.Is(err, ErrDamaged) {
		t.Errorf("a short file: %v", err)
	}
}

func TestOwnersOfUsers(t *testing.T) {
	got := subordinates([]byte("other:5:6\nme:100000:65536\n1000:300000:10\nme:x:1\nme:1:0\n"), []string{"1000", "me"})
	if want := []IDRange{{100000, 1, 65536}, {300000, 65537, 10}}; !slices.Equal(got, want) {
		t.Errorf("%v, expected %v", got, want)
	}
	for id, want := range map[uint32]uint32{100000: 1, 165535: 65536, 300009: 65546} {
		if in, ok := Inside(got, id); !ok || in != want {
			t.Errorf("%d is %d %v, expected %d", id, in, ok, want)
		}
	}
	if _, ok := Inside(got, 165536); ok {
		t.Error("an id of nobody is somebody's")
	}
}

func TestRemapped(t *testing.T) {
	for name, want := range map[string]uint32{"100000.200000": 100000, "docker": 0, "1.x": 0, "0.0": 0, "4294967295.1": 0, "1.2.3": 0} {
		ids, ok := remapped(name)
		if ok != (want > 0) || ok && (ids.UIDs[0].Disk != want || ids.GIDs[0].Disk != 200000) {
			t.Errorf("%s: %+v %v", name, ids, ok)
		}
	}
}

// TestParentsFirst: also of images whose parents form a circle.
func TestParentsFirst(t *testing.T) {
	s := &Store{}
	for _, p := range [][2]string{{"c", "b"}, {"a", ""}, {"b", "a"}, {"x", "y"}, {"y", "x"}, {"z", "missing"}} {
		s.Images = append(s.Images, &Image{Key: p[0], Parent: p[1]})
	}
	s.sortImages()
	var keys []string
	for _, i := range s.Images {
		keys = append(keys, i.Key)
	}
	if got := fmt.Sprint(keys); got != "[a b c y x z]" {
		t.Errorf("order %s", got)
	}
}
