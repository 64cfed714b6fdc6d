package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// addTrash records paths for deletion in the transaction that makes them
// garbage.
func addTrash(tx *metadata.Tx, reason string, paths ...string) ([]metadata.Trash, error) {
	var out []metadata.Trash
	for _, p := range paths {
		t := metadata.Trash{Path: p, Reason: reason, Since: time.Now().UTC()}
		seq, err := tx.AddTrash(t)
		if err != nil {
			return nil, err
		}
		t.Seq = seq
		out = append(out, t)
	}
	return out, nil
}

// purge deletes what a committed transaction gave up, or has it deleted by somebody
// who is not waited for. Anything that fails stays in the trash for the next sweep.
func (s *Store) purge(ctx context.Context, junk []metadata.Trash) {
	s.buried.Lock()
	junk = append(junk, s.buried.rows...)
	s.buried.rows = nil
	s.buried.Unlock()
	if len(junk) == 0 || s.fault("before-purge") != nil {
		return
	}
	if s.opts.OnTrash != nil {
		s.opts.OnTrash()
		return
	}
	s.purgeNow(ctx, junk)
}

// Purge deletes everything that is in the trash, and what comes into it meanwhile. If
// another process is at it, that one does it.
func (s *Store) Purge(ctx context.Context) error {
	last := uint64(0)
	for {
		// The lock is given up before the last look: who comes then and cannot have
		// it has put its rows in before.
		if err := unix.Flock(s.trashFd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			return nil
		}
		var rows []metadata.Trash
		err := s.view(ctx, func(tx *metadata.Tx) (err error) { rows, err = tx.TrashRows(); return err })
		n := len(rows)
		if err == nil && n > 0 && rows[n-1].Seq > last {
			last = rows[n-1].Seq
			s.purgeNow(ctx, rows)
		} else {
			n = 0
		}
		_ = unix.Flock(s.trashFd, unix.LOCK_UN)
		if err != nil || n == 0 || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
}

func (s *Store) purgeNow(ctx context.Context, junk []metadata.Trash) {
	ctx = context.WithoutCancel(ctx)
	var done []uint64
	dirs := map[string]bool{trashName: true}
	for _, t := range junk {
		if err := s.purgeOne(ctx, t); err != nil {
			s.log.Warn("delete trash", zap.String("path", t.Path), zap.Error(err))
			continue
		}
		dir, _, _ := strings.Cut(t.Path, "/")
		dirs[dir] = true
		done = append(done, t.Seq)
	}
	// What comes back with the power must still be known as trash.
	for _, dir := range sortedNames(dirs) {
		if err := s.syncDir(dir); err != nil {
			s.log.Warn("delete trash", zap.String("path", dir), zap.Error(err))
			return
		}
	}
	err := s.updateFreeing(ctx, func(tx *metadata.Tx) error {
		for _, seq := range done {
			if err := tx.DeleteTrash(seq); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.log.Warn("forget trash", zap.Error(err))
	}
}

// trashDirs are the directories whose entries a trash row may name.
var trashDirs = map[string]bool{layersName: true, stageName: true, rwName: true, trashName: true, chainsName: true, blobsName: true, imagesName: true}

// validTrash says whether a path from a trash row is one of ours.
func validTrash(path string) bool {
	dir, name, ok := strings.Cut(path, "/")
	return ok && trashDirs[dir] && name != "" && name != "." && name != ".." && !strings.Contains(name, "/")
}

// buryImages records that the images of a transaction which are no more are not to come
// back: a sidecar without a row is otherwise taken for what is left of a lost row.
// purge takes the rows away.
func buryImages(tx *metadata.Tx, ids []digest.Digest) (rows []metadata.Trash, err error) {
	for _, id := range ids {
		if _, err := tx.Image(id); id.Validate() != nil || !errors.Is(err, metadata.ErrNotFound) {
			continue
		}
		t, err := addTrash(tx, "image removed", imagesName+"/"+imageFile(id))
		if err != nil {
			return nil, err
		}
		rows = append(rows, t...)
	}
	return rows, nil
}

// syncDir makes durable what happened to the names in a directory of the store.
func (s *Store) syncDir(name string) error {
	fd, err := fsat.OpenName(s.rootFd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if fsat.IsAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	return unix.Fsync(fd)
}

func (s *Store) purgeOne(ctx context.Context, t metadata.Trash) error {
	dir, name, _ := strings.Cut(t.Path, "/")
	if !validTrash(t.Path) {
		return fmt.Errorf("%w: trash row names %q, which is no place of ours", ErrCorrupt, t.Path)
	}
	switch dir {
	case blobsName:
		return s.removeKept(name)
	case imagesName: // it may have been loaded again
		if id := imageOfFile(name); id != "" {
			return s.follow(ctx, metadata.Touched{Images: []digest.Digest{id}})
		}
		return nil
	}
	from, err := fsat.OpenBeneath(s.rootFd, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer fsat.Close(from)
	if dir == chainsName {
		return s.removeChains(strings.TrimSuffix(name, chainExt))
	}
	// Out of sight in one step, then at leisure.
	aside := fmt.Sprintf("%s.%d", filepath.Base(name), t.Seq)
	if err := fsat.Rename(from, name, s.trashFd, aside, unix.RENAME_NOREPLACE); err != nil && !errors.Is(err, unix.ENOENT) {
		aside = ""
	}
	if aside == "" {
		return removeTree(from, name)
	}
	return removeTree(s.trashFd, aside)
}
