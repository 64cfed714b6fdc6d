package layers

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/layers/registry/registrytest"
	"github.com/plyfs/plyfs/metadata"
)

func tryPush(t testing.TB, s *Store, reg *registrytest.Server, name string, o PushOptions) (PushResult, error) {
	t.Helper()
	ref, err := registry.Parse(reg.Host() + "/" + name)
	must(t, err)
	o.Registry = hasty
	return s.Push(t.Context(), reg.Host()+"/"+name, reach(reg, ref.Path()), o)
}

func push(t testing.TB, s *Store, reg *registrytest.Server, name string, o PushOptions) PushResult {
	t.Helper()
	res, err := tryPush(t, s, reg, name, o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// TestPushMakesTheSame: two stores that have the image in different ways push the same bytes.
func TestPushMakesTheSame(t *testing.T) {
	im := img{refs: []string{"app:1"}, layers: [][]byte{noise(t, "one", 100_000), layerTar(t, file("two", "2")), layerTar(t, file("two", "2"))}}
	var digests []digest.Digest
	for i, a := range [][]byte{outerTar(t, oldDocker(t, im)), outerTar(t, ociFiles(t, zst, im))} {
		reg, s := registrytest.New(t), openStore(t)
		id := load(t, s, a)[0].ID
		res := push(t, s, reg, "app:1", PushOptions{Image: "app:1"})
		digests = append(digests, res.Digest)
		var man ocispec.Manifest
		must(t, json.Unmarshal(reg.Manifest("app", "1"), &man))
		if len(man.Layers) != 3 || man.Layers[1].Digest != man.Layers[2].Digest || man.Config.Digest != id || res.Size != int64(len(reg.Manifest("app", "1"))) {
			t.Errorf("%d: %+v, result %+v", i, man, res)
		}
		for j, l := range man.Layers {
			b := reg.Blob("app", l.Digest)
			if int64(len(b)) != l.Size || l.MediaType != ocispec.MediaTypeImageLayerGzip || !bytes.Equal(gunzip(t, b), im.layers[j]) {
				t.Errorf("%d: layer %d is not what it was: %+v", i, j+1, l)
			}
		}
		// A second push sends nothing, nor compresses anything.
		reg.Log()
		var told []string
		res = push(t, s, reg, "app:1", PushOptions{Image: "app:1", Progress: func(p Progress) { told = append(told, p.Action) }})
		if log := reg.Log(); asked(log, "POST", "") != 0 || asked(log, "PUT", "") != 1 || res.Uploaded != 0 || res.Digest != digests[0] || slices.Contains(told, "Preparing") {
			t.Errorf("%d: the second push asked %v, told %q", i, log, told)
		}
		clean(t, s)
	}
	if digests[0] != digests[1] {
		t.Errorf("digests differ: %v", digests)
	}
}

// TestGzipStays: how layers are compressed is a promise. A library that does it in another way
// shows here: then images that were pushed get other digests.
func TestGzipStays(t *testing.T) {
	sum := digest.SHA256.Digester()
	z, err := newGzip(sum.Hash())
	must(t, err)
	r := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		fmt.Fprintf(z, "%d %s\n", r.IntN(1000), []string{"usr", "lib", "etc"}[r.IntN(3)])
	}
	must(t, z.Close())
	if want := digest.Digest("sha256:f05f65dc965100517b0946eb13bca765a9df7b992a78a4057f67b8420b33bb60"); sum.Digest() != want {
		t.Errorf("the digest is %s, it was %s", sum.Digest(), want)
	}
}

func gunzip(t testing.TB, b []byte) []byte {
	t.Helper()
	z, _, err := decompress(bufio.NewReader(bytes.NewReader(b)))
	must(t, err)
	defer z.Close()
	out, err := io.ReadAll(z)
	must(t, err)
	return out
}

func TestPushDockerFormat(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"app"}, layers: [][]byte{layerTar(t, file("a", "b"))}})))
	push(t, s, reg, "app", PushOptions{Image: "app", Format: "docker"})
	var man ocispec.Manifest
	must(t, json.Unmarshal(reg.Manifest("app", "latest"), &man))
	if man.MediaType != registry.MediaDockerImage || man.Config.MediaType != registry.MediaDockerConfig || man.Layers[0].MediaType != registry.MediaDockerLayer {
		t.Errorf("%+v", man)
	}
	for _, c := range []struct {
		name string
		o    PushOptions
		is   error
	}{
		{"app", PushOptions{Image: "app", Format: "v1"}, ErrInvalid},
		{"app@" + digest.FromString("x").String(), PushOptions{Image: "app"}, ErrInvalid},
		{"other", PushOptions{}, ErrNotFound},
	} {
		if _, err := tryPush(t, s, reg, c.name, c.o); !errors.Is(err, c.is) {
			t.Errorf("push %s: %v", c.name, err)
		}
	}
}

