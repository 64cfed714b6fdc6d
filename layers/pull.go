package layers

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/layers/registry"
	"github.com/plyfs/plyfs/metadata"
)

// pullSlots is how many layers are downloaded and unpacked at once: a connection is
// seldom as fast as what is at its end.
const pullSlots = 4

// errStale says that what an earlier download had left was not the beginning of the
// blob.
var errStale = errors.New("partial blob is damaged")

// Pull fetches an image by tag or digest. Only layers that the store does not have
// are asked for, and a partial download goes on where it ended. Manifest, config and
// layers are checked against their digests; when the registry lies about one, the
// store stays as it was. acc is what [registry.Discover] has found for the name.
func (s *Store) Pull(ctx context.Context, name string, acc registry.Access, o PullOptions) (PullResult, error) {
	ref, err := registry.Parse(name)
	if err != nil {
		return PullResult{}, registryError(err)
	}
	if s.powers.guest != nil {
		return PullResult{}, s.powers.guest
	}
	if err := s.sweep(ctx); err != nil {
		return PullResult{}, err
	}
	stale := false
	for {
		res, err := s.pull(ctx, ref, acc, o)
		switch n := len(acc.Endpoints); {
		case err == nil:
			return res, nil
		case ctx.Err() != nil:
			return res, ctx.Err()
		case errors.Is(err, errStale) && !stale:
			stale = true // it is gone now
		case (errors.Is(err, ErrCorrupt) || errors.Is(err, registry.ErrCorrupt)) && n > 1:
			// A mirror may be wrong where the registry is right.
			s.log.Warn("pull again without mirrors", zap.String("image", ref.String()), zap.Error(err))
			acc.Endpoints = acc.Endpoints[n-1:]
		default:
			return res, registryError(err)
		}
	}
}

func (s *Store) pull(ctx context.Context, ref registry.Reference, acc registry.Access, o PullOptions) (PullResult, error) {
	rem, err := registry.Open(acc, s.registryOptions(o.Registry))
	if err != nil {
		return PullResult{}, err
	}
	defer rem.Close()
	p := &puller{s: s, ref: ref, rem: rem, o: o}
	p.res = PullResult{Ref: ref.Familiar(), Canonical: ref.String()}
	err = p.pull(ctx)
	return p.res, err
}

func (s *Store) registryOptions(o registry.Options) registry.Options {
	o.ManifestBytes = s.limits.Manifest
	return o
}

// registryError adds our sentinel to an error of package registry.
func registryError(err error) error {
	for _, m := range []struct{ from, to error }{
		{registry.ErrInvalid, ErrInvalid},
		{registry.ErrNotFound, ErrNotFound},
		{registry.ErrCorrupt, ErrCorrupt},
		{registry.ErrUnsupported, ErrUnsupported},
	} {
		if errors.Is(err, m.from) && !errors.Is(err, m.to) {
			return sentinel{err, m.to}
		}
	}
	return err
}

// puller is one pull.
type puller struct {
	s         *Store
	ref       registry.Reference
	rem       *registry.Remote
	o         PullOptions
	res       PullResult
	a         *archive
	downloads map[digest.Digest]*download
}

func (p *puller) pull(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	top, err := p.rem.Resolve(ctx, p.ref.Version())
	if err != nil && !errors.Is(err, registry.ErrUnsupported) { // it may know no HEAD
		return fmt.Errorf("%s: %w", p.ref.Familiar(), err)
	}
	if top != "" {
		if known, err := p.known(ctx, top); known || err != nil {
			return err
		}
	}
	lease, err := p.s.newLease(ctx)
	if err != nil {
		return err
	}
	p.a = p.s.newArchive(lease, p.o.Progress)
	p.a.slots, p.a.doing, p.a.did, p.a.stop = make(chan struct{}, pullSlots), "Downloading", "Pull complete", cancel
	p.downloads = map[digest.Digest]*download{}
	defer func() {
		cancel() // of what still downloads
		p.a.clean()
		p.endDownloads(err)
		if err != nil {
			p.s.dropLease(lease)
		}
	}()
	pl, err := p.plan(ctx, top)
	if err != nil {
		return err
	}
	if !p.o.KeepBlobs { // before the disk is made to write them
		for d, dl := range p.downloads {
			dl.remove()
			delete(p.downloads, d)
		}
	}
	if err := p.s.addLayers(ctx, lease, pl); err != nil {
		return fmt.Errorf("image %s: %w", pl.id, err)
	}
	unlock, err := p.keep(ctx, pl)
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.s.fault("before-images"); err != nil {
		return err
	}
	// No end of ctx takes away what is complete.
	if _, err := p.s.addImages(context.WithoutCancel(ctx), lease, []*plan{pl}); err != nil {
		return err
	}
	p.res.ID, p.res.Updated = pl.id, pl.changed
	return nil
}

