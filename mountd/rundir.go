package mountd

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A run directory holds what a reboot may forget:
//
//	/run/plyfs/                     root; a user, and root of a user namespace, $XDG_RUNTIME_DIR/plyfs,
//	                                else /tmp/plyfs-UID
//	  raw/PID-TIME-<random>/        of one mount without a store: state.json, stats, control
//	  snapshotter.sock              `plyfs snapshotter`
//	  <12 hex of the store root>/   so that stores do not meet
//	    plyfs.sock                  the daemon
//	    daemon.lock                 locked by the daemon for its life
//	    live.lock                   locked around changes of live rows
//	    start.lock                  one byte locked per container that is being mounted
//	    target.lock                 one byte locked per mount point of a wanted mount, and
//	                                of a mount that is being unmounted
//	    shell/                      the mounts of `plyfs shell`, each in a namespace of its own
//	    mounts/<8 hex>/             of one mount: mount.json, and state.json, log, exit.json;
//	                                stats and control, where its server answers
//
// RunDirEnv overrides the first line.
const RunDirEnv = "PLYFS_RUN_DIR"

const socketName = "plyfs.sock"

// DefaultRoot is the store used when neither option nor environment name one.
func DefaultRoot() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/lib/plyfs", nil
	}
	if d := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "plyfs"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", markedf(ErrUsage, "no store directory: set --root, PLYFS_ROOT or HOME")
	}
	return filepath.Join(home, ".local/share/plyfs"), nil
}

// CanonicalRoot returns root absolute and free of symlinks, also when its last
// components do not exist yet.
func CanonicalRoot(root string) (string, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return "", fmt.Errorf("store %q: %w", root, err)
	}
	rest := ""
	for p := abs; ; p = filepath.Dir(p) {
		real, err := filepath.EvalSymlinks(p)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || p == "/" {
			return "", fmt.Errorf("store %q: %w", root, reason(err))
		}
		rest = filepath.Join(filepath.Base(p), rest)
	}
}

// RunDir returns the run directory of the store in root, which is canonical,
// without making it.
func RunDir(root string) string {
	sum := sha256.Sum256([]byte(root))
	return filepath.Join(RunBase(), hex.EncodeToString(sum[:6]))
}

// SocketPath returns where the daemon of the store listens by default.
func SocketPath(root string) string { return filepath.Join(RunDir(root), socketName) }

// RunBase is the directory of all run directories of this user, without making it.
func RunBase() string {
	if d := os.Getenv(RunDirEnv); filepath.IsAbs(d) {
		return d
	}
	if os.Geteuid() == 0 && unix.Access("/run", unix.W_OK) == nil {
		return "/run/plyfs"
	}
	// Also for root in the user namespace of a user.
	if d := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(d) {
		if st, err := os.Stat(d); err == nil && st.IsDir() {
			return filepath.Join(d, "plyfs")
		}
	}
	return "/tmp/plyfs-" + strconv.Itoa(os.Geteuid())
}

// makeRunDir makes the run directory of a store. What lies there decides whom
// we talk to and which processes we trust, so it must be ours alone.
func makeRunDir(dir string) error {
	for _, d := range []string{filepath.Dir(dir), dir, filepath.Join(dir, "mounts")} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("run directory %q: %w", d, reason(err))
		}
		if err := ownedByUs(d); err != nil {
			return err
		}
	}
	return nil
}

func ownedByUs(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("run directory %q: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return markedf(ErrRefused, "run directory %q: not a directory of user %d that nobody else can write; remove it or set %s",
			dir, os.Geteuid(), RunDirEnv)
	}
	return nil
}

// makeMountDir makes the run directory of one mount.
func makeMountDir(runDir string) (string, error) {
	for range 100 {
		var b [4]byte
		_, _ = rand.Read(b[:]) // never fails
		d := filepath.Join(runDir, "mounts", hex.EncodeToString(b[:]))
		err := os.Mkdir(d, 0o700)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return "", fmt.Errorf("run directory of the mount: %w", err)
		}
	}
	return "", errors.New("run directory of the mount: no free name")
}

// lockName takes a lock that only the same name excludes: one byte of a common
// file, so that no file is left behind for each name. The kernel drops it with
// the process.
func lockName(ctx context.Context, path, name string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	sum := sha256.Sum256([]byte(name))
	lk := unix.Flock_t{
		Type: unix.F_WRLCK, Whence: io.SeekStart, Len: 1,
		Start: int64(binary.BigEndian.Uint64(sum[:8]) >> 2),
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
		if err == nil {
			return func() { _ = f.Close() }, nil // closing unlocks
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINTR) {
			_ = f.Close() // nothing written
			return nil, fmt.Errorf("lock %q: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close() // nothing written
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// lockFile takes an exclusive flock(2) on path, which is made if needed.
func lockFile(path string, wait bool) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	how := unix.LOCK_EX
	if !wait {
		how |= unix.LOCK_NB
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close() // nothing written
		return nil, fmt.Errorf("lock %q: %w", path, err)
	}
	return func() { _ = f.Close() }, nil // closing unlocks
}
