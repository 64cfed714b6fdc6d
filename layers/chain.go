package layers

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/whiteout/merge"
	"github.com/plyfs/plyfs/whiteout/override"
)

// The index of a chain lies in chains/<chainID>-<id>.idx. The id, which is also
// in the file, is a digest of everything that the index depends on and that can
// differ for one chainID: which directories the layers are in, and whether these
// are the directories that were indexed or copies of them. So an index is never
// taken for one of another stack, whoever wrote it and when.

// The version is part of every id: what is merged in another way is another
// index. Version 1 showed what the files are also in a store without privileges;
// of the layers of a store of root, the two versions are the same.
const (
	chainVersion     = "plyfs chain 1"
	userChainVersion = "plyfs chain 2"
)

// verifyMax is the size up to which an index that is there is read as a whole
// before it is used. A larger one is checked block by block while it is used.
const verifyMax = 64 << 20

// ChainIndex returns the path and the id of the merged index of a stack's
// lowers, and makes it if it is not there. Both are empty for a stack that is
// no chain of the store. Two processes that make the same index do the work
// twice and nothing else.
func (s *Store) ChainIndex(ctx context.Context, st Stack) (path, id string, err error) {
	if st.ChainID == "" || len(st.Lowers) == 0 {
		return "", "", nil
	}
	if id, err = s.stackID(st.Lowers); err != nil {
		return "", "", fmt.Errorf("chain %s: %w", st.ChainID, err)
	}
	path = filepath.Join(s.root, chainsName, chainFile(st.ChainID, id))
	err = checkChain(path, id, len(st.Lowers))
	if err == nil {
		return path, id, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("index of a chain is made anew", zap.String("chain_id", st.ChainID.String()), zap.Error(err))
	}
	if err := s.buildChain(ctx, st.Lowers, path, id); err != nil {
		return "", "", fmt.Errorf("chain %s: %w", st.ChainID, err)
	}
	return path, id, nil
}

// chainFile is the name of a chain's index.
func chainFile(chain digest.Digest, id string) string {
	return chainPrefix(chain) + digest.Digest(id).Encoded()[:32] + chainExt
}

// chainPrefix is what the names of all indexes of a chain begin with.
func chainPrefix(chain digest.Digest) string { return hexOf(chain) + "-" }

const chainExt = ".idx"

// stackID identifies a list of layer directories.
func (s *Store) stackID(lowers []LayerDir) (string, error) {
	sum := sha256.New()
	version := chainVersion
	for _, d := range lowers {
		if d.Override != override.None || d.Virtual {
			version = userChainVersion
		}
	}
	fmt.Fprintln(sum, version)
	for _, d := range lowers {
		var st unix.Stat_t
		if !validID(d.CacheID) {
			return "", fmt.Errorf("%w: layer directory %q", ErrCorrupt, d.CacheID)
		}
		if err := s.statContent(d, &st); err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %s %d %d.%d\n", d.CacheID, d.Dialect, st.Ino, st.Ctim.Sec, st.Ctim.Nsec)
	}
	return digest.NewDigest(digest.SHA256, sum).String(), nil
}

// checkChain looks whether the file at path is the index id of n layers.
func checkChain(path, id string, n int) error {
	x, err := chainindex.Open(path)
	if err != nil {
		return err
	}
	switch st, serr := os.Stat(path); {
	case x.Kind() != chainindex.KindChain || x.ID() != id || x.Layers() != n:
		err = fmt.Errorf("%w: %s is the index of %v %s of %d layers, expected chain %s of %d", chainindex.ErrCorrupt, path, x.Kind(), x.ID(), x.Layers(), id, n)
	case serr != nil:
		err = serr
	case st.Size() <= verifyMax:
		if err = x.VerifySums(); err != nil {
			err = fmt.Errorf("index %q: %w", path, err)
		}
	}
	return errors.Join(err, x.Close())
}

// buildChain merges the indexes of layers.
func (s *Store) buildChain(ctx context.Context, lowers []LayerDir, path, id string) error {
	return s.withSoundIndexes(ctx, lowers, func() error { return s.tryBuildChain(ctx, lowers, path, id) })
}

// withSoundIndexes does something with the indexes of layers. A layer whose index turns
// out to be damaged gets a new one, and the work begins again.
func (s *Store) withSoundIndexes(ctx context.Context, lowers []LayerDir, f func() error) error {
	err := f()
	if !errors.Is(err, chainindex.ErrCorrupt) && !errors.Is(err, chainindex.ErrFault) {
		return err
	}
	for _, d := range lowers {
		if rerr := s.renewIndex(ctx, d); rerr != nil {
			return errors.Join(err, rerr)
		}
	}
	return f()
}

// renewIndex makes a layer's index anew if it is damaged.
func (s *Store) renewIndex(ctx context.Context, d LayerDir) error {
	l, err := s.openFiles(d.CacheID)
	if err != nil {
		return err
	}
	defer l.Close()
	x, err := readLayerIndex(l, d.indexID())
	if err == nil {
		err = errors.Join(x.Verify(), x.Close())
	}
	if err == nil {
		return nil
	}
	s.log.Warn("index of a layer is made anew", zap.String("layer", d.CacheID), zap.Error(err))
	return s.rebuildIndex(ctx, l, d)
}

