package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// children are the processes started here that have not been waited for.
var children struct {
	mu   sync.Mutex
	pids map[int]string // guarded by mu; value: what it is
}

func track(pid int, what string) {
	children.mu.Lock()
	defer children.mu.Unlock()
	if children.pids == nil {
		children.pids = make(map[int]string)
	}
	children.pids[pid] = what
}

func untrack(pid int) {
	children.mu.Lock()
	defer children.mu.Unlock()
	delete(children.pids, pid)
}

// childAttr is how servers and agents are started: in a process group of
// their own, killed when the thread that started them ends.
//
// Pdeathsig follows the thread, not the process; it is left out, since Go ends
// threads at will. TestMain kills what is left instead.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}

// Leaks reports processes started by this package that still run and mounts
// below the directories given, and removes both.
func Leaks(dirs ...string) []string {
	var found []string
	children.mu.Lock()
	pids := make(map[int]string, len(children.pids))
	for pid, what := range children.pids {
		pids[pid] = what
	}
	children.mu.Unlock()
	for pid, what := range pids {
		found = append(found, fmt.Sprintf("process %d still runs: %s", pid, what))
		_ = unix.Kill(pid, unix.SIGKILL) // ours; it may have ended
	}
	for _, dir := range dirs {
		mounts := MountsBelow(dir)
		sort.Sort(sort.Reverse(sort.StringSlice(mounts)))
		for _, m := range mounts {
			found = append(found, "still mounted: "+m)
			if dev, ok := IsMounted(m); ok {
				abortConnection(dev)
			}
			_ = unix.Unmount(m, unix.MNT_DETACH) // reported above
		}
		found = append(found, strays(dir)...)
	}
	sort.Strings(found)
	return found
}

// strays finds processes whose command line names dir: servers that went into
// the background. They are killed.
func strays(dir string) []string {
	var found []string
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", p.Name(), "cmdline"))
		if err != nil || !strings.Contains(string(b), dir+"/") {
			continue
		}
		if exe, err := os.Readlink(filepath.Join("/proc", p.Name(), "exe")); err != nil || !strings.Contains(exe, "plyfs") {
			continue
		}
		found = append(found, fmt.Sprintf("process %d still runs: %s", pid, strings.ReplaceAll(string(b), "\x00", " ")))
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	return found
}

// OpenFiles counts the descriptors of a process.
func OpenFiles(pid int) (int, error) {
	ents, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0, fmt.Errorf("count descriptors of process %d: %w", pid, err)
	}
	return len(ents), nil
}

// ServerFiles counts the descriptors of all processes that serve a mount.
func ServerFiles(m Mount) (int, error) {
	total := 0
	for _, pid := range Family(m.Pid()) {
		n, err := OpenFiles(pid)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

// Goroutines stops a Go server with SIGQUIT and counts the goroutines in the
// trace it prints. The mount is gone afterwards.
func Goroutines(m Mount) (n int, trace string, err error) {
	fm, ok := m.(*fuseMount)
	if !ok {
		return 0, "", fmt.Errorf("%T has no server process", m)
	}
	for _, pid := range Family(fm.Pid()) {
		if err := unix.Kill(pid, unix.SIGQUIT); err != nil {
			return 0, "", fmt.Errorf("SIGQUIT to %s (pid %d): %w", fm.name, pid, err)
		}
	}
	select {
	case <-fm.done:
	case <-time.After(10 * time.Second):
		return 0, fm.Abort(), fmt.Errorf("%s does not end on SIGQUIT", fm.name)
	}
	abortConnection(fm.dev)
	_ = unix.Unmount(fm.target, unix.MNT_DETACH) // checked by Leaks
	trace = fm.log.String()
	return strings.Count(trace, "\ngoroutine "), trace, nil
}

// KillServers kills with SIGKILL every plyfs process that names dir on its
// command line or in its environment, and waits until they are gone.
func KillServers(dir string) (int, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", p.Name(), "exe"))
		if name := filepath.Base(exe); err != nil || name != "plyfs" && name != "fuse-overlayfs" {
			continue
		}
		for _, f := range []string{"cmdline", "environ"} {
			if b, err := os.ReadFile(filepath.Join("/proc", p.Name(), f)); err == nil && strings.Contains(string(b), dir+"/") {
				pids = append(pids, pid)
				break
			}
		}
	}
	// All are stopped before the first is killed, so that none starts another.
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
		for _, pid := range pids {
			if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
				return 0, fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
	}
	deadline := time.Now().Add(20 * time.Second)
	for _, pid := range pids {
		for alive(pid) {
			if time.Now().After(deadline) {
				return 0, fmt.Errorf("process %d survives SIGKILL", pid)
			}
			<-time.After(5 * time.Millisecond) // polling: it is not our child
		}
	}
	return len(pids), nil
}

// alive says whether a process exists and is not a zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}