// known looks for an image that came with the manifest, and gives it the names. What
// a tag stands for now is all that has been asked of the registry then.
func (p *puller) known(ctx context.Context, top digest.Digest) (bool, error) {
	var found metadata.Image
	var dirs []string
	err := p.s.view(ctx, func(tx *metadata.Tx) error {
		found, dirs = metadata.Image{}, nil
		for _, id := range tx.ImagesByManifest(top) {
			row, err := tx.Image(id)
			if err != nil {
				return err
			}
			// An index has images for several platforms.
			want := p.o.Platform
			if want == "" && row.Manifest != top {
				want = hostPlatform()
			}
			if want != "" && !isPlatform(row.Platform, want) {
				continue
			}
			rows, err := tx.Chain(row.TopChain)
			if err != nil {
				return err
			}
			complete := true
			for _, l := range rows {
				if _, err := tx.Blob(l.Blob); p.o.KeepBlobs && err != nil {
					complete = false
				}
				dirs = append(dirs, l.CacheID)
			}
			if complete {
				found = row
				return nil
			}
			dirs = nil
		}
		return nil
	})
	if err != nil || found.ID == "" {
		return false, err
	}
	for _, d := range dirs { // a row is believed only as far as its directory is there
		l, _, err := p.s.openLayer(d)
		if err != nil {
			return false, fmt.Errorf("image %s is in the store, but %w; run check --repair, remove it and pull again", found.ID, err)
		}
		l.Close()
	}
	p.res.ID, p.res.Digest, p.res.Platform = found.ID, top, found.Platform
	now, changed := time.Now().UTC(), false
	gone := false
	err = p.s.update(ctx, func(tx *metadata.Tx) error {
		changed = false
		if _, err := tx.Image(found.ID); errors.Is(err, metadata.ErrNotFound) {
			gone = true
			return nil
		}
		for _, r := range p.names(top) {
			if have, err := tx.Ref(r); err == nil && have.ImageID == found.ID {
				continue
			}
			if _, err := tx.SetRef(r, metadata.Ref{ImageID: found.ID, Updated: now}); err != nil {
				return err
			}
			changed = true
		}
		return nil
	})
	p.res.Updated = changed
	return !gone, err
}

// names are the references that the image gets.
func (p *puller) names(top digest.Digest) []string {
	out := []string{p.ref.WithDigest(top)}
	if p.ref.Digest == "" {
		out = append(out, p.ref.String())
	}
	return out
}

// plan fetches everything that the store does not have, and checks it.
func (p *puller) plan(ctx context.Context, top digest.Digest) (*plan, error) {
	man, d, raws, err := p.manifest(ctx, top)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.ref.Familiar(), err)
	}
	config, err := p.config(ctx, man.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	pl := &plan{id: man.Config.Digest, config: config, manifest: d, manifests: raws, refs: p.names(p.res.Digest), origin: "pull"}
	if pl.spec, err = parseConfig(config, p.s.limits); err != nil {
		return nil, err
	}
	if err := p.platform(pl); err != nil {
		return nil, err
	}
	if len(man.Layers) != len(pl.spec.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%w: the manifest lists %d layers, the config %d diffIDs", ErrCorrupt, len(man.Layers), len(pl.spec.RootFS.DiffIDs))
	}
	for i, l := range man.Layers {
		if err := p.checkLayer(l); err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i+1, l.Digest, err)
		}
	}
	var members []*member
	for i, l := range man.Layers {
		m, err := p.layer(ctx, i, l, pl.spec.RootFS.DiffIDs[i])
		if err != nil {
			if ferr := p.a.failed(); ferr != nil {
				err = ferr
			}
			return nil, err
		}
		members = append(members, m)
	}
	if err := p.a.settle(); err != nil {
		return nil, p.stale(err)
	}
	for i, m := range members {
		if err := pl.addLayer(i, m); err != nil {
			return nil, p.stale(err)
		}
	}
	return pl, nil
}