func (s *Store) tryBuildChain(ctx context.Context, lowers []LayerDir, path, id string) (err error) {
	w, err := s.mergeIndexes(ctx, lowers, id, filepath.Dir(path))
	if err != nil {
		return err
	}
	defer w.Discard()
	if err := s.fault("before-chain"); err != nil {
		return err
	}
	return w.Commit(path)
}

// mergeIndexes merges the indexes of layers; what does not fit into memory is in
// tempDir.
func (s *Store) mergeIndexes(ctx context.Context, lowers []LayerDir, id, tempDir string) (_ *chainindex.Writer, err error) {
	indexes, err := s.layerIndexes(ctx, lowers)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeIndexes(indexes)) }()
	w, err := chainindex.NewWriter(chainindex.WriterOptions{Kind: chainindex.KindChain, ID: id, Layers: len(lowers), TempDir: tempDir})
	if err != nil {
		return nil, err
	}
	if err := chainindex.Merge(w, indexes, chainindex.MergeOptions{Rule: unionRule, Step: ctx.Err}); err != nil {
		w.Discard()
		return nil, err
	}
	return w, nil
}

// layerIndexes opens the indexes of layers.
func (s *Store) layerIndexes(ctx context.Context, dirs []LayerDir) ([]*chainindex.Index, error) {
	indexes := make([]*chainindex.Index, 0, len(dirs))
	for _, d := range dirs {
		x, err := s.layerIndex(ctx, d)
		if err != nil {
			return nil, errors.Join(err, closeIndexes(indexes))
		}
		indexes = append(indexes, x)
	}
	return indexes, nil
}

func closeIndexes(indexes []*chainindex.Index) error {
	var errs []error
	for _, x := range indexes {
		errs = append(errs, x.Close())
	}
	return errors.Join(errs...)
}

// mergedIndex is the merged tree of layers for somebody who looks at it once: nothing
// is kept of it. nil: there are no layers.
func (s *Store) mergedIndex(ctx context.Context, lowers []LayerDir) (x *chainindex.Index, err error) {
	if len(lowers) == 0 {
		return nil, nil
	}
	err = s.withSoundIndexes(ctx, lowers, func() error {
		w, err := s.mergeIndexes(ctx, lowers, "", "")
		if err != nil {
			return err
		}
		defer w.Discard()
		var buf bytes.Buffer
		if _, err := w.WriteTo(&buf); err != nil {
			return err
		}
		x, err = chainindex.New(buf.Bytes())
		return err
	})
	return x, err
}

// unionRule is package merge as an index wants it.
func unionRule(dirs []chainindex.LayerDir) ([]chainindex.MergedEntry, error) {
	listings := make([]merge.Listing, len(dirs))
	back := make([][]int32, len(dirs)) // from entries of listings to those of dirs
	for i, d := range dirs {
		l := merge.Listing{Opaque: d.Opaque, Entries: make([]merge.Entry, 0, len(d.Entries))}
		for j, e := range d.Entries {
			if e.Slot != 0 {
				k := merge.Other
				if e.Type == unix.DT_DIR {
					k = merge.Dir
				}
				l.Entries = append(l.Entries, merge.Entry{Name: e.Name, Kind: k})
				back[i] = append(back[i], int32(j))
			}
			if e.Whiteout {
				l.Entries = append(l.Entries, merge.Entry{Name: e.Name, Kind: merge.Whiteout})
				back[i] = append(back[i], int32(j))
			}
		}
		listings[i] = l
	}
	merged := merge.Merge(listings)
	out := make([]chainindex.MergedEntry, len(merged))
	for i, m := range merged {
		out[i].Name = m.Name
		for _, r := range m.Refs {
			out[i].Refs = append(out[i].Refs, chainindex.LayerRef{Dir: int(r.Listing), Entry: int(back[r.Listing][r.Entry])})
		}
	}
	return out, nil
}

// tempAge is how old the unfinished file of an index must be for nobody to be
// writing it any more.
const tempAge = time.Hour

// unusedChains returns those of the names in chains/ that no chain has a use
// for. The names were read before the rows: an index is made after its chain.
func (s *Store) unusedChains(ctx context.Context, names []string) (out []string, err error) {
	known := map[string]bool{}
	err = s.view(ctx, func(tx *metadata.Tx) error {
		rows, err := tx.Layers()
		if err != nil {
			return err
		}
		trash, err := tx.TrashRows()
		if err != nil {
			return err
		}
		for _, l := range rows {
			known[hexOf(l.ChainID)] = true
		}
		for _, t := range trash { // about to be removed
			if hex, ok := strings.CutPrefix(t.Path, chainsName+"/"); ok {
				known[strings.TrimSuffix(hex, "-")] = true
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		hex, _, _ := strings.Cut(n, "-")
		var st unix.Stat_t
		switch {
		case !strings.HasSuffix(n, chainExt): // unfinished, or none of ours
			if fsat.Stat(s.chainsFd, n, &st) == nil && time.Since(time.Unix(st.Ctim.Sec, st.Ctim.Nsec)) > tempAge {
				out = append(out, n)
			}
		case !known[hex]:
			out = append(out, n)
		}
	}
	return out, nil
}

// removeChains removes every index of a chain.
func (s *Store) removeChains(hex string) error {
	names, err := listDir(s.chainsFd)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if strings.HasPrefix(n, hex) {
			if err := fsat.Unlink(s.chainsFd, n); err != nil && !fsat.IsAbsent(err) {
				errs = append(errs, fmt.Errorf("remove %s/%s: %w", chainsName, n, err))
			}
		}
	}
	return errors.Join(errs...)
}
