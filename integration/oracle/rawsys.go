package oracle

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawSetgroups sets the groups of the calling thread alone; the functions of
// the syscall package change every thread of the process.
func rawSetgroups(gids []uint32) error {
	var p unsafe.Pointer
	if len(gids) > 0 {
		p = unsafe.Pointer(&gids[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(gids)), uintptr(p), 0); e != 0 {
		return e
	}
	return nil
}

// dirent is one entry of getdents64.
type dirent struct {
	ino  uint64
	off  int64
	typ  byte
	name string
}

// getdents reads one buffer of directory entries.
func getdents(fd, size int) ([]dirent, error) {
	buf := make([]byte, size)
	n, err := unix.Getdents(fd, buf)
	if err != nil {
		return nil, err
	}
	var out []dirent
	for b := buf[:n]; len(b) > 0; {
		d := (*unix.Dirent)(unsafe.Pointer(&b[0]))
		start := int(unsafe.Offsetof(d.Name))
		end := start
		for b[end] != 0 {
			end++
		}
		out = append(out, dirent{d.Ino, d.Off, d.Type, string(b[start:end])})
		b = b[d.Reclen:]
	}
	return out, nil
}
