package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
)

// ErrInUse says that another mount works in the directory.
var ErrInUse = fmt.Errorf("in use by another mount: %w", unix.EBUSY)

// Work is the scratch directory of one upper.
type Work struct {
	fd       int // WORKDIR/work, open for reading; holds the lock
	volatile bool
	prefix   string // of temporary names
	seq      atomic.Uint64

	unnamed func() bool // whether the file system has files without a name

	// whAttr, if not "", is the attribute that makes an empty file a
	// whiteout: the file system refuses the device. Immutable once in use.
	whAttr string

	whMu    sync.Mutex
	whReady bool // work/whiteout exists; guarded by whMu
}

const (
	workName     = "work"
	whiteoutName = "whiteout"

	// Below work: features without which the upper must not be used, and the
	// one that is said so (kernel: ovl_create_volatile_dirty).
	incompatName = "incompat"
	volatileName = "volatile"
	dirtyName    = "dirty"
)

// ErrVolatile says that an earlier mount of the upper promised no durability
// and did not end in order.
var ErrVolatile = errors.New("an earlier volatile mount was not unmounted in order, so what it wrote may be incomplete: " +
	"discard the upper, or remove \"incompat\" from the \"work\" directory to use it all the same")

// LeftUnsynced reports whether the directory workdir has the mark of such a mount.
func LeftUnsynced(workdir string) bool {
	_, err := os.Lstat(filepath.Join(workdir, workName, incompatName))
	return err == nil
}

// WorkOptions say how a scratch directory is used.
type WorkOptions struct {
	// Volatile: nothing is ever synced.
	Volatile bool
	// TakeUnsynced takes an upper that a volatile mount has left behind
	// without a sync. Otherwise it is refused with ErrVolatile.
	TakeUnsynced bool
	// Generation counts the processes that had this directory before in the same mount
	// and were killed. All but the first leave what is in it: some of that may be in use.
	Generation int
}

