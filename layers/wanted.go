package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/plyfs/plyfs/metadata"
)

// Wanted is a mount that is to be made again when it has ended without being unmounted,
// or the system was started anew.
type Wanted = metadata.Wanted

// Want records a wanted mount in place of one that was wanted on the same target. A
// container is wanted for writing only once, and there where it was asked for last.
func (s *Store) Want(ctx context.Context, w Wanted) error {
	if !filepath.IsAbs(w.Target) || (w.ContainerID == "") == (w.ImageID == "") {
		return fmt.Errorf("%w: a wanted mount needs an absolute target and either a container or an image", ErrInvalid)
	}
	if w.Since.IsZero() {
		w.Since = time.Now().UTC()
	}
	return s.update(ctx, func(tx *metadata.Tx) error {
		if w.ContainerID != "" && !w.ReadOnly {
			other := func(o metadata.Wanted) bool { return !o.ReadOnly && o.Target != w.Target }
			if err := unwantContainer(tx, w.ContainerID, other); err != nil {
				return err
			}
		}
		return tx.PutWanted(w)
	})
}

// Wanted lists the wanted mounts in the order of their targets.
func (s *Store) Wanted(ctx context.Context) (out []Wanted, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		out, err = tx.Wanted()
		return err
	})
	return out, err
}

// WantedAt returns what is wanted on target, or ErrNotFound.
func (s *Store) WantedAt(ctx context.Context, target string) (w Wanted, err error) {
	err = s.view(ctx, func(tx *metadata.Tx) error {
		w, err = tx.WantedAt(target)
		return err
	})
	return w, err
}

// ChangeWanted changes the row of a target, if there is one.
func (s *Store) ChangeWanted(ctx context.Context, target string, f func(*Wanted)) error {
	return s.update(ctx, func(tx *metadata.Tx) error {
		w, err := tx.WantedAt(target)
		if errors.Is(err, metadata.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		f(&w)
		return tx.PutWanted(w)
	})
}

// Unwant forgets what was wanted on target. Unknown targets are not an error.
func (s *Store) Unwant(ctx context.Context, target string) error {
	return s.update(ctx, func(tx *metadata.Tx) error { return tx.DeleteWanted(target) })
}

// unwantContainer forgets wanted mounts of a container.
func unwantContainer(tx *metadata.Tx, id string, which func(metadata.Wanted) bool) error {
	all, err := tx.Wanted()
	if err != nil {
		return err
	}
	for _, w := range all {
		if w.ContainerID == id && which(w) {
			if err := tx.DeleteWanted(w.Target); err != nil {
				return err
			}
		}
	}
	return nil
}
