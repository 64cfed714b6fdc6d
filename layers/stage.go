package layers

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
)

// Names inside the store and inside a layer's directory.
const (
	dbName      = "plyfs.db"
	layersName  = "layers"
	chainsName  = "chains"
	rwName      = "rw"
	stageName   = "stage"
	trashName   = "trash"
	diffName    = "diff"
	dupName     = "dup"
	splitName   = "tarsplit.zst"
	indexName   = "layer.idx"
	sidecarName = "layer.json"
	upperName   = "upper"
	workName    = "work"
)

// What a content directory's row says about owners.
const (
	ownersReal    = "real"    // files have the modes and owners of the tar
	ownersVirtual = "virtual" // they have what a process without privileges can give
)

var base32Lower = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// newID returns 128 random bits as 26 letters and digits.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return base32Lower.EncodeToString(b[:])
}

// validID says whether a name from the database or the disk is one of ours:
// a name from a database is still a path.
func validID(id string) bool {
	if len(id) != 26 {
		return false
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

// Sidecar is layer.json: enough to make the layer's rows anew.
type Sidecar struct {
	Version   int            `json:"version"`
	Cache     metadata.Cache `json:"cache"`
	Layer     metadata.Layer `json:"layer"` // the chain it was first unpacked for
	Displaced []int          `json:"displaced,omitempty"`
	// Incomplete: some attributes could not be applied to the files and are
	// only in the tar-split record.
	Incomplete   bool `json:"incomplete,omitempty"`
	Placeholders int  `json:"placeholders,omitempty"` // devices that are empty files
}

func (c *Sidecar) displaced() map[int]bool {
	m := make(map[int]bool, len(c.Displaced))
	for _, d := range c.Displaced {
		m[d] = true
	}
	return m
}

// stage is a layer being made.
type stage struct {
	s         *Store
	id        string
	dir       int // stage/<id>
	diff      int
	u         *unpacker
	committed bool
}

// newStage records an ingest and makes its directory: the row comes first, so
// that a directory without a row is always garbage.
func (s *Store) newStage(ctx context.Context, kind string) (st *stage, err error) {
	owner, err := self()
	if err != nil {
		return nil, err
	}
	id := newID()
	row := metadata.Ingest{ID: id, Kind: kind, Owner: owner, Started: time.Now().UTC()}
	if err := s.update(ctx, func(tx *metadata.Tx) error { return tx.AddIngest(row) }); err != nil {
		return nil, fmt.Errorf("begin stage: %w", err)
	}
	st = &stage{s: s, id: id, dir: -1, diff: -1}
	defer func() {
		if err != nil {
			st.discard()
			st = nil
		}
	}()
	if err := s.fault("after-ingest-row"); err != nil {
		return st, err
	}
	if err := fsat.Mkdir(s.stageFd, id, 0o700); err != nil {
		return st, fmt.Errorf("make stage: %w", err)
	}
	if st.dir, err = fsat.OpenName(s.stageFd, id, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return st, fmt.Errorf("open stage: %w", err)
	}
	if err := fsat.Mkdir(st.dir, diffName, 0o700); err != nil {
		return st, fmt.Errorf("make stage: %w", err)
	}
	if st.diff, err = fsat.OpenName(st.dir, diffName, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return st, fmt.Errorf("open stage: %w", err)
	}
	return st, nil
}

// unpack fills the stage from a plain tar.
func (st *stage) unpack(ctx context.Context, r io.Reader) error {
	plain := readAhead(ctx, r, aheadBlocks)
	if err := st.unpackFrom(ctx, plain); err != nil {
		plain.stop()
		return err
	}
	diffID, err := plain.finish()
	st.u.stats.diffID = diffID
	return err
}

// unpackFrom fills the stage from a plain tar, whose digest the caller knows.
func (st *stage) unpackFrom(ctx context.Context, r io.Reader) error {
	fd, err := fsat.OpenName(st.dir, splitName, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), splitName)
	st.u = &unpacker{powers: st.s.powers, limits: st.s.limits, dir: st.dir, diff: st.diff, root: newRoot(), curFd: -1}
	shown, err := userXattrs(st.diff, "", st.s.powers.dialect)
	st.u.foreignXattrs = len(shown) > 0
	if err == nil {
		st.u.maker, err = newMaker(st.diff, st.u.foreignXattrs)
	}
	if err == nil {
		err = st.u.unpack(ctx, r, f)
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("write %s: %w", splitName, cerr)
	}
	if err == nil {
		err = st.s.fault("after-unpack")
	}
	return err
}

// close releases descriptors.
func (st *stage) close() {
	fsat.Close(st.diff)
	fsat.Close(st.dir)
	st.dir, st.diff = -1, -1
}

// discard throws the stage away. What cannot be removed now is swept later.
func (st *stage) discard() {
	st.close()
	if st.committed {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// A transaction whose failure was reported may have been written all the
	// same: look before deleting.
	named := false
	err := st.s.view(ctx, func(tx *metadata.Tx) error {
		_, err := tx.Cache(st.id)
		named = err == nil
		return nil
	})
	if err != nil || named {
		return
	}
	for _, dir := range []int{st.s.stageFd, st.s.layersFd} {
		if err := removeTree(dir, st.id); err != nil {
			st.s.log.Warn("remove stage", zap.String("stage", st.id), zap.Error(err))
			return
		}
	}
	err = st.s.updateFreeing(ctx, func(tx *metadata.Tx) error { return tx.DeleteIngest(st.id) })
	if err != nil && !errors.Is(err, metadata.ErrNotFound) {
		st.s.log.Warn("forget stage", zap.String("stage", st.id), zap.Error(err))
	}
}

// removeTree removes name in dirfd, whatever modes its directories have.
func removeTree(dirfd int, name string) error {
	err := fsat.RemoveAll(dirfd, name)
	if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
		return err
	}
	if fd, oerr := fsat.OpenName(dirfd, name, unix.O_PATH, 0); oerr == nil {
		openUp(fd)
		fsat.Close(fd)
	}
	return fsat.RemoveAll(dirfd, name)
}

// openUp makes directories of ours that somebody without privileges has closed
// to himself removable.
func openUp(fd int) {
	var st unix.Stat_t
	if fsat.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return
	}
	_ = fsat.Chmod(fd, "", 0o700) // best effort: the second removal tells
	var names []string
	if fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { names = append(names, e.Name); return nil }) != nil {
		return
	}
	for _, n := range names {
		if c, err := fsat.OpenName(fd, n, unix.O_PATH, 0); err == nil {
			openUp(c)
			fsat.Close(c)
		}
	}
}