// OpenWork locks and empties the scratch directory below the directory workdir.
func OpenWork(workdir int, o WorkOptions) (*Work, error) {
	if err := fsat.Mkdir(workdir, workName, 0o700); err != nil && err != unix.EEXIST {
		return nil, fmt.Errorf("create %q in the workdir: %w", workName, err)
	}
	fd, err := fsat.OpenName(workdir, workName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q in the workdir: %w", workName, err)
	}
	w := &Work{fd: fd, volatile: o.Volatile, prefix: "#"}
	if o.Generation > 0 {
		w.prefix = fmt.Sprintf("#%d.", o.Generation)
	}
	w.unnamed = sync.OnceValue(w.probeUnnamed)
	if err := LockDir(fd); err != nil {
		w.Close()
		return nil, fmt.Errorf("lock the workdir: %w", err)
	}
	// What a setgid or ACL-bearing workdir bequeathed must not reach the
	// objects built here (kernel: ovl_workdir_create).
	if err := fsat.Chmod(fd, "", 0o700); err != nil {
		w.Close()
		return nil, fmt.Errorf("set the mode of the workdir: %w", err)
	}
	for _, acl := range []string{"system.posix_acl_default", "system.posix_acl_access"} {
		_ = fsat.Removexattr(fd, "", acl) // usually absent
	}
	if err := w.prepare(o); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// Keeps reports whether the file system can hold the attribute.
func (w *Work) Keeps(attr string) bool {
	if fsat.Setxattr(w.fd, "", attr, []byte{'0'}, 0) != nil {
		return false
	}
	return fsat.Removexattr(w.fd, "", attr) == nil
}

// lockWait is how long LockDir waits for a mount that is just ending: it keeps
// the lock until it has synced.
const lockWait = 5 * time.Second

// LockDir takes the advisory lock that keeps a second mount off a directory.
// File systems without locks are trusted.
func LockDir(fd int) error {
	end := time.Now().Add(lockWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		switch err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err {
		case unix.EINTR:
		case unix.EWOULDBLOCK:
			if time.Now().After(end) {
				return ErrInUse
			}
			time.Sleep(pause) // a blocking flock(2) could not be given up
		case unix.ENOLCK, unix.EOPNOTSUPP, unix.ENOSYS:
			return nil
		default:
			return err
		}
	}
}

// prepare empties the scratch directory and marks it if the mount is volatile.
func (w *Work) prepare(o WorkOptions) error {
	var st unix.Stat_t
	switch err := fsat.Stat(w.fd, incompatName, &st); {
	case o.Generation > 0:
		return nil
	case err == nil && !o.TakeUnsynced:
		return ErrVolatile
	case err != nil && err != unix.ENOENT:
		return fmt.Errorf("look at the workdir: %w", err)
	}
	if err := w.sweep(func(string) bool { return false }); err != nil {
		return fmt.Errorf("empty the workdir: %w", err)
	}
	if !w.volatile {
		return nil
	}
	for _, dir := range []string{incompatName, incompatName + "/" + volatileName, incompatName + "/" + volatileName + "/" + dirtyName} {
		if err := fsat.Mkdir(w.fd, dir, 0o700); err != nil {
			return fmt.Errorf("mark the workdir volatile: %w", err)
		}
	}
	return nil
}

// Clean empties the directory at the end of a mount whose upper has been
// synced; the mark of a volatile mount goes with the rest. What cannot be
// removed is left to the next OpenWork.
func (w *Work) Clean() { _ = w.sweep(func(string) bool { return false }) }

// SweepAfter removes what an earlier generation was building when it was killed, but
// not the names that are in use.
func (w *Work) SweepAfter(used map[string]bool) error {
	return w.sweep(func(name string) bool { return used[name] || name == whiteoutName || name == incompatName })
}

// sweep removes what an earlier mount left behind, but for what is kept. Nothing in the
// scratch directory was ever visible in the union.
func (w *Work) sweep(keep func(name string) bool) error {
	var names []string
	if _, err := unix.Seek(w.fd, 0, unix.SEEK_SET); err != nil {
		return err
	}
	if err := fsat.ReadDir(w.fd, func(e fsat.Dirent) error { names = append(names, e.Name); return nil }); err != nil {
		return err
	}
	for _, n := range names {
		if keep(n) {
			continue
		}
		if err := fsat.RemoveAll(w.fd, n); err != nil {
			return fmt.Errorf("remove %q: %w", n, err)
		}
		fault.Point("work.swept")
	}
	return nil
}

// Close releases the directory and its lock.
func (w *Work) Close() {
	fsat.Close(w.fd)
	w.fd = -1
}

// Fd is the scratch directory's descriptor, for renames in and out of it.
func (w *Work) Fd() int { return w.fd }

// TempName returns a name that is not in use in the scratch directory.
func (w *Work) TempName() string { return w.prefix + strconv.FormatUint(w.seq.Add(1), 16) }

// Remove deletes name and everything below it from the scratch directory. What
// cannot be deleted now is litter that the next OpenWork sweeps.
func (w *Work) Remove(name string) { _ = fsat.RemoveAll(w.fd, name) }

// ProbeWhiteouts finds out whether whiteouts can be devices, and makes them empty
// files with the attribute attr otherwise: so it is on another union, for users of
// old kernels, and if noDevices says so. It reports whether they are files; the
// directories that hold such must be marked. Call it before the first whiteout.
func (w *Work) ProbeWhiteouts(attr string, noDevices bool) (files bool, err error) {
	if noDevices {
		w.whAttr = attr
		return true, nil
	}
	name := w.TempName()
	err = fsat.Mknod(w.fd, name, unix.S_IFCHR, 0)
	switch err {
	case nil:
		w.Remove(name)
		return false, nil
	case unix.EPERM, unix.EOPNOTSUPP, unix.EACCES:
		w.whAttr = attr
		return true, nil
	}
	return false, fmt.Errorf("make a whiteout in the workdir: %w", err)
}

// newWhiteout makes a whiteout in whichever form.
func (w *Work) newWhiteout(dirfd int, name string) error {
	if w.whAttr == "" {
		return fsat.Mknod(dirfd, name, unix.S_IFCHR, 0)
	}
	fd, err := fsat.OpenName(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	if err := fsat.Setxattr(fd, "", w.whAttr, []byte{'y'}, 0); err != nil {
		_ = fsat.Unlink(dirfd, name) // the first error is the one to report
		return err
	}
	return nil
}

// Whiteout makes a whiteout under a fresh name, ready to be renamed
// into place. Whiteouts are hard links to one object, as kernel overlayfs makes
// them, for as long as the file system's link limit allows.
func (w *Work) Whiteout() (name string, err error) {
	name = w.TempName()
	err = w.linkWhiteout(w.fd, name)
	return name, err
}

// WhiteoutAt makes a whiteout directly under its final name, which must
// not exist.
func (w *Work) WhiteoutAt(dirfd int, name string) error { return w.linkWhiteout(dirfd, name) }

func (w *Work) linkWhiteout(dirfd int, name string) error {
	w.whMu.Lock()
	defer w.whMu.Unlock()
	for range 2 {
		if !w.whReady {
			err := w.newWhiteout(w.fd, whiteoutName)
			if err != nil && err != unix.EEXIST {
				return err
			}
			fault.Point("whiteout.made")
			w.whReady = true
		}
		err := fsat.Link(w.fd, whiteoutName, dirfd, name)
		fault.Point("whiteout.linked")
		switch err {
		case nil, unix.EEXIST:
			return err
		case unix.EMLINK:
			if err := fsat.Unlink(w.fd, whiteoutName); err != nil {
				return err
			}
			w.whReady = false
		default:
			return w.separateWhiteout(dirfd, name)
		}
	}
	return w.separateWhiteout(dirfd, name)
}

// separateWhiteout makes a whiteout that is no link to another one. A file gets
// its name only when it is one.
func (w *Work) separateWhiteout(dirfd int, name string) error {
	if w.whAttr == "" {
		return w.newWhiteout(dirfd, name)
	}
	temp := w.TempName()
	if err := w.newWhiteout(w.fd, temp); err != nil {
		return err
	}
	err := fsat.Rename(w.fd, temp, dirfd, name, unix.RENAME_NOREPLACE)
	if err != nil {
		w.Remove(temp)
	}
	return err
}
