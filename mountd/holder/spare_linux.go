package holder

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A server that is confined cannot start a process, and whatever it started would be confined
// as well. So the holder leaves a copy of itself behind: the spare, which does nothing but wait on
// a socket to the server. When something comes there it executes the holder's verb; when
// the server ends, so does it. It is forked and not executed: what it has in memory is the
// holder's, until one of them writes to it.

// forkSpare makes the spare and returns the server's end of its socket.
func forkSpare(target string) (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "socket of the spare holder")
	defer unix.Close(fds[1])
	c := &spareCall{sock: uintptr(fds[1]), name: [16]byte{}}
	copy(c.name[:], "plyfs-spare")
	if c.path, err = syscall.BytePtrFromString("/proc/self/exe"); err == nil {
		c.args, err = syscall.SlicePtrFromStrings([]string{"plyfs", VerbHolder, target})
	}
	if err == nil {
		c.env, err = syscall.SlicePtrFromStrings(os.Environ())
	}
	var limit unix.Rlimit
	if err == nil {
		err = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	if err != nil {
		_ = ours.Close() // never used
		return nil, fmt.Errorf("spare holder: %w", err)
	}
	c.files = uintptr(min(limit.Cur, 1<<20))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// A signal must not find the Go runtime in a process that has but one of its threads.
	all := ^uint64(0)
	_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&c.mask)), 8, 0, 0)
	pid, errno := c.fork()
	_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&c.mask)), 0, 8, 0, 0)
	if errno != 0 {
		_ = ours.Close() // never used
		return nil, fmt.Errorf("fork a spare holder: %w", errno)
	}
	for {
		if _, err := unix.Wait4(int(pid), nil, unix.WALL, nil); err != unix.EINTR {
			return ours, nil // the spare is init's
		}
	}
}

// spareCall is all that the spare knows.
type spareCall struct {
	sock, files uintptr
	mask        uint64 // of signals
	path        *byte
	args, env   []*byte
	name        [16]byte
	buf         [1]byte
}

// fork returns twice, as fork(2) does; the second time it does not return. There are no
// other threads then and no locks of theirs are ever released: nothing may be called but
// the kernel (as syscall.forkAndExecInChild).
//
//go:noinline
//go:norace
func (c *spareCall) fork() (pid uintptr, errno syscall.Errno) {
	// Without a signal for the holder, which has not asked for this child.
	if pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, 0, 0, 0, 0, 0, 0); pid != 0 || errno != 0 {
		return pid, errno
	}
	// It is nobody's child, so that nobody has to wait for it.
	if pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0); pid != 0 || errno != 0 {
		for {
			_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	_, _, _ = syscall.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
	_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&c.name)), 0)
	if c.sock == 3 {
		_, _, errno = syscall.RawSyscall(unix.SYS_FCNTL, 3, unix.F_SETFD, 0)
	} else {
		_, _, errno = syscall.RawSyscall(unix.SYS_DUP3, c.sock, 3, 0)
	}
	// Above all the connection and the sockets, whose ends would not be seen.
	if _, _, e := syscall.RawSyscall(unix.SYS_CLOSE_RANGE, 4, math.MaxUint32, 0); e != 0 { // before Linux 5.9
		for fd := uintptr(4); fd < c.files; fd++ {
			_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
		}
	}
	for errno == 0 || errno == unix.EINTR {
		var n uintptr
		n, _, errno = syscall.RawSyscall6(unix.SYS_RECVFROM, 3, uintptr(unsafe.Pointer(&c.buf)), 1, unix.MSG_PEEK, 0, 0)
		if errno != 0 {
			continue
		}
		if n == 1 {
			_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&c.mask)), 0, 8, 0, 0)
			_, _, _ = syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(c.path)),
				uintptr(unsafe.Pointer(unsafe.SliceData(c.args))), uintptr(unsafe.Pointer(unsafe.SliceData(c.env))))
		}
		break
	}
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}
