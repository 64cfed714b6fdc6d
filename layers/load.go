package layers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"sort"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// Load reads every image of an archive or OCI layout into the store: docker
// archives of any Docker since 1.10 and of other tools, OCI archives and
// layouts, compressed or not. The stream is read once, to its end. If anything
// is wrong with any of the images, the store stays as it was.
func (s *Store) Load(ctx context.Context, src Source, o LoadOptions) (_ []LoadedImage, err error) {
	if (src.Reader == nil) == (src.Dir == "") {
		return nil, fmt.Errorf("%w: a source is either a stream or a directory", ErrInvalid)
	}
	if o.Ref != "" {
		if _, err := parseTag(o.Ref); err != nil {
			return nil, err
		}
	}
	if o.Platform, err = parsePlatform(o.Platform); err != nil {
		return nil, err
	}
	if err := s.sweep(ctx); err != nil {
		return nil, err
	}
	lease, err := s.newLease(ctx)
	if err != nil {
		return nil, err
	}
	a := s.newArchive(lease, o.Progress)
	defer func() {
		a.clean()
		if err != nil {
			s.dropLease(lease)
		}
	}()
	if src.Dir != "" {
		if a.dirFd, err = fsat.OpenTrusted(src.Dir); err != nil {
			return nil, fmt.Errorf("open %q: %w", src.Dir, err)
		}
	} else if err := a.read(ctx, src.Reader); err != nil {
		return nil, err
	}
	plans, err := a.plans(ctx, o)
	if err != nil {
		return nil, err
	}
	for _, p := range plans {
		if err := s.addLayers(ctx, lease, p); err != nil {
			return nil, fmt.Errorf("image %s: %w", p.id, err)
		}
	}
	if err := s.fault("before-images"); err != nil {
		return nil, err
	}
	out, err := s.addImages(ctx, lease, plans)
	if err != nil {
		return nil, err
	}
	return out, s.fault("after-images")
}

// addLayers makes sure that the store has the layers of an image. Those that it
// has not are published together.
func (s *Store) addLayers(ctx context.Context, lease string, p *plan) error {
	c := chainer{s: s, lease: lease, origin: cmp.Or(p.origin, "load")}
	defer c.discard()
	for i, ld := range p.layers {
		if err := c.add(ctx, ld); err != nil {
			return fmt.Errorf("layer %d (%s): %w", i+1, ld.diffID, err)
		}
	}
	return c.publish(ctx)
}

// chainer puts layers on top of each other.
type chainer struct {
	s      *Store
	lease  string
	origin string
	top    digest.Digest // chainID of the last layer
	bound  []*bound      // the last layers, not published yet
	stack  []LayerDir    // of top; valid while there are bound ones
	stages []*stage      // every one taken
}

func (c *chainer) discard() {
	for _, st := range c.stages {
		st.discard()
	}
}

func (c *chainer) publish(ctx context.Context) error {
	if len(c.bound) == 0 {
		return nil
	}
	bs := c.bound
	c.bound, c.stack = nil, nil
	return c.s.publish(ctx, bs)
}

// add puts a layer on top of what there is.
func (c *chainer) add(ctx context.Context, ld *layerData) error {
	if ld.stage == nil {
		// Content of the store, or of a layer bound before: on another chain,
		// unless there is a row, it is unpacked once more.
		if err := c.publish(ctx); err != nil {
			return err
		}
	}
	chain := metadata.ChainID(c.top, ld.diffID)
	lost, err := c.s.lost(ctx, chain)
	if err != nil {
		return err
	}
	if len(c.bound) == 0 && lost {
		if c.stack, err = c.s.stackOf(ctx, c.top); err != nil {
			return err
		}
	} else if len(c.bound) == 0 {
		have, err := c.s.haveLayer(ctx, c.lease, c.origin, c.top, ld)
		if err != nil {
			return err
		}
		if have {
			c.top = chain
			return nil
		}
		if c.stack, err = c.s.stackOf(ctx, c.top); err != nil {
			return err
		}
	}
	st := ld.stage
	ld.stage = nil
	if st == nil {
		var err error
		if st, err = c.s.restage(ctx, ld.diffID); err != nil {
			return err
		}
	}
	c.stages = append(c.stages, st)
	t := target{parent: c.top, origin: c.origin, blob: ld.blob, blobSize: ld.blobSize, mediaType: ld.mediaType, lease: c.lease}
	b, err := st.bind(ctx, t, c.stack)
	if err != nil {
		return err
	}
	b.replace = lost
	c.bound = append(c.bound, b)
	c.stack = append([]LayerDir{b.dir()}, c.stack...)
	c.top = b.layer.ChainID
	return nil
}

