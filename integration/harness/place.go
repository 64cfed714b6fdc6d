package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Place makes the directory dir, which must be empty, the root of a file system
// of its own and lets fill write to it. remove takes it away again.
type Place func(dir string, fill func() error) (remove func() error, err error)

// ErrNoPlace means that a file system cannot be made here.
var ErrNoPlace = errors.New("no such file system here")

// imageSizes are as small as the kinds allow.
var imageSizes = map[string]int64{"ext4": 64 << 20, "xfs": 400 << 20, "btrfs": 256 << 20}

// NewPlace returns the place of that name: ext4, xfs, btrfs, tmpfs, ramfs, like-nfs, or a union
// by one of the mounters. After a colon may stand the size in bytes, of btrfs with
// a quota ("300000000,quota=BYTES"), or the options of a union.
func NewPlace(name string) (Place, error) {
	kind, arg, _ := strings.Cut(name, ":")
	size, isImage := imageSizes[kind]
	switch kind {
	case "ramfs":
		return onRamfs, nil
	case "like-nfs":
		return onLikeNFS, nil
	}
	if !isImage && kind != "tmpfs" {
		m, err := NewMounter(kind)
		if err != nil {
			return nil, fmt.Errorf("file system %q: %w", name, err)
		}
		var options []string
		if arg != "" {
			options = strings.Split(arg, ",")
		}
		return onUnion(m, options), nil
	}
	if kind == "tmpfs" {
		size = 64 << 20
	}
	arg, quota, _ := strings.Cut(arg, ",quota=")
	if arg != "" {
		n, err := strconv.ParseInt(arg, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("size of file system %q: %w", name, err)
		}
		size = n
	}
	if kind == "tmpfs" {
		return onTmpfs(size), nil
	}
	if quota != "" && kind != "btrfs" {
		return nil, fmt.Errorf("file system %q: quotas are for btrfs; others let root go beyond them", name)
	}
	return onImage(kind, size, quota), nil
}

func onTmpfs(size int64) Place {
	return func(dir string, fill func() error) (func() error, error) {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+strconv.FormatInt(size, 10)); err != nil {
			return nil, fmt.Errorf("mount tmpfs on %s: %w", dir, err)
		}
		return func() error { return umount(dir) }, fill()
	}
}

// onRamfs is a file system without extended attributes.
func onRamfs(dir string, fill func() error) (func() error, error) {
	if err := unix.Mount("ramfs", dir, "ramfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount ramfs on %s: %w", dir, err)
	}
	return func() error { return umount(dir) }, fill()
}

// onImage is a file system in a sparse file next to the directory.
func onImage(kind string, size int64, quota string) Place {
	return func(dir string, fill func() error) (func() error, error) {
		image := dir + ".img"
		mkfs, err := exec.LookPath("mkfs." + kind)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoPlace, err)
		}
		f, err := os.Create(image)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			return nil, err
		}
		if out, err := run(exec.Command(mkfs, "-q", image), time.Minute); err != nil {
			return nil, fmt.Errorf("make %s: %w: %s", kind, err, out)
		}
		if out, err := run(exec.Command("mount", "-o", "loop", image, dir), time.Minute); err != nil {
			return nil, errors.Join(fmt.Errorf("%w: mount %s: %w: %s", ErrNoPlace, kind, err, out), os.Remove(image))
		}
		remove := func() error { return errors.Join(umount(dir), os.Remove(image)) }
		if err := errors.Join(os.Chmod(dir, 0o755), fill()); err != nil || quota == "" {
			return remove, err
		}
		for _, args := range [][]string{{"quota", "enable", dir}, {"qgroup", "limit", quota, dir}} {
			if out, err := run(exec.Command("btrfs", args...), time.Minute); err != nil {
				return remove, fmt.Errorf("set quota: %w: %s", err, out)
			}
		}
		return remove, nil
	}
}

// onUnion is a writable union, whose layers lie next to the directory.
func onUnion(m Mounter, options []string) Place {
	return func(dir string, fill func() error) (func() error, error) {
		s := Stack{Lowers: []string{dir + ".lower"}, Upper: dir + ".upper", Work: dir + ".work", Options: options}
		for _, d := range append(s.Lowers, s.Upper, s.Work) {
			if err := os.Mkdir(d, 0o755); err != nil {
				return nil, err
			}
		}
		mnt, err := m.Mount(s, dir)
		if err != nil {
			return nil, err
		}
		return mnt.Unmount, fill()
	}
}
