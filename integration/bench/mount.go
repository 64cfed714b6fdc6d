package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

// Limits for what is not timed.
const (
	mountLimit   = 60 * time.Second
	unmountLimit = 60 * time.Second
)

// mounted is a live mount, or a plain directory.
type mounted struct {
	system system
	target string
	minor  string // of the device: the number of the FUSE connection; set under live.mu

	// umount replaces umount(2), if it is not nil.
	umount func() error

	// A server in the foreground.
	cmd  *exec.Cmd
	log  lastWords
	done chan struct{} // closed when the server has ended
}

// live holds the mounts that exist now, to abort them all on a signal.
var live struct {
	mu  sync.Mutex
	all map[*mounted]bool // guarded by mu
}

func (m *mounted) born() {
	live.mu.Lock()
	defer live.mu.Unlock()
	if live.all == nil {
		live.all = map[*mounted]bool{}
	}
	live.all[m] = true
}

func (m *mounted) gone() {
	live.mu.Lock()
	defer live.mu.Unlock()
	delete(live.all, m)
}

// plain pretends that a directory is a mount.
func plain(s system, dir string) *mounted { return &mounted{system: s, target: dir} }

// mount mounts st on target, and returns when the mount is there. A server
// stays a child of this process, or, without foreground, goes its own way.
func (s system) mount(ctx context.Context, bin string, more []string, st stack, target string, foreground bool) (*mounted, error) {
	m := &mounted{system: s, target: target}
	if s.kind == kernel {
		if err := mountKernel(st, target); err != nil {
			return nil, err
		}
		m.born()
		return m, nil
	}
	argv, err := s.argv(bin, more, st, target, foreground)
	if err != nil {
		return nil, err
	}
	m.born()
	if !foreground {
		cctx, cancel := context.WithTimeout(ctx, mountLimit)
		defer cancel()
		if _, err := run(cctx, argv...); err != nil {
			return nil, errors.Join(err, m.unmount())
		}
		return m, m.connection()
	}
	m.done = make(chan struct{})
	// The server's life does not depend on ctx: it is told to end by umount.
	m.cmd = exec.Command(argv[0], argv[1:]...)
	m.cmd.Stdout, m.cmd.Stderr = &m.log, &m.log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := m.cmd.Start(); err != nil {
		m.gone()
		return nil, fmt.Errorf("start %s: %w", s.Name, err)
	}
	go func() {
		_ = m.cmd.Wait() // its words are in the log
		close(m.done)
	}()
	there := poll(mountLimit, func() bool {
		select {
		case <-m.done:
			return true
		case <-ctx.Done():
			return true
		default:
		}
		_, ok := harness.IsMounted(target)
		return ok
	})
	if _, ok := harness.IsMounted(target); !ok {
		m.abort()
		m.gone()
		if !there {
			return nil, fmt.Errorf("%s: no mount after %s: %s", s.Name, mountLimit, m.log.String())
		}
		return nil, errors.Join(fmt.Errorf("%s ended before the mount was there: %s", s.Name, m.log.String()), ctx.Err())
	}
	return m, m.connection()
}

func (m *mounted) connection() error {
	dev, ok := harness.IsMounted(m.target)
	if !ok {
		return fmt.Errorf("%s says that it has mounted %s, but there is no mount", m.system.Name, m.target)
	}
	live.mu.Lock()
	defer live.mu.Unlock()
	_, m.minor, _ = strings.Cut(dev, ":")
	return nil
}

// pid is the process that was started for the mount; 0 if there is none.
func (m *mounted) pid() int {
	if m.cmd == nil {
		return 0
	}
	return m.cmd.Process.Pid
}

// unmount takes the mount away and waits until its server is gone. What does
// not go is removed by force, and is an error.
func (m *mounted) unmount() error {
	if m.system.kind == native {
		return nil
	}
	defer m.gone()
	if m.umount != nil {
		if err := m.umount(); err != nil {
			m.abort()
			return err
		}
		return nil
	}
	var err error
	ok := poll(unmountLimit, func() bool {
		err = unix.Unmount(m.target, 0)
		return !errors.Is(err, unix.EBUSY)
	})
	if errors.Is(err, unix.EINVAL) { // nothing is mounted there
		err = nil
	}
	if err != nil || !ok {
		m.abort()
		return fmt.Errorf("unmount %s of %s: %w: %s", m.target, m.system.Name, err, m.log.String())
	}
	if m.system.kind == kernel {
		return nil
	}
	if !poll(unmountLimit, m.ended) {
		m.abort()
		return fmt.Errorf("%s still runs %s after its mount is gone: %s", m.system.Name, unmountLimit, m.log.String())
	}
	return nil
}

// ended says whether the server has ended.
func (m *mounted) ended() bool {
	if m.done == nil {
		return len(naming(m.target)) == 0
	}
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// abort breaks the connection, so that every waiting request fails, detaches the
// mount, and kills what serves it.
func (m *mounted) abort() {
	if m.system.kind == native {
		return
	}
	abortConnection(m.minor)
	_ = unix.Unmount(m.target, unix.MNT_DETACH) // it may be gone
	if m.cmd == nil {
		return
	}
	for _, pid := range harness.Family(m.pid()) {
		_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
	}
}

// abortAll breaks every mount.
func abortAll() {
	live.mu.Lock()
	defer live.mu.Unlock()
	for m := range live.all {
		m.abort()
	}
}

// abortConnection writes to the abort file of a FUSE connection.
func abortConnection(minor string) {
	if minor == "" {
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

// mountKernel uses the mount API that takes layers one by one, so that 500 of
// them fit.
func mountKernel(st stack, target string) error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fd, key, value); err != nil {
			return fmt.Errorf("overlay option %s=%s: %w", key, value, err)
		}
		return nil
	}
	for _, l := range st.lowers {
		if err := set("lowerdir+", l); err != nil {
			return err
		}
	}
	if st.upper != "" {
		if err := errors.Join(set("upperdir", st.upper), set("workdir", st.work)); err != nil {
			return err
		}
	}
	for _, o := range st.options {
		key, value, _ := strings.Cut(o, "=")
		if err := set(key, value); err != nil {
			return err
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fsmount overlay: %w", err)
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach overlay to %s: %w", target, err)
	}
	return nil
}
