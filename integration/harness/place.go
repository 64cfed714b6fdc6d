package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Place makes the directory dir, which must be empty, the root of a file system
// of its own and lets fill write to it. remove takes it away again. ErrNoPlace
// says that this machine lacks something for it.
type Place func(dir string, fill func() error) (remove func() error, err error)

// ErrNoPlace means that a file system cannot be made here.
var ErrNoPlace = errors.New("no such file system here")

// Tmpfs is a file system in memory of that many bytes.
func Tmpfs(size int64) Place {
	return func(dir string, fill func() error) (func() error, error) {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+strconv.FormatInt(size, 10)); err != nil {
			return nil, fmt.Errorf("mount tmpfs on %s: %w", dir, err)
		}
		return filled(dir, fill, func() error { return nil })
	}
}

// Image is a file system of a kind that mkfs(8) knows, of that many bytes, in a
// sparse file next to dir.
func Image(kind string, size int64, mkfsArgs ...string) Place {
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
		if out, err := run(exec.Command(mkfs, append(mkfsArgs, "-q", image)...), time.Minute); err != nil {
			return nil, fmt.Errorf("make %s: %w: %s", kind, err, out)
		}
		if out, err := run(exec.Command("mount", "-o", "loop", image, dir), time.Minute); err != nil {
			return nil, errors.Join(fmt.Errorf("%w: mount %s: %w: %s", ErrNoPlace, kind, err, out), os.Remove(image))
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return nil, err
		}
		return filled(dir, fill, func() error { return os.Remove(image) })
	}
}

// Union is a writable union by a mounter, whose layers lie next to dir.
func Union(m Mounter, options ...string) Place {
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

// filled calls fill and returns what unmounts dir.
func filled(dir string, fill, after func() error) (func() error, error) {
	return func() error { return errors.Join(umount(dir), after()) }, fill()
}
