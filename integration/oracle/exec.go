package oracle

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// execFunc is one operation: it returns what is compared besides the errno.
type execFunc func(a *agent, op Op) (string, error)

// ops maps the name of an operation to its function. The fields an operation
// reads are given in brackets; every path is subject to Rel.
var ops map[string]execFunc

// opRemount is not for agents: the trial ends them.
func opRemount(*agent, Op) (string, error) { return "", unix.ENOSYS }

func init() {
	ops = map[string]execFunc{
		// open files (exec_file.go, exec_map.go)
		"open":      opOpen,      // [Path Flags Mode FD]
		"close":     opClose,     // [FD]
		"read":      opRead,      // [FD Len] at the file offset
		"write":     opWrite,     // [FD Len+Seed | Text] at the file offset
		"pread":     opPread,     // [FD Off Len]
		"pwrite":    opPwrite,    // [FD Off Len+Seed | Text]
		"seek":      opSeek,      // [FD Off Flags=SET|END|DATA|HOLE]
		"ftruncate": opFtruncate, // [FD Len]
		"fallocate": opFallocate, // [FD Off Len Flags]
		"copyrange": opCopyRange, // [FD Off -> FD2 Off2, Len]
		"fsync":     opFsync,     // [FD]
		"fdatasync": opFdatasync, // [FD]
		"fstat":     opFstat,     // [FD]
		"fchmod":    opFchmod,    // [FD Mode]
		"fchown":    opFchown,    // [FD UID GID]
		"futimens":  opFutimens,  // [FD Atime Mtime]
		"fgetxattr": opFgetxattr, // [FD Attr]
		"fsetxattr": opFsetxattr, // [FD Attr Value Flags]
		"flock":     opFlock,     // [FD Flags]
		"ofdlock":   opOFDLock,   // [FD Off Len Flags]
		"lock":      opLock,      // [FD Off Len Flags] fcntl lock of the process
		"mmapread":  opMmapRead,  // [FD Off Len]
		"mmapwrite": opMmapWrite, // [FD Off Len+Seed]
		"msync":     opMsync,     // [FD FD2 Off Len+Seed] stores, and reads through FD2
		"linkfd":    opLinkFD,    // [FD To]
		"readdirfd": opReaddirFD, // [FD] from the start
		"seekmap":   opSeekMap,   // [FD] all data segments
		// names (exec_name.go)
		"mkdir":    opMkdir,    // [Path Mode]
		"rmdir":    opRmdir,    // [Path]
		"unlink":   opUnlink,   // [Path]
		"mknod":    opMknod,    // [Path Mode with type; Off/Off2 = major/minor]
		"symlink":  opSymlink,  // [Path To=target]
		"link":     opLink,     // [Path To Flags]
		"rename":   opRename,   // [Path To Flags]
		"readlink": opReadlink, // [Path]
		"readdir":  opReaddir,  // [Path]
		"dirseek":  opDirSeek,  // [Path] every cookie is tried
		"dirchurn": opDirChurn, // [Path Len Text] Len names come and go between reads
		"inos":     opInos,     // [Path] inode numbers agree with each other
		"remount":  opRemount,  // unmount and mount again, with new agents
		"chdir":    opChdir,    // [Path]
		"umask":    opUmask,    // [Mode]
		"fill":     opFill,     // [Path Len] creates Len names in a directory
		"count":    opCount,    // [Path] number of names
		"longpath": opLongPath, // [Path Len] mkdir and open at the end of a path
		// attributes (exec_meta.go)
		"stat":        opStat,        // [Path]
		"lstat":       opLstat,       // [Path]
		"access":      opAccess,      // [Path Mode]
		"chmod":       opChmod,       // [Path Mode]
		"chown":       opChown,       // [Path UID GID]
		"lchown":      opLchown,      // [Path UID GID]
		"atime":       opAtime,       // [Path]
		"btime":       opBtime,       // [Path]
		"utimens":     opUtimens,     // [Path Atime Mtime Flags=NOFOLLOW]
		"truncate":    opTruncate,    // [Path Len]
		"getxattr":    opGetxattr,    // [Path Attr Flags=NOFOLLOW]
		"setxattr":    opSetxattr,    // [Path Attr Value Flags]
		"removexattr": opRemovexattr, // [Path Attr Flags=NOFOLLOW]
		"listxattr":   opListxattr,   // [Path Flags=NOFOLLOW]
		"statfs":      opStatfs,      // [Path]
		"blocks":      opBlocks,      // [Path] whether data takes up space
		// flags and handles (exec_ioctl.go)
		"getflags": opGetFlags, // [Path]
		"setflags": opSetFlags, // [Path Flags=adiAS]
		"getfsx":   opGetFSX,   // [Path]
		"setfsx":   opSetFSX,   // [Path Flags=adiAS]
		"handle":   opHandle,   // [Path]
		// whole things (snapshot.go, exec_misc.go)
		"cat":       opCat,       // [Path] content of a file
		"put":       opPut,       // [Path Text | Len+Seed Flags Mode] whole file
		"snapshot":  opSnapshot,  // [Path] the tree below
		"paths":     opPaths,     // everything that exists: type and path
		"numbers":   opNumbers,   // [Path] inode numbers of the tree below
		"sameino":   opSameIno,   // [FD Path] whether both have one number
		"rlimit":    opRlimit,    // [Len] RLIMIT_FSIZE
		"exec":      opExec,      // [Path] starts a program that waits
		"killexec":  opKillExec,  // ends it
		"makeelf":   opMakeELF,   // [Path] such a program
		"appenders": opAppenders, // [Path Len] Len writers with O_APPEND
	}
}

