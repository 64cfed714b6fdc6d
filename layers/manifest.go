package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/plyfs/plyfs/layers/boundedjson"
	"github.com/plyfs/plyfs/metadata"
)

const (
	annotationName   = "io.containerd.image.name"
	mediaDockerIndex = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaDockerImage = "application/vnd.docker.distribution.manifest.v2+json"
)

// dockerItem is one image of a docker-archive's manifest.json.
type dockerItem struct {
	Config   string
	RepoTags []string
	Layers   []string
	Parent   digest.Digest `json:",omitempty"` // the image of the archive it was built on
}

// plan is an image as an archive describes it, checked against what the
// archive holds.
type plan struct {
	id       digest.Digest
	config   []byte
	spec     ocispec.Image
	refs     []string // canonical
	parent   digest.Digest
	layers   []*layerData
	manifest digest.Digest
	// manifests are that one and the indexes that led to it, byte for byte.
	manifests map[digest.Digest][]byte
	origin    string // "load" or "pull"
	kept      []metadata.Blob
	committed func() // called when the rows are there; may be nil
	changed   bool   // a name has come to mean this image; set by addImages
}

// decodeJSON decodes hostile JSON: bounded depth, one value, nothing after it.
func decodeJSON(raw []byte, depth int, v any) error {
	switch err := boundedjson.Decode(raw, depth, v); {
	case errors.Is(err, boundedjson.ErrDepth):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil
}

// parseConfig reads an image config and checks it against itself.
func parseConfig(raw []byte, l Limits) (ocispec.Image, error) {
	var spec ocispec.Image
	if int64(len(raw)) > l.Config {
		return spec, fmt.Errorf("%w: config of %d bytes, the limit is %d", ErrUnsupported, len(raw), l.Config)
	}
	if err := decodeJSON(raw, l.JSONDepth, &spec); err != nil {
		return spec, fmt.Errorf("config: %w", err)
	}
	if t := spec.RootFS.Type; t != "" && t != "layers" {
		return spec, fmt.Errorf("%w: config has rootfs type %q, expected \"layers\"", ErrUnsupported, t)
	}
	if len(spec.RootFS.DiffIDs) > l.Layers {
		return spec, fmt.Errorf("%w: %d layers, the limit is %d", ErrUnsupported, len(spec.RootFS.DiffIDs), l.Layers)
	}
	for i, d := range spec.RootFS.DiffIDs {
		if err := checkDigest(d); err != nil {
			return spec, fmt.Errorf("config: diffID of layer %d: %w", i+1, err)
		}
	}
	full := 0
	for _, h := range spec.History {
		if !h.EmptyLayer {
			full++
		}
	}
	if full > len(spec.RootFS.DiffIDs) {
		return spec, fmt.Errorf("%w: config history has %d layers, but there are only %d diffIDs", ErrCorrupt, full, len(spec.RootFS.DiffIDs))
	}
	return spec, nil
}

func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%w: digest %q: %w", ErrCorrupt, d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%w: digest %q: only sha256 is supported", ErrUnsupported, d)
	}
	return nil
}

// plans finds the images of the archive.
func (a *archive) plans(ctx context.Context, o LoadOptions) ([]*plan, error) {
	m, err := a.get(ctx, "manifest.json")
	switch {
	case err != nil:
	case len(m.json) > 0 && bytes.TrimLeft(m.json, " \t\r\n")[0] == '{':
		return a.dirPlans(ctx, m, o)
	default:
		return a.dockerPlans(ctx, m.json, o)
	}
	m, ierr := a.get(ctx, "index.json")
	if ierr != nil {
		if a.isV1(ctx) {
			return a.v1Plans(ctx, o)
		}
		if a.dirFd >= 0 {
			return nil, fmt.Errorf("%w: the directory has neither index.json (OCI layout) nor manifest.json (docker-archive)", ErrInvalid)
		}
		return nil, fmt.Errorf("%w: the archive has neither manifest.json (docker-archive) nor index.json (OCI); a flat root filesystem goes to import", ErrInvalid)
	}
	return a.ociPlans(ctx, m.json, o)
}

