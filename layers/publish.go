package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
)

// target is where in the chains a stage belongs.
type target struct {
	parent   digest.Digest
	origin   string
	blob     digest.Digest
	blobSize int64
	// mediaType of the blob; empty if nobody said.
	mediaType string
	lease     string
}

// bound is a stage that is finished but for its index, on its place in a chain.
type bound struct {
	st    *stage
	t     target
	layer metadata.Layer
	cache metadata.Cache
	// replace: the layer has its row, and gets this content in place of what it has.
	replace bool
}

// commit makes the stage a layer.
func (st *stage) commit(ctx context.Context, t target) (metadata.Layer, error) {
	stack, err := st.s.stackOf(ctx, t.parent)
	if err != nil {
		return metadata.Layer{}, err
	}
	b, err := st.bind(ctx, t, stack)
	if err != nil {
		return metadata.Layer{}, err
	}
	return b.layer, st.s.publish(ctx, []*bound{b})
}

// bind finishes the stage on top of a stack, which is that of t.parent.
func (st *stage) bind(ctx context.Context, t target, stack []LayerDir) (*bound, error) {
	v, err := openView(ctx, stack)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	bind, err := st.u.bind(ctx, v)
	if err != nil {
		return nil, err
	}
	if err := st.u.finish(ctx); err != nil {
		return nil, err
	}
	now, diffID := time.Now().UTC(), st.u.stats.diffID
	b := &bound{st: st, t: t}
	b.layer = metadata.Layer{
		ChainID: metadata.ChainID(t.parent, diffID), DiffID: diffID, Parent: t.parent, CacheID: st.id,
		Blob: t.blob, BlobSize: t.blobSize, MediaType: t.mediaType, Origin: t.origin, Created: now,
	}
	b.cache = metadata.Cache{
		CacheID: st.id, DiffID: diffID, Bind: bind, Dialect: st.u.powers.dialect.String(), Owners: st.u.powers.owners(),
		TarSize: st.u.stats.tarSize, SplitSHA: st.u.split.digest(), SplitSize: st.u.split.size,
		Duplicates: st.u.stats.duplicates, Created: now,
	}
	return b, nil
}

// dir is the stage as a layer below others that are bound after it.
func (b *bound) dir() LayerDir {
	if a := b.cache.Adopted; a != nil {
		d, _ := whiteout.ParseDialect(b.cache.Dialect) // we have written it
		return LayerDir{Path: a.Path, Dialect: d, DiffID: b.layer.DiffID, adopted: a}
	}
	d := LayerDir{Path: b.st.path() + "/" + diffName, Dialect: b.st.u.powers.dialect, DiffID: b.layer.DiffID}
	d.setOwners(b.cache.Owners)
	if !b.st.u.powers.privileged {
		d.tree = b.st.u.root
	}
	return d
}

