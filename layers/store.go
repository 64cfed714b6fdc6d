package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/override"
)

// Store is a layer and image store in one directory. Its methods may be called
// from several goroutines, and several processes may have the same directory
// open.
type Store struct {
	root   string // immutable, like all below
	opts   Options
	limits Limits
	log    *zap.Logger
	db     *metadata.DB
	powers powers

	rootFd, layersFd, stageFd, rwFd, trashFd, chainsFd, imagesFd, copiesFd int

	// buried are trash rows of images that no purge has been asked for yet.
	buried struct {
		sync.Mutex
		rows []metadata.Trash
	}
	savedMu sync.Mutex // held with the lock of images/, see lockSaved

	// hook is told the name of each step of a change to the disk and may end
	// it there. Tests only.
	hook   func(point string) error
	hookMu sync.Mutex // calls of hook come one at a time
}

// Open opens the store in root and makes an empty one if there is none. The
// database is not kept open between calls.
func Open(ctx context.Context, root string, o Options) (_ *Store, err error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("store %q: %w", root, err)
	}
	s := &Store{root: abs, opts: o, limits: o.Limits.withDefaults(), log: o.Logger, rootFd: -1, layersFd: -1, stageFd: -1, rwFd: -1, trashFd: -1, chainsFd: -1, imagesFd: -1, copiesFd: -1}
	if s.log == nil {
		s.log = zap.NewNop()
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store %s: %w", abs, errors.Join(err, s.Close()))
		}
	}()
	if err := os.MkdirAll(abs, 0o711); err != nil {
		return nil, err
	}
	if s.rootFd, err = fsat.OpenTrusted(abs); err != nil {
		return nil, err
	}
	if err := s.checkFileSystem(); err != nil {
		return nil, err
	}
	for _, d := range []struct {
		name string
		fd   *int
	}{{layersName, &s.layersFd}, {stageName, &s.stageFd}, {rwName, &s.rwFd}, {trashName, &s.trashFd}, {chainsName, &s.chainsFd}, {imagesName, &s.imagesFd}, {copiesName, &s.copiesFd}} {
		// 0700: what lies below carries suid bits and foreign owners.
		if err := fsat.Mkdir(s.rootFd, d.name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("make %s: %w", d.name, err)
		}
		if *d.fd, err = s.openOwn(d.name); err != nil {
			return nil, err
		}
		if err := dropDefaultACL(*d.fd); err != nil {
			return nil, fmt.Errorf("default ACL of %s: %w", d.name, err)
		}
	}
	s.db = metadata.New(filepath.Join(abs, dbName), metadata.Options{
		LockTimeout: o.LockTimeout, OnWait: o.OnLockWait,
		BeforeMigration: func(ctx context.Context) error { return s.copyDatabase(ctx, "migration") },
	})
	if err := s.mapErr(s.openDatabase(ctx)); err != nil && (!o.Damaged || !errors.Is(err, ErrCorrupt)) {
		return nil, err
	}
	if s.powers, err = probe(s.stageFd); err != nil {
		return nil, err
	}
	s.refill()
	return s, nil
}

