package crash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CallsEnv makes this binary the one that asks for its system calls to be held up, and
// becomes the command in the rest of its arguments; its value is the descriptor of a
// socket. Call [RunCalls].
const CallsEnv = "PLYFS_TEST_CALLS"

// Call is a system call of a process that changes something below a directory.
type Call struct {
	N    int    // counts from 1, over all processes
	Name string // of the system call
	Path string // that it is about, relative to the directory; of a new name, its directory
}

func (c Call) String() string { return fmt.Sprintf("call %d, %s %s", c.N, c.Name, c.Path) }

// Fate is what becomes of a call.
type Fate int

// Fates other than an error number, which the call fails with.
const (
	Passes Fate = 0
	Kills  Fate = -1 // it is not executed, and its process is killed
	Lies   Fate = -2 // it is not executed, and returns 0
)

// Calls runs a command and what it starts, and asks decide about each system call that
// changes something below dir. It returns the state of the command when all of them have
// ended.
//
// The kernel stops them in a seccomp filter that their parent has put before them, and
// waits for our word (seccomp_unotify(2)); the parent is this binary, see [CallsEnv]. A
// program in Go makes calls from several threads: they are counted in the order in which
// they come.
func Calls(ctx context.Context, cmd *exec.Cmd, dir string, decide func(Call) Fate) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("hold up calls: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	args := append([]string{"-test.run=^$", cmd.Path}, cmd.Args[1:]...)
	held := exec.CommandContext(ctx, "/proc/self/exe", args...)
	held.Dir, held.Stdin, held.Stdout, held.Stderr, held.SysProcAttr = cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr
	held.WaitDelay = 10 * time.Second
	env := cmd.Env
	if env == nil {
		env = os.Environ()
	}
	held.ExtraFiles = []*os.File{theirs}
	held.Env = append(env[:len(env):len(env)], CallsEnv+"=3")
	if err := held.Start(); err != nil {
		return errors.Join(fmt.Errorf("hold up calls: %w", err), theirs.Close())
	}
	if err := theirs.Close(); err != nil {
		return err
	}
	fd, err := receive(ours)
	if err != nil {
		_ = held.Process.Kill() // whatever it does instead
		return errors.Join(fmt.Errorf("hold up calls: %w", err), held.Wait())
	}
	done := make(chan error, 1)
	go func() { done <- (&listener{fd: fd, dir: dir, decide: decide}).serve() }()
	err = held.Wait()
	return errors.Join(err, <-done)
}

// RunCalls installs the filter and becomes the command.
func RunCalls(socket string) error {
	runtime.LockOSThread() // the filter is that of this thread; it alone survives
	fd, err := strconv.Atoi(socket)
	if err != nil {
		return fmt.Errorf("%s: %w", CallsEnv, err)
	}
	unix.CloseOnExec(fd)
	if len(os.Args) < 3 {
		return errors.New("no command")
	}
	prog := program()
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	listener, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&p)))
	if errno != 0 {
		return fmt.Errorf("install filter: %w", errno)
	}
	unix.CloseOnExec(int(listener))
	if err := unix.Sendmsg(fd, []byte{0}, unix.UnixRights(int(listener)), nil, 0); err != nil {
		return fmt.Errorf("send the listener: %w", err)
	}
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, CallsEnv+"=") {
			env = append(env, e)
		}
	}
	err = syscall.Exec(os.Args[2], os.Args[2:], env)
	return fmt.Errorf("%s: %w", os.Args[2], err)
}

