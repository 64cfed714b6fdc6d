package integration

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// imageMount is an image of a store, mounted.
type imageMount struct {
	t      testing.TB
	s      *store
	target string
	kills  atomic.Int64
}

func newReadOnlyMount(t testing.TB, r oracle.Recipe) *imageMount {
	t.Helper()
	return newImageMount(t, r, "--ro")
}

// newImageMount mounts an image of the layers with options.
func newImageMount(t testing.TB, r oracle.Recipe, options ...string) *imageMount {
	t.Helper()
	harness.NeedFUSE(t)
	s := newStore(t)
	file := filepath.Join(t.TempDir(), "a.tar")
	must(t, imageOf(t, "image:1", r).Write(file, archive.Options{}))
	s.run("load", "-i", file)
	m := &imageMount{t: t, s: s, target: filepath.Join(t.TempDir(), "m")}
	must(t, os.Mkdir(m.target, 0o755))
	s.run(append(append([]string{"mount"}, options...), "image:1", m.target)...)
	t.Cleanup(func() {
		if out, err := s.try("umount", m.target); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return m
}

// pids returns the processes of the mount.
func (m *imageMount) pids() (holder, server int) {
	m.t.Helper()
	var rows []struct{ Pid, ServerPid int }
	must(m.t, json.Unmarshal([]byte(m.s.run("ps", "--json")), &rows))
	if len(rows) != 1 || rows[0].ServerPid == 0 {
		m.t.Fatalf("%+v", rows)
	}
	return rows[0].Pid, rows[0].ServerPid
}

// kill kills whatever serves the mount now, and returns its pid. It may be called by
// any goroutine.
func (m *imageMount) kill(holder, last int) (int, error) {
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until); <-time.After(time.Millisecond) {
		pid, err := child(holder)
		if err != nil {
			return 0, err
		}
		if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); pid == last || err != nil || !strings.Contains(string(args), "\x00mount-server\x00") {
			continue // none, the same, or one that unmounts for a user
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return 0, err
		}
		m.kills.Add(1)
		return pid, nil
	}
	return 0, errors.New("no new server has come")
}