// haveLayer reports whether the store has a layer on top of parent, or could be
// given a row for it because it has the content, and keeps it.
func (s *Store) haveLayer(ctx context.Context, lease, origin string, parent digest.Digest, ld *layerData) (bool, error) {
	chain := metadata.ChainID(parent, ld.diffID)
	var cacheID string
	var junk []metadata.Trash
	err := s.update(ctx, func(tx *metadata.Tx) error {
		cacheID, junk = "", nil
		if l, err := tx.Layer(chain); err == nil {
			cacheID = l.CacheID
			var berr error
			junk, berr = setBlob(tx, chain, ld)
			return errors.Join(tx.LeaseLayer(lease, chain), berr)
		}
		// Content that takes nothing from the layers below serves any chain.
		caches, err := tx.CachesByDiff(ld.diffID)
		if err != nil {
			return err
		}
		for _, c := range caches {
			if c.Bind == "" && c.Broken == "" && c.Dialect == s.powers.dialect.String() {
				cacheID = c.CacheID
				l := metadata.Layer{
					ChainID: chain, DiffID: ld.diffID, Parent: parent, CacheID: cacheID,
					Blob: ld.blob, BlobSize: ld.blobSize, MediaType: ld.mediaType, Origin: origin, Created: time.Now().UTC(),
				}
				return errors.Join(tx.AddLayer(l, nil), tx.LeaseLayer(lease, chain))
			}
		}
		return nil
	})
	if err != nil || cacheID == "" {
		return false, err
	}
	s.purge(ctx, junk)
	// A row is believed only as far as its directory is there. What an archive has
	// promised by a name has been looked at already.
	return s.whole(ctx, cacheID, ld.stage != nil)
}

// whole says whether the content of a layer looks as it should: nothing is missing, no
// file has lost its content. Files are looked at if scan is set. A layer that is damaged
// is marked: whoever has its content puts it in its place.
func (s *Store) whole(ctx context.Context, cacheID string, scan bool) (bool, error) {
	var row metadata.Cache
	err := s.view(ctx, func(tx *metadata.Tx) (err error) { row, err = tx.Cache(cacheID); return err })
	if err != nil || row.Broken != "" {
		return false, err
	}
	if row.Adopted != nil { // of which check looks at more
		fd, err := openAdopted(row.Adopted)
		fsat.Close(fd)
		return !errors.Is(err, ErrCorrupt), nil
	}
	files, side, err := s.openLayer(cacheID)
	if err == nil {
		var st unix.Stat_t
		if err = fsat.Stat(files.dir, splitName, &st); err == nil && st.Size != row.SplitSize {
			err = fmt.Errorf("%w: %s has %d bytes, expected %d", ErrCorrupt, splitName, st.Size, row.SplitSize)
		}
		if err == nil && scan {
			err = files.scan(ctx, side.displaced())
		}
		files.Close()
	}
	if err == nil || ctx.Err() != nil {
		return err == nil, ctx.Err()
	}
	s.log.Warn("a layer of the store is damaged; it is unpacked again", zap.String("layer", row.DiffID.String()), zap.Error(err))
	return false, s.update(ctx, func(tx *metadata.Tx) error { return setBroken(tx, cacheID, "K22: "+err.Error()) })
}

// restage unpacks a layer of the store into a new stage.
func (s *Store) restage(ctx context.Context, diffID digest.Digest) (*stage, error) {
	var caches []metadata.Cache
	err := s.view(ctx, func(tx *metadata.Tx) (err error) {
		caches, err = tx.CachesByDiff(diffID)
		return err
	})
	if err != nil {
		return nil, err
	}
	// Damaged ones last: contents may be whole all the same, and are verified. Those in
	// another store may be changed by others.
	rank := func(c metadata.Cache) int {
		switch {
		case c.Broken != "":
			return 2
		case c.Adopted != nil:
			return 1
		}
		return 0
	}
	sort.SliceStable(caches, func(i, j int) bool { return rank(caches[i]) < rank(caches[j]) })
	err = fmt.Errorf("layer %s: %w", diffID, ErrNotFound)
	for _, c := range caches {
		var st *stage
		if st, err = s.restageFrom(ctx, c); err == nil || !errors.Is(err, ErrCorrupt) {
			return st, err
		}
	}
	return nil, err
}