// openOwn opens a directory of the store. Something else in its place is moved aside by
// those who repair.
func (s *Store) openOwn(name string) (int, error) {
	fd, err := fsat.OpenName(s.rootFd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		return fd, nil
	}
	if !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
		return -1, fmt.Errorf("open %s: %w", name, err)
	}
	if !s.opts.Damaged {
		return -1, fmt.Errorf("%w: %s is not a directory; plyfs check --repair moves it aside", ErrCorrupt, name)
	}
	aside := name + ".damaged-" + newID()
	if err := fsat.Rename(s.rootFd, name, s.rootFd, aside, unix.RENAME_NOREPLACE); err != nil {
		return -1, fmt.Errorf("move %s aside: %w", name, err)
	}
	s.log.Warn("something that is not a directory of ours was moved aside", zap.String("name", aside))
	if err := fsat.Mkdir(s.rootFd, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, fmt.Errorf("make %s: %w", name, err)
	}
	return fsat.OpenName(s.rootFd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// dropDefaultACL removes what a directory above the store hands down: it would become a
// part of every object of every image.
func dropDefaultACL(fd int) error {
	const attr = "system.posix_acl_default"
	if _, err := fsat.Getxattr(fd, "", attr, nil); err != nil {
		return nil //nolint:nilerr // there is none, or can be none
	}
	return fsat.Removexattr(fd, "", attr)
}

// probe finds out what we may do: a root that cannot set trusted attributes is
// one of a user namespace.
func probe(stageFd int) (powers, error) {
	root := powers{privileged: true, encoding: encoding{dialect: whiteout.Overlay}}
	name := "probe-" + newID()
	if os.Geteuid() != 0 {
		return probeUser(stageFd)
	}
	switch err := fsat.Mkdir(stageFd, name, 0o700); {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EROFS):
		// Looking and removing must still be possible.
		if initialUserNS() {
			return root, nil
		}
		return probeUser(stageFd)
	case err != nil:
		return powers{}, fmt.Errorf("write to the store: %w", err)
	}
	defer func() { _ = fsat.Rmdir(stageFd, name) }() // swept otherwise
	fd, err := fsat.OpenName(stageFd, name, unix.O_PATH, 0)
	if err != nil {
		return powers{}, err
	}
	defer fsat.Close(fd)
	if root.guest, err = guest(stageFd, fd); err != nil {
		return powers{}, err
	}
	switch err := whiteout.Overlay.SetOpaque(fd); {
	case err == nil:
		return root, nil
	case errors.Is(err, unix.EPERM):
		user, err := probeUser(stageFd)
		user.guest = root.guest
		return user, err
	case errors.Is(err, unix.EOPNOTSUPP):
		return powers{}, fmt.Errorf("%w: the file system of the store has no trusted.* extended attributes", ErrUnsupported)
	default:
		return powers{}, fmt.Errorf("set an extended attribute in the store: %w", err)
	}
}

// guest compares the owners of the stage and of what we have just made in it.
func guest(stageFd, made int) (not, err error) {
	var store, ours unix.Stat_t
	if err := errors.Join(fsat.Stat(stageFd, "", &store), fsat.Stat(made, "", &ours)); err != nil {
		return nil, err
	}
	if store.Uid == ours.Uid {
		return nil, nil
	}
	return fmt.Errorf("%w: the store belongs to user %d, who could not remove what user %d puts there: run this as that user", ErrUnsupported, store.Uid, ours.Uid), nil
}

// probeUser finds out what somebody without privileges may do.
func probeUser(stageFd int) (powers, error) {
	p := powers{encoding: encoding{dialect: whiteout.UserXattr, override: override.Containers}}
	_, err := fsat.Getxattr(stageFd, "", p.override.Attr(), nil)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP): // the file system has no user attributes
		p.dialect, p.override = whiteout.AUFS, override.None
	case err != nil && !errors.Is(err, unix.ENODATA):
		return p, fmt.Errorf("read an extended attribute in the store: %w", err)
	}
	return p, nil
}

// initialUserNS reports whether all IDs are mapped to themselves.
func initialUserNS() bool {
	raw, err := os.ReadFile("/proc/self/uid_map")
	f := strings.Fields(string(raw))
	return err == nil && len(f) == 3 && f[0] == "0" && f[1] == "0" && f[2] == "4294967295"
}

// Close releases what the store holds. It does not touch the disk.
func (s *Store) Close() error {
	for _, fd := range []*int{&s.rootFd, &s.layersFd, &s.stageFd, &s.rwFd, &s.trashFd, &s.chainsFd, &s.imagesFd, &s.copiesFd} {
		fsat.Close(*fd)
		*fd = -1
	}
	return nil
}

