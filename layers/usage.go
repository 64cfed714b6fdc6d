package layers

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// treeUse is what a directory tree occupies.
type treeUse struct {
	apparent  int64 // sizes of regular files, hard links once
	allocated int64 // blocks of everything, the root included
	inodes    int64 // everything below the root, hard links once
	entries   int64 // names below the root, whiteouts left out
}

// measure walks the directory fd.
func measure(fd int) (treeUse, error) {
	var u treeUse
	type id struct{ dev, ino uint64 }
	seen := map[id]bool{}
	var walk func(fd int) error
	walk = func(fd int) error {
		return fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error {
			c, err := fsat.OpenName(fd, e.Name, unix.O_PATH, 0)
			if errors.Is(err, unix.ENOENT) {
				return nil // gone while we looked: the tree may be in use
			}
			if err != nil {
				return err
			}
			defer fsat.Close(c)
			var st unix.Stat_t
			if err := fsat.Fstat(c, &st); err != nil {
				return err
			}
			if !whiteout.IsDevice(st.Mode, st.Rdev) {
				u.entries++
			}
			if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
				k := id{st.Dev, st.Ino}
				if seen[k] {
					return nil
				}
				seen[k] = true
			}
			u.inodes++
			u.allocated += st.Blocks * 512
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFREG:
				u.apparent += st.Size
			case unix.S_IFDIR:
				return walk(c)
			}
			return nil
		})
	}
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return u, err
	}
	u.allocated = st.Blocks * 512
	return u, walk(fd)
}
