package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/layers/foreign"
	"github.com/plyfs/plyfs/metadata"
)

// adopter takes over one store.
type adopter struct {
	s        *Store
	src      *foreign.Store
	lease    string
	copy     bool
	verify   bool
	progress *progress
	rep      *AdoptReport

	// diffIDs that only reading a tar has told, by layer.
	told map[*foreign.Layer]digest.Digest
	// met are the chainIDs of layers that have been counted, kept those of layers that are
	// in the store and kept by the lease.
	met, kept map[digest.Digest]bool
	// broken layers, and why: an error is told once for each image, not found again.
	broken map[*foreign.Layer]error
}

// layer puts a layer on top of what the chainer has.
func (a *adopter) layer(ctx context.Context, c *chainer, l *foreign.Layer) (digest.Digest, error) {
	if err := a.broken[l]; err != nil {
		return "", err
	}
	diffID := a.diffID(l)
	if diffID != "" {
		have, err := a.have(ctx, c, diffID)
		if err != nil || have {
			return diffID, err
		}
	}
	diffID, err := a.take(ctx, c, l, diffID)
	if err != nil {
		if !fatal(ctx, err) {
			a.broken[l] = err
		}
		return "", err
	}
	a.told[l] = diffID
	return diffID, nil
}

func (a *adopter) diffID(l *foreign.Layer) digest.Digest {
	if l.DiffID != "" {
		return l.DiffID
	}
	return a.told[l]
}

// have uses a layer that the store has.
func (a *adopter) have(ctx context.Context, c *chainer, diffID digest.Digest) (bool, error) {
	chain := metadata.ChainID(c.top, diffID)
	if a.kept[chain] && len(c.bound) == 0 {
		c.top = chain
		return true, nil
	}
	if lost, err := a.s.lost(ctx, chain); err != nil || lost {
		return false, err
	}
	known := false
	err := a.s.view(ctx, func(tx *metadata.Tx) error {
		same, err := tx.CachesByDiff(diffID)
		known = len(same) > 0
		return err
	})
	if err != nil || !known {
		return false, err
	}
	if err := c.publish(ctx); err != nil {
		return false, err
	}
	have, err := a.s.haveLayer(ctx, a.lease, "adopt", c.top, &layerData{name: diffID.String(), diffID: diffID})
	if err != nil || !have {
		return false, err
	}
	c.top, a.kept[chain] = chain, true
	if !a.met[chain] {
		a.met[chain] = true
		a.rep.Present++
	}
	return true, nil
}

// take copies a layer, or refers to it.
func (a *adopter) take(ctx context.Context, c *chainer, l *foreign.Layer, diffID digest.Digest) (_ digest.Digest, err error) {
	tree := -1
	if l.Tree != nil {
		if tree, err = a.src.OpenTree(l.Tree); err != nil {
			return "", fmt.Errorf("%s: %w", l.Tree.Dir, mapForeign(err))
		}
		defer fsat.Close(tree)
	}
	if !a.copy {
		return a.refer(ctx, c, l, tree, diffID)
	}
	t := a.progress.start(l.Name, "copying", max(l.Size, 0))
	defer t.done()
	st, err := a.s.stageFrom(ctx, "adopt", func(w io.Writer) error {
		return a.s.writeForeign(ctx, io.MultiWriter(w, t), a.src, l, tree)
	})
	if err != nil {
		return "", mapForeign(err)
	}
	if got := st.u.stats.diffID; diffID != "" && got != diffID {
		st.discard()
		return "", isLayer(got, diffID)
	}
	if diffID == "" {
		diffID = st.u.stats.diffID
		if have, err := a.have(ctx, c, diffID); err != nil || have {
			st.discard()
			return diffID, err
		}
	}
	a.met[metadata.ChainID(c.top, diffID)] = true
	return diffID, a.add(ctx, c, l.Name, st)
}

// add puts a stage on top of the chain, unless the store has the layer.
func (a *adopter) add(ctx context.Context, c *chainer, name string, st *stage) error {
	ld := &layerData{name: name, diffID: st.u.stats.diffID, stage: st}
	err := c.add(ctx, ld)
	if ld.stage != nil { // not taken
		ld.stage.discard()
		return err
	}
	if err == nil {
		a.rep.Copied++
	}
	return err
}

