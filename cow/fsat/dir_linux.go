package fsat

import (
	"encoding/binary"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Dirent is one name of a directory as getdents64(2) gives it.
type Dirent struct {
	Name string
	Ino  uint64
	Type uint8 // DT_*; DT_UNKNOWN where the file system does not say
}

var direntBufs = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// ReadDir calls fn for each entry of the directory fd but "." and "..". fd must
// be open for reading and stand at the start. fn's error ends the walk. The names of
// many entries lie in one string: who keeps one for long should copy it.
func ReadDir(fd int, fn func(Dirent) error) error {
	bp := direntBufs.Get().(*[]byte)
	defer direntBufs.Put(bp)
	for {
		var n int
		if err := retry(func() (e error) { n, e = unix.Getdents(fd, *bp); return e }); err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		all := string((*bp)[:n])
		for at := 0; at < n; {
			// struct linux_dirent64: ino, off, reclen, type, name.
			const header = 19
			if n-at < header {
				return unix.EIO
			}
			buf := (*bp)[at:n]
			reclen := int(binary.NativeEndian.Uint16(buf[16:]))
			if reclen < header || reclen > len(buf) {
				return unix.EIO
			}
			name := all[at+header : at+reclen]
			if end := strings.IndexByte(name, 0); end >= 0 {
				name = name[:end]
			}
			if name != "." && name != ".." {
				if err := fn(Dirent{Name: name, Ino: binary.NativeEndian.Uint64(buf), Type: buf[18]}); err != nil {
					return err
				}
			}
			at += reclen
		}
	}
}

// OpenDir opens the directory behind dirfd, which may be an O_PATH descriptor, for
// reading, so that reading it leaves no trace in its access time where the caller
// may do that.
func OpenDir(dirfd int) (fd int, err error) {
	fd, err = OpenName(dirfd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME, 0)
	if err == unix.EPERM { // O_NOATIME is for owners and root
		fd, err = OpenName(dirfd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	return fd, err
}

// OpenDirBeneath is OpenBeneath for a directory that is to be read as OpenDir opens
// it.
func OpenDirBeneath(dirfd int, path string) (fd int, err error) {
	fd, err = OpenBeneath(dirfd, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME)
	if err == unix.EPERM {
		fd, err = OpenBeneath(dirfd, path, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	return fd, err
}

// ReadDirBeneath lists the directory behind the O_PATH descriptor fd as OpenDir
// opens it.
func ReadDirBeneath(fd int, fn func(Dirent) error) error {
	d, err := OpenDir(fd)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	return ReadDir(d, fn)
}

// RemoveAll removes name in dirfd and everything below it. It follows no links
// and goes on where it can after an error, which it returns.
func RemoveAll(dirfd int, name string) error {
	err := Unlink(dirfd, name)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	fd, oerr := OpenName(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if oerr != nil {
		if oerr == unix.ENOTDIR || oerr == unix.ELOOP {
			return err
		}
		return oerr
	}
	var names []string
	first := ReadDir(fd, func(e Dirent) error { names = append(names, e.Name); return nil })
	for _, n := range names {
		if err := RemoveAll(fd, n); err != nil && first == nil {
			first = err
		}
	}
	_ = unix.Close(fd)
	if err := Rmdir(dirfd, name); err != nil && err != unix.ENOENT {
		if first != nil {
			return first
		}
		return err
	}
	return nil
}
