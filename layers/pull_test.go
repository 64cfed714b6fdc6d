package layers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/layers/registry/registrytest"
	"github.com/plyfs/plyfs/metadata"
)

// hasty gives up soon.
var hasty = registry.Options{
	Answer: 5 * time.Second, Stall: 400 * time.Millisecond, StallBytes: 64,
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

// TestPullGoesOnInPlace: what the network does in the middle of a pull is not seen in its result.
func TestPullGoesOnInPlace(t *testing.T) {
	im := img{layers: [][]byte{noise(t, "one", 300_000), noise(t, "two", 200_000)}}
	for name, fault := range map[string]func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool{
		"cut": func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			if n > 2 {
				return false
			}
			from := 0
			if h := r.Header.Get("Range"); h != "" {
				_, _ = fmt.Sscanf(h, "bytes=%d-", &from)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(b)-from))
			if from > 0 {
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write(b[from : from+50_000])
			registrytest.Cut(w)
			return true
		},
		"reset": func(n int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if n > 2 {
				return false
			}
			registrytest.Reset(w)
			return true
		},
		"503": func(n int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if n > 3 {
				return false
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		},
		"429": func(n int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			if n > 1 {
				return false
			}
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		},
		"knows no ranges": func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			if n == 1 {
				_, _ = w.Write(b[:100_000])
				registrytest.Cut(w)
				return true
			}
			_, _ = w.Write(b)
			return true
		},
		"short ranges": func(_ int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			from := 0
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
				w.Header().Set("Content-Length", fmt.Sprint(len(b)))
				_, _ = w.Write(b[:60_000])
				registrytest.Cut(w)
				return true
			}
			to := min(from+70_000, len(b))
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b[from:to])
			return true
		},
		"stalls": func(n int, w http.ResponseWriter, r *http.Request, b []byte) bool {
			if n > 1 {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:10_000])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg, s := registrytest.New(t), openStore(t)
			man, _ := offer(t, reg, "app", "1", ociGzip, im)
			count := map[string]int{}
			reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
				i := slices.IndexFunc(man.Layers, func(d ocispec.Descriptor) bool { return strings.HasSuffix(r.URL.Path, d.Digest.String()) })
				if i < 0 || r.Method != http.MethodGet {
					return false
				}
				n := 0
				reg.Lock(func() { count[r.URL.Path]++; n = count[r.URL.Path] })
				return fault(n, w, r, reg.Blob("app", man.Layers[i].Digest))
			})
			res := pull(t, s, reg, "app:1", PullOptions{})
			if res.ID != man.Config.Digest {
				t.Error(res)
			}
			clean(t, s)
		})
	}
}

// TestPullGoesOnLater: a pull that has failed leaves what has arrived to the next one.
func TestPullGoesOnLater(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	man, _ := offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 300_000), noise(t, "two", 200_000)}})
	blob := reg.Blob("app", man.Layers[0].Digest)
	// The second layer arrives, half of the first, and then there is no network.
	arrived := make(chan struct{})
	cut := func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, man.Layers[1].Digest.String()):
			defer close(arrived)
			_, _ = w.Write(reg.Blob("app", man.Layers[1].Digest))
			return true
		case !strings.HasSuffix(r.URL.Path, man.Layers[0].Digest.String()):
			return false
		case r.Header.Get("Range") != "":
			registrytest.Reset(w)
			return true
		}
		<-arrived
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:150_000])
		registrytest.Cut(w)
		return true
	}
	fail := func() {
		t.Helper()
		arrived = make(chan struct{})
		reg.SetFault(cut)
		_, err := tryPull(t, s, reg, "app:1", PullOptions{})
		if err == nil || errors.Is(err, ErrCorrupt) || !errors.Is(err, registry.ErrUnavailable) || !strings.Contains(err.Error(), "layer 1 ("+man.Layers[0].Digest.String()+")") {
			t.Fatalf("got %v", err)
		}
		clean(t, s) // no stage, no row
		reg.SetFault(nil)
		reg.Log()
	}
	fail()
	if f := files(t, s, blobsName); len(f) != 2 {
		t.Fatalf("the partial blobs are %v", f)
	}
	u, err := s.DiskUsage(t.Context())
	must(t, err)
	if u.Stage < 300_000 {
		t.Errorf("df does not count the partial blobs: %+v", u)
	}
	res := pull(t, s, reg, "app:1", PullOptions{})
	log := reg.Log()
	i := slices.IndexFunc(log, func(r registrytest.Request) bool { return r.Range != "" })
	if i < 0 || log[i].Range != "bytes=150000-" || asked(log, "GET", man.Layers[1].Digest.String()) != 0 || res.Downloaded != int64(len(blob))-150_000 {
		t.Errorf("the second pull asked %v, result %+v", log, res)
	}
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("blobs are left: %v", f)
	}
	clean(t, s)

	// A partial blob that is not the beginning of the right one is noticed, and all is well.
	_, err = s.RemoveImage(t.Context(), res.ID.String(), RemoveOptions{})
	must(t, err)
	fail()
	must(t, os.WriteFile(filepath.Join(s.root, blobsName, partialName, man.Layers[0].Digest.Encoded()), make([]byte, 150_000), 0o600))
	pull(t, s, reg, "app:1", PullOptions{})
	clean(t, s)

	// Others are removed by gc, and by age.
	_, err = s.RemoveImage(t.Context(), res.ID.String(), RemoveOptions{})
	must(t, err)
	fail()
	rep, err := s.GC(t.Context(), true)
	if err != nil || len(rep.Paths) != 2 || len(files(t, s, blobsName)) != 2 {
		t.Errorf("dry run: %+v %v", rep, err)
	}
	path := filepath.Join(s.root, blobsName, partialName, man.Layers[0].Digest.Encoded())
	old := time.Now().Add(-partialAge - time.Minute)
	must(t, os.Chtimes(path, old, old))
	must(t, s.sweep(t.Context()))
	if f := files(t, s, blobsName); !slices.Equal(f, []string{man.Layers[1].Digest.Encoded()}) {
		t.Errorf("after the sweep of the old one: %v", f)
	}
	// One that somebody is at stays.
	dl, err := s.newDownload(man.Layers[1].Digest, man.Layers[1].Size)
	must(t, err)
	if _, err = s.GC(t.Context(), false); err != nil || len(files(t, s, blobsName)) != 1 {
		t.Errorf("gc took a download away: %v", err)
	}
	second, err := s.newDownload(man.Layers[1].Digest, man.Layers[1].Size)
	if err != nil || second.name == dl.name || second.resumed != 0 {
		t.Errorf("two downloads share a file: %v", err)
	}
	second.close()
	dl.close()
	if _, err = s.GC(t.Context(), false); err != nil || len(files(t, s, blobsName)) != 0 {
		t.Errorf("gc left %v: %v", files(t, s, blobsName), err)
	}
}