// TestKeptBlobs: with the blobs, an image goes on as it came.
func TestKeptBlobs(t *testing.T) {
	from, to, s := registrytest.New(t), registrytest.New(t), openStore(t)
	im := img{layers: [][]byte{noise(t, "one", 100_000), layerTar(t, file("two", "2"))}}
	man, d := offer(t, from, "team/app", "1", dockerGzip, im)
	// Without them first: other layers, another manifest, and it is said.
	pull(t, s, from, "team/app:1", PullOptions{})
	res := push(t, s, to, "app:1", PushOptions{Image: from.Host() + "/team/app:1"})
	if res.Original || res.Digest == d || len(res.Notes) != 1 || !strings.Contains(res.Notes[0], "of 2 layers the compressed form was not kept") {
		t.Errorf("push without blobs: %+v", res)
	}
	// To where they are already it makes no difference.
	from.Log()
	if res = push(t, s, from, "team/app:2", PushOptions{Image: res.ID.String()}); !res.Original || res.Digest != d || res.Uploaded != 0 {
		t.Errorf("push back: %+v", res)
	}
	// And another repository of that registry takes them from there.
	res = push(t, s, from, "other/app:1", PushOptions{Image: res.ID.String()})
	if log := from.Log(); !res.Original || res.Digest != d || res.Mounted != 2 || asked(log, "PUT", "/blobs/") != 1 { // the config
		t.Errorf("push beside: %+v, asked %v", res, log)
	}

	// The image is there, and the blobs are fetched all the same.
	from.Log()
	pres := pull(t, s, from, "team/app:1", PullOptions{KeepBlobs: true})
	if log := from.Log(); asked(log, "GET", "/blobs/") != 2 || pres.Updated {
		t.Errorf("asked %v, result %+v", log, pres)
	}
	kept := func() []string { return files(t, s, blobsName+"/"+keptName) }
	if len(kept()) != 2 || len(files(t, s, blobsName)) != 2 {
		t.Errorf("kept %v of %v", kept(), files(t, s, blobsName))
	}
	for _, l := range man.Layers {
		b, err := os.ReadFile(filepath.Join(s.root, blobsName, keptName, l.Digest.Encoded()))
		if err != nil || !bytes.Equal(b, from.Blob("team/app", l.Digest)) {
			t.Errorf("kept blob %s: %v", l.Digest, err)
		}
	}
	clean(t, s)
	u, err := s.DiskUsage(t.Context())
	if err != nil || u.Blobs < 100_000 {
		t.Errorf("df: %+v %v", u, err)
	}
	from.Log()
	pull(t, s, from, "team/app:1", PullOptions{KeepBlobs: true})
	if log := from.Log(); len(log) != 1 {
		t.Errorf("a second pull asked %v", log)
	}
	res = push(t, s, to, "app:2", PushOptions{Image: res.ID.String()})
	if !res.Original || res.Digest != d || len(res.Notes) != 0 || !bytes.Equal(to.Manifest("app", "2"), from.Manifest("team/app", "1")) {
		t.Errorf("push with blobs: %+v", res)
	}

	// Damage is found and mended without losing the layer.
	path := filepath.Join(s.root, blobsName, keptName, man.Layers[0].Digest.Encoded())
	b := bytes.Clone(from.Blob("team/app", man.Layers[0].Digest))
	b[50] ^= 1
	must(t, os.WriteFile(path, b, 0o600))
	must(t, os.Remove(filepath.Join(s.root, blobsName, keptName, man.Layers[1].Digest.Encoded())))
	stray := filepath.Join(s.root, blobsName, keptName, digest.FromString("stray").Encoded())
	must(t, os.WriteFile(stray, b, 0o600))
	rep, err := s.Check(t.Context(), CheckOptions{Deep: true, Repair: true})
	must(t, err)
	for _, f := range rep.Findings {
		if f.Invariant != "K30" || !f.Fixed {
			t.Errorf("%+v", f)
		}
	}
	if len(rep.Findings) != 3 || len(kept()) != 0 {
		t.Errorf("%+v, kept %v", rep.Findings, kept())
	}
	clean(t, s)

	// The blobs go with their layers.
	pull(t, s, from, "team/app:1", PullOptions{KeepBlobs: true})
	must(t, os.WriteFile(stray, b, 0o600))
	if len(kept()) != 3 {
		t.Errorf("kept %v", kept())
	}
	gc, err := s.GC(t.Context(), false)
	if err != nil || len(gc.Paths) != 1 || len(kept()) != 2 {
		t.Errorf("gc: %+v %v", gc, err)
	}
	_, err = s.RemoveImage(t.Context(), pres.ID.String(), RemoveOptions{Force: true})
	must(t, err)
	if len(kept()) != 0 {
		t.Errorf("kept after rmi: %v", kept())
	}
	clean(t, s)
}

