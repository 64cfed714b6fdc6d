package layers

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// layerDir returns the directory of a content row.
func (s *Store) layerDir(c metadata.Cache) (LayerDir, error) {
	d, err := whiteout.ParseDialect(c.Dialect)
	if err != nil {
		return LayerDir{}, fmt.Errorf("layer directory %s: %w: %w", c.CacheID, ErrCorrupt, err)
	}
	if !validID(c.CacheID) {
		return LayerDir{}, fmt.Errorf("%w: the database names the layer directory %q", ErrCorrupt, c.CacheID)
	}
	dir := LayerDir{Path: filepath.Join(s.root, layersName, c.CacheID, diffName), Dialect: d, DiffID: c.DiffID, CacheID: c.CacheID}
	if c.Adopted != nil {
		dir.Path, dir.adopted = c.Adopted.Path, c.Adopted
	}
	dir.setOwners(c.Owners)
	return dir, nil
}

// setOwners sets what follows from what a row says about owners.
func (d *LayerDir) setOwners(owners string) {
	switch owners {
	case ownersReal:
	case ownersOverride:
		d.Override = override.Containers
	default:
		d.Virtual = true
	}
}

// indexID is the ID of the layer's index.
func (d LayerDir) indexID() string {
	return indexID(d.CacheID, d.Override == override.None && !d.Virtual)
}

// upperOverride is how an upper in a dialect of ours says who owns its objects.
// Uppers of older versions have no attributes, and all their files belong to root,
// as far as that goes: there never was anything else.
func upperOverride(d whiteout.Dialect) override.Form {
	if d == whiteout.UserXattr {
		return override.Containers
	}
	return override.None
}

// stackOf returns the directories of a chain, topmost first.
func (s *Store) stackOf(ctx context.Context, chain digest.Digest) (out []LayerDir, err error) {
	if chain == "" {
		return nil, nil
	}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		out, err = s.stackTx(tx, chain)
		return err
	})
	return out, err
}

func (s *Store) stackTx(tx *metadata.Tx, chain digest.Digest) ([]LayerDir, error) {
	rows, err := tx.Chain(chain)
	if err != nil {
		return nil, err
	}
	out := make([]LayerDir, 0, len(rows))
	for _, r := range rows {
		c, err := tx.Cache(r.CacheID)
		if err != nil {
			return nil, err
		}
		d, err := s.layerDir(c)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

// openLayer opens the directory of a layer to read its tar.
func (s *Store) openLayer(cacheID string) (layerFiles, Sidecar, error) {
	l, err := s.openFiles(cacheID)
	if err != nil {
		return l, Sidecar{}, err
	}
	side, err := readSidecar(l.dir)
	if err != nil {
		l.Close()
		return l, side, fmt.Errorf("%w: layer directory %s/%s: %w", ErrCorrupt, layersName, cacheID, err)
	}
	return l, side, nil
}

// openFiles opens the directory of a layer. One without content has it in another
// engine's store, and its sidecar says where.
func (s *Store) openFiles(cacheID string) (layerFiles, error) {
	l := layerFiles{dir: -1, diff: -1}
	if !validID(cacheID) {
		return l, fmt.Errorf("%w: the database names the layer directory %q", ErrCorrupt, cacheID)
	}
	var err error
	if l.dir, err = fsat.OpenName(s.layersFd, cacheID, unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
		l.diff, err = openContent(l.dir)
	}
	if err != nil {
		l.Close()
		return l, fmt.Errorf("%w: layer directory %s/%s: %w", ErrCorrupt, layersName, cacheID, err)
	}
	l.adopted = !hasContent(l.dir)
	return l, nil
}
