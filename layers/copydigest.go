package layers

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// CopyDigest identifies what a build copies: the objects below paths by their
// names, types, modes and contents, and not by their times and owners, which a copy
// does not take over. The result is "file:", "dir:" or, of several paths, "multi:"
// and a sha256, as Docker's history shows it: `ADD file:… in /`.
//
// The names of the paths themselves do not count, symbolic links are not followed.
func CopyDigest(paths ...string) (string, error) {
	if len(paths) == 0 {
		return "", fmt.Errorf("%w: nothing to copy", ErrInvalid)
	}
	kinds := make([]string, len(paths))
	sums := make([]string, len(paths))
	for i, p := range paths {
		fd, err := unix.Open(p, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", fmt.Errorf("%q: %w", p, err)
		}
		h := sha256.New()
		kinds[i], err = copied(h, fd, "")
		fsat.Close(fd)
		if err != nil {
			return "", fmt.Errorf("%q: %w", p, err)
		}
		sums[i] = hex.EncodeToString(h.Sum(nil))
	}
	if len(paths) == 1 {
		return kinds[0] + ":" + sums[0], nil
	}
	h := sha256.New()
	for i := range sums {
		fmt.Fprintf(h, "%s:%s\n", kinds[i], sums[i])
	}
	return "multi:" + hex.EncodeToString(h.Sum(nil)), nil
}

// copied hashes one object and what is below it. Every part has its length in
// front, so that no two trees give the same bytes.
func copied(h hash.Hash, fd int, path string) (kind string, err error) {
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return "", err
	}
	typ := st.Mode & unix.S_IFMT
	rdev := uint64(0)
	if typ == unix.S_IFCHR || typ == unix.S_IFBLK {
		rdev = st.Rdev
	}
	fmt.Fprintf(h, "%d:%s %o %d ", len(path), path, st.Mode, rdev)
	capability, err := fsat.GetxattrValue(fd, "", "security.capability")
	if err != nil {
		capability = nil // there is none, or can be none
	}
	fmt.Fprintf(h, "%d:%s ", len(capability), capability)
	switch typ {
	case unix.S_IFREG:
		return "file", copiedFile(h, fd, st.Size)
	case unix.S_IFLNK:
		target, err := fsat.Readlink(fd, "")
		fmt.Fprintf(h, "%d:%s\n", len(target), target)
		return "file", err
	case unix.S_IFDIR:
		_, _ = io.WriteString(h, "\n") // never fails
		return "dir", copiedDir(h, fd, path)
	}
	_, _ = io.WriteString(h, "\n") // never fails
	return "file", nil
}

func copiedFile(h hash.Hash, fd int, size int64) error {
	r, err := fsat.Reopen(fd, unix.O_RDONLY)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(r), "file")
	defer f.Close() // read only
	content := sha256.New()
	n, err := io.Copy(content, f)
	if err == nil && n != size {
		err = fmt.Errorf("%w: it changed while it was read", ErrInvalid)
	}
	fmt.Fprintf(h, "%d:%x\n", n, content.Sum(nil))
	return err
}

func copiedDir(h hash.Hash, fd int, path string) error {
	var names []string
	if err := fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { names = append(names, e.Name); return nil }); err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		c, err := fsat.OpenName(fd, n, unix.O_PATH, 0)
		if err != nil {
			return fmt.Errorf("%q: %w", join(path, n), err)
		}
		_, err = copied(h, c, join(path, n))
		fsat.Close(c)
		if err != nil {
			return fmt.Errorf("%q: %w", join(path, n), err)
		}
	}
	return nil
}
