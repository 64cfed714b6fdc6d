package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/mountd/holder"
)

// dirs names the directories of a root; see doc.go for what is in them.
type dirs struct{ root string }

func (d dirs) snapshots() string     { return filepath.Join(d.root, "snapshots") }
func (d dirs) trash() string         { return filepath.Join(d.root, "trash") }
func (d dirs) of(id string) string   { return filepath.Join(d.snapshots(), id) }
func (d dirs) fs(id string) string   { return filepath.Join(d.of(id), "fs") }
func (d dirs) work(id string) string { return filepath.Join(d.of(id), "work") }
func (d dirs) mnt(id string) string  { return filepath.Join(d.of(id), "mnt") }
func (d dirs) run(id string) string  { return filepath.Join(d.of(id), "run") }
func (d dirs) gone(id string) string { return filepath.Join(d.trash(), id) }

// ofUnion are the directories that only a snapshot with a union needs.
func (d dirs) ofUnion(id string) []string { return []string{d.work(id), d.mnt(id), d.run(id)} }

// prepare makes the directories of the root.
func (d dirs) prepare() error {
	// Others may pass: what the root of a container lies in is looked up with its ids, and
	// the names of what is there cannot be guessed.
	for _, p := range []string{d.root, d.snapshots()} {
		if err := os.MkdirAll(p, 0o711); err != nil {
			return fmt.Errorf("root of the snapshotter: %w", err)
		}
	}
	if err := os.MkdirAll(d.trash(), 0o700); err != nil {
		return fmt.Errorf("root of the snapshotter: %w", err)
	}
	return nil
}

// makeSnapshot makes the directory of a new snapshot. The root of its content is that of
// the parent's, if there is one.
func (d dirs) makeSnapshot(id, parent string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make the directory of a snapshot: %w", errors.Join(err, os.RemoveAll(d.of(id))))
		}
	}()
	if err := os.Mkdir(d.of(id), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(d.fs(id), 0o755); err != nil {
		return err
	}
	mode := uint32(0o755)
	if parent != "" {
		var st unix.Stat_t
		if err := unix.Lstat(d.fs(parent), &st); err != nil {
			return fmt.Errorf("root of the parent: %w", err)
		}
		mode = st.Mode & 0o7777
		if err := os.Lchown(d.fs(id), int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if err := unix.Chmod(d.fs(id), mode); err != nil { // whatever the umask is
		return err
	}
	for _, p := range []string{d.of(id), d.snapshots()} {
		if err := syncDir(p); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// syncTree waits until everything written to the file system of a directory is on the disk.
func syncTree(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return errors.Join(fmt.Errorf("sync %q: %w", path, err), f.Close())
	}
	return f.Close()
}

// newID returns a name that no snapshot has had.
func newID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// discard moves the directory of a snapshot to the trash, for purge.
func (d dirs) discard(id string) error {
	err := os.Rename(d.of(id), d.gone(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// purge deletes what is in the trash. Nothing is deleted through a mount.
func (d dirs) purge(ctx context.Context, log *zap.Logger) error {
	entries, err := os.ReadDir(d.trash())
	if err != nil {
		return fmt.Errorf("trash: %w", err)
	}
	var errs error
	for _, e := range entries {
		if ctx.Err() != nil {
			return errors.Join(errs, ctx.Err())
		}
		errs = errors.Join(errs, removeTree(d.gone(e.Name()), log))
	}
	return errs
}

// removeTree deletes a directory of a snapshot, and first detaches what is mounted in it.
func removeTree(dir string, log *zap.Logger) error {
	table, err := holder.MountTable(0)
	if err != nil {
		return err
	}
	for i := len(table) - 1; i >= 0; i-- { // the last was mounted last
		at := table[i].Mountpoint
		if !strings.HasPrefix(at, dir+"/") {
			continue
		}
		log.Warn("something was still mounted in a removed snapshot", zap.String("name", at))
		err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("unmount %q: %w", at, err)
		}
	}
	return os.RemoveAll(dir)
}