func receive(from *os.File) (int, error) {
	if err := unix.SetsockoptTimeval(int(from.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
		return -1, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	n, err := 0, error(unix.EINTR)
	for err == unix.EINTR {
		_, n, _, _, err = unix.Recvmsg(int(from.Fd()), make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("no listener came: %w", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("no listener came: %w", err)
	}
	return fds[0], nil
}

// argument says what an argument of a call is.
type argument int

const (
	argFd  argument = iota // a descriptor of what is changed
	argDir                 // a descriptor of a directory; the name is in the next argument
)

type watched struct {
	name string
	kind argument
	at   int  // which argument
	open bool // only if it creates or truncates
}

// calls are those that change a file system.
var calls = map[uint32]watched{
	unix.SYS_WRITE: {"write", argFd, 0, false}, unix.SYS_PWRITE64: {"pwrite", argFd, 0, false},
	unix.SYS_WRITEV: {"writev", argFd, 0, false}, unix.SYS_PWRITEV2: {"pwritev2", argFd, 0, false},
	unix.SYS_FTRUNCATE: {"ftruncate", argFd, 0, false}, unix.SYS_FALLOCATE: {"fallocate", argFd, 0, false},
	unix.SYS_FSYNC: {"fsync", argFd, 0, false}, unix.SYS_FDATASYNC: {"fdatasync", argFd, 0, false}, unix.SYS_SYNCFS: {"syncfs", argFd, 0, false},
	unix.SYS_FSETXATTR: {"fsetxattr", argFd, 0, false}, unix.SYS_FCHMOD: {"fchmod", argFd, 0, false}, unix.SYS_FCHOWN: {"fchown", argFd, 0, false},
	unix.SYS_COPY_FILE_RANGE: {"copy_file_range", argFd, 2, false}, unix.SYS_SENDFILE: {"sendfile", argFd, 0, false}, unix.SYS_SPLICE: {"splice", argFd, 2, false},
	unix.SYS_OPENAT: {"openat", argDir, 0, true}, unix.SYS_OPENAT2: {"openat2", argDir, 0, true},
	unix.SYS_MKDIRAT: {"mkdirat", argDir, 0, false}, unix.SYS_MKNODAT: {"mknodat", argDir, 0, false},
	unix.SYS_UNLINKAT: {"unlinkat", argDir, 0, false}, unix.SYS_SYMLINKAT: {"symlinkat", argDir, 1, false},
	unix.SYS_LINKAT: {"linkat", argDir, 2, false}, unix.SYS_RENAMEAT2: {"renameat2", argDir, 2, false}, unix.SYS_RENAMEAT: {"renameat", argDir, 2, false},
	unix.SYS_FCHMODAT: {"fchmodat", argDir, 0, false}, unix.SYS_FCHOWNAT: {"fchownat", argDir, 0, false}, unix.SYS_UTIMENSAT: {"utimensat", argDir, 0, false},
}

// program is a filter that holds up these calls and lets all others pass.
func program() []unix.SockFilter {
	prog := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // the number
	n := len(calls)
	i := 0
	for nr := range calls {
		prog = append(prog, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jt: uint8(n - i)})
		i++
	}
	return append(prog,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
}

// From linux/seccomp.h.
const (
	notifRecv = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
	notifSend = 0xc0182101 // SECCOMP_IOCTL_NOTIF_SEND
)

type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

type listener struct {
	fd     int
	dir    string
	decide func(Call) Fate
	n      int
}

// serve answers until nobody is left whom the filter holds up.
func (l *listener) serve() (err error) {
	defer func() { err = errors.Join(err, unix.Close(l.fd)) }()
	for {
		p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for calls: %w", err)
		}
		if p[0].Revents&unix.POLLIN == 0 {
			if p[0].Revents&unix.POLLHUP != 0 {
				return nil
			}
			continue
		}
		var n notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.fd), notifRecv, uintptr(unsafe.Pointer(&n))); errno != 0 {
			if errno == unix.EINTR || errno == unix.ENOENT { // it has been killed meanwhile
				continue
			}
			return fmt.Errorf("receive call: %w", errno)
		}
		fate := l.fate(&n)
		if fate == Kills {
			if err := unix.Kill(int(n.pid), unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill: %w", err)
			}
			continue
		}
		r := response{id: n.id}
		switch {
		case fate == Passes:
			r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
		case fate > 0:
			r.err = -int32(fate)
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.fd), notifSend, uintptr(unsafe.Pointer(&r))); errno != 0 && errno != unix.ENOENT {
			return fmt.Errorf("answer call: %w", errno)
		}
	}
}

// fate finds out what a call is about. The process waits for us, so what we read of it
// stays as it is; only its other threads could change it, and ours do not.
func (l *listener) fate(n *notification) Fate {
	w, ok := calls[uint32(n.nr)]
	if !ok || w.open && !l.creates(n) {
		return Passes
	}
	base := fmt.Sprintf("/proc/%d/fd/%d", n.pid, int32(n.args[w.at]))
	if w.kind == argDir && int32(n.args[w.at]) == unix.AT_FDCWD {
		base = fmt.Sprintf("/proc/%d/cwd", n.pid)
	}
	path, err := os.Readlink(base)
	if err != nil {
		return Passes
	}
	if w.kind == argDir {
		path = join(path, l.text(n.pid, n.args[w.at+1]))
	}
	rel, ok := strings.CutPrefix(strings.TrimSuffix(path, " (deleted)"), l.dir)
	if !ok || rel != "" && rel[0] != '/' {
		return Passes
	}
	l.n++
	return l.decide(Call{N: l.n, Name: w.name, Path: strings.TrimPrefix(rel, "/")})
}

func join(dir, name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(dir, name)
}

// creates reports whether an open makes or empties a file.
func (l *listener) creates(n *notification) bool {
	flags := n.args[2]
	if n.nr == unix.SYS_OPENAT2 {
		var b [8]byte
		if !l.read(n.pid, n.args[2], b[:]) {
			return false
		}
		flags = *(*uint64)(unsafe.Pointer(&b))
	}
	return flags&(unix.O_CREAT|unix.O_TRUNC) != 0 || flags&unix.O_TMPFILE == unix.O_TMPFILE
}

// text reads a string of a process.
func (l *listener) text(pid uint32, addr uint64) string {
	var b [4096]byte
	for n := len(b); n > 0; n /= 2 { // it may lie at the end of what can be read
		if l.read(pid, addr, b[:n]) {
			s, _, _ := strings.Cut(string(b[:n]), "\x00")
			return s
		}
	}
	return ""
}

func (l *listener) read(pid uint32, addr uint64, b []byte) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = f.ReadAt(b, int64(addr))
	return err == nil || errors.Is(err, io.EOF)
}
