package oracle

import (
	"fmt"
	"sort"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

var typeNames = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "dir", unix.S_IFLNK: "symlink", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
	unix.S_IFCHR: "char", unix.S_IFBLK: "block",
}

// showStat renders what must be equal on both sides.
func showStat(st *unix.Stat_t) string {
	var b strings.Builder
	typ := st.Mode & unix.S_IFMT
	fmt.Fprintf(&b, "%s 0%o %d:%d", typeNames[typ], st.Mode&0o7777, st.Uid, st.Gid)
	if typ != unix.S_IFDIR {
		fmt.Fprintf(&b, " nlink=%d", st.Nlink)
	}
	if typ == unix.S_IFREG || typ == unix.S_IFLNK {
		fmt.Fprintf(&b, " size=%d", st.Size)
	}
	if typ == unix.S_IFCHR || typ == unix.S_IFBLK {
		fmt.Fprintf(&b, " rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	fmt.Fprintf(&b, " mtime=%s", showTime(unix.Timespec{Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}))
	return b.String()
}

func opStat(a *agent, op Op) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(op.path(), &st); err != nil {
		return "", err
	}
	return showStat(&st), nil
}

func opLstat(a *agent, op Op) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(op.path(), &st); err != nil {
		return "", err
	}
	return showStat(&st), nil
}

// opSameIno compares the inode number of an open file with that of a name.
func opSameIno(a *agent, op Op) (string, error) {
	fd, err := a.fd(op.FD)
	if err != nil {
		return "", err
	}
	var open, named unix.Stat_t
	if err := unix.Fstat(fd, &open); err != nil {
		return "", err
	}
	if err := unix.Lstat(op.path(), &named); err != nil {
		return "", err
	}
	if open.Ino == named.Ino && open.Dev == named.Dev {
		return "same", nil
	}
	return "different", nil
}

func opAccess(a *agent, op Op) (string, error) {
	return "", unix.Faccessat(unix.AT_FDCWD, op.path(), op.Mode, 0)
}

func opChmod(a *agent, op Op) (string, error) { return "", unix.Chmod(op.path(), op.Mode) }

func opChown(a *agent, op Op) (string, error) { return "", unix.Chown(op.path(), op.UID, op.GID) }

func opLchown(a *agent, op Op) (string, error) { return "", unix.Lchown(op.path(), op.UID, op.GID) }

func opTruncate(a *agent, op Op) (string, error) { return "", unix.Truncate(op.path(), op.Len) }

func (o Op) times() ([]unix.Timespec, error) {
	at, err := parseTime(o.Atime)
	if err != nil {
		return nil, err
	}
	mt, err := parseTime(o.Mtime)
	return []unix.Timespec{at, mt}, err
}

// futimens calls utimensat(fd, NULL, …).
func futimens(fd int, ts []unix.Timespec) error {
	if _, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0); e != 0 {
		return e
	}
	return nil
}

// opAtime shows the access time of a name.
func opAtime(_ *agent, op Op) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(op.path(), &st); err != nil {
		return "", err
	}
	return showTime(unix.Timespec{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}), nil
}

// opBtime shows the time of birth of a name.
func opBtime(_ *agent, op Op) (string, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, op.path(), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	if err != nil {
		return "", err
	}
	if st.Mask&unix.STATX_BTIME == 0 {
		return "none", nil
	}
	return showTime(unix.Timespec{Sec: st.Btime.Sec, Nsec: int64(st.Btime.Nsec)}), nil
}

func opUtimens(a *agent, op Op) (string, error) {
	ts, err := op.times()
	if err != nil {
		return "", err
	}
	flags := 0
	if op.Flags == "NOFOLLOW" {
		flags = unix.AT_SYMLINK_NOFOLLOW
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, op.path(), ts, flags); err != nil {
		return "", err
	}
	// The access time is compared here only, where nothing has read since.
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, op.path(), &st, flags); err != nil {
		return "stat", err
	}
	out := "mtime=" + showTime(unix.Timespec{Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec})
	if op.Atime != "omit" {
		out += " atime=" + showTime(unix.Timespec{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec})
	}
	return out, nil
}

// noFollow splits NOFOLLOW from the other flags.
func (o Op) noFollow() (rest int, no bool, err error) {
	s := o.Flags
	if s == "NOFOLLOW" || strings.HasSuffix(s, "|NOFOLLOW") {
		no = true
		s = strings.TrimSuffix(strings.TrimSuffix(s, "NOFOLLOW"), "|")
	}
	rest, err = parseFlags(s)
	return rest, no, err
}

func opGetxattr(a *agent, op Op) (string, error) {
	_, no, err := op.noFollow()
	if err != nil {
		return "", err
	}
	get := unix.Getxattr
	if no {
		get = unix.Lgetxattr
	}
	var buf []byte
	if op.Len >= 0 {
		buf = make([]byte, 1<<16)
		if op.Len > 0 {
			buf = buf[:op.Len]
		}
	}
	n, err := get(op.path(), op.Attr, buf)
	if err != nil || buf == nil {
		return fmt.Sprint(n), err
	}
	return showBytes(buf[:n]), nil
}

func opSetxattr(a *agent, op Op) (string, error) {
	flags, no, err := op.noFollow()
	if err != nil {
		return "", err
	}
	v, err := EncodeValue(op.Value)
	if err != nil {
		return "", err
	}
	set := unix.Setxattr
	if no {
		set = unix.Lsetxattr
	}
	return "", set(op.path(), op.Attr, v, flags)
}

func opRemovexattr(a *agent, op Op) (string, error) {
	_, no, err := op.noFollow()
	if err != nil {
		return "", err
	}
	if no {
		return "", unix.Lremovexattr(op.path(), op.Attr)
	}
	return "", unix.Removexattr(op.path(), op.Attr)
}

func opListxattr(a *agent, op Op) (string, error) {
	_, no, err := op.noFollow()
	if err != nil {
		return "", err
	}
	list, err := listxattr(op.path(), !no)
	return strings.Join(list, " "), err
}

func listxattr(path string, follow bool) ([]string, error) {
	f := unix.Llistxattr
	if follow {
		f = unix.Listxattr
	}
	buf := make([]byte, 1<<16)
	n, err := f(path, buf)
	if err != nil {
		return nil, err
	}
	var out []string
	for s := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if s != "" {
			out = append(out, s)
		}
	}
	sort.Strings(out)
	return out, nil
}

func opBlocks(a *agent, op Op) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(op.path(), &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("size=%d takes up space: %t", st.Size, st.Blocks > 0), nil
}

func opStatfs(a *agent, op Op) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(op.path(), &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("namelen=%d bsize=%d blocks=%d", st.Namelen, st.Bsize, st.Blocks), nil
}