var errNotRun = fmt.Errorf("NOPROCESS")

func opCat(a *agent, op Op) (string, error) {
	fd, err := unix.Open(op.path(), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	b, err := readAll(fd)
	return showBytes(b), err
}

// maxRead bounds what is read of one file: device nodes have no end.
const maxRead = 64 << 20

func readAll(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		buf := make([]byte, 16)
		n, err := unix.Read(fd, buf)
		return buf[:max(n, 0)], err
	}
	b := make([]byte, 0, st.Size+1)
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err != nil || n <= 0 || len(b) > maxRead {
			return b, err
		}
		b = b[:len(b)+n]
	}
}

func opPut(a *agent, op Op) (string, error) {
	flags, err := parseFlags(op.Flags)
	if err != nil {
		return "", err
	}
	if op.Flags == "" {
		flags = unix.O_CREAT | unix.O_TRUNC
	}
	mode := op.Mode
	if mode == 0 {
		mode = 0o644
	}
	fd, err := unix.Open(op.path(), flags|unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
	if err != nil {
		return "", err
	}
	n, err := unix.Write(fd, op.data())
	if e := unix.Close(fd); err == nil {
		err = e
	}
	return fmt.Sprint(n), err
}

func opRlimit(a *agent, op Op) (string, error) {
	lim := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if op.Len > 0 {
		lim.Cur = uint64(op.Len)
	}
	return "", unix.Setrlimit(unix.RLIMIT_FSIZE, &lim)
}

// elfPause is a static x86-64 program that waits for a signal: an ELF header,
// one program header, and pause in a loop.
var elfPause = []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00\x01\x00\x00\x00" +
	"\x78\x00\x40\x00\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
	"\x00\x00\x00\x00\x40\x00\x38\x00\x01\x00\x00\x00\x00\x00\x00\x00" +
	"\x01\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00" +
	"\x00\x00\x40\x00\x00\x00\x00\x00\x81\x00\x00\x00\x00\x00\x00\x00\x81\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00" +
	"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7")

// ELF as the Text of a file entry stands for that program.
const ELF = "@elf"

func opMakeELF(a *agent, op Op) (string, error) {
	fd, err := unix.Open(op.path(), unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY|unix.O_CLOEXEC, 0o755)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	n, err := unix.Write(fd, elfPause)
	return fmt.Sprint(n), err
}

// child is the program that exec started; only user 0's thread touches it.
var child *os.Process

func opExec(a *agent, op Op) (string, error) {
	// A descriptor slot may be inherited between fork and exec, which would
	// keep files busy; all are close-on-exec.
	p, err := os.StartProcess(op.path(), []string{"pause"}, &os.ProcAttr{Files: []*os.File{os.Stderr, os.Stderr, os.Stderr}})
	if err != nil {
		return "", err
	}
	child = p
	return "", nil
}

func opKillExec(a *agent, op Op) (string, error) {
	if child == nil {
		return "", errNotRun
	}
	if err := child.Kill(); err != nil {
		return "", err
	}
	_, err := child.Wait()
	child = nil
	return "", err
}

// opAppenders lets several descriptors append records in turn and at once and
// checks that none is lost or torn.
func opAppenders(a *agent, op Op) (string, error) {
	const rounds, record = 50, 16
	errs := make(chan error, op.Len)
	for w := range op.Len {
		fd, err := unix.Open(op.path(), unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		go func() {
			defer unix.Close(fd)
			for i := range rounds {
				if _, err := unix.Write(fd, fmt.Appendf(nil, "%07d-%07d\n", w, i)); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range op.Len {
		if err := <-errs; err != nil {
			return "", err
		}
	}
	fd, err := unix.Open(op.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	b, err := readAll(fd)
	if err != nil {
		return "", err
	}
	seen := make(map[string]int)
	for line := range strings.Lines(string(b)) {
		seen[line]++
	}
	for w := range op.Len {
		for i := range rounds {
			if seen[fmt.Sprintf("%07d-%07d\n", w, i)] != 1 {
				return fmt.Sprintf("record %d-%d is there %d times", w, i, seen[fmt.Sprintf("%07d-%07d\n", w, i)]), nil
			}
		}
	}
	return fmt.Sprintf("%d bytes, %d records of %d", len(b), op.Len*rounds, record), nil
}
