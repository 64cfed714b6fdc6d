package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// maxPerInode is how much memory the server may take for an inode that the
// kernel knows.
const maxPerInode = 400

// TestMemoryPerInode looks at many files and checks what the server takes for
// each and gives back when the kernel drops its caches.
func TestMemoryPerInode(t *testing.T) {
	harness.NeedRoot(t) // drop_caches
	harness.NeedFUSE(t)
	const dirs, files = 60, 1000
	dir := filepath.Join(fastDir(t), "memory")
	stack := harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	target := filepath.Join(dir, "merged")
	for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for d := range dirs {
		at := filepath.Join(stack.Lowers[0], fmt.Sprintf("directory%d", d))
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		for f := range files {
			if err := os.WriteFile(filepath.Join(at, fmt.Sprintf("some-file-name-%d.txt", f)), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	pid := childOf(t, m.Pid())
	before := anonymous(t, pid)
	seen := 0
	err = filepath.WalkDir(target, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if _, err := e.Info(); err != nil {
			return err
		}
		seen++
		return nil
	})
	if err != nil || seen != dirs*(files+1)+1 {
		t.Fatalf("saw %d objects, %v", seen, err)
	}
	// What listing has left behind goes when it has been quiet for a moment.
	after := settle(t, pid, before+seen*maxPerInode, func() error { return nil })
	if per := (after - before) / seen; per > maxPerInode {
		t.Errorf("%d bytes for each of %d inodes, at most %d wanted (%d before, %d after)", per, seen, maxPerInode, before, after)
	}
	t.Logf("%d bytes for each of %d inodes", (after-before)/seen, seen)
	if now := settle(t, pid, before+(after-before)/2, dropCaches); now-before > (after-before)/2 {
		t.Errorf("of %d bytes for inodes that the kernel has forgotten, %d are still held", after-before, now-before)
	}
}

// dropCaches makes the kernel forget inodes. It keeps those that were used a
// moment ago, so once may not be enough.
func dropCaches() error { return os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0) }

// settle waits until the memory of a process is at most limit, or for half a
// minute, and returns it. It calls fn every second.
func settle(t *testing.T, pid, limit int, fn func() error) (now int) {
	t.Helper()
	for i := range 150 {
		if i%5 == 0 {
			if err := fn(); err != nil {
				t.Fatal(err)
			}
		}
		if now = anonymous(t, pid); now <= limit {
			break
		}
		<-time.After(200 * time.Millisecond) // polling: the kernel says FORGET when it likes
	}
	return now
}

// childOf returns the process that has been started by pid: the server of a
// holder.
func childOf(t *testing.T, pid int) int {
	t.Helper()
	found, err := child(pid)
	if err != nil {
		t.Skip("this kernel does not list children")
	}
	if found > 0 {
		return found
	}
	t.Fatalf("process %d has no child", pid)
	return 0
}

// anonymous returns how much memory of its own a process has in RAM.
func anonymous(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no RssAnon in /proc/PID/status")
	return 0
}
