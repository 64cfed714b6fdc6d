package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DirName is the directory of the log in a store.
	DirName = "events"

	logName = "log"
	oldName = "log.1"

	// MaxFile is how large a file of the log grows before it is renamed, in bytes. There
	// are two of them at most.
	MaxFile = 1 << 20
	// lockWait is how long a writer waits for another one.
	lockWait = 5 * time.Second
	lockTick = 2 * time.Millisecond
	// attempts bounds how often a writer finds that the log was renamed meanwhile.
	attempts = 100
)

// Log is where the events of one store are written. Its methods may be called from several
// goroutines and processes.
type Log struct {
	dir string
	// See MaxFile and lockWait.
	max  int64
	wait time.Duration
}

// In returns the log of the store in root. Nothing is made or opened yet.
func In(root string) *Log { return At(filepath.Join(root, DirName)) }

// At returns the log in a directory.
func At(dir string) *Log { return &Log{dir: dir, max: MaxFile, wait: lockWait} }

// Dir is the directory of the log.
func (l *Log) Dir() string { return l.dir }

// Append writes an event, and gives it the time, if it has none, and its number.
func (l *Log) Append(e Event) error {
	if err := l.append(e); err != nil {
		return fmt.Errorf("write an event to %q: %w", l.dir, err)
	}
	return nil
}

func (l *Log) append(e Event) error {
	if e.Time.IsZero() {
		e.Time = time.Now().UTC()
	}
	if err := os.Mkdir(l.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// No link is followed: the store may be that of a user, and we be root.
	dir, err := unix.Open(l.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	f, locked, size, err := l.open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // what write(2) has taken is in the file; this unlocks
	last, whole, err := lastSeq(f, size)
	if err != nil {
		return err
	}
	if last == 0 {
		if last, err = l.lastOld(); err != nil {
			return err
		}
	}
	e.Seq = last + 1
	line, err := encode(e)
	if err != nil {
		return err
	}
	if !whole { // a writer has met a full disk
		line = append([]byte{'\n'}, line...)
	}
	if _, err := f.Write(line); err != nil {
		return err
	}
	if locked && size+int64(len(line)) >= l.max {
		return unix.Renameat(dir, logName, dir, oldName)
	}
	return nil
}

// open opens the file that has the name of the log, and locks it.
func (l *Log) open(dir int) (f *os.File, locked bool, size int64, err error) {
	path := filepath.Join(l.dir, logName)
	deadline := time.Now().Add(l.wait)
	for range attempts {
		fd, err := unix.Openat(dir, logName, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, false, 0, fmt.Errorf("open %q: %w", path, err)
		}
		f = os.NewFile(uintptr(fd), path)
		var st, now unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1) {
			err = fmt.Errorf("%q is no file of this store alone: remove it", path)
		}
		if err == nil {
			locked, err = lock(f, deadline)
		}
		if err == nil {
			err = unix.Fstat(fd, &st) // others have written while we waited
		}
		if err != nil {
			_ = f.Close() // nothing written
			return nil, false, 0, err
		}
		if unix.Fstatat(dir, logName, &now, unix.AT_SYMLINK_NOFOLLOW) == nil && now.Dev == st.Dev && now.Ino == st.Ino {
			return f, locked, st.Size, nil
		}
		_ = f.Close() // it was renamed while we waited for the lock
	}
	return nil, false, 0, fmt.Errorf("%q is renamed again and again", path)
}

// lock waits until deadline for the lock, and reports whether it has got it.
func lock(f *os.File, deadline time.Time) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("lock: %w", err)
		case time.Now().After(deadline):
			return false, nil
		}
		<-time.After(lockTick)
	}
}

// lastOld is the last number of the file before; 0 if there is none.
func (l *Log) lastOld() (uint64, error) {
	f, err := openOld(filepath.Join(l.dir, oldName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	last, _, err := lastSeq(f, st.Size())
	return last, err
}

// openOld opens a file of the log for reading.
func openOld(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close() // nothing was read
		return nil, errors.Join(fmt.Errorf("%q is no file: remove it", path), err)
	}
	return f, nil
}

// lastSeq returns the number of the last event in a file of this size, and whether the file
// ends with the end of a line. What lies further back than a few lines is not looked at.
func lastSeq(f *os.File, size int64) (seq uint64, whole bool, err error) {
	if size == 0 {
		return 0, true, nil
	}
	const most = 8 * MaxLine
	buf := make([]byte, min(size, most))
	n, err := f.ReadAt(buf, size-int64(len(buf)))
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, false, err
	}
	buf = buf[:n]
	whole = bytes.HasSuffix(buf, []byte{'\n'})
	for len(buf) > 0 {
		i := bytes.LastIndexByte(buf, '\n')
		var e struct {
			Seq uint64 `json:"seq"`
		}
		if json.Unmarshal(buf[i+1:], &e) == nil && e.Seq > 0 {
			return e.Seq, whole, nil
		}
		buf = buf[:max(i, 0)]
	}
	return 0, whole, nil
}