func (s *Store) restageFrom(ctx context.Context, c metadata.Cache) (*stage, error) {
	diffID := c.DiffID
	files, side, err := s.openLayer(c.CacheID)
	if err != nil {
		return nil, err
	}
	defer files.Close()
	return s.stageFrom(ctx, "restage", func(w io.Writer) error {
		_, err := files.assemble(ctx, w, diffID, side.displaced())
		return err
	})
}

// stageFrom unpacks a tar that write produces.
func (s *Store) stageFrom(ctx context.Context, kind string, write func(io.Writer) error) (*stage, error) {
	st, err := s.newStage(ctx, kind)
	if err != nil {
		return nil, err
	}
	pr, pw := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		err := write(pw)
		_ = pw.CloseWithError(err) // nil closes with EOF
		wrote <- err
	}()
	err = st.unpack(ctx, pr)
	_ = pr.CloseWithError(io.ErrClosedPipe)
	if werr := <-wrote; werr != nil && !errors.Is(werr, io.ErrClosedPipe) {
		err = werr
	}
	if err != nil {
		st.discard()
		return nil, err
	}
	return st, nil
}

// addImages names the images and ends the lease, in one transaction.
func (s *Store) addImages(ctx context.Context, lease string, plans []*plan) ([]LoadedImage, error) {
	var out []LoadedImage
	var junk []metadata.Trash
	now := time.Now().UTC()
	err := s.update(ctx, func(tx *metadata.Tx) (err error) {
		out = nil
		var more []metadata.Trash
		for _, p := range plans {
			row := metadata.Image{
				ID: p.id, TopChain: chainOf(p.spec.RootFS.DiffIDs), Created: now,
				Platform: platformName(p.spec.OS, p.spec.Architecture, p.spec.Variant), Manifest: p.manifest, Origin: cmp.Or(p.origin, "load"),
			}
			if _, err := tx.AddImage(row, p.config); err != nil {
				return err
			}
			for d, raw := range p.manifests {
				if err := tx.AddManifest(p.id, d, raw); err != nil {
					return err
				}
			}
			for _, b := range p.kept {
				err := tx.PutBlob(b)
				if err == nil {
					t, err := dropBlob(tx, b.Digest) // if others have made the layer, of another blob
					if err != nil {
						return err
					}
					more = append(more, t...)
				}
				if err != nil {
					return err
				}
			}
			p.changed = false
			loaded := LoadedImage{ID: p.id, Refs: familiars(p.refs)}
			for i, r := range p.refs {
				old, err := tx.SetRef(r, metadata.Ref{ImageID: p.id, Updated: now})
				if err != nil {
					return err
				}
				p.changed = p.changed || old != p.id
				if old != "" && old != p.id {
					if loaded.Replaced == nil {
						loaded.Replaced = map[string]digest.Digest{}
					}
					loaded.Replaced[loaded.Refs[i]] = old
				}
			}
			out = append(out, loaded)
		}
		if err := setParents(tx, plans); err != nil {
			return err
		}
		junk, err = endLease(tx, lease)
		junk = append(junk, more...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("record images: %w", err)
	}
	for _, p := range plans {
		if p.committed != nil {
			p.committed()
		}
	}
	s.purge(ctx, junk)
	return out, nil
}

// setParents notes which images were built on others of the archive. What an archive says
// is believed if it fits, so that no image keeps another one by a lie.
func setParents(tx *metadata.Tx, plans []*plan) error {
	byID := map[digest.Digest]*plan{}
	for _, p := range plans {
		byID[p.id] = p
	}
	for _, p := range plans {
		parent := byID[p.parent]
		if parent == nil || !isStep(parent.spec, p.spec) {
			continue
		}
		row, err := tx.Image(p.id)
		if err != nil {
			return err
		}
		if row.Parent != "" { // it was made here
			continue
		}
		if err := tx.SetImageParent(p.id, p.parent); err != nil {
			return err
		}
	}
	return nil
}

// isStep reports whether an image is another one with one more step, as docker asks of
// the parents in an archive.
func isStep(parent, img ocispec.Image) bool {
	n, layers := len(parent.History), len(parent.RootFS.DiffIDs)
	return len(img.History) == n+1 && reflect.DeepEqual(img.History[:n], parent.History) &&
		len(img.RootFS.DiffIDs) >= layers && slices.Equal(img.RootFS.DiffIDs[:layers], parent.RootFS.DiffIDs)
}

// chainOf is the chainID of a list of layers.
func chainOf(diffIDs []digest.Digest) digest.Digest {
	var c digest.Digest
	for _, d := range diffIDs {
		c = metadata.ChainID(c, d)
	}
	return c
}
