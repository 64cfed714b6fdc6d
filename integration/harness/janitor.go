package harness

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
)

// JanitorEnv, when set, turns a test binary into a janitor: call RunJanitor
// first thing in TestMain.
const JanitorEnv = "PLYFS_TEST_JANITOR"

// Janitor is a process that outlives the test process, however that ends
// (a panic at the time limit, SIGKILL), and then removes what it left behind.
type Janitor struct {
	mu  sync.Mutex
	cmd *exec.Cmd
	in  io.WriteCloser // guarded by mu
}

// StartJanitor starts this binary again as a janitor.
func StartJanitor() (*Janitor, error) {
	j := &Janitor{cmd: exec.Command("/proc/self/exe")}
	j.cmd.Env = append(os.Environ(), JanitorEnv+"=1")
	// Out of reach of signals to the group of the tests.
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var err error
	if j.in, err = j.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start janitor: %w", err)
	}
	if err := j.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start janitor: %w", err)
	}
	return j, nil
}

// Watch puts a directory under the care of the janitor: at the end the
// processes that name it are killed, mounts in it are detached, and it is
// removed.
func (j *Janitor) Watch(dir string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := fmt.Fprintln(j.in, dir); err != nil {
		return fmt.Errorf("tell the janitor about %s: %w", dir, err)
	}
	return nil
}

// Close lets the janitor do its work and waits for it.
func (j *Janitor) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.in.Close(); err != nil {
		return fmt.Errorf("close janitor: %w", err)
	}
	if err := j.cmd.Wait(); err != nil {
		return fmt.Errorf("janitor: %w", err)
	}
	return nil
}

// RunJanitor is the janitor: it reads directories until the test process is
// gone.
func RunJanitor(in io.Reader) error {
	var dirs []string
	sc := bufio.NewScanner(in)
	for sc.Scan() {
		if filepath.IsAbs(sc.Text()) {
			dirs = append(dirs, sc.Text())
		}
	}
	var failed error
	for _, dir := range dirs {
		if _, err := KillServers(dir); err != nil {
			failed = err
		}
		Leaks(dir)
		if len(MountsBelow(dir)) > 0 {
			failed = fmt.Errorf("mounts below %s cannot be detached", dir)
			continue // never remove files through a mount
		}
		if err := os.RemoveAll(dir); err != nil {
			failed = fmt.Errorf("remove %s: %w", dir, err)
		}
	}
	return failed
}