// TestKeptBlobsCrash: a pull that ends between the disk and the rows leaves garbage, which gc
// finds.
func TestKeptBlobsCrash(t *testing.T) {
	for _, point := range []string{"after-blob-rename", "after-blob-sync", "before-images"} {
		reg, s := registrytest.New(t), openStore(t)
		offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 1000)}})
		s.hook = func(p string) error {
			if p == point {
				return errFault
			}
			return nil
		}
		if _, err := tryPull(t, s, reg, "app:1", PullOptions{KeepBlobs: true}); !errors.Is(err, errFault) {
			t.Fatal(err)
		}
		s.hook = nil
		if _, err := s.GC(t.Context(), false); err != nil {
			t.Error(err)
		}
		clean(t, s)
		if f := files(t, s, blobsName); len(f) > 0 {
			t.Errorf("%s: left %v", point, f)
		}
		pull(t, s, reg, "app:1", PullOptions{KeepBlobs: true})
		clean(t, s)
	}
}

// TestPushRetries: an upload that breaks is made again; one that is refused is an error.
func TestPushRetries(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	load(t, s, outerTar(t, oldDocker(t, img{refs: []string{"app"}, layers: [][]byte{noise(t, "one", 100_000)}})))
	puts := 0
	reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		n := 0
		reg.Lock(func() { puts++; n = puts })
		switch n {
		case 1:
			_, _ = io.CopyN(io.Discard, r.Body, 1000)
			registrytest.Reset(w)
			return true
		case 2:
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
		return false
	})
	push(t, s, reg, "app", PushOptions{Image: "app"})
	reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"errors":[{"code":"DENIED","message":"quota"}]}`)
		return true
	})
	_, err := tryPush(t, s, reg, "app:2", PushOptions{Image: "app"})
	if !errors.Is(err, registry.ErrDenied) || !strings.Contains(err.Error(), "denied: quota") || strings.Contains(err.Error(), "_state") {
		t.Error(err)
	}
	clean(t, s)
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("left %v", f)
	}
	// A damaged layer is not given away.
	rows, err := s.Layers(t.Context(), "app")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(rows[0].Path, "one"), []byte("damaged"), 0o644))
	reg.SetFault(nil)
	if _, err := tryPush(t, s, registrytest.New(t), "app:3", PushOptions{Image: "app"}); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

// TestLoadKeepsManifest: an image of an OCI archive has its manifest, byte for byte.
func TestLoadKeepsManifest(t *testing.T) {
	s := openStore(t)
	archive := outerTar(t, ociFiles(t, gz, img{refs: []string{"app:1"}, layers: [][]byte{layerTar(t, file("a", "b"))}}))
	id := load(t, s, archive)[0].ID
	blobs := blobsOf(t, archive)
	must(t, s.view(t.Context(), func(tx *metadata.Tx) error {
		row, err := tx.Image(id)
		if err != nil {
			return err
		}
		raw, err := tx.Manifest(id, row.Manifest)
		if !bytes.Equal(raw, blobs[blobPath(row.Manifest)]) {
			t.Errorf("kept %q", raw)
		}
		return err
	}))
	_, err := s.RemoveImage(t.Context(), "app:1", RemoveOptions{})
	must(t, err)
	clean(t, s)
}

// TestKeptBlobsChange: the same layer in another compression takes the place of the first.
func TestKeptBlobsChange(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	im := img{layers: [][]byte{noise(t, "one", 10_000), layerTar(t, file("two", "2"))}}
	offer(t, reg, "app", "1", ociGzip, im)
	man, _ := offer(t, reg, "app", "2", form{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerZstd, zst}, im)
	pull(t, s, reg, "app:1", PullOptions{KeepBlobs: true})
	// Without a wish to keep them, they are not given up for what is only mentioned.
	pull(t, s, reg, "app:2", PullOptions{})
	if res := push(t, s, registrytest.New(t), "app:1", PushOptions{Image: reg.Host() + "/app:1"}); res.Uploaded == 0 || !res.Original || len(res.Notes) > 0 {
		t.Errorf("%+v", res)
	}
	pull(t, s, reg, "app:2", PullOptions{KeepBlobs: true})
	want := []string{man.Layers[0].Digest.Encoded(), man.Layers[1].Digest.Encoded()}
	slices.Sort(want)
	if got := files(t, s, blobsName); !slices.Equal(got, want) {
		t.Errorf("kept %v, want %v", got, want)
	}
	clean(t, s)
}
