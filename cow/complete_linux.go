package cow

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
)

// Complete gives data to a copy that so far has attributes only: data is copied
// to fd, in place, and made durable; then the attribute mark, which says that the
// data is elsewhere, is removed. fd is open for reading and writing. A crash
// before the last step leaves a file whose data is still taken from elsewhere, but
// before the attributes that writing changes are restored, it has lost its
// capabilities and modification time (as on the kernel). Nobody else may change
// the attributes meanwhile.
//
// All data is copied, even if the caller is about to truncate the file: kernel
// overlayfs reads a file that is marked beyond the size that its attributes say.
func (w *Work) Complete(fd, data int, mark string) error {
	var st unix.Stat_t
	if err := fsat.Fstat(fd, &st); err != nil {
		return err
	}
	caps, err := fsat.GetxattrValue(fd, "", capsAttr)
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("read capabilities: %w", err)
	}
	if err := copyData(fd, data, st.Size); err != nil {
		// The file goes on as it was, so it must look as it did.
		return errors.Join(fmt.Errorf("copy data: %w", err), restore(fd, &st, caps))
	}
	fault.Point("complete.copied")
	// What is behind the end of the data is a hole.
	if err := unix.Ftruncate(fd, st.Size); err != nil {
		return fmt.Errorf("set size: %w", err)
	}
	if err := restore(fd, &st, caps); err != nil {
		return err
	}
	fault.Point("complete.restored")
	if !w.volatile {
		if err := unix.Fsync(fd); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	fault.Point("complete.synced")
	if err := fsat.Removexattr(fd, "", mark); err != nil && !errors.Is(err, unix.ENODATA) {
		return fmt.Errorf("remove %s: %w", mark, err)
	}
	fault.Point("complete.done")
	return nil
}

const capsAttr = "security.capability"

// restore undoes what writing has done to the attributes of the file.
func restore(fd int, st *unix.Stat_t, caps []byte) error {
	if st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		if err := fsat.Chmod(fd, "", st.Mode&0o7777); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if len(caps) > 0 {
		if err := fsat.Setxattr(fd, "", capsAttr, caps, 0); err != nil {
			return fmt.Errorf("set capabilities: %w", err)
		}
	}
	if err := fsat.Utimes(fd, "", [2]unix.Timespec{st.Atim, st.Mtim}); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}