// target is where in the chains a stage belongs.
type target struct {
	parent   digest.Digest
	origin   string
	blob     digest.Digest
	blobSize int64
	lease    string
}

// commit makes the stage a layer: bound to its chain, durable, renamed, and
// only then named by a row. Whoever loses a race for the same layer finds out
// in the transaction and throws its copy away.
func (st *stage) commit(ctx context.Context, t target) (metadata.Layer, error) {
	s := st.s
	diffID := st.u.stats.diffID
	l := metadata.Layer{
		ChainID: metadata.ChainID(t.parent, diffID), DiffID: diffID, Parent: t.parent, CacheID: st.id,
		Blob: t.blob, BlobSize: t.blobSize, Origin: t.origin, Created: time.Now().UTC(),
	}
	stack, err := s.stackOf(ctx, t.parent)
	if err != nil {
		return l, err
	}
	v, err := openView(stack)
	if err != nil {
		return l, err
	}
	defer v.Close()
	bind, err := st.u.bind(ctx, v)
	if err != nil {
		return l, err
	}
	if err := st.u.finish(ctx); err != nil {
		return l, err
	}
	if err := st.sync(); err != nil {
		return l, err
	}
	index, err := newLayerIndex(st.id, st.path())
	if err != nil {
		return l, err
	}
	defer index.Discard()
	if err := st.u.index(ctx, index); err != nil {
		return l, err
	}
	c := metadata.Cache{
		CacheID: st.id, DiffID: diffID, Bind: bind, Dialect: st.u.powers.dialect.String(), Owners: ownersReal,
		Apparent: st.u.stats.apparent, Allocated: st.u.stats.allocated, Inodes: st.u.stats.inodes,
		TarSize: st.u.stats.tarSize, SplitSHA: st.u.split.digest(), SplitSize: st.u.split.size,
		Duplicates: st.u.stats.duplicates, Created: l.Created,
	}
	if !st.u.powers.privileged {
		c.Owners = ownersVirtual
	}
	side := Sidecar{Version: 1, Cache: c, Layer: l, Incomplete: st.u.stats.incomplete, Placeholders: st.u.stats.placeholder}
	for d := range st.u.displaced {
		side.Displaced = append(side.Displaced, d)
	}
	if err := writeSidecar(st.dir, side); err != nil {
		return l, err
	}
	if err := index.Commit(filepath.Join(st.path(), indexName)); err != nil { // syncs the directory, too
		return l, err
	}
	if err := s.fault("after-index"); err != nil {
		return l, err
	}
	st.close()
	if err := fsat.Rename(s.stageFd, st.id, s.layersFd, st.id, unix.RENAME_NOREPLACE); err != nil {
		return l, fmt.Errorf("move stage into place: %w", err)
	}
	if err := s.fault("after-rename"); err != nil {
		return l, err
	}
	for _, fd := range []int{s.layersFd, s.stageFd} {
		if err := unix.Fsync(fd); err != nil {
			return l, fmt.Errorf("sync store directory: %w", err)
		}
	}
	if err := s.fault("after-dirsync"); err != nil {
		return l, err
	}
	var junk []metadata.Trash
	err = s.update(ctx, func(tx *metadata.Tx) error {
		junk = nil
		if err := tx.DeleteIngest(st.id); err != nil {
			return err
		}
		shared, err := place(tx, l, c, t)
		if shared && err == nil {
			junk, err = addTrash(tx, "lost race", layersName+"/"+st.id)
		}
		return err
	})
	if err != nil {
		return l, err
	}
	st.committed = true
	if err := s.fault("after-row"); err != nil {
		return l, err
	}
	s.purge(ctx, junk)
	return l, nil
}

