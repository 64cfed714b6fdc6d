package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/layers/registry/registrytest"
	"github.com/plyfs/plyfs/metadata"
)

// hasty gives up soon.
var hasty = registry.Options{
	Answer: 10 * time.Second, Stall: 1500 * time.Millisecond, StallBytes: 64,
	Backoff: 2 * time.Millisecond, MaxBackoff: 10 * time.Millisecond, Attempts: 3,
}

// reach is the access to a repository of a test registry.
func reach(reg *registrytest.Server, repo string) registry.Access {
	return registry.Access{Endpoints: []registry.Endpoint{{Host: reg.Host(), Repository: repo, Security: registry.SecurityPlain}}}
}

func tryPull(t testing.TB, s *Store, reg *registrytest.Server, name string, o PullOptions) (PullResult, error) {
	t.Helper()
	ref, err := registry.Parse(reg.Host() + "/" + name)
	must(t, err)
	o.Registry = hasty
	return s.Pull(t.Context(), reg.Host()+"/"+name, reach(reg, ref.Path()), o)
}

func pull(t testing.TB, s *Store, reg *registrytest.Server, name string, o PullOptions) PullResult {
	t.Helper()
	res, err := tryPull(t, s, reg, name, o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// noise is a layer that does not compress.
func noise(t testing.TB, name string, size int) []byte {
	t.Helper()
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(1, uint64(len(name)+size)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return layerTar(t, file(name, string(b)))
}

// form is how an image is served.
type form struct {
	image, config, layer string
	compress             func(testing.TB, []byte) []byte
}

var (
	ociGzip    = form{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip, gz}
	dockerGzip = form{registry.MediaDockerImage, registry.MediaDockerConfig, registry.MediaDockerLayer, gz}
)

// offer puts an image into a repository.
func offer(t testing.TB, reg *registrytest.Server, repo, tag string, f form, im img) (man ocispec.Manifest, d digest.Digest) {
	t.Helper()
	man.SchemaVersion, man.MediaType = 2, f.image
	config := im.configJSON(t)
	man.Config = ocispec.Descriptor{MediaType: f.config, Digest: reg.Put(repo, config), Size: int64(len(config))}
	for _, l := range im.layers {
		b := f.compress(t, l)
		man.Layers = append(man.Layers, ocispec.Descriptor{MediaType: f.layer, Digest: reg.Put(repo, b), Size: int64(len(b))})
	}
	return man, offerManifest(t, reg, repo, tag, man)
}

func offerManifest(t testing.TB, reg *registrytest.Server, repo, tag string, man ocispec.Manifest) digest.Digest {
	t.Helper()
	raw, err := json.Marshal(man)
	must(t, err)
	return reg.PutManifest(repo, tag, man.MediaType, raw)
}

// files are the regular files below a directory of the store.
func files(t testing.TB, s *Store, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(s.root, dir), func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.Type().IsRegular() {
			out = append(out, d.Name())
		}
		return err
	})
	must(t, err)
	return out
}

// trees shows what an image's layers hold.
func trees(t testing.TB, s *Store, id digest.Digest) (out string) {
	t.Helper()
	st, err := s.ImageStack(t.Context(), id.String())
	must(t, err)
	for _, l := range st.Lowers {
		out += l.DiffID.String() + "\n" + dump(t, l.Path)
	}
	return out
}

// asked counts the requests that match.
func asked(log []registrytest.Request, method, part string) (n int) {
	for _, r := range log {
		if r.Method == method && strings.Contains(r.Path, part) {
			n++
		}
	}
	return n
}

func TestPullForms(t *testing.T) {
	im := img{layers: [][]byte{layerTar(t, dir("a"), file("a/x", "one")), layerTar(t, dir("a"), wh("a/x"), file("b", "two"))}}
	for name, f := range map[string]form{
		"oci gzip": ociGzip, "docker": dockerGzip,
		"zstd":  {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerZstd, zst},
		"plain": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayer, plain},
		// What it is is seen, not believed.
		"zstd as gzip": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip, zst},
	} {
		t.Run(name, func(t *testing.T) {
			reg, s := registrytest.New(t), openStore(t)
			man, d := offer(t, reg, "team/app", "1", f, im)
			res := pull(t, s, reg, "team/app:1", PullOptions{})
			want := PullResult{
				ID: man.Config.Digest, Ref: reg.Host() + "/team/app:1", Canonical: reg.Host() + "/team/app:1", Digest: d, Platform: "linux/amd64",
				Updated: true, Layers: 2, Downloaded: man.Layers[0].Size + man.Layers[1].Size,
			}
			if fmt.Sprint(res) != fmt.Sprint(want) {
				t.Errorf("got %+v\nwant %+v", res, want)
			}
			clean(t, s)
			if f := files(t, s, blobsName); len(f) > 0 {
				t.Errorf("blobs are left: %v", f)
			}
			// It is the image that load makes of the same layers.
			other := openStore(t)
			load(t, other, outerTar(t, oldDocker(t, im)))
			if a, b := trees(t, s, res.ID), trees(t, other, res.ID); a != b {
				t.Errorf("pull made\n%s\nload\n%s", a, b)
			}
			must(t, s.view(t.Context(), func(tx *metadata.Tx) error {
				raw, err := tx.Manifest(res.ID, d)
				if err == nil && !bytes.Equal(raw, reg.Manifest("team/app", "1")) {
					t.Error("the manifest was changed")
				}
				for i, c := range tx.ChainsByDiff(digest.FromBytes(im.layers[0])) {
					l, err := tx.Layer(c)
					if err != nil || i > 0 || l.Blob != man.Layers[0].Digest || l.BlobSize != man.Layers[0].Size || l.MediaType != f.layer || l.Origin != "pull" {
						t.Errorf("layer row %+v, %v", l, err)
					}
				}
				return err
			}))
			// By its digest, from now on without the registry.
			img, err := s.ResolveImage(t.Context(), reg.Host()+"/team/app@"+d.String())
			if err != nil || img.ID != res.ID {
				t.Error(img.ID, err)
			}
			if img, err = s.ResolveImage(t.Context(), reg.Host()+"/team/app:other@"+d.String()); err != nil || img.ID != res.ID {
				t.Error(img.ID, err)
			}
			reg.Log()
			res = pull(t, s, reg, "team/app:1", PullOptions{})
			if log := reg.Log(); len(log) != 1 || log[0].String() != "HEAD /v2/team/app/manifests/1" || res.Updated || res.ID != img.ID || res.Digest != d {
				t.Errorf("the second pull asked %v, result %+v", log, res)
			}
		})
	}
}

