package trace

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// flagName is a bit, or some, and its name.
type flagName struct {
	bits uint32
	name string
}

var openFlags = []flagName{
	{unix.O_CREAT, "O_CREAT"},
	{unix.O_EXCL, "O_EXCL"},
	{unix.O_TRUNC, "O_TRUNC"},
	{unix.O_APPEND, "O_APPEND"},
	{unix.O_NONBLOCK, "O_NONBLOCK"},
	{unix.O_SYNC, "O_SYNC"},
	{unix.O_DSYNC, "O_DSYNC"},
	{unix.O_DIRECT, "O_DIRECT"},
	{unix.O_DIRECTORY, "O_DIRECTORY"},
	{unix.O_NOFOLLOW, "O_NOFOLLOW"},
	{unix.O_NOATIME, "O_NOATIME"},
	{unix.O_TMPFILE &^ unix.O_DIRECTORY, "O_TMPFILE"},
	{1 << 5, "exec"}, // FMODE_EXEC, which the kernel hands through
}

var renameFlags = []flagName{
	{unix.RENAME_NOREPLACE, "RENAME_NOREPLACE"}, {unix.RENAME_EXCHANGE, "RENAME_EXCHANGE"}, {unix.RENAME_WHITEOUT, "RENAME_WHITEOUT"},
}

var fallocFlags = []flagName{
	{unix.FALLOC_FL_KEEP_SIZE, "KEEP_SIZE"},
	{unix.FALLOC_FL_PUNCH_HOLE, "PUNCH_HOLE"},
	{unix.FALLOC_FL_COLLAPSE_RANGE, "COLLAPSE_RANGE"},
	{unix.FALLOC_FL_ZERO_RANGE, "ZERO_RANGE"},
	{unix.FALLOC_FL_INSERT_RANGE, "INSERT_RANGE"},
	{unix.FALLOC_FL_UNSHARE_RANGE, "UNSHARE_RANGE"},
}

// flagText names the bits that are set. Those without a name are left out.
func flagText(v uint32, names []flagName) string {
	var out []string
	for _, f := range names {
		if f.bits != 0 && v&f.bits == f.bits {
			out = append(out, f.name)
			v &^= f.bits
		}
	}
	return strings.Join(out, "|")
}

func openText(flags uint32) string {
	mode := [...]string{unix.O_RDONLY: "O_RDONLY", unix.O_WRONLY: "O_WRONLY", unix.O_RDWR: "O_RDWR", unix.O_ACCMODE: "O_ACCMODE"}[flags&unix.O_ACCMODE]
	if more := flagText(flags, openFlags); more != "" {
		return mode + "|" + more
	}
	return mode
}

// modeText is a mode as ls(1) would not write it, but strace(1) does.
func modeText(mode uint32) string {
	kind := map[uint32]string{
		unix.S_IFDIR: "S_IFDIR", unix.S_IFCHR: "S_IFCHR", unix.S_IFBLK: "S_IFBLK", unix.S_IFIFO: "S_IFIFO", unix.S_IFSOCK: "S_IFSOCK", unix.S_IFLNK: "S_IFLNK",
	}[mode&unix.S_IFMT]
	if kind == "" {
		return fmt.Sprintf("%04o", mode&0o7777)
	}
	return fmt.Sprintf("%s|%04o", kind, mode&0o7777)
}

func whenceText(w uint32) string {
	switch w {
	case unix.SEEK_DATA:
		return "SEEK_DATA"
	case unix.SEEK_HOLE:
		return "SEEK_HOLE"
	}
	return fmt.Sprintf("whence %d", w)
}

// attrText says what a SETATTR sets (struct fuse_setattr_in, FATTR_*).
func attrText(b body) string {
	valid := b.u32(0)
	var out []string
	add := func(bit int, format string, args ...any) {
		if valid&(1<<bit) != 0 {
			out = append(out, fmt.Sprintf(format, args...))
		}
	}
	add(0, "mode=%04o", b.u32(68)&0o7777)
	add(1, "uid=%d", b.u32(76))
	add(2, "gid=%d", b.u32(80))
	add(3, "size=%d", b.u64(16))
	switch {
	case valid&(1<<7) != 0:
		out = append(out, "atime=now")
	default:
		add(4, "atime=%d.%09d", int64(b.u64(32)), b.u32(56))
	}
	switch {
	case valid&(1<<8) != 0:
		out = append(out, "mtime=now")
	default:
		add(5, "mtime=%d.%09d", int64(b.u64(40)), b.u32(60))
	}
	return strings.Join(out, " ")
}
