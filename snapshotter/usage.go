package snapshotter

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// usageOf adds up what a tree takes on the disk, as du does: a file with several names
// counts once, and one that goes meanwhile not at all.
func usageOf(dir string) (u Usage, err error) {
	type file struct{ dev, ino uint64 }
	seen := map[file]bool{}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil
		}
		if err != nil {
			return err
		}
		id := file{uint64(st.Dev), st.Ino}
		if st.Nlink > 1 {
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		u.Inodes++
		u.Size += st.Blocks * 512 // whatever st_blksize says
		return nil
	})
	if err != nil {
		return Usage{}, fmt.Errorf("measure %q: %w", dir, err)
	}
	return u, nil
}
