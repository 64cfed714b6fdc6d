package unionfs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// status is the one place where an error becomes what the kernel is told. An
// errno anywhere in the chain is passed on, except for ENOSYS: the kernel
// would never send that kind of request again. Anything else is EIO and logged,
// because nobody else will ever see it.
func (fs *FS) status(op string, n *inode, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	var errno unix.Errno
	switch {
	case errors.As(err, &errno):
		switch errno {
		case unix.ENOSYS:
			errno = unix.EOPNOTSUPP
		case unix.EIO, unix.EUCLEAN, unix.ESTALE, unix.EMFILE, unix.ENFILE:
			fs.logFailure(op, n, err)
		}
		return fuse.Status(errno)
	case errors.Is(err, errStale):
		return fuse.Status(unix.ESTALE)
	}
	fs.logFailure(op, n, err)
	return fuse.EIO
}

func (fs *FS) logFailure(op string, n *inode, err error) {
	var id uint64
	if n != nil {
		id = n.id
	}
	fs.log.Error("request failed", zap.String("op", op), zap.Uint64("node", id), zap.Error(err))
}
