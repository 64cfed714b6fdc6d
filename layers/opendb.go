package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

const (
	copiesName = "copies"
	copyPrefix = "plyfs.db."
	copyTime   = "20060102T150405.000Z"
	// keepCopies is how many copies of the database there are, and copyAge how old
	// the newest one is at most while the store changes.
	keepCopies = 3
	copyAge    = 24 * time.Hour
)

// openDatabase opens the database, and makes an empty one for a new store. A store
// whose database has gone is not a new one.
func (s *Store) openDatabase(ctx context.Context) error {
	err := s.db.Attach(ctx)
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	what, err := s.content()
	if err != nil {
		return err
	}
	if what == "" {
		return s.db.Init(ctx)
	}
	// Another process may have made both since we looked.
	if err = s.db.Attach(ctx); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("database %s: %w: it is missing, but the store has %s", s.db.Path(), metadata.ErrFile, what)
	}
	return err
}

// content names something that only a store with a database can have.
func (s *Store) content() (string, error) {
	for _, d := range []struct {
		name string
		fd   int
	}{{layersName, s.layersFd}, {rwName, s.rwFd}, {imagesName, s.imagesFd}, {copiesName, s.copiesFd}} {
		names, err := listDir(d.fd)
		if err != nil {
			return "", err
		}
		if len(names) > 0 {
			slices.Sort(names)
			return d.name + "/" + names[0], nil
		}
	}
	return "", nil
}

// copyDatabase keeps a copy of the database and removes the oldest ones.
func (s *Store) copyDatabase(ctx context.Context, why string) error {
	name := copyPrefix + time.Now().UTC().Format(copyTime)
	if err := s.db.CopyTo(ctx, s.root+"/"+copiesName+"/"+name); err != nil {
		return err
	}
	s.log.Debug("copied the database", zap.String("name", name), zap.String("reason", why))
	names, err := s.copies()
	if err != nil {
		return err
	}
	for _, old := range names[min(keepCopies, len(names)):] {
		if err := fsat.Unlink(s.copiesFd, old); err != nil && !fsat.IsAbsent(err) {
			return fmt.Errorf("remove %s/%s: %w", copiesName, old, err)
		}
	}
	return nil
}

// copies returns the names of the copies, newest first.
func (s *Store) copies() ([]string, error) {
	names, err := listDir(s.copiesFd)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool {
		_, err := time.Parse(copyTime, strings.TrimPrefix(n, copyPrefix))
		return err != nil || !strings.HasPrefix(n, copyPrefix)
	})
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(b, a) })
	return names, nil
}

// copyDaily keeps a copy if the last one is old and the database has changed since.
func (s *Store) copyDaily(ctx context.Context) {
	names, err := s.copies()
	if err != nil {
		return
	}
	if len(names) > 0 {
		at, _ := time.Parse(copyTime, strings.TrimPrefix(names[0], copyPrefix)) // it is one
		var st unix.Stat_t
		if age := time.Since(at); age >= 0 && age < copyAge || fsat.Stat(s.rootFd, dbName, &st) != nil || time.Unix(st.Mtim.Sec, 0).Before(at) {
			return
		}
	}
	if err := s.copyDatabase(ctx, "daily"); err != nil {
		s.log.Warn("no copy of the database was kept", zap.Error(err))
	}
}

// CopyDatabase keeps a copy of the database now and returns its path.
func (s *Store) CopyDatabase(ctx context.Context) (string, error) {
	if err := s.copyDatabase(ctx, "asked for"); err != nil {
		return "", s.mapErr(err)
	}
	names, err := s.copies()
	if err != nil || len(names) == 0 {
		return "", err
	}
	return s.root + "/" + copiesName + "/" + names[0], nil
}

// Compact writes the database anew without the space it does not use, and returns its
// sizes in bytes before and after.
func (s *Store) Compact(ctx context.Context) (before, after int64, err error) {
	before, after, err = s.db.Compact(ctx)
	return before, after, s.mapErr(err)
}