// refer makes a layer whose content stays where it is.
func (a *adopter) refer(ctx context.Context, c *chainer, l *foreign.Layer, tree int, diffID digest.Digest) (digest.Digest, error) {
	if tree < 0 {
		return "", fmt.Errorf("%w: its content is in an archive: adopt it with --copy", ErrUnsupported)
	}
	if l.Tree.Whole {
		return "", wholeTrees(a.src)
	}
	in, err := a.inspect(ctx, l.Tree, tree)
	if err != nil {
		return "", err
	}
	if in.indirect != "" {
		return "", fmt.Errorf("%w: %q says that a part of it is elsewhere (redirect or metacopy), which no image can say: adopt it with --copy", ErrUnsupported, in.indirect)
	}
	if isOverridden(tree) {
		return "", fmt.Errorf("%w: its files say in an attribute what they are (force_mask): adopt it with --copy", ErrUnsupported)
	}
	t := a.progress.start(l.Name, "adopting", 0)
	defer t.done()
	return a.addReference(ctx, c, l.Tree, tree, in, diffID, "adopt", func(f *os.File) (recorded, error) {
		if l.Split != "" {
			return a.s.convertRecord(ctx, a.src, l, tree, f)
		}
		if l.Blob == nil && diffID != "" {
			return recorded{}, nil // nobody has kept its form
		}
		return a.record(ctx, tree, f, func(w io.Writer) error { return a.s.writeForeign(ctx, w, a.src, l, tree) })
	})
}

// record reads a tar that write produces.
func (a *adopter) record(ctx context.Context, tree int, f *os.File, write func(io.Writer) error) (recorded, error) {
	pr, pw := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		err := write(pw)
		_ = pw.CloseWithError(err) // nil closes with EOF
		wrote <- err
	}()
	rec, err := a.s.recordTar(ctx, pr, tree, f)
	_ = pr.CloseWithError(io.ErrClosedPipe)
	if werr := <-wrote; werr != nil && !errors.Is(werr, io.ErrClosedPipe) {
		err = werr
	}
	return rec, err
}

func (a *adopter) inspect(ctx context.Context, t *foreign.Tree, tree int) (inspection, error) {
	private, err := guarded(a.src.Abs(t.Dir))
	if err != nil {
		return inspection{}, needCopy(err)
	}
	in, err := inspect(ctx, tree, t.Dialect, private)
	return in, needCopy(err)
}

// needCopy says what to do about content that is not safe where it lies.
func needCopy(err error) error {
	if errors.Is(err, errNotOurs) {
		return fmt.Errorf("%w: %w: adopt with --copy", ErrUnsupported, err)
	}
	return err
}

