package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// RebuildReport says what a new database was made of.
type RebuildReport struct {
	Layers     int      `json:"layers"`
	Images     int      `json:"images"`
	Containers int      `json:"containers"`
	Sources    []string `json:"sources"`        // what the rows come from
	Kept       string   `json:"kept,omitempty"` // the database that was there
	// Incomplete are images of which layers are missing: load them again.
	Incomplete []string `json:"incomplete,omitempty"`
	// Doubtful are images that only a copy of the database knows: they may have
	// been removed since it was made.
	Doubtful []string `json:"doubtful,omitempty"`
	// Unused is what could not be used, with the reason.
	Unused []string `json:"unused,omitempty"`
}

// Rebuild makes the database anew from what lies beside it: the sidecars of layers,
// images and containers, what can still be read of the old database, and the newest
// copy. Nothing on the disk is removed; the old database is kept under another name.
// Mounts that are alive have no rows afterwards: the service finds them again.
func (s *Store) Rebuild(ctx context.Context) (RebuildReport, error) {
	var rep RebuildReport
	e, err := s.gather(ctx, true)
	if err != nil {
		return rep, fmt.Errorf("rebuild: %w", err)
	}
	var touched metadata.Touched
	kept, err := s.db.Rebuild(ctx, func(tx *metadata.Tx) error {
		rep = RebuildReport{Sources: e.sources, Unused: e.notes}
		if err := e.restore(tx, &rep); err != nil {
			return err
		}
		for i, r := range e.salvaged { // what names images needs them
			if err := r.Rest(tx, i == 0); err != nil {
				return err
			}
		}
		touched = tx.Touched()
		return nil
	})
	if err != nil {
		return rep, s.mapErr(err)
	}
	if kept != "" {
		rep.Kept = filepath.Base(kept)
	}
	s.followed(ctx, touched)
	return rep, nil
}

// restore inserts everything the evidence has and tx has not. What is there stays as
// it is.
func (e *evidence) restore(tx *metadata.Tx, rep *RebuildReport) error {
	chains := make([]digest.Digest, 0, len(e.layers))
	for c := range e.layers {
		chains = append(chains, c)
	}
	slices.Sort(chains) // the same evidence gives the same database
	for _, c := range chains {
		if _, err := e.addChain(tx, c, rep); err != nil {
			return err
		}
	}
	known := map[digest.Digest]bool{}
	for _, img := range e.images {
		known[img.Image.ID] = true
		if err := e.addImage(tx, img, rep); err != nil {
			return err
		}
	}
	for _, img := range e.doubtful {
		if known[img.Image.ID] {
			continue
		}
		if _, err := tx.Image(img.Image.ID); err == nil || !e.completes(tx, img) {
			continue
		}
		if err := e.addImage(tx, img, rep); err != nil {
			return err
		}
		rep.Doubtful = append(rep.Doubtful, imageNames(tx, img.Image.ID))
	}
	mounts := map[string]bool{}
	for _, id := range tx.MountIDs() {
		mounts[id] = true
	}
	for _, c := range e.containers {
		if mounts[c.MountID] {
			continue
		}
		if _, err := tx.Container(c.ID); err == nil {
			continue
		}
		if err := tx.RestoreContainer(c); err != nil {
			return err
		}
		rep.Containers++
	}
	return nil
}

// addChain inserts a layer and what lies below it, as far as there are candidates.
func (e *evidence) addChain(tx *metadata.Tx, top digest.Digest, rep *RebuildReport) (bool, error) {
	var todo []digest.Digest // topmost first
	for c := top; c != "" && !tx.HasLayer(c); {
		if len(todo) > 1<<20 || len(e.layers[c]) == 0 {
			return false, nil
		}
		todo = append(todo, c)
		c = e.layers[c][0].Parent // all candidates have the same
	}
	for i := len(todo) - 1; i >= 0; i-- {
		l := e.layers[todo[i]][0]
		var cache *metadata.Cache
		if _, err := tx.Cache(l.CacheID); err != nil {
			c := e.caches[l.CacheID]
			cache = &c
		}
		if err := tx.AddLayer(l, cache); err != nil {
			return false, err
		}
		rep.Layers++
	}
	return true, nil
}

// completes makes sure, as far as it can, of the chain that an image needs: content
// that takes nothing from the layers below serves every chain.
func (e *evidence) completes(tx *metadata.Tx, img metadata.SavedImage) bool {
	spec, err := parseConfig(img.Config, Limits{}.withDefaults())
	if err != nil {
		return false
	}
	var chain digest.Digest
	for _, d := range spec.RootFS.DiffIDs {
		next := metadata.ChainID(chain, d)
		if len(e.layers[next]) == 0 && !tx.HasLayer(next) {
			for _, id := range sortedNames(e.caches) {
				if c := e.caches[id]; c.DiffID == d && c.Bind == "" && c.Broken == "" {
					e.candidate(metadata.Layer{ChainID: next, DiffID: d, Parent: chain, CacheID: id, Origin: "repair", Created: c.Created})
					break
				}
			}
		}
		if len(e.layers[next]) == 0 && !tx.HasLayer(next) {
			return false
		}
		chain = next
	}
	return true
}

func (e *evidence) addImage(tx *metadata.Tx, img metadata.SavedImage, rep *RebuildReport) error {
	whole := e.completes(tx, img)
	spec, err := parseConfig(img.Config, Limits{}.withDefaults())
	if err != nil {
		return nil //nolint:nilerr // it was never an image of ours
	}
	if _, err := e.addChain(tx, chainOf(spec.RootFS.DiffIDs), rep); err != nil {
		return err
	}
	had := slices.Contains(tx.ImageIDs(), img.Image.ID)
	if err := tx.RestoreImage(img); err != nil {
		return err
	}
	if !had {
		rep.Images++
	}
	if !whole {
		rep.Incomplete = append(rep.Incomplete, imageNames(tx, img.Image.ID))
	}
	return nil
}

// imageNames is how a message calls an image.
func imageNames(tx *metadata.Tx, id digest.Digest) string {
	if refs := tx.RefsOf(id); len(refs) > 0 {
		return familiar(refs[0])
	}
	return ShortID(id)
}

// quarantine moves a writable layer that belongs to no container out of the way. It is
// somebody's data: nothing here removes it.
func (s *Store) quarantine(name string) error {
	if err := fsat.Mkdir(s.rootFd, lostName, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make %s: %w", lostName, err)
	}
	lost, err := fsat.OpenName(s.rootFd, lostName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer fsat.Close(lost)
	to := name
	for i := 1; ; i++ {
		err := fsat.Rename(s.rwFd, name, lost, to, unix.RENAME_NOREPLACE)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || i > 1000 {
			return fmt.Errorf("move %s/%s to %s: %w", rwName, name, lostName, err)
		}
		to = fmt.Sprintf("%s.%d", name, i)
	}
	for _, fd := range []int{lost, s.rwFd} {
		if err := unix.Fsync(fd); err != nil {
			return err
		}
	}
	return nil
}

const lostName = "lost"
