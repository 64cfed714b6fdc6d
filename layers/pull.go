package layers

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
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
	if o.Platform, err = parsePlatform(o.Platform); err != nil {
		return PullResult{}, err
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
		// Who pulls the same at the same time waits, and finds it done.
		unlock, err := p.s.lockPull(ctx, top, p.o.Progress)
		if err != nil {
			return err
		}
		defer unlock()
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
	// Before what the transaction gave up is deleted, which may be a kept blob.
	pl.committed = sync.OnceFunc(unlock)
	defer pl.committed()
	if err := p.s.fault("before-images"); err != nil {
		return err
	}
	// No end of ctx takes away what is complete.
	if _, err := p.s.addImages(context.WithoutCancel(ctx), lease, []*plan{pl}); err != nil {
		return err
	}
	p.res.ID, p.res.Updated = pl.id, pl.changed
	return p.s.fault("after-images")
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
				want = thisPlatform()
			}
			if want != "" && !isPlatform(row.Platform, want) {
				continue
			}
			rows, err := tx.Chain(row.TopChain)
			if err != nil {
				return err
			}
			if p.o.KeepBlobs && !p.keptAll(tx, id, top) {
				continue
			}
			for _, l := range rows {
				dirs = append(dirs, l.CacheID)
			}
			found = row
			return nil
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

// keptAll reports whether all layers of the image's manifest are kept, which is top
// or listed there.
func (p *puller) keptAll(tx *metadata.Tx, id, top digest.Digest) bool {
	index, err := tx.Manifest(id, top)
	if err != nil {
		return false
	}
	for _, d := range tx.Manifests(id) {
		var man ocispec.Manifest
		raw, err := tx.Manifest(id, d)
		if err != nil || d != top && !bytes.Contains(index, []byte(d.Encoded())) ||
			decodeJSON(raw, p.s.limits.JSONDepth, &man) != nil || man.Config.Digest != id {
			continue
		}
		if !slices.ContainsFunc(man.Layers, func(l ocispec.Descriptor) bool { _, err := tx.Blob(l.Digest); return err != nil }) {
			return true
		}
	}
	return false
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
		t.add(d.Size)
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