// TestPullOnlyMissing: layers that the store has are not asked for, wherever they came from.
func TestPullOnlyMissing(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	base, top := layerTar(t, file("base", "b")), layerTar(t, file("top", "t"))
	load(t, s, outerTar(t, oldDocker(t, img{layers: [][]byte{base}})))
	man, _ := offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{base, top}})
	var told []string
	res := pull(t, s, reg, "app:1", PullOptions{Progress: func(p Progress) {
		if p.Done {
			told = append(told, p.ID+" "+p.Action)
		}
	}})
	log := reg.Log()
	if asked(log, "GET", man.Layers[0].Digest.String()) != 0 || asked(log, "GET", man.Layers[1].Digest.String()) != 1 || res.Present != 1 || res.Layers != 2 {
		t.Errorf("asked %v, result %+v", log, res)
	}
	slices.Sort(told)
	want := []string{ShortID(man.Layers[0].Digest) + " Already exists", ShortID(man.Layers[1].Digest) + " Pull complete"}
	slices.Sort(want)
	if !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	clean(t, s)
	// The same image by another name: only its manifest is fetched.
	man.Annotations = map[string]string{"a": "b"}
	offerManifest(t, reg, "app", "2", man)
	res = pull(t, s, reg, "app:2", PullOptions{})
	if log := reg.Log(); asked(log, "GET", "/blobs/") != 0 || res.Present != 2 || !res.Updated {
		t.Errorf("asked %v, result %+v", log, res)
	}
	// That the blob of the first layer is it nobody has seen here.
	must(t, s.view(t.Context(), func(tx *metadata.Tx) error {
		if n := len(tx.ChainsByBlob(man.Layers[0].Digest)); n != 0 {
			t.Errorf("%d layers claim a blob that was never read", n)
		}
		return nil
	}))
}