// Root returns the absolute directory of the store.
func (s *Store) Root() string { return s.root }

func (s *Store) fault(point string) error {
	if s.hook == nil {
		return nil
	}
	s.hookMu.Lock()
	defer s.hookMu.Unlock()
	return s.hook(point)
}

func (s *Store) view(ctx context.Context, fn func(*metadata.Tx) error) error {
	skipped := 0
	err := s.db.View(ctx, func(tx *metadata.Tx) error {
		defer func() { skipped = tx.Skipped() }()
		return fn(tx)
	})
	if skipped > 0 {
		s.log.Warn("rows of the database that cannot be read were left out: run plyfs check --repair", zap.Int("count", skipped))
	}
	return s.mapErr(err)
}

// update runs a transaction, and has what is kept beside the database follow it.
func (s *Store) update(ctx context.Context, fn func(*metadata.Tx) error) error {
	var (
		touched metadata.Touched
		buried  []metadata.Trash
	)
	err := s.db.Update(ctx, func(tx *metadata.Tx) error {
		err := fn(tx)
		if touched = tx.Touched(); err == nil {
			buried, err = buryImages(tx, touched.Images)
		}
		return err
	})
	if err == nil {
		s.buried.Lock()
		s.buried.rows = append(s.buried.rows, buried...)
		s.buried.Unlock()
		s.followed(ctx, touched)
	}
	return s.mapErr(err)
}

// mapErr adds our sentinel to an error of the database.
func (s *Store) mapErr(err error) error {
	if err == nil {
		return nil
	}
	for _, have := range []error{ErrNotFound, ErrExists, ErrInUse, ErrInvalid, ErrCorrupt, ErrLocked, ErrUnsupported} {
		if errors.Is(err, have) {
			return err
		}
	}
	for _, m := range []struct{ from, to error }{
		{metadata.ErrFile, errDatabase}, // before those it also matches
		{metadata.ErrNotFound, ErrNotFound},
		{metadata.ErrExists, ErrExists},
		{metadata.ErrInUse, ErrInUse},
		{metadata.ErrLocked, ErrLocked},
		{metadata.ErrSchema, ErrUnsupported},
		{metadata.ErrInvariant, ErrCorrupt},
		{metadata.ErrCorrupt, ErrCorrupt},
	} {
		if !errors.Is(err, m.from) {
			continue
		}
		if errors.Is(m.to, errDatabase) {
			return sentinel{fmt.Errorf("%w; plyfs store rebuild makes it anew from what lies beside it", err), ErrCorrupt}
		}
		return sentinel{err, m.to}
	}
	return err
}

// errDatabase stands for an error that concerns the whole database file.
var errDatabase = errors.New("database file")

// sentinel makes an error be one of ours without changing its text.
type sentinel struct {
	error
	is error
}

func (e sentinel) Unwrap() []error { return []error{e.error, e.is} }

