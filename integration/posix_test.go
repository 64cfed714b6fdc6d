package integration

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"

	"github.com/plyfs/plyfs/integration/harness"
)

// posixAccepted are the tests that fail on kernel overlayfs too, with reasons.
var posixAccepted = map[string]string{
	"FcntlFlockLocksFile": "expects that two descriptors of one process exclude each other by fcntl locks, which belong to the process",
}

// TestPosix runs go-fuse's posixtest on a mount with a lower. Each test runs
// in a process of its own with a time limit.
func TestPosix(t *testing.T) {
	needOracle(t)
	if mnt := os.Getenv("PLYFS_POSIX_MOUNT"); mnt != "" {
		t.Fatal("the inner test is TestPosixInner")
	}
	for _, m := range []harness.Mounter{subject(t), harness.Kernel{}} {
		t.Run(m.Name(), func(t *testing.T) {
			dir := t.TempDir()
			stack := harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
			target := filepath.Join(dir, "merged")
			for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			mnt, err := m.Mount(stack, target)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := mnt.Unmount(); err != nil {
					t.Error(err)
				}
			}()
			for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
				t.Run(name, func(t *testing.T) {
					sub := filepath.Join(target, name)
					if err := os.Mkdir(sub, 0o755); err != nil {
						t.Fatal(err)
					}
					cmd := exec.Command("/proc/self/exe", "-test.run=^TestPosixInner$/^"+name+"$")
					cmd.Env = append(os.Environ(), "PLYFS_POSIX_MOUNT="+sub)
					cmd.WaitDelay = time.Second
					kill := time.AfterFunc(time.Minute, func() { mnt.Abort() })
					out, err := cmd.CombinedOutput()
					kill.Stop()
					why, accepted := posixAccepted[name]
					switch {
					case err != nil && accepted:
						t.Skipf("accepted: %s", why)
					case err != nil:
						t.Errorf("%v: %s", err, out)
					}
				})
			}
		})
	}
}

// TestPosixInner is the process that runs one test of posixtest.
func TestPosixInner(t *testing.T) {
	mnt := os.Getenv("PLYFS_POSIX_MOUNT")
	if mnt == "" {
		t.Skip("started by TestPosix")
	}
	for name, f := range posixtest.All {
		t.Run(name, func(t *testing.T) { f(t, mnt) })
	}
}
