package layers

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/metadata"
)

// platform notes what the image is for, and refuses one for another platform than
// was asked for.
func (p *puller) platform(pl *plan) error {
	p.res.Platform = platformName(pl.spec.OS, pl.spec.Architecture, pl.spec.Variant)
	switch want := p.o.Platform; {
	case want != "" && !isPlatform(p.res.Platform, want):
		return fmt.Errorf("%w: the image is for %s, not for %s", ErrInvalid, p.res.Platform, want)
	case want == "" && pl.spec.OS != "" && !isPlatform(p.res.Platform, thisPlatform()):
		p.res.Notes = append(p.res.Notes, fmt.Sprintf("the image is for %s, this machine is %s", p.res.Platform, thisPlatform()))
	}
	return nil
}

// manifest goes from what was asked for through indexes to an image's manifest, and
// returns all on the way.
func (p *puller) manifest(ctx context.Context, top digest.Digest) (man ocispec.Manifest, d digest.Digest, raws map[digest.Digest][]byte, err error) {
	raws = map[digest.Digest][]byte{}
	version, size := p.ref.Version(), int64(-1)
	if top != "" {
		version = top.String() // the tag may be moving
	}
	for depth := 0; ; depth++ {
		if depth > 8 {
			return man, d, nil, fmt.Errorf("%w: indexes are nested too deeply", ErrUnsupported)
		}
		desc, raw, err := p.rem.Manifest(ctx, version)
		if err != nil {
			return man, d, nil, err
		}
		d = desc.Digest
		if size >= 0 && size != desc.Size {
			return man, d, nil, fmt.Errorf("%w: manifest %s: the index says it has %d bytes, it has %d", ErrCorrupt, d, size, desc.Size)
		}
		raws[d] = raw
		if depth == 0 {
			p.res.Digest = d
		}
		idx, err := p.parse(raw, desc.MediaType, &man)
		if err != nil {
			return man, d, nil, fmt.Errorf("manifest %s: %w", d, err)
		}
		if idx == nil {
			return man, d, raws, nil
		}
		next, err := pick(*idx, p.o.Platform)
		if err != nil {
			return man, d, nil, err
		}
		if err := checkDigest(next.Digest); err != nil {
			return man, d, nil, fmt.Errorf("index %s: %w", d, err)
		}
		version, size = next.Digest.String(), next.Size
	}
}

// parse reads a manifest into man, or an index. What it is it says itself; a media
// type of the registry that contradicts it is refused, since others would read it as
// something else.
func (p *puller) parse(raw []byte, said string, man *ocispec.Manifest) (*ocispec.Index, error) {
	var k struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := decodeJSON(raw, p.s.limits.JSONDepth, &k); err != nil {
		return nil, err
	}
	if k.SchemaVersion == 1 || k.FSLayers != nil {
		return nil, fmt.Errorf("%w: it is of schema 1, as written before Docker 1.10; pull and push it with a Docker of 1.10 to 25 to convert it", ErrUnsupported)
	}
	if k.Manifests != nil && (k.Config != nil || k.Layers != nil) {
		return nil, fmt.Errorf("%w: it is an index and an image at once", ErrCorrupt)
	}
	image, index := []string{ocispec.MediaTypeImageManifest, registry.MediaDockerImage}, []string{ocispec.MediaTypeImageIndex, registry.MediaDockerIndex}
	types := append(append([]string{}, image...), index...)
	if k.MediaType != "" && slices.Contains(types, said) && said != k.MediaType {
		return nil, fmt.Errorf("%w: it says that it is %q, the registry that it is %q", ErrCorrupt, k.MediaType, said)
	}
	isImage := k.Manifests == nil
	want := image
	if !isImage {
		want = index
	}
	mediaType := k.MediaType
	if mediaType == "" && slices.Contains(types, said) {
		mediaType = said
	}
	if mediaType != "" && !slices.Contains(want, mediaType) {
		return nil, fmt.Errorf("%w: %q is no kind of image, or its content is of another kind", ErrUnsupported, mediaType)
	}
	if isImage {
		if k.Config == nil {
			return nil, fmt.Errorf("%w: it has neither a config nor manifests", ErrCorrupt)
		}
		return nil, decodeJSON(raw, p.s.limits.JSONDepth, man)
	}
	var idx ocispec.Index
	return &idx, decodeJSON(raw, p.s.limits.JSONDepth, &idx)
}

// config fetches an image config, unless the store has it.
func (p *puller) config(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := checkDigest(d.Digest); err != nil {
		return nil, err
	}
	switch d.MediaType {
	case ocispec.MediaTypeImageConfig, registry.MediaDockerConfig:
	default:
		return nil, fmt.Errorf("%w: this is no image: its config is %q", ErrUnsupported, d.MediaType)
	}
	if d.Size < 0 || d.Size > p.s.limits.Config {
		return nil, fmt.Errorf("%w: config of %d bytes, the limit is %d", ErrUnsupported, d.Size, p.s.limits.Config)
	}
	var raw []byte
	err := p.s.view(ctx, func(tx *metadata.Tx) (err error) {
		raw, err = tx.Config(d.Digest)
		return err
	})
	if err == nil {
		return raw, nil
	}
	r := p.rem.Blob(ctx, d, 0)
	defer r.Close()
	if raw, err = io.ReadAll(r); err != nil {
		return nil, err
	}
	if got := digest.FromBytes(raw); got != d.Digest {
		return nil, fmt.Errorf("%w: wrong digest: expected %s, got %s", ErrCorrupt, d.Digest, got)
	}
	return raw, nil
}

var layerTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, registry.MediaDockerLayer,
	"application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.zstd",
}

var foreignTypes = []string{
	"application/vnd.docker.image.rootfs.foreign.diff.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
	"application/vnd.oci.image.layer.nondistributable.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
}

func (p *puller) checkLayer(d ocispec.Descriptor) error {
	if err := checkDigest(d.Digest); err != nil {
		return err
	}
	switch {
	case slices.Contains(foreignTypes, d.MediaType):
		return fmt.Errorf("%w: a foreign layer (%s): it must not be distributed, so the registry does not have it; such are the bases of Windows images", ErrUnsupported, d.MediaType)
	case !slices.Contains(layerTypes, d.MediaType):
		return fmt.Errorf("%w: %q is no layer of files", ErrUnsupported, d.MediaType)
	case d.Size < 0 || d.Size > p.s.limits.LayerBytes:
		return fmt.Errorf("%w: a blob of %d bytes, the limit is %d", ErrUnsupported, d.Size, p.s.limits.LayerBytes)
	}
	return nil
}