// platform notes what the image is for, and refuses one for another platform than
// was asked for.
func (p *puller) platform(pl *plan) error {
	p.res.Platform = platformName(pl.spec.OS, pl.spec.Architecture, pl.spec.Variant)
	switch want := p.o.Platform; {
	case want != "" && !isPlatform(p.res.Platform, want):
		return fmt.Errorf("%w: the image is for %s, not for %s", ErrInvalid, p.res.Platform, want)
	case want == "" && pl.spec.OS != "" && !isPlatform(p.res.Platform, hostPlatform()):
		p.res.Notes = append(p.res.Notes, fmt.Sprintf("the image is for %s, this machine is %s", p.res.Platform, hostPlatform()))
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

// layer begins to fetch a layer, unless the store has its content.
func (p *puller) layer(ctx context.Context, i int, d ocispec.Descriptor, diffID digest.Digest) (*member, error) {
	name := blobPath(d.Digest)
	if m := p.a.members[name]; m != nil {
		return m, nil // the image has it twice
	}
	m := &member{name: name, what: fmt.Sprintf("layer %d (%s)", i+1, d.Digest)}
	have, err := p.a.haveDiff(ctx, diffID)
	if err != nil {
		return nil, err
	}
	p.res.Layers++
	if have && p.o.KeepBlobs {
		have, err = p.hasKept(ctx, d)
	}
	if err != nil {
		return nil, err
	}
	if have {
		// That the blob of the manifest is this layer nobody has seen: it is not noted.
		m.layer = &layerData{name: name, diffID: diffID}
		p.a.put(m)
		t := p.a.progress.start(ShortID(d.Digest), "Already exists", d.Size)
		t.done()
		p.res.Present++
		return m, nil
	}
	dl, err := p.s.newDownload(d.Digest, d.Size)
	if err != nil {
		return nil, err
	}
	p.downloads[d.Digest] = dl
	rest := p.rem.Blob(ctx, d, dl.resumed)
	m.media, m.keep = d.MediaType, p.o.KeepBlobs
	p.res.Downloaded += d.Size - dl.resumed
	_, err = p.a.start(ctx, m, bufio.NewReaderSize(dl.reader(rest), 64<<10), d.Size, func() { _ = rest.Close() })
	if err != nil {
		_ = rest.Close() // not begun
	}
	return m, err
}

// hasKept reports whether a blob is kept as one of a layer.
func (p *puller) hasKept(ctx context.Context, d ocispec.Descriptor) (have bool, err error) {
	err = p.s.view(ctx, func(tx *metadata.Tx) error {
		_, err := tx.Blob(d.Digest)
		have = err == nil && len(tx.ChainsByBlob(d.Digest)) > 0
		return nil
	})
	return have, err
}

// haveDiff asks whether the store has content, and keeps it from being removed.
func (a *archive) haveDiff(ctx context.Context, diffID digest.Digest) (bool, error) {
	return a.haveContent(ctx, diffID.Encoded()+".tar")
}

// stale looks after a failure for a download that began with damaged bytes of an
// earlier one: without them it may be right.
func (p *puller) stale(err error) error {
	for d, dl := range p.downloads {
		m := p.a.members[blobPath(d)]
		if m != nil && dl.resumed > 0 && m.digest != "" && m.digest != d {
			dl.remove()
			delete(p.downloads, d)
			return fmt.Errorf("%w: %w", errStale, err)
		}
	}
	return err
}

// endDownloads decides what becomes of the blobs: after a lie nothing stays, after
// a failure of the network or of this machine the next pull goes on with them.
func (p *puller) endDownloads(err error) {
	lie := errors.Is(err, ErrCorrupt) || errors.Is(err, registry.ErrCorrupt)
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) // they would keep it so
	for _, dl := range p.downloads {
		if err == nil || full || lie && !errors.Is(err, errStale) {
			dl.remove()
		} else {
			dl.close()
		}
	}
	p.downloads = nil
}

// keep moves the blobs to those that are kept. The returned function is called when
// the rows are there.
func (p *puller) keep(ctx context.Context, pl *plan) (unlock func(), err error) {
	list := slices.Collect(maps.Values(p.downloads))
	if len(list) == 0 {
		return func() {}, nil
	}
	if unlock, err = p.s.lockBlobs(ctx); err != nil {
		return nil, err
	}
	if pl.kept, err = p.s.keepParts(list); err != nil {
		unlock()
		return nil, err
	}
	for d, dl := range p.downloads {
		dl.close()
		delete(p.downloads, d)
	}
	return unlock, nil
}
