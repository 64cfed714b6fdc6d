package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/layers"
)

// Prepare makes an active snapshot on top of a committed one, or of nothing.
func (s *Store) Prepare(ctx context.Context, name, parent string, labels map[string]string) ([]Mount, error) {
	return s.create(ctx, Active, name, parent, labels)
}

// View makes a read-only snapshot that shows a committed one.
func (s *Store) View(ctx context.Context, name, parent string, labels map[string]string) ([]Mount, error) {
	return s.create(ctx, View, name, parent, labels)
}

func (s *Store) create(ctx context.Context, kind Kind, name, parent string, labels map[string]string) (ms []Mount, err error) {
	if err := checkName("name", name); err != nil {
		return nil, err
	}
	if _, _, err := ownersOf(labels); err != nil {
		return nil, err
	}
	release, err := s.names.take(ctx, name)
	if err != nil {
		return nil, err
	}
	defer release()
	now := time.Now().UTC()
	r := row{ID: newID(), Kind: kind, Parent: parent, Labels: labels, Created: now, Updated: now}
	parents, err := s.make(name, r)
	if err != nil {
		return nil, err
	}
	ms, err = s.mounts(ctx, name, r, parents)
	if err != nil {
		return nil, errors.Join(err, s.drop(name, r))
	}
	return ms, nil
}

// make makes the directory of a new snapshot, and then its row.
func (s *Store) make(name string, r row) (parents []string, err error) {
	err = s.db.view(func(t tx) error {
		if err := t.free(name); err != nil || r.Parent == "" {
			return err
		}
		if _, err := t.parent(r.Parent); err != nil {
			return err
		}
		parents, err = t.chain(r)
		return err
	})
	if err != nil {
		return nil, err
	}
	parentID := ""
	if len(parents) > 0 {
		parentID = parents[0]
	}
	s.mu.Lock()
	s.making[r.ID] = true
	s.mu.Unlock()
	defer func() { // after the row is written, or the directory is gone
		s.mu.Lock()
		delete(s.making, r.ID)
		s.mu.Unlock()
	}()
	if err := s.makeSnapshot(r.ID, parentID); err != nil {
		return nil, err
	}
	if err := s.db.update(func(t tx) error { return t.create(name, r, parentID) }); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.of(r.ID)))
	}
	return parents, nil
}

// drop removes row and directory of a snapshot.
func (s *Store) drop(name string, r row) error {
	if err := s.db.update(func(t tx) error { return t.remove(name) }); err != nil {
		return err
	}
	if err := s.discard(r.ID); err != nil {
		// It has no row any more, so that the next start, or Cleanup, takes it away.
		s.log.Warn("the directory of a removed snapshot stays for now", zap.String("id", r.ID), zap.Error(err))
	}
	s.purgeSoon()
	return nil
}

// Commit makes a committed snapshot called name of the active one called key. A parent may
// be named if it is the one that key has: nothing is put on another one.
func (s *Store) Commit(ctx context.Context, name, key, parent string, labels map[string]string) error {
	if err := checkName("name", name); err != nil {
		return err
	}
	release, err := s.names.take(ctx, key)
	if err != nil {
		return err
	}
	defer release()
	var r row
	var parents []string
	err = s.db.view(func(t tx) error {
		if err := t.free(name); err != nil { // also before anything is unmounted
			return err
		}
		if r, err = t.get(key); err != nil {
			return err
		}
		parents, err = t.chain(r)
		return err
	})
	switch {
	case err != nil:
		return err
	case r.Kind != Active:
		return notActive(key, r)
	case parent != "" && parent != r.Parent:
		return markedf(layers.ErrInvalid, "snapshot %q cannot be committed on top of %q: its parent is %q", key, parent, r.Parent)
	}
	u, hasUnion, err := s.unionOf(r, parents)
	if err != nil {
		return err
	}
	if hasUnion {
		err = s.unions.unmount(ctx, u, false)
	} else {
		err = syncTree(s.fs(r.ID))
	}
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	usage, err := usageOf(s.fs(r.ID))
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	err = s.db.update(func(t tx) error { return t.commit(key, name, labels, usage, time.Now().UTC()) })
	if err != nil {
		return err
	}
	if err := s.dropUnion(r.ID); err != nil { // the next start does it
		s.log.Warn("a committed snapshot keeps what its union needed", zap.String("id", r.ID), zap.Error(err))
	}
	return nil
}

// Remove removes a snapshot that has no children.
func (s *Store) Remove(ctx context.Context, name string) error {
	release, err := s.names.take(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	r, parents, err := s.find(name)
	if err != nil {
		return err
	}
	if r.Kind != Committed {
		u, hasUnion, err := s.unionOf(r, parents)
		if err != nil {
			return err
		}
		if hasUnion {
			if err := s.unions.unmount(ctx, u, true); err != nil {
				return fmt.Errorf("remove snapshot %q: %w", name, err)
			}
		}
	}
	return s.drop(name, r)
}
