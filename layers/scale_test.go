package layers

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/metadata/metatest"
)

// manyImages makes rows of n images of five layers each, of which one is shared by all.
// Directories are made if dirs is set.
func manyImages(t testing.TB, s *Store, n int, dirs bool) {
	t.Helper()
	diff := func(i, l int) digest.Digest {
		if l == 0 {
			return digest.FromString("base")
		}
		return digest.FromString(fmt.Sprintf("%d/%d", i, l))
	}
	err := s.db.Update(t.Context(), func(tx *metadata.Tx) error {
		for i := range n {
			var chain digest.Digest
			spec := ocispec.Image{Created: &epoch, RootFS: ocispec.RootFS{Type: "layers"}}
			for l := range 6 {
				d := diff(i, l)
				spec.RootFS.DiffIDs = append(spec.RootFS.DiffIDs, d)
				spec.History = append(spec.History, ocispec.History{Created: &epoch, CreatedBy: fmt.Sprintf("step %d of image %d, which says what it does at some length", l, i)})
				next := metadata.ChainID(chain, d)
				if !tx.HasLayer(next) {
					c := metadata.Cache{CacheID: newID(), DiffID: d, Dialect: "overlay", Owners: ownersReal, Apparent: 1000, Created: epoch}
					if err := tx.AddLayer(metadata.Layer{ChainID: next, DiffID: d, Parent: chain, CacheID: c.CacheID, Origin: "load", Created: epoch}, &c); err != nil {
						return err
					}
					if dirs {
						if err := os.MkdirAll(s.root+"/layers/"+c.CacheID+"/diff", 0o700); err != nil {
							return err
						}
					}
				}
				chain = next
			}
			config, err := json.Marshal(spec)
			if err != nil {
				return err
			}
			id := digest.FromBytes(config)
			if _, err := tx.AddImage(metadata.Image{ID: id, TopChain: chain, Created: epoch, Origin: "load"}, config); err != nil {
				return err
			}
			if _, err := tx.SetRef(fmt.Sprintf("docker.io/library/image:%d", i), metadata.Ref{ImageID: id}); err != nil {
				return err
			}
		}
		return nil
	})
	must(t, err)
}

// TestListReadsNoLayers: a list of images is made of the images' rows and the index of
// layers; however many and large the others are, nobody decodes them.
func TestListReadsNoLayers(t *testing.T) {
	s := openStore(t)
	manyImages(t, s, 20, false)
	before, err := s.Images(t.Context(), "")
	must(t, err)
	if len(before) != 20 || before[0].Size != 6000 || before[0].SharedSize != 1000 || before[0].UniqueSize != 5000 || before[0].Layers != 6 || !before[0].Created.Equal(epoch) {
		t.Fatalf("%+v", before[0])
	}
	metatest.Edit(t, s.db.Path(), func(b metatest.Buckets) {
		for _, bucket := range []string{"layers", "cache", "configs"} {
			for _, k := range b.Keys(bucket) {
				b.Put(bucket, k, []byte("nobody reads this"))
			}
		}
	})
	after, err := s.Images(t.Context(), "")
	must(t, err)
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Error("the list has changed:", after)
	}
}

// TestRemoveDoesNotWait: with somebody to delete what is removed, rmi leaves it alone; it
// is in the trash until then, and df says so.
func TestRemoveDoesNotWait(t *testing.T) {
	s := openStore(t)
	load(t, s, outerTar(t, oldDocker(t, sample(t))))
	asked := 0
	s.opts.OnTrash = func() { asked++ }
	dirs := listLayers(t, s)
	_, err := s.RemoveImage(t.Context(), "example.com/a:1", RemoveOptions{})
	must(t, err)
	if got := listLayers(t, s); len(got) != len(dirs) || asked != 1 {
		t.Errorf("%d of %d directories are there, asked %d times", len(got), len(dirs), asked)
	}
	u, err := s.DiskUsage(t.Context())
	must(t, err)
	if u.Trash < 100_000 || u.Layers.Count != 0 || u.Other != 0 {
		t.Errorf("df: %+v", u)
	}
	// The images can be loaded again meanwhile.
	load(t, s, outerTar(t, oldDocker(t, sample(t))))
	must(t, s.Purge(t.Context()))
	if got := listLayers(t, s); len(got) != len(dirs) {
		t.Errorf("%d directories, expected those of one image, %d", len(got), len(dirs))
	}
	clean(t, s)
}

// TestThousandLayers: an image with as many layers as there may be is loaded, listed,
// mounted, written out and removed.
func TestThousandLayers(t *testing.T) {
	if testing.Short() {
		t.Skip("some seconds")
	}
	root, err := os.MkdirTemp("/dev/shm", "plyfs-test-") // thousands of syncs
	if err != nil {
		root = t.TempDir()
	}
	defer os.RemoveAll(root)
	s := openAt(t, root+"/store")
	var layers [][]byte
	for i := range 1000 {
		layers = append(layers, layerTar(t, file(fmt.Sprintf("f%d", i), "x")))
	}
	archive := outerTar(t, oldDocker(t, img{refs: []string{"deep"}, layers: layers}))
	load(t, s, archive)
	st, err := s.ImageStack(t.Context(), "deep")
	must(t, err)
	if len(st.Lowers) != 1000 {
		t.Fatal(len(st.Lowers))
	}
	var out bytes.Buffer
	must(t, s.Save(t.Context(), &out, []string{"deep"}, SaveOptions{}))
	before := len(listLayers(t, s))
	load(t, s, out.Bytes())
	if n := len(listLayers(t, s)); n != before {
		t.Errorf("%d directories, %d before", n, before)
	}
	_, err = s.RemoveImage(t.Context(), "deep", RemoveOptions{})
	must(t, err)
	if n := len(listLayers(t, s)); n != 0 {
		t.Errorf("%d directories are left", n)
	}
}

func BenchmarkManyImages(b *testing.B) {
	s := openStore(b)
	manyImages(b, s, 2000, false)
	u, err := s.db.FileUse()
	must(b, err)
	_, small, err := s.Compact(b.Context())
	must(b, err)
	b.Logf("database: %d kB, %d kB of it free; %d kB compacted", u.Size>>10, u.Free>>10, small>>10)
	b.Run("images", func(b *testing.B) {
		for b.Loop() {
			if list, err := s.Images(b.Context(), ""); err != nil || len(list) != 2000 {
				b.Fatal(len(list), err)
			}
		}
	})
	b.Run("view", func(b *testing.B) {
		for b.Loop() {
			must(b, s.view(b.Context(), func(tx *metadata.Tx) error { return nil }))
		}
	})
	b.Run("tag", func(b *testing.B) {
		for b.Loop() {
			must(b, s.Tag(b.Context(), "image:7", "image:tagged"))
		}
	})
	b.Run("transaction", func(b *testing.B) {
		for b.Loop() {
			must(b, s.db.Update(b.Context(), func(tx *metadata.Tx) error { return tx.AddLease(metadata.Lease{ID: "x", Started: time.Now()}) }))
		}
	})
	b.Run("gc", func(b *testing.B) {
		for b.Loop() {
			_, err := s.GC(b.Context(), true)
			must(b, err)
		}
	})
	b.Run("df", func(b *testing.B) {
		for b.Loop() {
			_, err := s.DiskUsage(b.Context())
			must(b, err)
		}
	})
	i := 0
	s.opts.OnTrash = func() {}
	b.Run("rmi", func(b *testing.B) {
		for b.Loop() {
			_, err := s.RemoveImage(b.Context(), fmt.Sprintf("image:%d", i), RemoveOptions{})
			must(b, err)
			i++
		}
	})
}