// place inserts the layer's row, unless it is there, and the content's row,
// unless another directory holds the same; then shared is true.
func place(tx *metadata.Tx, l metadata.Layer, c metadata.Cache, t target) (shared bool, err error) {
	if tx.HasLayer(l.ChainID) {
		shared = true
	} else {
		same, err := tx.CachesByDiff(l.DiffID)
		if err != nil {
			return false, err
		}
		row := &c
		for _, have := range same {
			if have.Bind == c.Bind && have.Dialect == c.Dialect && have.Owners == c.Owners {
				l.CacheID, row, shared = have.CacheID, nil, true
				break
			}
		}
		if err := tx.AddLayer(l, row); err != nil {
			return false, err
		}
	}
	return shared, tx.LeaseLayer(t.lease, l.ChainID)
}

// path names the stage for those who take a path, and for messages.
func (st *stage) path() string { return filepath.Join(st.s.root, stageName, st.id) }

// sync has everything in the stage on disk.
func (st *stage) sync() error {
	if err := st.s.fault("before-sync"); err != nil {
		return err
	}
	if err := fsat.Syncfs(st.dir); err != nil {
		return fmt.Errorf("sync stage: %w", err)
	}
	return st.s.fault("after-sync")
}

func writeSidecar(dir int, side Sidecar) (err error) {
	raw, err := json.MarshalIndent(side, "", "\t")
	if err != nil {
		return err
	}
	const tmp = sidecarName + ".new"
	fd, err := fsat.OpenName(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", sidecarName, err)
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = f.Write(append(raw, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fsat.Rename(dir, tmp, dir, sidecarName, 0)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", sidecarName, err)
	}
	return nil
}

func readSidecar(dir int) (side Sidecar, err error) {
	fd, err := fsat.OpenRegular(dir, sidecarName, unix.O_RDONLY)
	if err != nil {
		return side, fmt.Errorf("%s: %w", sidecarName, err)
	}
	f := os.NewFile(uintptr(fd), sidecarName)
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 64<<20))
	if err != nil {
		return side, err
	}
	if err := json.Unmarshal(raw, &side); err != nil || side.Version != 1 {
		return side, fmt.Errorf("%w: %s: version %d: %w", ErrCorrupt, sidecarName, side.Version, errors.Join(err))
	}
	return side, nil
}

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

// purge deletes what a committed transaction gave up. Anything that fails
// stays in the trash for the next sweep.
func (s *Store) purge(ctx context.Context, junk []metadata.Trash) {
	if len(junk) == 0 || s.fault("before-purge") != nil {
		return
	}
	ctx = context.WithoutCancel(ctx)
	var done []uint64
	for _, t := range junk {
		if err := s.purgeOne(t); err != nil {
			s.log.Warn("delete trash", zap.String("path", t.Path), zap.Error(err))
			continue
		}
		done = append(done, t.Seq)
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
var trashDirs = map[string]bool{layersName: true, stageName: true, rwName: true, trashName: true, chainsName: true}

func (s *Store) purgeOne(t metadata.Trash) error {
	dir, name, ok := strings.Cut(t.Path, "/")
	if !ok || !trashDirs[dir] || name == "" || name == "." || name == ".." || strings.Contains(name, "/") {
		return fmt.Errorf("%w: trash row names %q, which is no place of ours", ErrCorrupt, t.Path)
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

// LayerDir returns the directory of a content row.
func (s *Store) layerDir(c metadata.Cache) (LayerDir, error) {
	d, err := whiteout.ParseDialect(c.Dialect)
	if err != nil {
		return LayerDir{}, fmt.Errorf("layer directory %s: %w: %w", c.CacheID, ErrCorrupt, err)
	}
	if !validID(c.CacheID) {
		return LayerDir{}, fmt.Errorf("%w: the database names the layer directory %q", ErrCorrupt, c.CacheID)
	}
	return LayerDir{
		Path: filepath.Join(s.root, layersName, c.CacheID, diffName), Dialect: d, DiffID: c.DiffID,
		CacheID: c.CacheID, Virtual: c.Owners != ownersReal,
	}, nil
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

// openFiles opens the directory of a layer.
func (s *Store) openFiles(cacheID string) (layerFiles, error) {
	l := layerFiles{dir: -1, diff: -1}
	if !validID(cacheID) {
		return l, fmt.Errorf("%w: the database names the layer directory %q", ErrCorrupt, cacheID)
	}
	var err error
	if l.dir, err = fsat.OpenName(s.layersFd, cacheID, unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
		l.diff, err = fsat.OpenName(l.dir, diffName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	if err != nil {
		l.Close()
		return l, fmt.Errorf("%w: layer directory %s/%s: %w", ErrCorrupt, layersName, cacheID, err)
	}
	return l, nil
}
