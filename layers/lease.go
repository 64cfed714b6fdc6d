package layers

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/plyfs/plyfs/metadata"
)

// newLease records that this process is about to add layers that no image
// names yet.
func (s *Store) newLease(ctx context.Context) (string, error) {
	owner, err := self()
	if err != nil {
		return "", err
	}
	l := metadata.Lease{ID: newID(), Owner: owner, Started: time.Now().UTC()}
	if err := s.update(ctx, func(tx *metadata.Tx) error { return tx.AddLease(l) }); err != nil {
		return "", fmt.Errorf("begin: %w", err)
	}
	return l.ID, nil
}

// dropLease ends a lease whose work has failed: layers nothing else needs go
// with it.
func (s *Store) dropLease(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var junk []metadata.Trash
	err := s.updateFreeing(ctx, func(tx *metadata.Tx) (err error) {
		junk, err = endLease(tx, id)
		return err
	})
	if err != nil {
		s.log.Warn("end lease", zap.String("lease", id), zap.Error(err))
		return
	}
	s.purge(ctx, junk)
}

// endLease removes a lease and the layers only it has kept.
func endLease(tx *metadata.Tx, id string) (junk []metadata.Trash, err error) {
	chains, err := tx.EndLease(id)
	if err != nil {
		return nil, err
	}
	for _, c := range chains {
		more, err := releaseChain(tx, c, nil)
		if err != nil {
			return nil, err
		}
		junk = append(junk, more...)
	}
	return junk, nil
}

// releaseChain deletes a layer, and then its parents, as long as nothing needs
// them. gone is told each one.
func releaseChain(tx *metadata.Tx, chain digest.Digest, gone func(metadata.Layer)) (junk []metadata.Trash, err error) {
	for chain != "" && tx.HasLayer(chain) {
		l, err := tx.Layer(chain)
		if err != nil {
			return nil, err
		}
		u, err := tx.LayerUsers(chain)
		if err != nil {
			return nil, err
		}
		if !u.None() {
			return junk, nil
		}
		orphan, err := tx.DeleteLayer(chain)
		if err != nil {
			return nil, err
		}
		if orphan != "" {
			t, err := addTrash(tx, "layer removed", layersName+"/"+orphan)
			if err != nil {
				return nil, err
			}
			junk = append(junk, t...)
		}
		// The merged indexes of this chain are caches of what is gone.
		t, err := addTrash(tx, "layer removed", chainsName+"/"+chainPrefix(chain))
		if err != nil {
			return nil, err
		}
		junk = append(junk, t...)
		if t, err = dropBlob(tx, l.Blob); err != nil {
			return nil, err
		}
		junk = append(junk, t...)
		if gone != nil {
			gone(l)
		}
		chain = l.Parent
	}
	return junk, nil
}
