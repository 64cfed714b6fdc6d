package oracle

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

func opOpen(a *agent, op Op) (string, error) {
	flags, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	fd, err := unix.Open(op.path(), flags|unix.O_NONBLOCK|unix.O_CLOEXEC, op.Mode)
	if err != nil {
		return "", err
	}
	a.put(op.FD, fd, flags&unix.O_ACCMODE == unix.O_RDWR)
	return "", nil
}

func opClose(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	a.fds[op.FD] = -1
	return "", unix.Close(fd)
}

// maxIO bounds a single read.
const maxIO = 4 << 20

func opRead(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	buf := make([]byte, min(op.Len, maxIO))
	n, err := unix.Read(fd, buf)
	if err == unix.EINVAL && isDir(fd) {
		err = unix.EISDIR // the position is a cookie, and may be too large for a check before
	}
	return showBytes(buf[:max(n, 0)]), err
}

func opWrite(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	n, err := unix.Write(fd, op.data())
	return fmt.Sprint(n), err
}

func opPread(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	buf := make([]byte, min(op.Len, maxIO))
	n, err := unix.Pread(fd, buf, op.Off)
	return showBytes(buf[:max(n, 0)]), err
}

func opPwrite(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	n, err := unix.Pwrite(fd, op.data(), op.Off)
	return fmt.Sprint(n), err
}

func opSeek(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	if isDir(fd) {
		return "", errNotRun // offsets of directories are cookies; see dirseek
	}
	whence, ok := map[string]int{"": unix.SEEK_SET, "SET": unix.SEEK_SET, "CUR": unix.SEEK_CUR, "END": unix.SEEK_END, "DATA": unix.SEEK_DATA, "HOLE": unix.SEEK_HOLE}[op.Flags]
	if !ok {
		return "", fmt.Errorf("unknown whence %q", op.Flags)
	}
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		n, err := unix.Seek(fd, op.Off, whence)
		return fmt.Sprint(n), err
	}
	// Where it leads may differ, so the position must not stay there.
	was, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	if err != nil {
		return "", err
	}
	n, err := unix.Seek(fd, op.Off, whence)
	if _, e := unix.Seek(fd, was, unix.SEEK_SET); e != nil {
		return "", e
	}
	return checkHole(fd, op.Off, n, whence, err)
}

// checkHole says whether the answer to SEEK_DATA or SEEK_HOLE is a right one;
// where exactly holes are is up to the copy-up.
func checkHole(fd int, off, n int64, whence int, err error) (string, error) {
	var st unix.Stat_t
	if e := unix.Fstat(fd, &st); e != nil {
		return "", e
	}
	switch {
	case err != nil && (err != unix.ENXIO || off >= st.Size || whence == unix.SEEK_HOLE):
		return "", err
	case err != nil:
		n = st.Size
	case n < off || n > st.Size:
		return fmt.Sprintf("%d is outside of %d-%d", n, off, st.Size), nil
	}
	if whence == unix.SEEK_DATA {
		buf := make([]byte, min(n-off, maxIO))
		if _, err := unix.Pread(fd, buf, off); err != nil && err != unix.EBADF {
			return "read", err
		}
		if i := slices.IndexFunc(buf, func(b byte) bool { return b != 0 }); i >= 0 {
			return fmt.Sprintf("data at %d, next data said to be at %d", off+int64(i), n), nil
		}
	}
	return "right", nil
}

func isDir(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

func opFtruncate(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return "", unix.Ftruncate(fd, op.Len)
}

func opFallocate(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	flags, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	return "", unix.Fallocate(fd, uint32(flags), op.Off, op.Len)
}

func opCopyRange(a *agent, op Op) (string, error) {
	from, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	to, err := a.fd(op.FD2)
	if err != nil {
		return "", err
	}
	offIn, offOut, left := op.Off, op.Off2, op.Len
	for left > 0 {
		n, err := unix.CopyFileRange(from, &offIn, to, &offOut, int(left), 0)
		if err != nil {
			return fmt.Sprint(op.Len - left), err
		}
		if n == 0 {
			break
		}
		left -= int64(n)
	}
	return fmt.Sprint(op.Len - left), nil
}

func opFsync(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return "", unix.Fsync(fd)
}

func opFdatasync(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return "", unix.Fdatasync(fd)
}

func opFstat(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	return showStat(&st), nil
}

func opFchmod(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return "", unix.Fchmod(fd, op.Mode)
}

func opFchown(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return "", unix.Fchown(fd, op.UID, op.GID)
}

func opFutimens(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	ts, err := op.times()
	if err != nil {
		return "", err
	}
	return "", futimens(fd, ts)
}

func opFgetxattr(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	buf := make([]byte, 1<<16)
	n, err := unix.Fgetxattr(fd, op.Attr, buf)
	return showBytes(buf[:max(n, 0)]), err
}

func opFsetxattr(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	v, err := EncodeValue(op.Value)
	if err != nil {
		return "", err
	}
	flags, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	return "", unix.Fsetxattr(fd, op.Attr, v, flags)
}

func opFlock(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	how, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	return "", unix.Flock(fd, how|unix.LOCK_NB)
}

// fcntlLock sets a record lock without waiting; cmd says whose it is.
func (a *agent) fcntlLock(op Op, cmd int) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	l := unix.Flock_t{Start: op.Off, Len: op.Len}
	switch op.Flags {
	case "EX":
		l.Type = unix.F_WRLCK
	case "SH":
		l.Type = unix.F_RDLCK
	default:
		l.Type = unix.F_UNLCK
	}
	return "", unix.FcntlFlock(uintptr(fd), cmd, &l)
}

func opOFDLock(a *agent, op Op) (string, error) { return a.fcntlLock(op, unix.F_OFD_SETLK) }
func opLock(a *agent, op Op) (string, error)    { return a.fcntlLock(op, unix.F_SETLK) }

func opLinkFD(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	return "", unix.Linkat(fd, "", unix.AT_FDCWD, op.to(), unix.AT_EMPTY_PATH)
}

func opSeekMap(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	was, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	if err != nil {
		return "", err
	}
	out, err := dataMap(fd)
	if _, e := unix.Seek(fd, was, unix.SEEK_SET); err == nil {
		err = e
	}
	return out, err
}

// dataMap goes through the data segments of a file and checks that everything
// between them reads as zeros.
func dataMap(fd int) (string, error) {
	off := int64(0)
	for {
		start, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if out, e := checkHole(fd, off, start, unix.SEEK_DATA, err); e == unix.ENXIO {
			return "right", nil
		} else if e != nil || out != "right" || err != nil {
			return out, e
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return "", err
		}
		if end <= off {
			return fmt.Sprintf("no progress at %d", off), nil
		}
		off = end
	}
}