// sweep removes what dead processes have left: their stages, the layers only
// their leases kept, containers they did not finish, and the trash. It is
// called before work that adds to the store.
func (s *Store) sweep(ctx context.Context) error {
	// Names first, rows second: whoever makes a stage writes its row before
	// the directory exists, so a name without a row is garbage.
	names, err := listDir(s.stageFd)
	if err != nil {
		return err
	}
	var (
		ingests    []metadata.Ingest
		leases     []metadata.Lease
		containers []metadata.Container
		live       []metadata.Live
		trash      []metadata.Trash
		known      = map[string]bool{}
	)
	err = s.view(ctx, func(tx *metadata.Tx) (err error) {
		if ingests, err = tx.Ingests(); err != nil {
			return err
		}
		if leases, err = tx.Leases(); err != nil {
			return err
		}
		if containers, err = tx.Containers(); err != nil {
			return err
		}
		if live, err = tx.LiveMounts(); err != nil {
			return err
		}
		for _, id := range append(tx.IngestIDs(), tx.MountIDs()...) {
			known[id] = true // also those whose row cannot be read
		}
		trash, err = tx.TrashRows()
		return err
	})
	if err != nil {
		return err
	}
	s.copyDaily(ctx)
	boot, err := BootID()
	if err != nil {
		return err
	}
	var void []metadata.Live // mounts do not survive a reboot
	for _, l := range live {
		if l.BootID != boot {
			void = append(void, l)
		}
	}
	var deadIngests, deadLeases, deadContainers []string
	for _, i := range ingests {
		if !alive(i.Owner, i.Started) {
			deadIngests = append(deadIngests, i.ID)
		}
	}
	for _, l := range leases {
		if !alive(l.Owner, l.Started) {
			deadLeases = append(deadLeases, l.ID)
		}
	}
	for _, c := range containers {
		if c.State == metadata.Creating {
			if !alive(c.Owner, c.Created) {
				deadContainers = append(deadContainers, c.ID)
			}
		}
	}
	if len(deadIngests)+len(deadLeases)+len(deadContainers)+len(void) > 0 {
		var more []metadata.Trash
		err = s.updateFreeing(ctx, func(tx *metadata.Tx) (err error) {
			for _, l := range void {
				if err := tx.DeleteLive(l.BootID, l.Target); err != nil {
					return err
				}
			}
			more, err = s.sweepTx(tx, deadIngests, deadLeases, deadContainers)
			return err
		})
		if err != nil {
			return err
		}
		trash = append(trash, more...)
	}
	for _, n := range names {
		if !known[n] && !s.youngProbe(n) {
			if err := removeTree(s.stageFd, n); err != nil {
				s.log.Warn("sweep stage", zap.String("name", n), zap.Error(err))
			}
		}
	}
	if _, _, err := s.oldParts(partialAge, false); err != nil {
		s.log.Warn("sweep partial blobs", zap.Error(err))
	}
	s.purge(ctx, trash)
	return nil
}

// youngProbe spares the directory another process is just probing with.
func (s *Store) youngProbe(name string) bool {
	var st unix.Stat_t
	return len(name) > 6 && name[:6] == "probe-" && fsat.Stat(s.stageFd, name, &st) == nil &&
		time.Since(time.Unix(st.Ctim.Sec, st.Ctim.Nsec)) < time.Minute
}

func (s *Store) sweepTx(tx *metadata.Tx, ingests, leases, containers []string) (trash []metadata.Trash, err error) {
	for _, id := range ingests {
		if err := tx.DeleteIngest(id); errors.Is(err, metadata.ErrNotFound) {
			continue // another sweep was faster
		} else if err != nil {
			return nil, err
		}
		paths := []string{stageName + "/" + id}
		if _, err := tx.Cache(id); errors.Is(err, metadata.ErrNotFound) {
			paths = append(paths, layersName+"/"+id)
		}
		t, err := addTrash(tx, "owner died", paths...)
		if err != nil {
			return nil, err
		}
		trash = append(trash, t...)
	}
	for _, id := range containers {
		c, err := tx.Container(id)
		if err != nil || c.State != metadata.Creating {
			continue
		}
		if _, err := tx.DeleteContainer(id); err != nil {
			return nil, err
		}
		t, err := addTrash(tx, "owner died", stageName+"/"+c.MountID, rwName+"/"+c.MountID)
		if err != nil {
			return nil, err
		}
		trash = append(trash, t...)
		more, err := releaseChain(tx, c.Chain, nil)
		if err != nil {
			return nil, err
		}
		trash = append(trash, more...)
	}
	for _, id := range leases {
		more, err := endLease(tx, id)
		if err != nil {
			return nil, err
		}
		trash = append(trash, more...)
	}
	return trash, nil
}

func listDir(fd int) ([]string, error) {
	var names []string
	err := fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { names = append(names, e.Name); return nil })
	return names, err
}
