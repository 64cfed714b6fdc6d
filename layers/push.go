package layers

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/metadata"
)

const (
	pushSlots = 3 // layers that are looked for, compressed or sent at once
	mountFrom = 2 // repositories in which a blob is looked for
	// gzipLevel and the library are what the digest of a new blob depends on.
	gzipLevel = 6
)

// Push gives an image to a registry, which is asked for each blob first whether it
// has it, or can take it from another repository of it. If all layers are there or
// kept as they were pulled, the manifest is the one that the image came with, and so
// is its digest. Otherwise layers are compressed, always to the same bytes, and a new
// manifest is made.
func (s *Store) Push(ctx context.Context, name string, acc registry.Access, o PushOptions) (PushResult, error) {
	ref, err := registry.Parse(name)
	if err != nil {
		return PushResult{}, registryError(err)
	}
	if ref.Digest != "" {
		return PushResult{}, fmt.Errorf("%w: %q: an image is pushed to a tag: its digest follows from what is pushed", ErrInvalid, name)
	}
	if o.Format = cmp.Or(o.Format, "oci"); o.Format != "oci" && o.Format != "docker" {
		return PushResult{}, fmt.Errorf("%w: format %q: expected oci or docker", ErrInvalid, o.Format)
	}
	ro := s.registryOptions(o.Registry)
	ro.Upload = true
	rem, err := registry.Open(acc, ro)
	if err != nil {
		return PushResult{}, registryError(err)
	}
	defer rem.Close()
	lease, err := s.newLease(ctx)
	if err != nil {
		return PushResult{}, err
	}
	defer s.dropLease(lease)
	p := &pusher{s: s, ref: ref, rem: rem, o: o, progress: &progress{fn: o.Progress}, kept: map[digest.Digest]bool{}, origins: map[digest.Digest][]string{}}
	p.res.Ref = ref.Familiar()
	if err := p.collect(ctx, lease); err != nil {
		return p.res, err
	}
	if err := p.push(ctx); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return p.res, registryError(fmt.Errorf("push %s: %w", ref.Familiar(), err))
	}
	return p.res, p.record(ctx)
}

// pusher is one push.
type pusher struct {
	s        *Store
	ref      registry.Reference
	rem      *registry.Remote
	o        PushOptions
	progress *progress

	id        digest.Digest
	config    []byte
	layers    []pushLayer // bottom first
	manifests []rawManifest
	kept      map[digest.Digest]bool     // blobs
	origins   map[digest.Digest][]string // diffID: other repositories of the registry
	lost      string                     // why the manifest that the image came with is not pushed

	mu  sync.Mutex
	res PushResult // counts guarded by mu
}

type pushLayer struct {
	metadata.Layer
	tarSize int64
	made    ocispec.Descriptor // compressed here
}

type rawManifest struct {
	digest digest.Digest
	raw    []byte
}

// collect reads what the store knows, and keeps it from being removed.
func (p *pusher) collect(ctx context.Context, lease string) error {
	return p.s.update(ctx, func(tx *metadata.Tx) error {
		p.layers, p.manifests = nil, nil
		r, err := resolve(tx, cmp.Or(p.o.Image, p.ref.String()))
		if err != nil {
			return err
		}
		row, err := tx.Image(r.id)
		if err != nil {
			return err
		}
		if p.config, err = tx.Config(r.id); err != nil {
			return err
		}
		p.id, p.res.ID = r.id, r.id
		if row.TopChain != "" {
			if err := tx.LeaseLayer(lease, row.TopChain); err != nil {
				return err
			}
		}
		chain, err := tx.Chain(row.TopChain)
		if err != nil {
			return err
		}
		for _, l := range slices.Backward(chain) {
			c, err := tx.Cache(l.CacheID)
			if err != nil {
				return err
			}
			p.layers = append(p.layers, pushLayer{Layer: l, tarSize: c.TarSize})
		}
		for _, d := range tx.Manifests(r.id) {
			raw, err := tx.Manifest(r.id, d)
			if err != nil {
				return err
			}
			m := rawManifest{d, raw}
			if d == row.Manifest {
				p.manifests = append([]rawManifest{m}, p.manifests...)
			} else {
				p.manifests = append(p.manifests, m)
			}
		}
		blobs, err := tx.Blobs()
		if err != nil {
			return err
		}
		for _, b := range blobs {
			p.kept[b.Digest] = true
		}
		return p.collectOrigins(tx)
	})
}

// collectOrigins finds the repositories of the same registry that have images with
// layers of this one.
func (p *pusher) collectOrigins(tx *metadata.Tx) error {
	ours := map[digest.Digest]bool{}
	for _, l := range p.layers {
		ours[l.DiffID] = true
	}
	images, err := tx.Images()
	if err != nil {
		return err
	}
	for _, img := range images {
		repos := map[string]bool{}
		for _, name := range tx.RefsOf(img.ID) {
			if r, err := registry.Parse(name); err == nil && r.Host() == p.ref.Host() && r.Path() != p.ref.Path() {
				repos[r.Path()] = true
			}
		}
		if len(repos) == 0 {
			continue
		}
		chain, err := tx.Chain(img.TopChain)
		if err != nil {
			return err
		}
		for _, l := range chain {
			for repo := range repos {
				if list := p.origins[l.DiffID]; ours[l.DiffID] && len(list) < mountFrom && !slices.Contains(list, repo) {
					p.origins[l.DiffID] = append(list, repo)
				}
			}
		}
	}
	return nil
}

