package oracle

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// AgentEnv, when set to a directory, turns a test binary into an agent that
// lives in it: call RunAgent first thing in TestMain.
const AgentEnv = "PLYFS_ORACLE_AGENT"

// slots is how many files an agent can have open.
const slots = 10

// agent is the state of an agent process. One operation runs at a time; the
// users' threads hand over to each other through channels.
type agent struct {
	fds     [slots]int // -1: free
	written [slots]bool
	users   []chan func()
	ghosts  []string // names without an object, in the listings of the running operation
}

// RunAgent executes the operations that arrive on standard input as JSON, one
// a line, and answers each with a line, until the input ends.
func RunAgent(dir string) error {
	signal.Ignore(unix.SIGXFSZ, unix.SIGPIPE)
	debug.SetPanicOnFault(true)
	a := &agent{}
	for i := range a.fds {
		a.fds[i] = -1
	}
	if err := unix.Chroot(dir); err != nil {
		return fmt.Errorf("chroot %s: %w", dir, err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("chdir /: %w", err)
	}
	n := len(Users)
	if s := os.Getenv(AgentEnv + "_USERS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			return fmt.Errorf("number of users %q: %w", s, err)
		}
	}
	for _, u := range Users[:n] {
		work := make(chan func())
		ready := make(chan error)
		go userThread(u, work, ready)
		if err := <-ready; err != nil {
			return fmt.Errorf("become uid %d: %w", u.UID, err)
		}
		a.users = append(a.users, work)
	}
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := json.NewEncoder(os.Stdout)
	for {
		var op Op
		if err := in.Decode(&op); err != nil {
			return nil // the end of the input is the end of the agent
		}
		if err := out.Encode(a.do(op)); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
}

// userThread executes functions on a thread with the identity, umask and
// working directory of one user. The thread ends with the process.
func userThread(u User, work <-chan func(), ready chan<- error) {
	runtime.LockOSThread()
	debug.SetPanicOnFault(true)
	// umask and working directory of its own; then plain system calls, which
	// change this thread only.
	err := unix.Unshare(unix.CLONE_FS)
	if err == nil {
		unix.Umask(0o022)
		if u.UID != 0 {
			err = become(u)
		}
	}
	ready <- err
	for f := range work {
		f()
	}
}

// become changes the identity of the calling thread alone.
func become(u User) error {
	gids := make([]uint32, len(u.Groups)+1)
	for i, g := range u.Groups {
		gids[i] = uint32(g)
	}
	if err := rawSetgroups(gids[:len(u.Groups)]); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(u.GID), uintptr(u.GID), uintptr(u.GID)); e != 0 {
		return fmt.Errorf("setresgid: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(u.UID), uintptr(u.UID), uintptr(u.UID)); e != 0 {
		return fmt.Errorf("setresuid: %w", e)
	}
	return nil
}

// do executes one operation on its user's thread.
func (a *agent) do(op Op) (res Result) {
	f := ops[op.Op]
	if f == nil {
		return Result{Err: "BADOP", Out: op.Op}
	}
	if op.User >= len(a.users) {
		op.User = 0
	}
	if op.FD < 0 || op.FD >= slots || op.FD2 < 0 || op.FD2 >= slots {
		return Result{Err: "BADSLOT"}
	}
	done := make(chan Result, 1)
	a.users[op.User] <- func() {
		defer func() {
			if p := recover(); p != nil {
				// A fault in a mapping (SIGBUS) arrives as a panic.
				done <- Result{Err: "FAULT", Out: fmt.Sprint(p)}
			}
		}()
		a.ghosts = nil
		out, err := f(a, op)
		done <- Result{Err: errName(err), Out: out, Ghosts: strings.Join(a.ghosts, " "), Gone: a.gone(op)}
	}
	return <-done
}

// gone says whether an operation was about an open object without a name.
func (a *agent) gone(op Op) bool {
	var st unix.Stat_t
	return op.Path == "" && a.fds[op.FD] >= 0 && unix.Fstat(a.fds[op.FD], &st) == nil && st.Nlink == 0
}

// exists drops names from a listing that lstat, as root, does not know, and
// remembers them.
func (a *agent) exists(op Op, fd int, ents []dirent) []dirent {
	var known []dirent
	check := func() {
		for _, e := range ents {
			var st unix.Stat_t
			err := unix.Fstatat(fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW)
			if errors.Is(err, unix.ENOENT) {
				a.ghosts = append(a.ghosts, Name(e.name).String())
				continue
			}
			known = append(known, e)
		}
	}
	if op.User == 0 {
		check()
		return known
	}
	done := make(chan struct{})
	a.users[0] <- func() { check(); close(done) }
	<-done
	return known
}

// errName is what an error is compared by.
func errName(err error) string {
	if err == nil {
		return ""
	}
	var no unix.Errno
	if errors.As(err, &no) {
		if n := unix.ErrnoName(no); n != "" {
			return n
		}
		return fmt.Sprintf("errno%d", int(no))
	}
	return err.Error()
}

// fd returns the descriptor of a slot.
func (a *agent) fd(slot int) (int, error) {
	if a.fds[slot] < 0 {
		return -1, errFree
	}
	return a.fds[slot], nil
}

var errFree = errors.New("SLOTFREE")

// put stores an open file in a slot and closes what was there.
func (a *agent) put(slot, fd int, writable bool) {
	if a.fds[slot] >= 0 {
		_ = unix.Close(a.fds[slot]) // an error would have no operation to belong to
	}
	a.fds[slot] = fd
	a.written[slot] = writable
}

// path gives the system call's path of an operation.
func (o Op) path() string {
	if o.Rel {
		return string(o.Path)
	}
	return "/" + string(o.Path)
}

// to is path for the second path.
func (o Op) to() string {
	if o.Rel {
		return string(o.To)
	}
	return "/" + string(o.To)
}

// data is what a write writes.
func (o Op) data() []byte {
	if o.Text != "" {
		return []byte(o.Text)
	}
	return Pattern(o.Seed, o.Len)
}
