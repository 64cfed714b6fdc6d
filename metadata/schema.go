package metadata

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	bolt "go.etcd.io/bbolt"
)

// The schema this code writes. Another major is refused, and so is writing to
// a newer minor: what its writer keeps consistent is not known here.
const (
	SchemaMajor = 1
	SchemaMinor = 3
)

// migration takes a database from the minor before to this one. What it does is
// one transaction with the new version number.
type migration struct {
	minor int
	do    func(*bolt.Tx) error
}

var migrations = []migration{
	{1, func(tx *bolt.Tx) error {
		for _, n := range [][]byte{bktManifests, idxManifestDigest, bktBlobs, bktBuildCache, idxBuildCacheImage} {
			if _, err := tx.CreateBucketIfNotExists(n); err != nil {
				return err
			}
		}
		return nil
	}},
	{2, func(btx *bolt.Tx) error {
		for _, n := range [][]byte{idxLayerBrief, idxLayerLease, idxLiveChain} {
			if _, err := btx.CreateBucketIfNotExists(n); err != nil {
				return err
			}
		}
		tx := &Tx{tx: btx}
		images, err := tx.Images()
		if err != nil {
			return err
		}
		for _, i := range images {
			config, err := tx.Config(i.ID)
			if err != nil {
				continue // K10 tells
			}
			i.brief(config)
			if err := put(tx, bktImages, []byte(i.ID), i); err != nil {
				return err
			}
		}
		return tx.fillIndexes(idxLayerBrief, idxLayerLease, idxLiveChain)
	}},
	{3, func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bktWanted)
		return err
	}},
}

// version reads the schema of a database.
func version(tx *bolt.Tx) (major, minor int, err error) {
	m := tx.Bucket(bktMeta)
	if m == nil {
		return 0, 0, fmt.Errorf("%w: it is not a plyfs database", ErrFile)
	}
	v := string(m.Get(keySchema))
	a, b, ok := strings.Cut(v, ".")
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(b)
	if !ok || err1 != nil || err2 != nil {
		return 0, 0, fmt.Errorf("%w: %w: version %q", ErrFile, ErrSchema, v)
	}
	if major != SchemaMajor {
		return 0, 0, fmt.Errorf("%w: version %s, this program knows %d.x; use the program that wrote it", ErrSchema, v, SchemaMajor)
	}
	return major, minor, nil
}

func checkSchema(tx *bolt.Tx) error {
	_, minor, err := version(tx)
	switch {
	case err != nil:
		return err
	case minor < SchemaMinor:
		return fmt.Errorf("%w: version %d.%d has not been brought to %d.%d; open the store again", ErrSchema, SchemaMajor, minor, SchemaMajor, SchemaMinor)
	case minor > SchemaMinor && tx.Writable():
		return fmt.Errorf("%w: version %d.%d, this program writes %d.%d and can only read it; use the program that wrote it", ErrSchema, SchemaMajor, minor, SchemaMajor, SchemaMinor)
	}
	for _, n := range slices.Concat(primaries, indexes) {
		if tx.Bucket(n) == nil {
			return fmt.Errorf("%w: bucket %q is missing", ErrFile, n)
		}
	}
	return nil
}

// migrate brings the database to the schema of this code.
func (db *DB) migrate(ctx context.Context) error {
	old := false
	err := db.locked(ctx, true, func(b *bolt.DB) error {
		return b.View(func(tx *bolt.Tx) error {
			_, minor, err := version(tx)
			old = minor < SchemaMinor
			return err
		})
	})
	if err == nil && old && db.opts.BeforeMigration != nil {
		if err = db.opts.BeforeMigration(ctx); err != nil {
			err = fmt.Errorf("keep a copy before the schema changes: %w", err)
		}
	}
	if err == nil && old {
		err = db.locked(ctx, false, func(b *bolt.DB) error { return b.Update(migrateTx) })
	}
	if err != nil && !errors.Is(err, ErrFile) && !errors.Is(err, ErrLocked) { // which name it
		return fmt.Errorf("database %s: %w", db.path, err)
	}
	return err
}

func migrateTx(tx *bolt.Tx) error {
	_, minor, err := version(tx)
	if err != nil || minor >= SchemaMinor { // another process was faster
		return err
	}
	for _, m := range migrations {
		if m.minor <= minor {
			continue
		}
		if err := m.do(tx); err != nil {
			return fmt.Errorf("migrate to %d.%d: %w", SchemaMajor, m.minor, err)
		}
	}
	return putVersion(tx)
}

func putVersion(tx *bolt.Tx) error {
	b := tx.Bucket(bktMeta)
	if b == nil {
		return errors.New("no meta bucket")
	}
	return b.Put(keySchema, fmt.Appendf(nil, "%d.%d", SchemaMajor, SchemaMinor))
}
