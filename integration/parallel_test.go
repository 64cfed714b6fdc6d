package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// tempStack makes the directories of a stack with one lower.
func tempStack(t testing.TB, dir string, lower oracle.Layer) (s harness.Stack, target string) {
	t.Helper()
	s = harness.Stack{Lowers: []string{filepath.Join(dir, "lower")}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	target = filepath.Join(dir, "merged")
	for _, d := range append(s.Lowers, s.Upper, s.Work, target) {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := lower.Build(s.Lowers[0]); err != nil {
		t.Fatal(err)
	}
	return s, target
}

// sharedLayer is a lower whose names everybody works on.
func sharedLayer() oracle.Layer {
	var l oracle.Layer
	for d := range 4 {
		dir := fmt.Sprintf("d%d", d)
		l.Entries = append(l.Entries, oracle.Entry{Path: oracle.Name(dir), Kind: oracle.Dir, Mode: 0o777})
		for f := range 30 {
			l.Entries = append(l.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("%s/f%d", dir, f)), Kind: oracle.File, Size: 20000, Seed: int64(f), Mode: 0o666})
		}
	}
	return l
}

// TestParallel lets several processes create, rename, write, list and remove
// in the same directories. Afterwards the listings agree with lookups, the
// tree is the same after a remount and under the kernel, and the server has
// let go of descriptors and goroutines.
func TestParallel(t *testing.T) {
	needOracle(t)
	stack, target := tempStack(t, filepath.Join(fastDir(t), "parallel"), sharedLayer())
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	duration := 5 * time.Second
	if testing.Short() {
		duration = time.Second
	}
	hammer(t, m, 6, duration)
	first := snapshotOf(t, target)
	if first.Ghosts != "" || strings.Contains(first.Out, "listed twice") || strings.Contains(first.Out, ": E") {
		t.Errorf("names that do not exist: %s; in\n%s", first.Ghosts, first.Out)
	}
	mountAgain(t, m, stack, sameTree(t, first.Out))
}

// mountAgain unmounts m, the mount of stack, lets plyfs and then the kernel mount it
// again, and calls check on each of these mounts.
func mountAgain(t *testing.T, m harness.Mount, stack harness.Stack, check func(by string, m harness.Mount)) {
	t.Helper()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	for _, by := range []harness.Mounter{subject(t), harness.Kernel{}} {
		m, err := by.Mount(stack, m.Target())
		if err != nil {
			t.Fatal(err)
		}
		check("mounted again by "+by.Name(), m)
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}
	workSwept(t, stack.Work)
}

// sameTree is a check for mountAgain: the tree is what a snapshot says.
func sameTree(t *testing.T, want string) func(by string, m harness.Mount) {
	return func(by string, m harness.Mount) {
		if lines := oracle.DiffLines(want, snapshotOf(t, m.Target()).Out); len(lines) > 0 {
			t.Errorf("%s (- before, + after):\n%s", by, strings.Join(lines[:min(len(lines), 20)], "\n"))
		}
	}
}