func (p *pusher) push(ctx context.Context) error {
	man, raw, err := p.original(ctx)
	if err != nil {
		return err
	}
	if raw == nil {
		if man, raw, err = p.newManifest(ctx); err != nil {
			return err
		}
	}
	d := ocispec.Descriptor{MediaType: man.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	p.res.Original = slices.ContainsFunc(p.manifests, func(m rawManifest) bool { return m.digest == d.Digest })
	if !p.res.Original && p.lost != "" {
		p.res.Notes = append(p.res.Notes, p.lost)
	}
	if err := p.blob(ctx, man.Config, func(off int64) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p.config[off:])), nil }, nil); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if err := p.rem.PushManifest(ctx, d, raw, p.ref.Tag); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	p.res.Digest, p.res.Size = d.Digest, d.Size
	p.manifests = []rawManifest{{d.Digest, raw}}
	return nil
}

// original sends the layers of a manifest that the image came with. It returns nil
// if it cannot.
func (p *pusher) original(ctx context.Context) (man ocispec.Manifest, raw []byte, err error) {
	for _, m := range p.manifests {
		man = ocispec.Manifest{}
		if decodeJSON(m.raw, p.s.limits.JSONDepth, &man) != nil || man.Config.Digest != p.id || len(man.Layers) != len(p.layers) {
			continue // an index
		}
		if man.MediaType == "" {
			man.MediaType = ocispec.MediaTypeImageManifest
		}
		missing, err := p.originalLayers(ctx, man)
		if err != nil {
			return man, nil, err
		}
		if missing == 0 {
			return man, m.raw, nil
		}
		if p.lost == "" {
			p.lost = fmt.Sprintf("this is a new manifest, not %s: of %s the compressed form was not kept (pull --keep-blobs), and the registry does not have it",
				m.digest, plural(missing, "layer"))
		}
	}
	return man, nil, nil
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// newManifest sends the layers in whatever form there is, and describes them.
func (p *pusher) newManifest(ctx context.Context) (man ocispec.Manifest, raw []byte, err error) {
	mediaType, config, layer := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip
	if p.o.Format == "docker" {
		mediaType, config, layer = registry.MediaDockerImage, registry.MediaDockerConfig, registry.MediaDockerLayer
	}
	man = ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType,
		Config: ocispec.Descriptor{MediaType: config, Digest: p.id, Size: int64(len(p.config))},
		Layers: make([]ocispec.Descriptor, len(p.layers)),
	}
	first := map[digest.Digest]int{} // of layers that come twice
	for i, l := range p.layers {
		if _, ok := first[l.DiffID]; !ok {
			first[l.DiffID] = i
		}
	}
	err = p.each(ctx, func(ctx context.Context, i int) error {
		if first[p.layers[i].DiffID] != i {
			return nil
		}
		d, err := p.layer(ctx, i, layer)
		if err != nil {
			return fmt.Errorf("layer %d (%s): %w", i+1, p.layers[i].DiffID, err)
		}
		man.Layers[i] = d
		return nil
	})
	if err != nil {
		return man, nil, err
	}
	for i, l := range p.layers {
		man.Layers[i] = man.Layers[first[l.DiffID]]
	}
	raw, err = json.Marshal(man)
	return man, raw, err
}

func (p *pusher) tell(d ocispec.Descriptor, action string) {
	t := p.progress.start(ShortID(d.Digest), action, d.Size)
	t.add(d.Size)
	t.done()
}

// each runs f for every layer, some at a time, and returns the first error.
func (p *pusher) each(ctx context.Context, f func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	slots := make(chan struct{}, pushSlots)
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	for i := range p.layers {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := f(ctx, i); err != nil {
				once.Do(func() { first = err })
				cancel()
			}
		})
	}
	wg.Wait()
	if first != nil {
		return first
	}
	return ctx.Err()
}

// record notes what the registry now has: the manifest and its digest, so that the
// next push finds them.
func (p *pusher) record(ctx context.Context) error {
	now := time.Now().UTC()
	return p.s.update(context.WithoutCancel(ctx), func(tx *metadata.Tx) error {
		if _, err := tx.Image(p.id); errors.Is(err, metadata.ErrNotFound) {
			return nil // removed meanwhile: the lease has kept its layers
		}
		for _, m := range p.manifests {
			if err := tx.AddManifest(p.id, m.digest, m.raw); err != nil {
				return err
			}
		}
		for _, l := range p.layers {
			if have, err := tx.Layer(l.ChainID); err == nil && have.Blob == "" && l.made.Digest != "" {
				if err := tx.SetBlob(l.ChainID, l.made.Digest, l.made.Size, l.made.MediaType); err != nil {
					return err
				}
			}
		}
		// The digest is one of a name that the image has.
		for _, name := range tx.RefsOf(p.id) {
			if r, err := registry.Parse(name); err == nil && r.Name() == p.ref.Name() {
				_, err := tx.SetRef(p.ref.WithDigest(p.res.Digest), metadata.Ref{ImageID: p.id, Updated: now})
				return err
			}
		}
		return nil
	})
}