func TestPullIndex(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	entry := func(arch string, variant string) ocispec.Descriptor {
		im := img{layers: [][]byte{layerTar(t, file("arch", arch+variant))}, config: func(i *ocispec.Image) { i.Architecture, i.Variant = arch, variant }}
		man, d := offer(t, reg, "multi", "", ociGzip, im)
		raw, err := json.Marshal(man)
		must(t, err)
		return ocispec.Descriptor{MediaType: man.MediaType, Digest: d, Size: int64(len(raw)), Platform: &ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}}
	}
	index := func(tag string, ds ...ocispec.Descriptor) ocispec.Descriptor {
		idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: ds}
		idx.SchemaVersion = 2
		raw, err := json.Marshal(idx)
		must(t, err)
		return ocispec.Descriptor{MediaType: idx.MediaType, Digest: reg.PutManifest("multi", tag, idx.MediaType, raw), Size: int64(len(raw))}
	}
	attestation := entry("unknown", "")
	attestation.Platform.OS = "unknown"
	inner := index("", attestation, entry("arm", "v7"), entry("arm64", "v8"), entry("amd64", ""))
	top := index("1", inner)
	for platform, want := range map[string]string{"linux/arm": "linux/arm/v7", "linux/arm64": "linux/arm64/v8", "linux/amd64": "linux/amd64"} {
		res := pull(t, s, reg, "multi:1", PullOptions{Platform: platform})
		if res.Platform != want || res.Digest != top.Digest || !res.Updated {
			t.Errorf("for %s: %+v", platform, res)
		}
		// Again, and the index is known: nothing but its digest is asked.
		reg.Log()
		if res := pull(t, s, reg, "multi:1", PullOptions{Platform: platform}); res.Updated || len(reg.Log()) != 1 {
			t.Errorf("for %s again: %+v", platform, res)
		}
	}
	_, err := tryPull(t, s, reg, "multi:1", PullOptions{Platform: "linux/s390x"})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "only for linux/arm/v7, linux/arm64/v8, linux/amd64") {
		t.Error(err)
	}
	// An image that is for one platform only is refused for another one, if one was asked for.
	offer(t, reg, "multi", "arm", ociGzip, img{layers: [][]byte{layerTar(t, file("f", "x"))}, config: func(i *ocispec.Image) { i.Architecture = "arm" }})
	if _, err = tryPull(t, s, reg, "multi:arm", PullOptions{Platform: "linux/amd64"}); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if res := pull(t, s, reg, "multi:arm", PullOptions{}); len(res.Notes) != 1 {
		t.Errorf("no note about the platform: %+v", res)
	}
	must(t, s.view(t.Context(), func(tx *metadata.Tx) error {
		if n := len(tx.ImagesByManifest(inner.Digest)); n != 3 {
			t.Errorf("%d images keep the inner index", n)
		}
		return nil
	}))
	clean(t, s)
}

// TestPullMirrors: a mirror that lies does not keep an image from those who could have it.
func TestPullMirrors(t *testing.T) {
	im := img{layers: [][]byte{noise(t, "one", 50_000)}}
	mirror, reg, s := registrytest.New(t), registrytest.New(t), openStore(t)
	man, _ := offer(t, mirror, "copy/app", "1", ociGzip, im)
	offer(t, reg, "app", "1", ociGzip, im)
	mirror.PutAs("copy/app", man.Layers[0].Digest, make([]byte, man.Layers[0].Size))
	acc := reach(mirror, "copy/app")
	acc.Endpoints[0].Mirror = true
	acc.Endpoints = append(acc.Endpoints, reach(reg, "app").Endpoints...)
	res, err := s.Pull(t.Context(), reg.Host()+"/app:1", acc, PullOptions{Registry: hasty})
	if err != nil || res.ID != man.Config.Digest || asked(mirror.Log(), "GET", "/blobs/") == 0 {
		t.Error(res, err)
	}
	clean(t, s)
}

