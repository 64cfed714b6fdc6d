package unionfs

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// maxSpacePause is the longest pause of withSpace; all together are twice as long.
const maxSpacePause = 32 * time.Millisecond

// withSpace calls fn, and again for a while if there is no space but objects without a
// name that still take some. The kernel forgets an unlinked object a moment after
// unlink(2) has returned; in an overlay of its own the space would be free by then, and
// who makes room and goes on must find it. So it is with one that the keeper has had.
func (fs *FS) withSpace(fn func() error) error {
	err := fn()
	for pause := time.Millisecond; pause <= maxSpacePause && noSpace(err) && (fs.orphans.Load() > 0 || fs.kept.letsGo()); pause *= 2 {
		<-time.After(pause)
		err = fn()
	}
	return err
}

func noSpace(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
