package layers

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata"
)

// On a full disk the database cannot write a page, not even the ones that say
// that something is to be deleted. So the store keeps some space of its own,
// and gives it up for transactions that free more than it.
const (
	reserveName = "reserve"
	reserveSize = 1 << 20
)

// refill makes the reserve, or makes it whole again. Where there is no space
// now there may be some at the next use.
func (s *Store) refill() {
	fd, err := fsat.OpenName(s.rootFd, reserveName, unix.O_WRONLY|unix.O_CREAT, 0o600)
	if err != nil {
		return
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if fsat.Fstat(fd, &st) == nil && st.Blocks*512 < reserveSize {
		if unix.Fallocate(fd, 0, 0, reserveSize) != nil {
			_ = unix.Ftruncate(fd, 0) // not half of it
		}
	}
}

// updateFreeing is update for transactions that delete.
func (s *Store) updateFreeing(ctx context.Context, fn func(*metadata.Tx) error) error {
	err := s.update(ctx, fn)
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	fd, oerr := fsat.OpenName(s.rootFd, reserveName, unix.O_WRONLY, 0)
	if oerr != nil {
		return err
	}
	terr := unix.Ftruncate(fd, 0)
	fsat.Close(fd)
	if terr != nil {
		return err
	}
	return s.update(ctx, fn)
}
