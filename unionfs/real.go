package unionfs

import (
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// dirFd returns an O_PATH descriptor of a directory in the upper.
func (fs *FS) dirFd(n *inode) (*fdHandle, error) {
	if n == fs.root {
		return borrowed(fs.upper.root), nil
	}
	if h := fs.fds.peek(&n.fd); h != nil {
		return h, nil
	}
	fs.renameMu.RLock()
	defer fs.renameMu.RUnlock()
	return fs.fds.get(&n.fd, false, func() (int, error) { return fs.openUpperDir(n) })
}

// openUpperDir opens a directory of the upper from its nearest ancestor that is
// open. Preconditions: renameMu is held.
func (fs *FS) openUpperDir(n *inode) (int, error) {
	var names []string
	base := borrowed(fs.upper.root)
	for at := n; at != fs.root; at = at.where.parent {
		if at.where.parent == nil {
			return -1, unix.ENOENT // removed
		}
		if at != n {
			if h := fs.fds.peek(&at.fd); h != nil {
				base = h
				break
			}
		}
		names = append(names, at.where.name)
	}
	defer base.release()
	slices.Reverse(names)
	return fsat.OpenBeneath(base.fd, strings.Join(names, "/"), unix.O_PATH|unix.O_DIRECTORY)
}

// withReal calls fn with the place of the real object behind n: a directory
// descriptor and a name, or the object's own descriptor and no name. The place
// cannot change while fn runs.
func (fs *FS) withReal(n *inode, fn func(dirfd int, name string) error) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return fs.withRealLocked(n, fn)
}

// withRealLocked is withReal for callers that hold n.mu.
func (fs *FS) withRealLocked(n *inode, fn func(dirfd int, name string) error) error {
	e := n.extra()
	switch {
	case e.orphan != nil && e.orphan.fd >= 0:
		return fn(e.orphan.fd, "")
	case e.orphan != nil && e.orphan.name != "":
		return fn(fs.work.Fd(), e.orphan.name)
	case !n.upper:
		return fs.lowers.with(n.low, fn)
	case n.isDir():
		h, err := fs.dirFd(n)
		if err != nil {
			return err
		}
		defer h.release()
		return fn(h.fd, "")
	case e.group != nil && e.group.index != "":
		dir, err := fs.index.dir()
		if err != nil {
			return err
		}
		return fn(dir, e.group.index)
	case n.where.parent == nil:
		return errStale
	}
	h, err := fs.dirFd(n.where.parent)
	if err != nil {
		return err
	}
	defer h.release()
	return fn(h.fd, n.where.name)
}

// dataFd returns a descriptor of the file's data: for reading, or for reading
// and writing, which needs the file to be in the upper.
func (fs *FS) dataFd(n *inode, write bool) (*fdHandle, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return fs.dataFdLocked(n, write)
}

// dataFdLocked is dataFd for callers that hold n.mu.
func (fs *FS) dataFdLocked(n *inode, write bool) (*fdHandle, error) {
	if h := fs.fds.peek(&n.fd); h != nil {
		if h.rw || !write {
			return h, nil
		}
		h.release()
	}
	flags := unix.O_RDONLY
	if write {
		flags = unix.O_RDWR
	}
	return fs.fds.get(&n.fd, write, func() (fd int, err error) {
		inLower := !n.upper || n.meta
		if write && inLower {
			return -1, unix.EROFS
		}
		if inLower {
			return fs.lowers.open(n.low)
		}
		if o := n.extra().orphan; o != nil && o.fd >= 0 {
			fd, err = fsat.Reopen(o.fd, flags)
		} else {
			err = fs.withRealLocked(n, func(dirfd int, name string) (e error) {
				fd, e = fs.upper.open(dirfd, name, flags)
				if e == unix.EPERM && write {
					// It is append-only by the flags of its own file system;
					// everybody who writes to it appends.
					fd, e = fs.upper.open(dirfd, name, flags|unix.O_APPEND)
				}
				return e
			})
		}
		if err == nil {
			quiet(fd)
		}
		return fd, err
	})
}

// keepData keeps the descriptor fd of a file's data in the upper, open for
// reading and writing, for whoever needs it next.
func (fs *FS) keepData(n *inode, fd int) {
	quiet(fd)
	fs.fds.put(&n.fd, fd, true).release()
}

// again runs fn until it does not report that what it looked at has moved.
func again[T any](fn func() (T, error)) (T, error) {
	for i := 0; ; i++ {
		v, err := fn()
		if err != errStale || i == 1000 {
			return v, err
		}
		runtime.Gosched()
	}
}