func (a *archive) dockerPlans(ctx context.Context, raw []byte, o LoadOptions) ([]*plan, error) {
	var items []dockerItem
	if err := decodeJSON(raw, a.s.limits.JSONDepth, &items); err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	if len(items) == 0 {
		return nil, fmt.Errorf("%w: manifest.json lists no image", ErrCorrupt)
	}
	var out []*plan
	for _, it := range items {
		name := it.Config
		if len(it.RepoTags) > 0 {
			name = it.RepoTags[0]
		}
		p, err := a.dockerPlan(ctx, it)
		if err != nil {
			return nil, fmt.Errorf("image %q: %w", name, err)
		}
		if len(p.refs) == 0 && o.Ref != "" {
			if p.refs, err = canonicalRefs([]string{o.Ref}); err != nil {
				return nil, err
			}
		}
		out = append(out, p)
	}
	return out, nil
}

// dirPlans is the image of a directory as skopeo writes it (transport "dir"): its
// manifest, and blobs that are named by the digits of their digests.
func (a *archive) dirPlans(ctx context.Context, m *member, o LoadOptions) ([]*plan, error) {
	a.flat = true
	var man ocispec.Manifest
	if err := decodeJSON(m.json, a.s.limits.JSONDepth, &man); err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	if man.Config.Digest == "" {
		return nil, fmt.Errorf("%w: manifest.json is neither the list of a docker-archive nor an image manifest (media type %q)", ErrUnsupported, man.MediaType)
	}
	p, err := a.manifestPlan(ctx, m.digest, m.json, man)
	if err != nil {
		return nil, err
	}
	if o.Ref != "" {
		p.refs, err = canonicalRefs([]string{o.Ref})
	}
	return []*plan{p}, err
}

