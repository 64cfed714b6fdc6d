package engine

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// reaper waits for all children of the process, those it started and those it inherited.
type reaper struct {
	mu      sync.Mutex
	waiting map[int]chan unix.WaitStatus // guarded by mu: who asks for which child
}

// newReaper makes this process the one that inherits orphans.
func newReaper() (*reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	r := &reaper{waiting: map[int]chan unix.WaitStatus{}}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	go func() {
		for range ended {
			r.reap()
		}
	}()
	return r, nil
}

// reap takes everybody who has ended. Signals can be merged, so it asks until nobody is left.
func (r *reaper) reap() {
	for {
		r.mu.Lock()
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if c := r.waiting[pid]; pid > 0 && c != nil {
			c <- status
			delete(r.waiting, pid)
		}
		r.mu.Unlock()
		if pid <= 0 && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// start starts a program. The lock keeps reap from taking it before it is known, and from
// taking the half of a fork that ForkExec waits for when the program cannot be executed.
func (r *reaper) start(args []string, attr *syscall.ProcAttr) (int, <-chan unix.WaitStatus, error) {
	program, err := find(args[0], attr.Env)
	if err != nil {
		return 0, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(program, args, attr)
	if err != nil {
		return 0, nil, err
	}
	c := make(chan unix.WaitStatus, 1)
	r.waiting[pid] = c
	return pid, c, nil
}

// find looks a program up in the PATH that it will have itself.
func find(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, e := range env {
		path, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(path) {
			p := filepath.Join(dir, name)
			if unix.Access(p, unix.X_OK) == nil {
				return p, nil
			}
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}
