package holder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Hidden verbs of the binary. cmd/plyfs hands them to [HolderMain] and
// [ServerMain] before it looks at any option.
const (
	VerbHolder = "mount-holder"
	VerbServer = "mount-server"
)

// Process identifies a process beyond the reuse of its id.
type Process struct {
	Pid int `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat, in clock ticks since boot.
	StartTime uint64 `json:"startTime"`
}

// Self returns the calling process.
func Self() Process {
	p, _ := Lookup(os.Getpid()) // our own entry can always be read
	return p
}

// Lookup returns the process that has this id now.
func Lookup(pid int) (Process, error) {
	st, is, err := procStat(pid)
	if is == ending {
		awaitEnd(pid)
		st, is, err = procStat(pid)
	}
	if err != nil {
		return Process{}, err
	}
	if is == ended {
		return Process{}, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	return Process{Pid: pid, StartTime: st}, nil
}

// endLimit is how long the threads of a process that is being killed are waited for.
const endLimit = time.Second

// awaitEnd waits for the last thread of a process whose first one has ended.
func awaitEnd(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it has ended
	}
	defer unix.Close(fd)
	// What comes of it shows in /proc.
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(endLimit/time.Millisecond))
}

// Alive reports whether p still runs. A zombie does not.
func (p Process) Alive() bool {
	if p.Pid <= 0 {
		return false
	}
	now, err := Lookup(p.Pid)
	return err == nil && now.StartTime == p.StartTime
}

// WaitGone returns when p has ended, or ctx.
func (p Process) WaitGone(ctx context.Context) error {
	if p.Pid <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.Pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.Pid, err)
	}
	defer unix.Close(fd)
	for p.Alive() { // asked after the open: the descriptor is of this process
		if err := ctx.Err(); err != nil {
			return err
		}
		pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(pfd, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch process %d: %w", p.Pid, err)
		}
		if pfd[0].Revents != 0 {
			return nil
		}
	}
	return nil
}

// phase is where a process is in its life.
type phase int

const (
	running phase = iota
	// ending: it has been killed, and its first thread is a zombie, but not the last; its
	// descriptors are still open.
	ending
	ended
)

// procStat returns start time and phase of a process.
func procStat(pid int) (uint64, phase, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, ended, fmt.Errorf("process %d: %w", pid, err)
	}
	return parseStat(b)
}

// parseStat finds the fields behind the command name, which may itself hold
// spaces and parentheses.
func parseStat(b []byte) (start uint64, is phase, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, ended, errors.New("stat of a process: no command name")
	}
	f := strings.Fields(string(b[i+1:])) // f[0] is field 3
	if len(f) < 20 || len(f[0]) != 1 {
		return 0, ended, errors.New("stat of a process: too few fields")
	}
	threads, err := strconv.ParseUint(f[17], 10, 32) // field 20
	if err != nil {
		return 0, ended, err
	}
	switch {
	case f[0] != "Z" && f[0] != "X":
	case threads > 1:
		is = ending
	default:
		is = ended
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, is, err
}

// BootID identifies this boot of the machine: process ids of another one mean
// nothing.
var BootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
})

// spawn starts a verb of this binary with sock as descriptor 3, log as
// standard output and error (nil: /dev/null), in a session of its own.
func spawn(verb, title string, sock, log *os.File) (*exec.Cmd, error) {
	// Descriptors that our own caller left open would be inherited; those of
	// the Go runtime are close-on-exec already.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		if err := closeOnExecAll(); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"plyfs", verb, title}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{sock}
	if log != nil {
		cmd.Stdout, cmd.Stderr = log, log
	}
	cmd.SysProcAttr = sysProcAttr
	start := cmd.Start
	if verb == VerbServer {
		start = func() error { return startWithout(cmd) }
	}
	if err := start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", verb, err)
	}
	return cmd, nil
}

// closeOnExecAll is close_range(2) for kernels before 5.11.
func closeOnExecAll() error {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open descriptors: %w", err)
	}
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// becomeDaemon gives a started process its name, umask and, if asked for,
// nothing else: session, directory and descriptors were set by spawn.
func becomeDaemon(comm string) {
	unix.Umask(0) // modes arrive complete from the kernel
	setComm(comm)
}

// setComm gives this process the name that ps and pgrep show.
func setComm(comm string) { _ = os.WriteFile("/proc/self/comm", []byte(comm), 0) }

// timeouts of the start: generous, since a stack of thousands of layers on a
// slow disk is opened in it.
const startTimeout = 5 * time.Minute
