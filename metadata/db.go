package metadata

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

const (
	defaultTimeout = 30 * time.Second
	// patience is how long a busy lock goes unmentioned.
	patience = time.Second
)

// Options configure a [DB].
type Options struct {
	LockTimeout time.Duration // 0: 30 s
	// OnWait is told once per transaction that the lock is busy.
	OnWait func(msg string)
}

// DB is a database file. It is open only while a transaction runs.
type DB struct {
	path string
	opts Options

	mu sync.RWMutex // serialises this process's own use of the file lock
}

// Tx is a transaction. It must not outlive the function it was given to.
type Tx struct {
	tx *bolt.Tx
}

// New names a database without touching it.
func New(path string, o Options) *DB {
	if o.LockTimeout <= 0 {
		o.LockTimeout = defaultTimeout
	}
	return &DB{path: path, opts: o}
}

// Path returns the file's name.
func (db *DB) Path() string { return db.path }

// Init creates the database if it does not exist and checks its schema if it
// does. The file appears complete or not at all.
func (db *DB) Init(ctx context.Context) error {
	_, err := os.Lstat(db.path)
	if errors.Is(err, os.ErrNotExist) {
		err = db.create()
	}
	if err != nil {
		return err
	}
	if err := db.migrate(ctx); err != nil {
		return err
	}
	return db.View(ctx, func(*Tx) error { return nil })
}

func (db *DB) create() (err error) {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	tmp := db.path + ".new." + hex.EncodeToString(id[:4])
	defer os.Remove(tmp)
	b, err := bolt.Open(tmp, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType, Timeout: patience})
	if err != nil {
		return fmt.Errorf("create database %s: %w", db.path, err)
	}
	err = b.Update(func(tx *bolt.Tx) error {
		for _, n := range slices.Concat(primaries, indexes) {
			if _, err := tx.CreateBucket(n); err != nil {
				return err
			}
		}
		m := tx.Bucket(bktMeta)
		return errors.Join(putVersion(tx), m.Put(keyUUID, []byte(hex.EncodeToString(id[:]))),
			m.Put(keyCreated, []byte(time.Now().UTC().Format(time.RFC3339))))
	})
	if cerr := b.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		// Not rename: of two processes that create the store, one wins.
		err = os.Link(tmp, db.path)
		if errors.Is(err, os.ErrExist) {
			err = nil
		}
	}
	if err == nil {
		err = syncDir(filepath.Dir(db.path))
	}
	if err != nil {
		return fmt.Errorf("create database %s: %w", db.path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// View runs fn in a read-only transaction.
func (db *DB) View(ctx context.Context, fn func(*Tx) error) error {
	return db.locked(ctx, true, func(b *bolt.DB) error {
		return b.View(func(tx *bolt.Tx) error { return db.run(tx, fn) })
	})
}

// Update runs fn in a read-write transaction, which is rolled back if fn
// returns an error.
func (db *DB) Update(ctx context.Context, fn func(*Tx) error) error {
	return db.locked(ctx, false, func(b *bolt.DB) error {
		return b.Update(func(tx *bolt.Tx) error { return db.run(tx, fn) })
	})
}

// locked runs fn with the file open.
func (db *DB) locked(ctx context.Context, readOnly bool, fn func(*bolt.DB) error) error {
	if readOnly {
		db.mu.RLock()
		defer db.mu.RUnlock()
	} else {
		db.mu.Lock()
		defer db.mu.Unlock()
	}
	return db.with(ctx, readOnly, fn)
}

func (db *DB) run(tx *bolt.Tx, fn func(*Tx) error) error {
	if err := checkSchema(tx); err != nil {
		return fmt.Errorf("database %s: %w", db.path, err)
	}
	return fn(&Tx{tx: tx})
}

// with opens the file, waiting for its lock, and closes it after fn.
func (db *DB) with(ctx context.Context, readOnly bool, fn func(*bolt.DB) error) (err error) {
	b, err := db.open(ctx, readOnly)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := b.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("close database %s: %w", db.path, cerr)
		}
	}()
	return fn(b)
}

func (db *DB) open(ctx context.Context, readOnly bool) (b *bolt.DB, err error) {
	start := time.Now()
	told := false
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		left := db.opts.LockTimeout - time.Since(start)
		if left <= 0 {
			return nil, fmt.Errorf("%w: %s is held by %s for more than %s; wait for it to end, or use its socket",
				ErrLocked, db.path, holder(db.path), db.opts.LockTimeout)
		}
		b, err = openBolt(db.path, &bolt.Options{
			Timeout: min(left, patience), ReadOnly: readOnly,
			FreelistType: bolt.FreelistMapType, NoStatistics: true,
			OpenFile: func(p string, flag int, perm os.FileMode) (*os.File, error) {
				// bbolt adds O_CREATE; a database that has vanished must not
				// come back empty.
				return os.OpenFile(p, flag&^os.O_CREATE|unix.O_NOFOLLOW, perm)
			},
		})
		switch {
		case err == nil:
			return b, nil
		case !errors.Is(err, berrors.ErrTimeout):
			if errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrChecksum) || errors.Is(err, berrors.ErrVersionMismatch) {
				err = fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
			return nil, fmt.Errorf("open database %s: %w", db.path, err)
		}
		if !told && db.opts.OnWait != nil {
			told = true
			db.opts.OnWait(fmt.Sprintf("waiting for %s, which is held by %s", db.path, holder(db.path)))
		}
	}
}

// openBolt turns the panics with which bbolt meets a damaged file into errors.
func openBolt(path string, o *bolt.Options) (b *bolt.DB, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	return bolt.Open(path, 0o600, o)
}

// holder names the processes that have the file locked, for messages.
func holder(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "another process"
	}
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	raw, err := os.ReadFile("/proc/locks")
	if err != nil {
		return "another process"
	}
	var who []string
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		// "1: FLOCK  ADVISORY  WRITE 708 00:13:1234 0 EOF"; waiters have "->".
		if len(f) < 8 || f[1] != "FLOCK" || f[5] != want {
			continue
		}
		name := "process " + f[4]
		if comm, err := os.ReadFile("/proc/" + f[4] + "/comm"); err == nil {
			name += fmt.Sprintf(" (%s)", strings.TrimSpace(string(comm)))
		}
		who = append(who, name)
	}
	if len(who) == 0 {
		return "another process"
	}
	return strings.Join(who, ", ")
}

// Size is the size of the file.
func (db *DB) Size() (int64, error) {
	st, err := os.Stat(db.path)
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}