// publish makes bound stages, each the parent of the next, layers: durable,
// described, renamed, and only then named by rows. Whoever loses a race for the
// same layer finds out in the transaction and throws its copy away. The disk is
// waited for once for all of them.
func (s *Store) publish(ctx context.Context, bs []*bound) error {
	if err := s.syncStages("before-sync", "after-sync"); err != nil {
		return err
	}
	if err := describeAll(ctx, bs); err != nil {
		return err
	}
	if err := s.syncStages("before-index-sync", "after-index"); err != nil {
		return err
	}
	for _, b := range bs {
		b.st.close()
		if err := fsat.Rename(s.stageFd, b.st.id, s.layersFd, b.st.id, unix.RENAME_NOREPLACE); err != nil {
			return fmt.Errorf("move stage into place: %w", err)
		}
		if err := s.fault("after-rename"); err != nil {
			return err
		}
	}
	for _, fd := range []int{s.layersFd, s.stageFd} {
		if err := unix.Fsync(fd); err != nil {
			return fmt.Errorf("sync store directory: %w", err)
		}
	}
	if err := s.fault("after-dirsync"); err != nil {
		return err
	}
	dead, err := s.deadMounts(ctx)
	if err != nil {
		return err
	}
	var junk []metadata.Trash
	err = s.update(ctx, func(tx *metadata.Tx) error {
		junk = nil
		for _, b := range bs {
			if err := tx.DeleteIngest(b.st.id); err != nil {
				return err
			}
			var gone string
			var err error
			if b.replace && tx.HasLayer(b.layer.ChainID) {
				gone, err = tx.ReplaceContent(b.layer.ChainID, b.cache)
			} else {
				gone, err = place(tx, b.layer, b.cache, b.t, dead)
			}
			if err != nil {
				return err
			}
			if gone == "" {
				continue
			}
			why := "replaced"
			if gone == b.st.id {
				why = "lost race"
			}
			more, err := addTrash(tx, why, layersName+"/"+gone)
			if err != nil {
				return err
			}
			junk = append(junk, more...)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, b := range bs {
		b.st.committed = true
	}
	if err := s.fault("after-row"); err != nil {
		return err
	}
	s.purge(ctx, junk)
	return nil
}

// syncStages has everything in stages on disk.
func (s *Store) syncStages(before, after string) error {
	if err := s.fault(before); err != nil {
		return err
	}
	if err := fsat.Syncfs(s.stageFd); err != nil {
		return fmt.Errorf("sync stages: %w", err)
	}
	return s.fault(after)
}

// describeAll writes the indexes and sidecars.
func describeAll(ctx context.Context, bs []*bound) error {
	errs := make([]error, len(bs))
	slots := make(chan struct{}, min(runtime.GOMAXPROCS(0), 8))
	var wg sync.WaitGroup
	for i, b := range bs {
		slots <- struct{}{}
		wg.Go(func() {
			errs[i] = b.describe(ctx)
			<-slots
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// describe writes the index of a stage, which measures it, and its sidecar. The
// stage was synced before, and is once more after.
func (b *bound) describe(ctx context.Context) error {
	if b.cache.Adopted != nil {
		return b.describeAdopted(ctx)
	}
	st := b.st
	w, err := newLayerIndex(indexID(st.id, st.u.powers.privileged), st.path())
	if err != nil {
		return err
	}
	defer w.Discard()
	if err := st.u.index(ctx, w); err != nil {
		return err
	}
	if err := st.writeStream(indexName, func(f *os.File) error { _, err := w.WriteTo(f); return err }); err != nil {
		return err
	}
	b.cache.Apparent, b.cache.Allocated, b.cache.Inodes = st.u.stats.apparent, st.u.stats.allocated, st.u.stats.inodes
	side := Sidecar{Version: 1, Cache: b.cache, Layer: b.layer, Incomplete: st.u.stats.incomplete}
	for d := range st.u.displaced {
		side.Displaced = append(side.Displaced, d)
	}
	return putSidecar(st.dir, side, false)
}

// place inserts the layer's row, unless it is there, and the content's row,
// unless another directory holds the same. A damaged directory gives its place to the
// new one. The directory that is useless then is returned.
func place(tx *metadata.Tx, l metadata.Layer, c metadata.Cache, t target, dead map[string]bool) (useless string, err error) {
	lease := func() error { return tx.LeaseLayer(t.lease, l.ChainID) }
	if have, err := tx.Layer(l.ChainID); err == nil {
		old, err := tx.Cache(have.CacheID)
		if err != nil {
			return "", err
		}
		if have.Blob == "" {
			if err := tx.SetBlob(l.ChainID, t.blob, t.blobSize, t.mediaType); err != nil {
				return "", err
			}
		}
		if old.Broken == "" {
			return c.CacheID, lease()
		}
		if err := replace(tx, old, c, dead); err != nil {
			return "", err
		}
		return old.CacheID, lease()
	}
	same, err := tx.CachesByDiff(l.DiffID)
	if err != nil {
		return "", err
	}
	for _, have := range same {
		if have.Bind != c.Bind || have.Dialect != c.Dialect || have.Owners != c.Owners {
			continue
		}
		if have.Broken != "" {
			if err := replace(tx, have, c, dead); err != nil {
				return "", err
			}
			useless = have.CacheID
		} else {
			l.CacheID, useless = have.CacheID, c.CacheID
		}
		if err := tx.AddLayer(l, nil); err != nil {
			return "", err
		}
		return useless, lease()
	}
	if err := tx.AddLayer(l, &c); err != nil {
		return "", err
	}
	return "", lease()
}

// replace puts new content in the place of a damaged directory, which nobody may have
// mounted: a server keeps its directories open.
func replace(tx *metadata.Tx, old, c metadata.Cache, dead map[string]bool) error {
	live, err := tx.LiveMounts()
	if err != nil {
		return err
	}
	for _, m := range live {
		if dead[liveKey(m)] {
			continue
		}
		chain, _ := tx.Chain(m.ChainID) // what there is of it
		for _, l := range chain {
			if l.CacheID == old.CacheID {
				return fmt.Errorf("layer %s: %w: it is damaged and mounted on %s; unmount it and try again", old.DiffID, ErrInUse, m.Target)
			}
		}
	}
	return tx.ReplaceCache(old.CacheID, c)
}
