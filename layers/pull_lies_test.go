package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/layers/registry/registrytest"
	"github.com/plyfs/plyfs/metadata"
)

// TestPullLies: whatever a registry says instead of the truth, the error tells what was wrong
// and nothing is in the store.
func TestPullLies(t *testing.T) {
	im := img{layers: [][]byte{layerTar(t, file("base", "b")), noise(t, "top", 200_000)}}
	type env struct {
		reg  *registrytest.Server
		man  ocispec.Manifest
		d    digest.Digest
		blob []byte // of the second layer
		name string // to pull
	}
	// answer replaces the answer for the second layer.
	answer := func(f func(w http.ResponseWriter, b []byte)) func(*env) {
		return func(e *env) {
			e.reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, e.man.Layers[1].Digest.String()) {
					return false
				}
				f(w, e.blob)
				return true
			})
		}
	}
	manifest := func(change func(m *ocispec.Manifest)) func(*env) {
		return func(e *env) { change(&e.man); offerManifest(t, e.reg, "app", "1", e.man) }
	}
	raw := func(mediaType, text string) func(*env) {
		return func(e *env) { e.reg.PutManifest("app", "1", mediaType, []byte(text)) }
	}
	for name, c := range map[string]struct {
		lie  func(*env)
		is   error
		says []string
	}{
		"wrong bytes": {answer(func(w http.ResponseWriter, b []byte) {
			c := bytes.Clone(b)
			c[len(c)/2] ^= 1
			_, _ = w.Write(c)
		}), ErrCorrupt, []string{"layer 2 (sha256:", "wrong digest: expected sha256:", "got sha256:"}},
		"another blob": {answer(func(w http.ResponseWriter, b []byte) {
			_, _ = w.Write(bytes.Repeat([]byte{7}, len(b)))
		}), ErrCorrupt, []string{"layer 2", "wrong digest"}},
		"truncated, with the length it has": {answer(func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)/2))
			_, _ = w.Write(b[:len(b)/2])
		}), ErrCorrupt, []string{"layer 2", "the manifest gives the blob"}},
		"truncated, in chunks": {answer(func(w http.ResponseWriter, b []byte) {
			_, _ = w.Write(b[:len(b)/2])
			w.(http.Flusher).Flush()
		}), ErrCorrupt, []string{"layer 2", "truncated"}},
		"endless": {answer(func(w http.ResponseWriter, b []byte) {
			for {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		}), ErrCorrupt, []string{"layer 2", "sends more than"}},
		"longer than it is": {answer(func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)+10))
			_, _ = w.Write(b)
		}), ErrCorrupt, []string{"layer 2", "the registry says it has"}},
		"a range nobody asked for": {answer(func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		}), ErrCorrupt, []string{"layer 2", "got the range"}},
		"no such blob": {answer(func(w http.ResponseWriter, _ []byte) {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors":[{"code":"BLOB_UNKNOWN","message":"blob \u001b[31munknown"}]}`)
		}), ErrNotFound, []string{"layer 2", "404: blob unknown: blob  [31munknown"}},
		"a redirect in a circle": {answer(func(w http.ResponseWriter, _ []byte) {
			w.Header().Set("Location", "/v2/app/blobs/"+digest.FromString("x").String())
			w.WriteHeader(http.StatusTemporaryRedirect)
		}), ErrNotFound, []string{"layer 2"}},
		"the blob is another layer": {func(e *env) {
			b := gz(t, layerTar(t, file("evil", "x")))
			e.man.Layers[1].Digest, e.man.Layers[1].Size = e.reg.Put("app", b), int64(len(b))
			offerManifest(t, e.reg, "app", "1", e.man)
		}, ErrCorrupt, []string{"layer 2", "wrong digest: expected diffID sha256:"}},
		"no layer at all": {func(e *env) {
			b := []byte(strings.Repeat("not a tar ", 1000))
			e.man.Layers[1].Digest, e.man.Layers[1].Size = e.reg.Put("app", b), int64(len(b))
			offerManifest(t, e.reg, "app", "1", e.man)
		}, ErrCorrupt, []string{"layer 2"}},
		"config with another digest": {func(e *env) { e.reg.PutAs("app", e.man.Config.Digest, make([]byte, e.man.Config.Size)) }, ErrCorrupt, []string{"config", "wrong digest: expected sha256:"}},
		"config of a wrong size":     {manifest(func(m *ocispec.Manifest) { m.Config.Size++ }), ErrCorrupt, []string{"config"}},
		"huge config":                {manifest(func(m *ocispec.Manifest) { m.Config.Size = 1 << 40 }), ErrUnsupported, []string{"config of 1099511627776 bytes"}},
		"negative size":              {manifest(func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }), ErrUnsupported, []string{"layer 1", "a blob of -1 bytes"}},
		"fewer layers":               {manifest(func(m *ocispec.Manifest) { m.Layers = m.Layers[:1] }), ErrCorrupt, []string{"lists 1 layers, the config 2"}},
		"foreign layer":              {manifest(func(m *ocispec.Manifest) { m.Layers[0].MediaType = foreignTypes[1] }), ErrUnsupported, []string{"layer 1", "foreign layer"}},
		"encrypted layer":            {manifest(func(m *ocispec.Manifest) { m.Layers[0].MediaType += "+encrypted" }), ErrUnsupported, []string{"layer 1", "no layer of files"}},
		"an artifact":                {manifest(func(m *ocispec.Manifest) { m.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" }), ErrUnsupported, []string{"this is no image"}},
		"sha512":                     {manifest(func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.SHA512.FromString("x") }), ErrUnsupported, []string{"only sha256"}},
		"path as a digest":           {manifest(func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../../../etc/passwd" }), ErrCorrupt, []string{"layer 1"}},
		"schema 1":                   {raw("application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1,"name":"x","fsLayers":[],"history":[]}`), ErrUnsupported, []string{"schema 1", "before Docker 1.10"}},
		"two kinds at once":          {raw(ocispec.MediaTypeImageIndex, `{"schemaVersion":2,"manifests":[],"config":{},"layers":[]}`), ErrCorrupt, []string{"an index and an image at once"}},
		"one kind here, another there": {func(e *env) {
			b := e.reg.Manifest("app", "1")
			e.reg.PutManifest("app", "1", registry.MediaDockerImage, b)
		}, ErrCorrupt, []string{"it says that it is"}},
		"empty index":   {raw(ocispec.MediaTypeImageIndex, `{"schemaVersion":2,"manifests":[]}`), ErrInvalid, []string{"lists no image"}},
		"no JSON":       {raw(ocispec.MediaTypeImageManifest, `<html>`), ErrCorrupt, nil},
		"deep JSON":     {raw(ocispec.MediaTypeImageManifest, strings.Repeat("[", 10_000)), ErrUnsupported, []string{"nested deeper"}},
		"huge manifest": {raw(ocispec.MediaTypeImageManifest, "{"+strings.Repeat(" ", 5<<20)+"}"), ErrUnsupported, []string{"the limit is 4194304"}},
		"index of itself": {func(e *env) {
			// As deep as it likes: each index names the next.
			d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: e.d, Size: int64(len(e.reg.Manifest("app", "1")))}
			for range 12 {
				idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}}
				idx.SchemaVersion = 2
				b, err := json.Marshal(idx)
				must(t, err)
				d = ocispec.Descriptor{MediaType: idx.MediaType, Digest: e.reg.PutManifest("app", "1", idx.MediaType, b), Size: int64(len(b))}
			}
		}, ErrUnsupported, []string{"nested too deeply"}},
		"another manifest than was asked for": {func(e *env) {
			other := offerManifest(t, e.reg, "app", "2", ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest})
			e.reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, e.d.String()) {
					w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
					_, _ = w.Write(e.reg.Manifest("app", other.String()))
					return true
				}
				return false
			})
			e.name = "app@" + e.d.String()
		}, ErrCorrupt, []string{"wrong digest: expected sha256:", "got sha256:"}},
		"a digest that is not the manifest's": {func(e *env) {
			e.reg.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/manifests/") {
					w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
					w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
					_, _ = w.Write(e.reg.Manifest("app", "1"))
					return true
				}
				return false
			})
		}, ErrCorrupt, []string{"wrong digest: expected " + digest.FromString("x").String()}},
		"no such tag": {func(e *env) { e.name = "app:2" }, ErrNotFound, []string{"/app:2: no such repository or tag", "404"}},
		"no access":   {func(e *env) { e.reg.Lock(func() { e.reg.User = "me" }) }, registry.ErrDenied, []string{"docker login"}},
		"a server of something else": {func(e *env) {
			e.reg.SetFault(func(w http.ResponseWriter, _ *http.Request) bool {
				fmt.Fprint(w, "<html>welcome</html>")
				return true
			})
		}, ErrCorrupt, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := &env{reg: registrytest.New(t), name: "app:1"}
			s := openStore(t)
			e.man, e.d = offer(t, e.reg, "app", "1", ociGzip, im)
			e.blob = e.reg.Blob("app", e.man.Layers[1].Digest)
			c.lie(e)
			_, err := tryPull(t, s, e.reg, e.name, PullOptions{KeepBlobs: strings.HasPrefix(name, "wrong")})
			if !errors.Is(err, c.is) {
				t.Fatalf("got %v, expected %v", err, c.is)
			}
			for _, text := range c.says {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
			clean(t, s)
			must(t, s.view(t.Context(), func(tx *metadata.Tx) error {
				images, err := tx.Images()
				rows, err2 := tx.Layers()
				if len(images)+len(rows) > 0 {
					t.Errorf("left in the store: %v %v", images, rows)
				}
				return errors.Join(err, err2)
			}))
			f := slices.DeleteFunc(files(t, s, ""), func(n string) bool { return strings.HasPrefix(n, dbName) || n == reserveName })
			if errors.Is(err, ErrCorrupt) && len(f) > 0 {
				t.Errorf("left in the store: %v", f)
			}
		})
	}
}
