package layers

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
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
	historyName = "history" // beside them: what was copied up, and by whom
)

// What a content directory's row says about owners.
const (
	ownersReal = "real" // files have the modes and owners of the tar
	// Files have what a process without privileges can give, and an attribute
	// that says what the object is (package whiteout/override).
	ownersOverride = "override"
	// The same without the attribute, which the file system, or an older version,
	// does not have: only the layer's index tells.
	ownersVirtual = "virtual"
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
	if s.powers.guest != nil {
		return nil, s.powers.guest
	}
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
	foreign, err := fsat.Listxattr(st.diff, "")
	st.u.foreignXattrs = len(foreign) > 0
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

// path names the stage for those who take a path, and for messages.
func (st *stage) path() string { return filepath.Join(st.s.root, stageName, st.id) }