// child returns a child of a process; 0 if it has none.
func child(parent int) (pid int, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil || len(tasks) == 0 {
		return 0, fmt.Errorf("process %d has ended: %w", parent, err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		if _, err := fmt.Sscan(string(b), &pid); err == nil {
			return pid, nil
		}
	}
	return 0, nil
}

// TestReadOnlySurvives kills the servers of a read-only mount of an image, again and
// again, while it is read: nobody notices.
func TestReadOnlySurvives(t *testing.T) {
	needOracle(t)
	r := imageRecipe(7)
	want := kernelTree(t, r)
	want.Ghosts = "" // what kernel overlayfs alone shows
	m := newReadOnlyMount(t, r)
	holder, first := m.pids()
	if d := cmp.Diff(want, snapshotOf(t, m.target)); d != "" {
		t.Fatal(d)
	}
	stop, killed := make(chan struct{}), make(chan error, 1)
	go func() {
		last := 0
		for i := 0; ; i++ {
			select {
			case <-stop:
				killed <- nil
				return
			case <-time.After(time.Duration(rand.IntN(60)) * time.Millisecond):
			}
			pid, err := m.kill(holder, last)
			if err != nil {
				killed <- err
				return
			}
			last = pid
			if i%5 == 4 { // who dies at once too often is not started again
				<-time.After(1200 * time.Millisecond)
			}
			if i%3 == 0 {
				_ = dropCaches() // only root of the machine may
			}
		}
	}()
	for until := time.Now().Add(12 * time.Second); time.Now().Before(until) && !t.Failed(); {
		if d := cmp.Diff(want, snapshotOf(t, m.target)); d != "" {
			t.Errorf("after %d kills: %s", m.kills.Load(), d)
		}
	}
	close(stop)
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if n := m.kills.Load(); n < 15 {
		t.Errorf("only %d kills", n)
	}
	if h, s := m.pids(); h != holder || s == first {
		t.Errorf("holder %d, server %d; before %d and %d", h, s, holder, first)
	}
	if out := m.s.run("ps"); !strings.Contains(out, "mounted (ro) (restarted ") {
		t.Errorf("ps does not tell: %s", out)
	}
}

// TestReadOnlySurvivesOpen keeps files and directories open, mapped and locked over the
// death of a server.
func TestReadOnlySurvivesOpen(t *testing.T) {
	const size = 3 << 20
	data := oracle.Pattern(5, size)
	lower := oracle.Layer{Entries: []oracle.Entry{
		{Path: "dir", Kind: oracle.Dir}, {Path: "dir/sub", Kind: oracle.Dir}, {Path: "big", Kind: oracle.File, Size: size, Seed: 5},
	}}
	const names = 3000
	for i := range names {
		lower.Entries = append(lower.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("dir/%04d", i)), Kind: oracle.File, Size: 3, Seed: 1})
	}
	m := newReadOnlyMount(t, oracle.Recipe{Lowers: []oracle.Layer{lower}})
	holder, _ := m.pids()

	f, err := os.Open(filepath.Join(m.target, "big"))
	must(t, err)
	defer f.Close()
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	mapped, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer func() { must(t, unix.Munmap(mapped)) }()
	dir, err := os.Open(filepath.Join(m.target, "dir"))
	must(t, err)
	defer dir.Close()
	var got []string
	last := 0
	for round := range 4 {
		list, err := dir.ReadDir(names / 4)
		must(t, err)
		for _, e := range list {
			got = append(got, e.Name())
		}
		if last, err = m.kill(holder, last); err != nil {
			t.Fatal(err)
		}
		if err := dropCaches(); err != nil && !errors.Is(err, fs.ErrPermission) {
			t.Fatal(err)
		}
		must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		must(t, unix.Madvise(mapped, unix.MADV_DONTNEED))
		if sha256.Sum256(mapped) != sha256.Sum256([]byte(data)) {
			t.Errorf("round %d: the mapped file has changed", round)
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, io.NewSectionReader(f, 0, size)); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		if want := sha256.Sum256([]byte(data)); !slices.Equal(sum.Sum(nil), want[:]) {
			t.Errorf("round %d: the open file has changed", round)
		}
		if _, err := unix.Openat(int(dir.Fd()), "sub/absent", unix.O_RDONLY, 0); !errors.Is(err, unix.ENOENT) {
			t.Errorf("round %d: from an open directory: %v", round, err)
		}
		again, err := os.Open(f.Name())
		must(t, err)
		if err := unix.Flock(int(again.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			t.Errorf("round %d: the lock is gone: %v", round, err)
		}
		must(t, again.Close())
	}
	rest, err := dir.ReadDir(-1)
	must(t, err)
	for _, e := range rest {
		got = append(got, e.Name())
	}
	slices.Sort(got)
	if n := len(slices.Compact(slices.Clone(got))); n != names+1 || len(got) != names+1 {
		t.Errorf("a listing over %d servers has %d names, %d different ones, expected %d", 5, len(got), n, names+1)
	}
}

// TestReadOnlyServerLoop kills each server as soon as it comes: in the end the mount is
// gone, and can be made again.
func TestReadOnlyServerLoop(t *testing.T) {
	m := newReadOnlyMount(t, imageRecipe(3))
	holder, _ := m.pids()
	last := 0
	for range 40 {
		pid, err := m.kill(holder, last)
		if err != nil {
			break
		}
		last = pid
	}
	if n := m.kills.Load(); n < 5 || n > 30 {
		t.Errorf("given up after %d", n)
	}
	waitFor(t, "the end of the mount", func() bool { return len(harness.MountsBelow(filepath.Dir(m.target))) == 0 })
	m.s.run("mount", "--ro", "image:1", m.target)
	if _, err := os.ReadDir(m.target); err != nil {
		t.Error(err)
	}
}

// TestReadOnlySurvivesBoth kills holder and server in turn, each when the other has come
// again.
func TestReadOnlySurvivesBoth(t *testing.T) {
	needOracle(t)
	r := imageRecipe(5)
	want := kernelTree(t, r)
	want.Ghosts = ""
	m := newReadOnlyMount(t, r)
	for round := range 3 {
		holder, server := m.pids()
		must(t, unix.Kill(holder, unix.SIGKILL))
		waitFor(t, "another holder", func() bool { h, _ := m.pids(); return h != holder && h != server })
		must(t, unix.Kill(server, unix.SIGKILL))
		if d := cmp.Diff(want, snapshotOf(t, m.target)); d != "" {
			t.Errorf("round %d: %s", round, d)
		}
		waitFor(t, "another server", func() bool { _, s := m.pids(); return s != server })
		<-time.After(1200 * time.Millisecond) // who is killed at once again is not followed by another
	}
}