// addReference puts a layer on top of the chain whose content is the directory tree.
// make writes its record.
func (a *adopter) addReference(ctx context.Context, c *chainer, t *foreign.Tree, tree int, in inspection, diffID digest.Digest, origin string,
	makeRecord func(*os.File) (recorded, error),
) (_ digest.Digest, err error) {
	st, err := a.s.newStage(ctx, "adopt")
	if err != nil {
		return "", err
	}
	c.stages = append(c.stages, st)
	fsat.Close(st.diff)
	st.diff = -1
	if err := fsat.Rmdir(st.dir, diffName); err != nil {
		return "", fmt.Errorf("stage: %w", err)
	}
	var stat unix.Stat_t
	if st.diff, err = fsat.Reopen(tree, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
		return "", err
	}
	if err := fsat.Fstat(st.diff, &stat); err != nil {
		return "", err
	}
	var rec recorded
	err = st.writeStream(splitName, func(f *os.File) (err error) { rec, err = makeRecord(f); return err })
	if err != nil {
		return "", mapForeign(err)
	}
	if rec.splitSize == 0 {
		if err := fsat.Unlink(st.dir, splitName); err != nil {
			return "", err
		}
	}
	files := layerFiles{dir: st.dir, diff: st.diff, adopted: true}
	known := diffID != ""
	switch {
	case rec.diffID != "" && diffID != "" && rec.diffID != diffID:
		return "", isLayer(rec.diffID, diffID)
	case rec.diffID != "":
		diffID = rec.diffID
	case diffID == "": // the record was converted: its contents tell
		if diffID, err = files.digest(ctx); err != nil {
			return "", err
		}
	}
	if !known {
		if have, err := a.have(ctx, c, diffID); err != nil || have {
			return diffID, err // the stage is thrown away
		}
	}
	if a.verify && rec.splitSize > 0 {
		if _, err := files.assemble(ctx, io.Discard, diffID, nil); err != nil {
			return "", err
		}
	}
	now := time.Now().UTC()
	b := &bound{st: st, t: target{parent: c.top, origin: origin, lease: a.lease}}
	b.layer = metadata.Layer{
		ChainID: metadata.ChainID(c.top, diffID), DiffID: diffID, Parent: c.top, CacheID: st.id, Origin: origin, Created: now,
	}
	b.cache = metadata.Cache{
		CacheID: st.id, DiffID: diffID, Dialect: t.Dialect.String(), Owners: ownersReal,
		// Another chain may have another directory: this one is for its own only.
		Bind:     digest.FromString("adopted " + a.src.Abs(t.Dir)).String(),
		Apparent: in.apparent, Allocated: in.allocated, Inodes: in.inodes,
		TarSize: rec.tarSize, SplitSHA: rec.splitSHA, SplitSize: rec.splitSize, Duplicates: rec.dup, Created: now,
		Adopted: &metadata.Adopted{
			Path: a.src.Abs(t.Dir), Source: sourceName(a.src), Dev: stat.Dev, Ino: stat.Ino, Ctime: ctimeOf(&stat),
		},
	}
	if b.replace, err = a.s.lost(ctx, b.layer.ChainID); err != nil {
		return "", err
	}
	a.met[b.layer.ChainID] = true
	c.bound = append(c.bound, b)
	c.stack = append([]LayerDir{b.dir()}, c.stack...)
	c.top = b.layer.ChainID
	a.rep.Referenced++
	return diffID, nil
}

// digest is the diffID that the record and the contents give.
func (l layerFiles) digest(ctx context.Context) (digest.Digest, error) {
	sum := digest.SHA256.Hash()
	if err := l.join(ctx, sum, nil); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, sum), nil
}

// describeAdopted writes the index of content in another store, and its sidecar.
func (b *bound) describeAdopted(ctx context.Context) error {
	st, d := b.st, b.dir()
	d.CacheID = st.id
	w, err := newLayerIndex(d.indexID(), st.path())
	if err != nil {
		return err
	}
	defer w.Discard()
	if err := indexDirectory(ctx, layerFiles{dir: st.dir, diff: st.diff, adopted: true}, d, w); err != nil {
		return fmt.Errorf("index of %q: %w", d.Path, err)
	}
	if err := st.writeStream(indexName, func(f *os.File) error { _, err := w.WriteTo(f); return err }); err != nil {
		return err
	}
	return putSidecar(st.dir, Sidecar{Version: 1, Cache: b.cache, Layer: b.layer}, false)
}

// mapForeign adds our sentinel to an error of package foreign.
func mapForeign(err error) error {
	for _, have := range []error{ErrNotFound, ErrExists, ErrInUse, ErrInvalid, ErrCorrupt, ErrLocked, ErrUnsupported} {
		if errors.Is(err, have) {
			return err
		}
	}
	for _, m := range []struct{ from, to error }{
		{foreign.ErrNoStore, ErrInvalid},
		{foreign.ErrUnsupported, ErrUnsupported},
		{foreign.ErrDamaged, ErrCorrupt},
	} {
		if errors.Is(err, m.from) {
			return sentinel{err, m.to}
		}
	}
	return err
}

// sourceName says whose content a layer is.
func sourceName(src *foreign.Store) string {
	if src.Driver == "" {
		return src.Kind
	}
	return src.Kind + " " + src.Driver
}

func wholeTrees(src *foreign.Store) error {
	return fmt.Errorf("%w: the storage driver %s keeps whole trees, not layers: adopt with --copy", ErrUnsupported, src.Driver)
}
