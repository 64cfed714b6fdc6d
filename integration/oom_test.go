package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// memoryGroup makes a group of processes that may have so much memory, in either version
// of cgroups, or skips the test.
func memoryGroup(t *testing.T, bytes int) (dir string) {
	t.Helper()
	harness.NeedRoot(t)
	for _, v := range []struct{ root, limit, swap string }{
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"},
		{"/sys/fs/cgroup", "memory.max", "memory.swap.max"},
	} {
		dir := filepath.Join(v.root, fmt.Sprintf("plyfs-test-%d", os.Getpid()))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			waitFor(t, "the end of what runs in "+dir, func() bool { return os.Remove(dir) == nil })
		})
		if err := os.WriteFile(filepath.Join(dir, v.limit), fmt.Appendf(nil, "%d", bytes), 0); err != nil {
			continue // the memory controller is not there
		}
		// Without this file there is no swap, or it is not counted.
		if err := os.WriteFile(filepath.Join(dir, v.swap), fmt.Appendf(nil, "%d", bytes), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Log(err)
		}
		return dir
	}
	t.Skip("needs a memory cgroup")
	return ""
}

// oomKills is how often the kernel has killed in a group.
func oomKills(t *testing.T, dir string) (n int) {
	t.Helper()
	for _, name := range []string{"memory.events", "memory.oom_control"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if _, err := fmt.Sscanf(line, "oom_kill %d", &n); err == nil {
				return n
			}
		}
	}
	t.Fatalf("%s: nobody counts", dir)
	return 0
}

// TestSoakMemory: the processes of a mount may have less memory than the objects take that
// programs work with. Servers are killed by the kernel until there is no sense in another
// one: then the mount ends, and says so; nothing that was synced is lost, nothing is there
// that was not written, and it can be mounted again.
func TestSoakMemory(t *testing.T) {
	if os.Getenv("SOAK_DURATION") == "" { // on its way to the limit it waits for the disk, a minute or two
		t.Skip("SOAK_DURATION is not set")
	}
	group := memoryGroup(t, 28<<20)
	m := newImageMount(t, oracle.Recipe{Lowers: []oracle.Layer{workshop()}})
	name := strings.Fields(m.s.run("ps", "-q"))[0]
	holder, server := m.pids()
	for _, pid := range []int{holder, server} { // those that come after them are their children
		must(t, os.WriteFile(filepath.Join(group, "cgroup.procs"), fmt.Appendf(nil, "%d", pid), 0))
	}

	// An object of the upper takes half a KiB: they come to twice the limit.
	content := bytes.Repeat([]byte("kept\n"), 100)
	synced, err := 0, error(nil)
	for i := 0; i < 110_000 && err == nil; i++ {
		dir := filepath.Join(m.target, fmt.Sprintf("d%d", i/1000))
		if i%1000 == 0 {
			if err = os.Mkdir(dir, 0o755); err != nil {
				break
			}
		}
		if i%100 != 0 {
			err = unix.Mknod(filepath.Join(dir, fmt.Sprint(i)), unix.S_IFREG|0o644, 0)
			continue
		}
		if err = writeSynced(filepath.Join(dir, fmt.Sprint(i)), content); err == nil {
			synced = i
		}
	}
	kills := oomKills(t, group)
	t.Logf("killed %d times, the last synced file is %d: %v", kills, synced, err)
	if kills == 0 {
		t.Error("the limit was never reached")
	}
	if err == nil { // it has lived through all of them
		m.s.run("umount", m.target)
	} else if !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.EIO) {
		t.Errorf("the end of a mount shows as: %v", err)
	}
	m.s.run("ps") // if nobody was left to detach it, this does
	waitFor(t, "the end of the mount", func() bool { return len(harness.MountsBelow(filepath.Dir(m.target))) == 0 })
	if events := m.s.run("events", "--since", "1h", "--until", "0s"); err != nil && !strings.Contains(events, "mount end") {
		t.Errorf("nobody has told of the end:\n%s", events)
	}

	m.s.run("mount", name, m.target)
	for i := 0; i <= synced; i++ {
		path := filepath.Join(m.target, fmt.Sprintf("d%d", i/1000), fmt.Sprint(i))
		if i%100 != 0 {
			if st, err := os.Lstat(path); err != nil || st.Size() != 0 {
				t.Fatalf("a file that came before one that was synced: %v, %v", st, err)
			}
			continue
		}
		if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, content) {
			t.Fatalf("a file that was synced: %q, %v", b, err)
		}
	}
}

func writeSynced(path string, content []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}