// TestMovedTag: what becomes of an image whose tag another one has got.
func TestMovedTag(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	one, two := img{layers: [][]byte{layerTar(t, file("f", "1"))}}, img{layers: [][]byte{layerTar(t, file("f", "2"))}}
	_, d1 := offer(t, reg, "app", "latest", ociGzip, one)
	first := pull(t, s, reg, "app", PullOptions{})
	_, d2 := offer(t, reg, "app", "latest", ociGzip, two)
	second := pull(t, s, reg, "app", PullOptions{})
	list := func() (out []string) {
		t.Helper()
		images, err := s.Images(t.Context(), "")
		must(t, err)
		for _, i := range images {
			out = append(out, fmt.Sprint(strings.TrimPrefix(i.Repository, reg.Host()), ":", i.Tag, " ", i.ID == first.ID, " ", i.Digests))
		}
		slices.Sort(out)
		return out
	}
	if got, want := list(), []string{fmt.Sprint("/app:<none> true [", d1, "]"), fmt.Sprint("/app:latest false [", d2, "]")}; !slices.Equal(got, want) {
		t.Errorf("images are %q, want %q", got, want)
	}
	// It has lost its tag: gc takes it. One that was asked for by its digest stays.
	rep, err := s.GC(t.Context(), false)
	if err != nil || !slices.Equal(rep.Images, []digest.Digest{first.ID}) {
		t.Errorf("gc: %+v %v", rep, err)
	}
	third := pull(t, s, reg, "app@"+d1.String(), PullOptions{})
	if rep, err = s.GC(t.Context(), false); err != nil || len(rep.Images) != 0 || third.ID != first.ID {
		t.Errorf("gc: %+v %v", rep, err)
	}
	if rep, err := s.Prune(t.Context(), PruneOptions{DryRun: true}); err != nil || !slices.Equal(rep.Images, []digest.Digest{third.ID}) {
		t.Errorf("prune: a digest is no name: %+v %v", rep, err)
	}
	// With the last tag the digests of its repository go, and those of others stay.
	must(t, s.Tag(t.Context(), second.ID.String(), "other:1"))
	done, err := s.RemoveImage(t.Context(), reg.Host()+"/app", RemoveOptions{})
	if err != nil || len(done) != 2 || done[1].Kind != "Untagged" || !strings.HasSuffix(done[1].Ref, "@"+d2.String()) {
		t.Errorf("rmi: %+v %v", done, err)
	}
	if done, err = s.RemoveImage(t.Context(), reg.Host()+"/app@"+d1.String(), RemoveOptions{}); err != nil || len(done) != 3 {
		t.Errorf("rmi: %+v %v", done, err)
	}
	clean(t, s)
}

func FuzzManifest(f *testing.F) {
	for _, s := range []string{
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"sha256:x","size":1},"layers":[]}`,
		`{"schemaVersion":2,"manifests":[{"digest":"sha256:x","platform":{"os":"linux","architecture":"amd64"}}]}`,
		`{"schemaVersion":1,"fsLayers":[]}`,
	} {
		f.Add([]byte(s), "application/vnd.oci.image.index.v1+json")
	}
	p := puller{s: &Store{limits: Limits{}.withDefaults()}}
	f.Fuzz(func(t *testing.T, raw []byte, said string) {
		var man ocispec.Manifest
		idx, err := p.parse(raw, said, &man)
		if err == nil && idx != nil {
			if d, err := pick(*idx, ""); err == nil && ignorable(d) {
				t.Errorf("picked %+v", d)
			}
		}
	})
}
