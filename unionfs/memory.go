package unionfs

import (
	"bufio"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// trimmer gives memory back to the system after the kernel has come to know or
// has forgotten many inodes. The garbage collector alone would keep what listing
// directories has left behind, or the inodes themselves, until much later.
type trimmer struct {
	seen  atomic.Uint64
	timer *time.Timer
}

const (
	trimEvery = 8192            // inodes
	trimDelay = 2 * time.Second // after the last such lot: they come in bursts
)

func newTrimmer() *trimmer {
	t := &trimmer{timer: time.AfterFunc(time.Hour, Trim)}
	t.timer.Stop()
	return t
}

// Trim gives the memory back to the system that a process at rest does not need. It
// collects twice: what lies in a sync.Pool survives the first time.
func Trim() {
	runtime.GC()
	debug.FreeOSMemory()
	unmapProgram()
}

// unmapProgram lets go of the pages of our own program: the kernel maps a dozen around
// each that is used, and finds those that are used again in its page cache.
func unmapProgram() {
	exe, err := os.Readlink(xattrat.Proc() + "/self/exe")
	if err != nil {
		return
	}
	maps, err := os.Open(xattrat.Proc() + "/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		// from-to permissions offset device inode path
		line := lines.Text()
		f := strings.Fields(line)
		if len(f) < 6 || strings.Contains(f[1], "w") || !strings.HasSuffix(line, exe) {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_DONTNEED)
		}
	}
}

// note counts one inode that has come or gone.
func (t *trimmer) note() {
	if t.seen.Add(1)%trimEvery == 0 {
		t.timer.Reset(trimDelay)
	}
}

func (t *trimmer) stop() { t.timer.Stop() }