func (a *archive) dockerPlan(ctx context.Context, it dockerItem) (*plan, error) {
	cm, err := a.get(ctx, it.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if cm.json == nil {
		return nil, fmt.Errorf("config %q: %w: it is not JSON", it.Config, ErrCorrupt)
	}
	p := &plan{id: cm.digest, config: cm.json, parent: it.Parent}
	// The name is a promise too.
	if hex, ok := strings.CutSuffix(it.Config, ".json"); ok && digest.NewDigestFromEncoded(digest.SHA256, hex).Validate() == nil && hex != cm.digest.Encoded() {
		return nil, fmt.Errorf("config: %w: wrong digest: expected sha256:%s, got %s", ErrCorrupt, hex, cm.digest)
	}
	if p.spec, err = parseConfig(cm.json, a.s.limits); err != nil {
		return nil, err
	}
	if p.refs, err = canonicalRefs(it.RepoTags); err != nil {
		return nil, err
	}
	if len(it.Layers) != len(p.spec.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%w: manifest.json lists %d layers, the config %d diffIDs", ErrCorrupt, len(it.Layers), len(p.spec.RootFS.DiffIDs))
	}
	a.prefetch(ctx, it.Layers)
	for i, name := range it.Layers {
		m, err := a.get(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
		if err := p.addLayer(i, m); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// addLayer takes a member as the plan's layer i.
func (p *plan) addLayer(i int, m *member) error {
	want := p.spec.RootFS.DiffIDs[i]
	switch {
	case m.err != nil:
		return fmt.Errorf("layer %d (%s): %w", i+1, m.name, m.err)
	case m.layer == nil:
		return fmt.Errorf("layer %d (%s): %w: it is JSON, not a layer", i+1, m.name, ErrCorrupt)
	case m.layer.diffID != want:
		return fmt.Errorf("layer %d (%s): %w: wrong digest: expected diffID %s, got %s", i+1, m.name, ErrCorrupt, want, m.layer.diffID)
	}
	p.layers = append(p.layers, m.layer)
	return nil
}

// blobName is the member that has a digest.
func (a *archive) blobName(d digest.Digest) string {
	if a.flat {
		return d.Encoded()
	}
	return blobPath(d)
}

// blob finds a descriptor's content and checks it.
func (a *archive) blob(ctx context.Context, d ocispec.Descriptor) (*member, error) {
	if err := checkDigest(d.Digest); err != nil {
		return nil, err
	}
	m, err := a.get(ctx, a.blobName(d.Digest))
	if err != nil {
		return nil, err
	}
	if m.size != d.Size {
		return nil, fmt.Errorf("%w: blob %s: expected %d bytes, got %d", ErrCorrupt, d.Digest, d.Size, m.size)
	}
	if m.digest != d.Digest {
		return nil, fmt.Errorf("%w: wrong digest: expected %s, got %s", ErrCorrupt, d.Digest, m.digest)
	}
	return m, nil
}

func (a *archive) blobJSON(ctx context.Context, d ocispec.Descriptor, v any) (*member, error) {
	m, err := a.blob(ctx, d)
	if err != nil {
		return nil, err
	}
	if m.json == nil {
		return nil, fmt.Errorf("%w: blob %s is not JSON", ErrCorrupt, d.Digest)
	}
	if v == nil {
		return m, nil
	}
	if err := decodeJSON(m.json, a.s.limits.JSONDepth, v); err != nil {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	return m, nil
}

func (a *archive) ociPlans(ctx context.Context, raw []byte, o LoadOptions) ([]*plan, error) {
	var idx ocispec.Index
	if err := decodeJSON(raw, a.s.limits.JSONDepth, &idx); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	named := map[digest.Digest]*plan{}
	var out []*plan
	for _, d := range idx.Manifests {
		if ignorable(d) {
			continue
		}
		refs, err := ociRefs(d.Annotations, o.Ref)
		if err != nil {
			return nil, err
		}
		d, err := a.choose(ctx, d, o.Platform, len(idx.Manifests) == 1, 0)
		if err != nil {
			return nil, err
		}
		p := named[d.Digest]
		if p == nil {
			if p, err = a.ociPlan(ctx, d); err != nil {
				return nil, fmt.Errorf("image %s: %w", d.Digest, err)
			}
			named[d.Digest] = p
			out = append(out, p)
		}
		p.refs = append(p.refs, refs...)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: index.json lists no image", ErrCorrupt)
	}
	return out, nil
}

// ignorable leaves out what hangs on images without being one: attestations,
// signatures.
func ignorable(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" || d.ArtifactType != "" ||
		(d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown")
}

// ociRefs names an image of an OCI layout. The annotation of the specification
// is often only a tag; then the caller's name is used for the rest.
func ociRefs(an map[string]string, fallback string) ([]string, error) {
	if n := an[annotationName]; n != "" {
		return canonicalRefs([]string{n})
	}
	n := an[ocispec.AnnotationRefName]
	switch {
	case strings.ContainsAny(n, "/:"):
		return canonicalRefs([]string{n})
	case fallback == "":
		return nil, nil
	}
	named, err := reference.ParseNormalizedNamed(fallback)
	if err != nil {
		return nil, fmt.Errorf("%w: name %q: %w", ErrInvalid, fallback, err)
	}
	if reference.IsNameOnly(named) && n != "" {
		if t, err := reference.WithTag(named, n); err == nil {
			named = t
		}
	}
	return []string{reference.TagNameOnly(named).String()}, nil
}

// choose goes down nested indexes to the manifest for a platform.
func (a *archive) choose(ctx context.Context, d ocispec.Descriptor, platform string, only bool, depth int) (ocispec.Descriptor, error) {
	switch d.MediaType {
	case ocispec.MediaTypeImageManifest, mediaDockerImage:
		return d, nil
	case ocispec.MediaTypeImageIndex, mediaDockerIndex:
	default:
		return d, fmt.Errorf("%w: index names a %q, expected an image manifest or an index", ErrUnsupported, d.MediaType)
	}
	if depth > 8 {
		return d, fmt.Errorf("%w: indexes are nested too deeply", ErrUnsupported)
	}
	var idx ocispec.Index
	if _, err := a.blobJSON(ctx, d, &idx); err != nil {
		return d, fmt.Errorf("index: %w", err)
	}
	m, err := pick(idx, platform)
	if err != nil {
		return d, err
	}
	return a.choose(ctx, m, platform, only, depth+1)
}

// pick takes the entry of an index for a platform, "" being this machine's; if there
// is but one image, that.
func pick(idx ocispec.Index, platform string) (ocispec.Descriptor, error) {
	if platform == "" {
		platform = thisPlatform()
	}
	var have []string
	var real []ocispec.Descriptor
	for _, m := range idx.Manifests {
		if ignorable(m) {
			continue
		}
		real = append(real, m)
		if m.Platform == nil {
			continue
		}
		name := platformName(m.Platform.OS, m.Platform.Architecture, m.Platform.Variant)
		have = append(have, name)
		if isPlatform(name, platform) {
			return m, nil
		}
	}
	switch {
	case len(real) == 1:
		return real[0], nil
	case len(real) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("%w: the index lists no image", ErrInvalid)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: the image is not there for %s, only for %s; choose one with --platform", ErrInvalid, platform, strings.Join(have, ", "))
}

func (a *archive) ociPlan(ctx context.Context, d ocispec.Descriptor) (*plan, error) {
	var man ocispec.Manifest
	mm, err := a.blobJSON(ctx, d, &man)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return a.manifestPlan(ctx, d.Digest, mm.json, man)
}

func (a *archive) manifestPlan(ctx context.Context, d digest.Digest, raw []byte, man ocispec.Manifest) (*plan, error) {
	cm, err := a.blobJSON(ctx, man.Config, nil)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	p := &plan{id: cm.digest, config: cm.json, manifest: d, manifests: map[digest.Digest][]byte{d: raw}}
	if p.spec, err = parseConfig(cm.json, a.s.limits); err != nil {
		return nil, err
	}
	if len(man.Layers) != len(p.spec.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%w: the manifest lists %d layers, the config %d diffIDs", ErrCorrupt, len(man.Layers), len(p.spec.RootFS.DiffIDs))
	}
	var names []string
	for _, ld := range man.Layers {
		if checkDigest(ld.Digest) == nil {
			names = append(names, a.blobName(ld.Digest))
		}
	}
	a.prefetch(ctx, names)
	for i, ld := range man.Layers {
		m, err := a.blob(ctx, ld)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
		if err := p.addLayer(i, m); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// canonicalRefs parses names as a user writes them.
func canonicalRefs(names []string) ([]string, error) {
	var out []string
	for _, n := range names {
		named, err := parseTag(n)
		if err != nil {
			return nil, err
		}
		out = append(out, named.String())
	}
	return out, nil
}

// parseTag parses a name that an image is to get: a tag is added if there is
// none, a digest is refused.
func parseTag(name string) (reference.NamedTagged, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		if errors.Is(err, reference.ErrNameContainsUppercase) {
			err = errors.New("repository names are lower case")
		}
		return nil, fmt.Errorf("%w: %q is not an image name: %w", ErrInvalid, name, err)
	}
	tagged, ok := reference.TagNameOnly(named).(reference.NamedTagged)
	if _, digested := named.(reference.Digested); !ok || digested {
		return nil, fmt.Errorf("%w: %q: a digest cannot be given to an image, only a tag", ErrInvalid, name)
	}
	// It would be taken for the beginning of an ID.
	if reference.FamiliarName(named) == digest.Canonical.String() {
		return nil, fmt.Errorf("%w: %q: the name of a digest algorithm cannot be that of a repository", ErrInvalid, name)
	}
	return tagged, nil
}

// familiar is the short form of a canonical reference.
func familiar(canonical string) string {
	named, err := reference.ParseNormalizedNamed(canonical)
	if err != nil {
		return canonical
	}
	return reference.FamiliarString(named)
}

func familiars(canonical []string) []string {
	out := make([]string, len(canonical))
	for i, c := range canonical {
		out[i] = familiar(c)
	}
	return out
}
