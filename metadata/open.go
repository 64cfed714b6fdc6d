package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

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

// with opens the file, waiting for its lock, and closes it after fn.
func (db *DB) with(ctx context.Context, readOnly bool, fn func(*bolt.DB) error) error {
	b, f, err := db.open(ctx, readOnly)
	if err != nil {
		return err
	}
	err = guard(func() error { return fn(b) })
	if errors.Is(err, errDamage) {
		db.abandon(b, f)
		return fmt.Errorf("database %s: %w: %w", db.path, ErrFile, err)
	}
	if cerr := b.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close database %s: %w", db.path, cerr)
	}
	return err
}

// abandon closes a database in which bbolt has stopped with a panic. It may have
// kept a lock of its own for ever; then the file goes all the same, and with it the
// lock that other processes see.
func (db *DB) abandon(b *bolt.DB, f *os.File) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = guard(b.Close) // it has failed already
	}()
	select {
	case <-done:
	case <-time.After(abandonWait):
		giveUp(f)
	}
}

// allocSize is by how much the file grows at once; bbolt's own 16 MiB are more than most
// stores need.
const allocSize = 1 << 20

// giveUp closes a file that bbolt has left mapped: the mapping would keep the lock.
func giveUp(f *os.File) {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	_ = f.Close() // it is of no use any more
}

// abandonWait is how long bbolt has to close a file in which it has stopped.
const abandonWait = 100 * time.Millisecond

// errDamage is what a panic of bbolt becomes.
var errDamage = errors.New("it contradicts itself")

// guard turns the panics with which bbolt meets a damaged file into errors: its own
// assertions, and a page that would lie beyond the end of the file. Panics of others
// go on.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if raisedByBolt() {
			err = fmt.Errorf("%w: %v", errDamage, recover())
		}
	}()
	return fn()
}

// raisedByBolt says whether there is a panic, and one of bbolt, or a fault: memory that
// is not there, as when a key leads out of the mapping. (That of a nil pointer is another
// one.) It is called by a deferred function while the stack is still there.
func raisedByBolt() bool {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	panicked := false
	for {
		f, more := frames.Next()
		switch {
		case f.Function == "runtime.gopanic":
			panicked = true
		case panicked && f.Function == "runtime.panicmemAddr":
			return true
		case panicked && !strings.HasPrefix(f.Function, "runtime."):
			return strings.HasPrefix(f.Function, "go.etcd.io/bbolt")
		}
		if !more {
			return false
		}
	}
}

func (db *DB) open(ctx context.Context, readOnly bool) (b *bolt.DB, f *os.File, err error) {
	start := time.Now()
	told := false
	for {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		left := db.opts.LockTimeout - time.Since(start)
		if left <= 0 {
			return nil, nil, fmt.Errorf("%w: %s is held by %s for more than %s; wait for it to end, or use its socket",
				ErrLocked, db.path, holder(db.path), db.opts.LockTimeout)
		}
		o := &bolt.Options{
			Timeout: min(left, patience), ReadOnly: readOnly,
			FreelistType: bolt.FreelistMapType, NoStatistics: true,
			OpenFile: func(p string, flag int, perm os.FileMode) (_ *os.File, err error) {
				// bbolt adds O_CREATE; a database that has vanished must not
				// come back empty. Neither must one that has lost its content.
				if f, err = os.OpenFile(p, flag&^os.O_CREATE|unix.O_NOFOLLOW, perm); err != nil {
					return nil, err
				}
				if st, err := f.Stat(); err != nil || st.Size() == 0 {
					_ = f.Close() // only looked at
					return nil, errors.Join(err, fmt.Errorf("%w: it is empty", ErrFile))
				}
				return f, nil
			},
		}
		err = guard(func() (err error) { b, err = bolt.Open(db.path, 0o600, o); return err })
		switch {
		case err == nil:
			// We have waited for the lock of the file that had the name then.
			// Somebody may have put another one in its place: what is written
			// to ours now nobody would read.
			same, err := db.current(f)
			if err == nil && same {
				err = checkSize(f) // only now: nobody is writing to it
			}
			if err != nil {
				_ = b.Close() // nothing was written
				return nil, nil, fmt.Errorf("open database %s: %w", db.path, err)
			}
			if same {
				b.AllocSize = allocSize
				return b, f, nil
			}
			if err := b.Close(); err != nil {
				return nil, nil, fmt.Errorf("close database %s: %w", db.path, err)
			}
			continue
		case !errors.Is(err, berrors.ErrTimeout):
			if errors.Is(err, errDamage) {
				giveUp(f) // bbolt has not come to it
			}
			if errors.Is(err, os.ErrNotExist) {
				err = fmt.Errorf("%w: it is missing: %w", ErrFile, err)
			}
			// What is not an error of the system is one of what the file says.
			var errno unix.Errno
			if !errors.As(err, &errno) && !errors.Is(err, ErrFile) {
				err = fmt.Errorf("%w: %w", ErrFile, err)
			}
			return nil, nil, fmt.Errorf("open database %s: %w", db.path, err)
		}
		if !told && db.opts.OnWait != nil {
			told = true
			db.opts.OnWait(fmt.Sprintf("waiting for %s, which is held by %s", db.path, holder(db.path)))
		}
	}
}

// current says whether f is the file that the database's name leads to.
func (db *DB) current(f *os.File) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Lstat(db.path)
	return err == nil && os.SameFile(a, b), err
}

// checkSize refuses a file that is shorter than its meta pages say: bbolt would read
// beyond the end.
func checkSize(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	p, err := openPages(f, st.Size())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFile, err)
	}
	if want := int64(p.meta.pages) * p.size; st.Size() < want {
		return fmt.Errorf("%w: it is truncated: %d bytes, expected at least %d", ErrFile, st.Size(), want)
	}
	return nil
}