// hammer runs n processes on a mount for some time; a hang aborts the mount.
func hammer(t *testing.T, m harness.Mount, n int, d time.Duration) {
	t.Helper()
	end := time.Now().Add(d)
	var wg sync.WaitGroup
	for w := range n {
		c, err := oracle.StartAgent(m.Target(), 3, *flagLimit)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), uint64(end.UnixNano())))
			for time.Now().Before(end) {
				if res, err := c.Do(parallelOp(r)); err != nil {
					t.Errorf("%v\nserver: %s", err, m.Abort())
					c.Kill()
					return
				} else if res.Err == "EIO" || res.Err == "ENOTCONN" || res.Err == "ESTALE" || res.Err == "ENOSYS" || res.Ghosts != "" && res.Err == "EIO" {
					t.Errorf("%v", res)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// parallelOp is an operation on the names of sharedLayer and some more.
func parallelOp(r *rand.Rand) oracle.Op {
	name := func() oracle.Name { return oracle.Name(fmt.Sprintf("d%d/f%d", r.IntN(4), r.IntN(40))) }
	dir := oracle.Name(fmt.Sprintf("d%d", r.IntN(4)))
	op := oracle.Op{User: r.IntN(3), FD: r.IntN(6), Path: name(), Seed: r.Int64N(100), Len: 1 + r.Int64N(30000)}
	switch r.IntN(20) {
	case 0, 1:
		op.Op = "put"
	case 2, 3:
		op.Op = "unlink"
	case 4, 5:
		op.Op, op.To = "rename", name()
	case 6:
		op.Op, op.To, op.Flags = "rename", name(), "EXCHANGE"
	case 7:
		op.Op, op.Mode = "mkdir", 0o777
	case 8:
		op.Op = "rmdir"
	case 9:
		op.Op, op.To = "link", name()
	case 10:
		op.Op, op.Path = "readdir", dir
	case 11:
		op.Op, op.Path = "count", dir
	case 12:
		op.Op = "cat"
	case 13, 14:
		op.Op, op.Flags = "open", []string{"RDWR", "RDONLY", "RDWR|CREAT", "WRONLY|APPEND"}[r.IntN(4)]
		op.Mode = 0o666
	case 15:
		op.Op, op.Path, op.Off = "pwrite", "", r.Int64N(30000)
	case 16:
		op.Op, op.Path, op.Off = "pread", "", r.Int64N(30000)
	case 17:
		op.Op, op.Mode = "chmod", 0o666
	case 18:
		op.Op = "truncate"
	default:
		op.Op, op.Attr, op.Value = "setxattr", "user.p", "x"
	}
	return op
}

// TestLeaks runs the same work twice on one mount and expects that the second
// time costs no descriptors, and that a mount at rest has few goroutines.
func TestLeaks(t *testing.T) {
	needOracle(t)
	stack, target := tempStack(t, filepath.Join(fastDir(t), "leaks"), sharedLayer())
	m, err := subject(t).Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	count := func() int {
		n, err := harness.ServerFiles(m)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	// Descriptors are a cache: compare after it had time to fill.
	var counts []int
	for range 3 {
		hammer(t, m, 3, time.Second)
		counts = append(counts, count())
	}
	t.Logf("descriptors after each round: %v", counts)
	if counts[2] > counts[1]+200 {
		t.Errorf("descriptors grow: %v", counts)
	}
	// The files that the processes had open at their end may still be being
	// released, by as many workers as there are requests.
	<-time.After(2 * time.Second)
	n, trace, err := harness.Goroutines(m)
	if err != nil {
		t.Fatal(err)
	}
	if n > 60 {
		t.Errorf("%d goroutines in a mount at rest:\n%.300000s", n, trace)
	}
}

// TestConcurrentLoad lets eight processes without a daemon load overlapping
// images while others list and mount.
func TestConcurrentLoad(t *testing.T) {
	needOracle(t)
	s := newStore(t)
	dir := t.TempDir()
	shared := imageRecipe(77)
	const loaders = 8
	for i := range loaders {
		r := shared
		own := oracle.Layer{Entries: []oracle.Entry{{Path: "own", Kind: oracle.File, Text: fmt.Sprint(i)}}}
		r.Lowers = append([]oracle.Layer{own}, r.Lowers...)
		if err := imageOf(t, fmt.Sprintf("load:%d", i), r).Write(filepath.Join(dir, fmt.Sprintf("%d.tar", i)), archiveOptions(i)); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range loaders {
		target := filepath.Join(dir, fmt.Sprintf("mnt%d", i))
		if err := os.Mkdir(target, 0o755); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for _, args := range [][]string{
				{"load", "-i", filepath.Join(dir, fmt.Sprintf("%d.tar", i))},
				{"images"},
				{"mount", "--ro", fmt.Sprintf("load:%d", i), target},
				{"ps"},
				{"umount", target},
			} {
				if out, err := s.try(args...); err != nil {
					t.Errorf("plyfs %s: %v\n%s", strings.Join(args, " "), err, out)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	// Each layer once: the shared ones and one for each image.
	ents, err := os.ReadDir(filepath.Join(s.root, "layers"))
	if err != nil {
		t.Fatal(err)
	}
	if want := len(shared.Lowers) + loaders; len(ents) != want {
		t.Errorf("%d layers on disk, not %d", len(ents), want)
	}
	s.run("check", "--deep")
}
