package harness

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FUSE mounts with a program that stays in front and serves the mount.
type FUSE struct {
	name string
	argv []string
	plus bool // understands repeated lowerdir+= and dialect=
	more []string
	Env  []string
}

// Name implements Mounter.
func (f FUSE) Name() string { return f.name }

// startLimit is how long a server may take until its mount is there.
const startLimit = 30 * time.Second

// Args is the command line that mounts s on target.
func (f FUSE) Args(s Stack, target string) []string {
	var o []string
	if f.plus {
		for _, l := range s.Lowers {
			o = append(o, "lowerdir+="+EscapeOption(l))
		}
		if s.Dialect != "" {
			o = append(o, "dialect="+s.Dialect)
		}
		opts := s.options()
		for _, key := range slices.Sorted(maps.Keys(opts)) {
			o = append(o, key+"="+opts[key])
		}
	} else {
		var ls []string
		for _, l := range s.Lowers {
			ls = append(ls, strings.ReplaceAll(EscapeOption(l), ":", `\:`))
		}
		o = append(o, "lowerdir="+strings.Join(ls, ":"), "allow_other", "suid", "dev")
	}
	if s.Upper != "" {
		o = append(o, "upperdir="+EscapeOption(s.Upper), "workdir="+EscapeOption(s.Work))
	}
	if s.ReadOnly {
		o = append(o, "ro")
	}
	if s.Atime != "" {
		o = append(o, s.Atime)
	}
	o = append(append(o, f.more...), s.Extra...)
	args := append([]string(nil), f.argv...)
	return append(args, "-o", strings.Join(o, ","), target)
}

// EscapeOption escapes a path for use as a value in an option string.
func EscapeOption(p string) string {
	return strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(p)
}

// Mount implements Mounter.
func (f FUSE) Mount(s Stack, target string) (Mount, error) {
	args := f.Args(s, target)
	cmd := exec.Command(args[0], args[1:]...)
	m := &fuseMount{name: f.name, target: target, cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &m.log, &m.log
	cmd.Env = append(os.Environ(), f.Env...)
	// The server must not receive the terminal's signals, and must not
	// outlive a test process that was killed.
	cmd.SysProcAttr = childAttr()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", f.name, err)
	}
	track(cmd.Process.Pid, f.name+" "+target)
	go func() {
		m.waitErr = cmd.Wait()
		untrack(cmd.Process.Pid)
		close(m.done)
	}()
	deadline := time.Now().Add(startLimit)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if dev, ok := IsMounted(target); ok {
			m.dev = dev
			return m, nil
		}
		select {
		case <-m.done:
			return nil, fmt.Errorf("%s ended before the mount was there: %w: %s", f.name, m.waitErr, m.log.String())
		case <-time.After(wait): // polling: mountinfo of a directory has no other event
		}
		if time.Now().After(deadline) {
			out := m.Abort()
			return nil, fmt.Errorf("%s: no mount on %s after %s: %s", f.name, target, startLimit, out)
		}
	}
}

type fuseMount struct {
	name, target string
	dev          string // "major:minor"
	cmd          *exec.Cmd
	log          LockedBuffer
	done         chan struct{} // closed after the server ended
	waitErr      error         // valid after done
}

func (m *fuseMount) Target() string { return m.target }
func (m *fuseMount) Pid() int       { return m.cmd.Process.Pid }

func (m *fuseMount) Unmount() error {
	if err := umount(m.target); err != nil {
		return errors.Join(err, fmt.Errorf("server says: %s", m.Abort()))
	}
	select {
	case <-m.done:
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%s (pid %d) still runs 20 s after its mount %s is gone: %s", m.name, m.Pid(), m.target, m.Abort())
	}
	if m.waitErr != nil {
		return fmt.Errorf("%s ended with %w: %s", m.name, m.waitErr, m.log.String())
	}
	return complain(m.name, m.log.String())
}

// complain finds what a server must never print.
func complain(name, log string) error {
	for _, bad := range []string{"DATA RACE", "panic:", "goroutine 1 ["} {
		if strings.Contains(log, bad) {
			return fmt.Errorf("%s: %q in its output:\n%s", name, bad, log)
		}
	}
	return nil
}

// Abort asks the server for its stacks, breaks the connection, kills the
// server and detaches the mount.
func (m *fuseMount) Abort() string {
	// SIGQUIT makes a Go program print all goroutines. It is sent first, as
	// the abort would wake them.
	pids := Family(m.Pid())
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGQUIT) // the process may have ended
	}
	select {
	case <-m.done:
	case <-time.After(3 * time.Second):
	}
	abortConnection(m.dev)
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL) // likewise
	}
	select {
	case <-m.done:
	case <-time.After(10 * time.Second):
	}
	_ = unix.Unmount(m.target, unix.MNT_DETACH) // the message is more important
	return m.log.String()
}

// Family is a process and all its descendants, ancestors first.
func Family(pid int) []int {
	pids := []int{pid}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return pids
	}
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // the thread has ended
		}
		for f := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				pids = append(pids, Family(child)...)
			}
		}
	}
	return pids
}

// KillServer kills the mount server that the holder of a mount has now, and reports whether
// there was one.
func KillServer(holder int) (killed bool) {
	for _, pid := range Family(holder)[1:] {
		// No other child: it may be one that unmounts for a user.
		if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.Contains(string(args), "\x00mount-server\x00") {
			killed = unix.Kill(pid, unix.SIGKILL) == nil
		}
	}
	return killed
}

// Kill implements Mount: SIGKILL to everything that serves the mount, then a
// lazy unmount of the dead mount.
func (m *fuseMount) Kill() error {
	// Stopped first, ancestors before children, so that none is started anew.
	pids := Family(m.Pid())
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGSTOP) // it may have ended
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill %s (pid %d): %w", m.name, pid, err)
		}
	}
	select {
	case <-m.done:
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%s (pid %d) survives SIGKILL: %s", m.name, m.Pid(), m.Abort())
	}
	if err := complain(m.name, m.log.String()); err != nil {
		return err
	}
	abortConnection(m.dev)
	if err := unix.Unmount(m.target, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach dead mount %s: %w", m.target, err)
	}
	return nil
}

// abortConnection writes to the abort file of the FUSE connection with that
// device number ("0:51").
func abortConnection(dev string) {
	_, minor, ok := strings.Cut(dev, ":")
	if !ok {
		return
	}
	const ctl = "/sys/fs/fuse/connections"
	if n, err := os.ReadDir(ctl); err == nil && len(n) == 0 {
		// Maybe nobody has mounted the control file system yet. An error
		// shows in the next step.
		_ = unix.Mount("none", ctl, "fusectl", 0, "")
	}
	// The connection is gone already when this fails.
	_ = os.WriteFile(filepath.Join(ctl, minor, "abort"), []byte("1"), 0)
}

// LockedBuffer keeps the beginning of what a process prints, and can be read
// while that runs.
type LockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

const maxLog = 1 << 20

// Write implements io.Writer.
func (b *LockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buf.Len() < maxLog {
		b.buf.Write(p)
	}
	return len(p), nil
}

// String returns what has been written so far.
func (b *LockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
