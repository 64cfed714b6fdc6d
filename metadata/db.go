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
	// BeforeMigration is called before a database is brought to a newer schema. An
	// error keeps it from that.
	BeforeMigration func(context.Context) error
}

// DB is a database file. It is open only while a transaction runs.
type DB struct {
	path string
	opts Options

	mu sync.RWMutex // serialises this process's own use of the file lock
}

// Tx is a transaction. It must not outlive the function it was given to.
type Tx struct {
	tx      *bolt.Tx
	touched Touched
	skipped int
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
	return db.Attach(ctx)
}

// Attach is Init for a database that must exist: without one the error matches
// [os.ErrNotExist].
func (db *DB) Attach(ctx context.Context) error {
	if err := db.migrate(ctx); err != nil {
		return err
	}
	return db.View(ctx, func(*Tx) error { return nil })
}

func (db *DB) create() (err error) {
	tmp := tempName(db.path, "new")
	defer os.Remove(tmp)
	if err = makeEmpty(tmp); err == nil {
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

// tempName is a name beside the database for a file that becomes something there.
func tempName(path, what string) string {
	var id [4]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	return path + "." + what + "." + hex.EncodeToString(id[:])
}

// makeEmpty writes a database without rows.
func makeEmpty(path string) error {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	b, err := bolt.Open(path, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType, Timeout: patience})
	if err != nil {
		return err
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
	return err
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

func (db *DB) run(tx *bolt.Tx, fn func(*Tx) error) error {
	if err := checkSchema(tx); err != nil {
		return fmt.Errorf("database %s: %w", db.path, err)
	}
	return fn(&Tx{tx: tx})
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
