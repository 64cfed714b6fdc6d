package mountd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// resolveMountPoint returns the absolute, symlink-free path of a directory to
// mount on.
func resolveMountPoint(target string) (string, error) {
	if target == "" {
		return "", errors.New("no mount point given")
	}
	dir, err := resolveDir(new(fsat.Resolver), "mount point", target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%w; create the directory first", err)
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED):
		return "", fmt.Errorf("%w: a dead mount is on it; detach it with `plyfs umount -l`", err)
	case errors.Is(err, unix.ENOTDIR):
		return "", fmt.Errorf("%w; a mount point must be a directory", err)
	case err != nil:
		return "", err
	}
	if dir == "/" {
		return "", errors.New(`mount point "/": refused, it would cover the whole system`)
	}
	return dir, nil
}

// fileID is what makes two paths the same directory, bind mounts included.
type fileID struct{ dev, ino uint64 }

func idOf(path string) (fileID, bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileID{}, false
	}
	return fileID{uint64(st.Dev), st.Ino}, true
}

// checkOverlap refuses a mount point that is a directory of the union, lies
// inside one or above one: the server would wait for itself. All paths are
// absolute and free of symlinks.
func checkOverlap(target string, dirs []string) error {
	above := map[fileID]bool{} // the mount point and all directories above it
	for p := target; ; p = filepath.Dir(p) {
		if id, ok := idOf(p); ok {
			above[id] = true
		}
		if p == "/" {
			break
		}
	}
	self, _ := idOf(target)
	seen := map[string]bool{} // parents already known not to be the target
	for _, dir := range dirs {
		id, ok := idOf(dir)
		switch {
		case dir == target || ok && id == self:
			return fmt.Errorf("mount point %q is itself a directory of the union (%q): mount somewhere else", target, dir)
		case ok && above[id] || isBelow(target, dir):
			return fmt.Errorf("mount point %q is inside %q, a directory of the union: mount somewhere else", target, dir)
		case isBelow(dir, target):
			return fmt.Errorf("mount point %q would cover %q, a directory of the union: mount somewhere else", target, dir)
		}
		for p := filepath.Dir(dir); p != "/" && !seen[p]; p = filepath.Dir(p) {
			seen[p] = true
			if id, ok := idOf(p); ok && id == self {
				return fmt.Errorf("mount point %q would cover %q, a directory of the union: mount somewhere else", target, dir)
			}
		}
	}
	return nil
}

// isBelow reports whether path lies strictly below dir, by name.
func isBelow(path, dir string) bool {
	return strings.HasPrefix(path, strings.TrimSuffix(dir, string(os.PathSeparator))+"/") && path != dir
}
