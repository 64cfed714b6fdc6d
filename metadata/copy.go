package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// CopyTo writes a copy of the database to a file that does not exist yet. The file
// appears whole, durable and checked, or not at all. Readers go on meanwhile; writers
// wait.
func (db *DB) CopyTo(ctx context.Context, path string) error {
	tmp := tempName(path, "new")
	defer os.Remove(tmp)
	err := db.locked(ctx, true, func(b *bolt.DB) error {
		return b.View(func(tx *bolt.Tx) error {
			f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			_, err = tx.WriteTo(f)
			if err == nil {
				err = f.Sync()
			}
			return errors.Join(err, f.Close())
		})
	})
	if err == nil {
		err = scanFile(tmp, func(string, []byte, []byte) {}, func(p string) {
			err = errors.Join(err, fmt.Errorf("%w: %s", ErrCorrupt, p))
		})
	}
	if err == nil {
		err = os.Link(tmp, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("copy database %s: %w", db.path, err)
	}
	return nil
}

// Compact writes the database anew without its free pages, puts the new file in the
// place of the old one, and returns the sizes of both. Nothing is lost that others
// write meanwhile: they wait for the lock of the old file, see that it is no longer
// the database, and open the new one.
func (db *DB) Compact(ctx context.Context) (before, after int64, err error) {
	tmp := tempName(db.path, "compact")
	defer os.Remove(tmp)
	if before, err = db.Size(); err != nil {
		return 0, 0, err
	}
	err = db.locked(ctx, false, func(src *bolt.DB) error {
		dst, err := bolt.Open(tmp, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType, NoSync: true})
		if err != nil {
			return err
		}
		dst.AllocSize = allocSize
		if err := bolt.Compact(dst, src, 1<<20); err != nil {
			return errors.Join(err, dst.Close())
		}
		if err := errors.Join(dst.Sync(), dst.Close()); err != nil {
			return err
		}
		return db.install(tmp)
	})
	if err != nil {
		return before, before, fmt.Errorf("compact database %s: %w", db.path, err)
	}
	after, err = db.Size()
	return before, after, err
}

// install puts a file in the place of the database, whose lock the caller holds if
// there is one.
func (db *DB) install(tmp string) error {
	if err := os.Rename(tmp, db.path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(db.path))
}

// Rebuild makes a new database with what fill puts into it and puts it in the place
// of the one that is there, which is kept under the name that is returned; empty if
// there was none. One that others use is waited for.
func (db *DB) Rebuild(ctx context.Context, fill func(*Tx) error) (kept string, err error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	tmp := tempName(db.path, "rebuild")
	defer os.Remove(tmp)
	fail := func(err error) (string, error) { return "", fmt.Errorf("rebuild database %s: %w", db.path, err) }
	if err := makeEmpty(tmp); err != nil {
		return fail(err)
	}
	b, err := bolt.Open(tmp, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
	if err != nil {
		return fail(err)
	}
	err = b.Update(func(btx *bolt.Tx) error {
		tx := &Tx{tx: btx}
		if err := fill(tx); err != nil {
			return err
		}
		return tx.RebuildIndexes()
	})
	if err = errors.Join(err, b.Close()); err != nil {
		return fail(err)
	}
	aside := db.path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000000Z")
	if st, err := os.Lstat(db.path); err == nil && !st.Mode().IsRegular() { // nobody has it open as a database
		if err := os.Rename(db.path, aside); err != nil {
			return fail(err)
		}
		kept = aside
	}
	old, err := db.lockFile(ctx)
	if err != nil {
		return fail(err)
	}
	if old != nil {
		defer old.Close()
		// A second name, then the new file over the first: there is a database at
		// every moment.
		kept = aside
		if err := os.Link(db.path, kept); err != nil {
			return fail(err)
		}
	}
	if err := db.install(tmp); err != nil {
		return fail(err)
	}
	return kept, nil
}

// lockFile takes the exclusive lock of the file that is the database, whatever is in
// it; nil if there is none.
func (db *DB) lockFile(ctx context.Context) (*os.File, error) {
	start := time.Now()
	for {
		f, err := os.OpenFile(db.path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			if same, cerr := db.current(f); cerr == nil && same {
				return f, nil
			}
		}
		_ = f.Close() // nothing was done with it
		switch {
		case err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, err
		case time.Since(start) > db.opts.LockTimeout:
			return nil, fmt.Errorf("%w: %s is held by %s", ErrLocked, db.path, holder(db.path))
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// FileUse is what a database file consists of, in bytes.
type FileUse struct {
	Size int64
	Free int64 // in pages that hold nothing; [DB.Compact] gives them back
}

// FileUse measures the file.
func (db *DB) FileUse() (u FileUse, err error) {
	f, err := os.OpenFile(db.path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return u, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return u, err
	}
	u.Size = st.Size()
	p, err := openPages(f, st.Size())
	if err != nil || p.meta.freelist == noFreelist {
		return u, nil //nolint:nilerr // K1 tells
	}
	p.seen = map[uint64]bool{}
	if flags, count, body, err := p.page(p.meta.freelist); err == nil && flags == flagFreelist {
		n := uint64(count)
		if count == 0xFFFF {
			n = order.Uint64(body[pageHeader:])
		}
		u.Free = int64(min(n, p.meta.pages)) * p.size
	}
	return u, nil
}
