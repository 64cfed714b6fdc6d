package integration

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

// TestSlowDisk: a union whose layers lie on a disk that takes its time, now and then. The disk is
// another mount of plyfs, in which requests wait. Programs are slow then, and nothing else; those that need
// nothing of the disk do not wait for it.
func TestSlowDisk(t *testing.T) {
	t.Parallel() // it waits for the most part
	needOracle(t)
	plyfs := program(t, "plyfs")
	run := func(args ...string) {
		t.Helper()
		s := &store{t: t, bin: plyfs, root: filepath.Join(t.TempDir(), "root")}
		s.run(args...)
	}
	dir := t.TempDir()
	mount := func(stack harness.Stack, target string) {
		t.Helper()
		for _, d := range append(stack.Lowers, stack.Upper, stack.Work, target) {
			must(t, os.MkdirAll(d, 0o755))
		}
		run("overlay", "-o", "lowerdir="+strings.Join(stack.Lowers, ":")+",upperdir="+stack.Upper+",workdir="+stack.Work, target)
		t.Cleanup(func() { run("umount", target) })
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	disk, union := at("disk"), at("union")
	mount(harness.Stack{Lowers: []string{at("l")}, Upper: at("u"), Work: at("w")}, disk)
	for _, d := range []string{"lower", "upper", "work"} {
		must(t, os.Mkdir(filepath.Join(disk, d), 0o755))
	}
	must(t, workshop().Build(filepath.Join(disk, "lower")))
	mount(harness.Stack{Lowers: []string{filepath.Join(disk, "lower")}, Upper: filepath.Join(disk, "upper"), Work: filepath.Join(disk, "work")}, union)

	// One file is in memory: reading it is not to take long, whatever the others do.
	fast := filepath.Join(union, "data", "low2")
	_, err := os.ReadFile(fast)
	must(t, err)
	for _, r := range [][]string{{"change", "40ms", "0.2"}, {"data,sync", "60ms", "0.1"}, {"name,attr", "20ms", "0.05"}} {
		run("inject", disk, "--op", r[0], "--latency", r[1], "--prob", r[2])
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for name, work := range survivors {
		wg.Go(func() {
			ops, err := work(filepath.Join(union, name), rand.New(rand.NewPCG(1, uint64(len(name)))), stop)
			if err != nil {
				t.Errorf("%s, after %d operations: %v", name, ops, err)
			}
			t.Logf("%s: %d operations", name, ops)
		})
	}
	reads := 0
	wg.Go(func() {
		for ; !stopped(stop); reads++ {
			f, err := os.Open(fast)
			if err == nil {
				_, err = f.Stat()
				_ = f.Close() // only read
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	time.AfterFunc(6*time.Second, func() { close(stop) })
	wg.Wait()
	t.Logf("%d times what is in memory", reads)
	run("inject", disk, "--clear", "all")
	before := snapshotOf(t, union)
	run("umount", union)
	run("overlay", "-o", "lowerdir="+filepath.Join(disk, "lower")+",upperdir="+filepath.Join(disk, "upper")+",workdir="+filepath.Join(disk, "work"), union)
	if after := snapshotOf(t, union); before.Out != after.Out {
		t.Error("the tree is another one after a remount")
	}
}
