package harness

import (
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// skips counts the tests that were skipped, by reason, for TestMain's summary.
var skips struct {
	mu  sync.Mutex
	why map[string]int // guarded by mu
}

// Skip skips a test and counts the reason.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	why := fmt.Sprintf(format, args...)
	skips.mu.Lock()
	if skips.why == nil {
		skips.why = make(map[string]int)
	}
	skips.why[why]++
	skips.mu.Unlock()
	t.Skip(why)
}

// SkipSummary is one line that says how many tests were skipped and why; empty
// if none was.
func SkipSummary() string {
	skips.mu.Lock()
	defer skips.mu.Unlock()
	total := 0
	var parts []string
	for why, n := range skips.why {
		total += n
		parts = append(parts, fmt.Sprintf("%d× %s", n, why))
	}
	if total == 0 {
		return ""
	}
	sort.Strings(parts)
	return fmt.Sprintf("integration: %d tests skipped: %s", total, strings.Join(parts, "; "))
}

// NeedRoot skips unless the test runs as root of the initial user namespace.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root")
	}
	if InUserNamespace() {
		Skip(t, "needs root of the initial user namespace")
	}
}

// NeedFUSE skips unless /dev/fuse can be opened.
func NeedFUSE(t testing.TB) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		Skip(t, "needs /dev/fuse: %v", err)
	}
	_ = unix.Close(fd) // it was only a probe
}

// NeedKernelOverlay skips unless this kernel has overlayfs and lets us mount it.
func NeedKernelOverlay(t testing.TB) {
	t.Helper()
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		Skip(t, "needs kernel overlayfs: %v", err)
	}
	_ = unix.Close(fd) // it was only a probe
}

// InUserNamespace says whether this process lives in another user namespace
// than the initial one.
func InUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	f := strings.Fields(string(b))
	return len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295"
}