// TestPullIsCancelled: Ctrl-C in the middle.
func TestPullIsCancelled(t *testing.T) {
	reg, s := registrytest.New(t), openStore(t)
	man, _ := offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 300_000)}})
	ctx, cancel := context.WithCancel(t.Context())
	reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, man.Layers[0].Digest.String()) {
			return false
		}
		_, _ = w.Write(reg.Blob("app", man.Layers[0].Digest)[:100_000])
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done()
		return true
	})
	_, err := s.Pull(ctx, reg.Host()+"/app:1", reach(reg, "app"), PullOptions{})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
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

// TestPullAtOnce: several pulls of images that share layers, in one store.
func TestPullAtOnce(t *testing.T) {
	reg := registrytest.New(t)
	base, mid := noise(t, "base", 300_000), noise(t, "mid", 100_000)
	const n = 6
	var stores []*Store
	root := filepath.Join(t.TempDir(), "store")
	for i := range n {
		offer(t, reg, "app", fmt.Sprint(i%3), ociGzip, img{layers: [][]byte{base, mid, layerTar(t, file("f", fmt.Sprint(i%3)))}})
		stores = append(stores, openAt(t, root))
	}
	errs := make(chan error, n)
	for i, s := range stores {
		go func() {
			_, err := tryPull(t, s, reg, "app:"+fmt.Sprint(i%3), PullOptions{KeepBlobs: i%2 == 0})
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	s := stores[0]
	clean(t, s)
	if got := listLayers(t, s); len(got) != 5 {
		t.Errorf("%d layers are in the store", len(got))
	}
	if f := files(t, s, blobsName+"/"+partialName); len(f) > 0 {
		t.Errorf("left %v", f)
	}
	images, err := s.Images(t.Context(), "")
	must(t, err)
	for _, i := range images {
		_, err := s.RemoveImage(t.Context(), i.ID.String(), RemoveOptions{Force: true})
		must(t, err)
	}
	clean(t, s)
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("left %v", f)
	}
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

// TestPullDiskFull: a pull that fills the disk gives it back.
func TestPullDiskFull(t *testing.T) {
	needRoot(t)
	mnt := t.TempDir()
	if err := unix.Mount("none", mnt, "tmpfs", 0, "size=3m"); err != nil {
		t.Skip("needs a tmpfs of its own:", err)
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	s, err := Open(t.Context(), filepath.Join(mnt, "store"), Options{})
	must(t, err)
	defer s.Close()
	reg := registrytest.New(t)
	offer(t, reg, "app", "1", ociGzip, img{layers: [][]byte{noise(t, "one", 4<<20)}})
	if _, err := tryPull(t, s, reg, "app:1", PullOptions{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	clean(t, s)
	if f := files(t, s, blobsName); len(f) > 0 {
		t.Errorf("the disk is full of %v", f)
	}
	offer(t, reg, "app", "2", ociGzip, img{layers: [][]byte{noise(t, "one", 10_000)}})
	pull(t, s, reg, "app:2", PullOptions{})
	clean(t, s)
}
