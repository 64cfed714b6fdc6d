package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/plyfs/plyfs/integration/harness"
)

func memoryTable(sz *sizes) table {
	servers := named("plyfs", "plyfs-base", "fuse-overlayfs")
	return table{"memory", "Memory", []scene{
		{name: "idle", fixture: "many", once: true, few: 3, only: servers, steps: []step{
			{phases: []phase{
				{Name: "idle-rss", Title: "all processes of an idle mount, resident", Unit: memory, Goals: atMost(25 << 20)},
				{Name: "idle-pss", Title: "the same, what is shared counted once", Unit: memory},
			}, special: idleMemory},
		}},
		{name: "inode", fixture: "wide", once: true, few: 3, only: servers, steps: []step{
			{phases: []phase{{Name: "memory-inode", Title: "server, for each inode that the kernel knows", Unit: memory, Goals: atMost(400)}}, special: inodeMemory},
		}},
		{name: "containers", fixture: "image", once: true, few: 3, unmounted: true, only: kinds(plyfs, kernel, fuseOverlayfs), steps: []step{
			{phases: []phase{{Name: "containers", Title: fmt.Sprintf("%d containers that read the same programs, all memory", sz.containers), Unit: memory}}, special: containersMemory},
		}},
	}}
}

// usage is the memory of some processes in bytes.
type usage struct {
	anon, rss, pss float64
}

// memoryOf adds up what the processes that serve a mount use.
func memoryOf(m *mounted) (u usage, err error) {
	if m.pid() == 0 {
		return u, fmt.Errorf("%w: %s has no server that is known", errUnfit, m.system.Name)
	}
	for _, pid := range harness.Family(m.pid()) {
		file := filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup")
		b, err := os.ReadFile(file)
		if err != nil {
			return u, err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			kb, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				continue // the line with addresses
			}
			switch f[0] {
			case "Rss:":
				u.rss += kb * 1024
			case "Pss:":
				u.pss += kb * 1024
			case "Pss_Anon:", "Pss_Shmem:":
				u.anon += kb * 1024
			}
		}
	}
	return u, nil
}

// settled waits until the memory of the server does not sink any more.
func settled(ctx context.Context, m *mounted) (usage, error) {
	const quiet, limit = 6, 60 // times a quarter of a second
	last, err := memoryOf(m)
	same := 0
	for i := 0; err == nil && same < quiet && i < limit; i++ {
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-time.After(250 * time.Millisecond):
		}
		var now usage
		if now, err = memoryOf(m); now.rss < last.rss-64<<10 {
			same = 0
		} else {
			same++
		}
		last = now
	}
	return last, err
}

// idleMemory looks at a mount whose root was listed.
func idleMemory(ctx context.Context, e *env) ([]part, error) {
	if err := listRoot(e.m.target); err != nil {
		return nil, err
	}
	u, err := settled(ctx, e.m)
	return []part{{Value: u.rss, Ops: 1}, {Value: u.pss, Ops: 1}}, err
}

// inodeMemory divides what a server takes for many names by their number. What
// it takes anyway is that of a mount without names: some servers read all names
// when they start. Pages of files, the program's own too, do not count.
func inodeMemory(ctx context.Context, e *env) ([]part, error) {
	before, err := e.emptyMemory(ctx)
	if err != nil {
		return nil, err
	}
	parts, _, err := e.step(ctx, &step{job: walkJob}, nil)
	if err != nil {
		return nil, err
	}
	after, err := settled(ctx, e.m)
	if err != nil {
		return nil, err
	}
	per := max(after.anon-before.anon, 1) / float64(parts[0].Ops)
	return []part{{Value: per, Ops: parts[0].Ops}}, nil
}

// emptyMemory is what the same server takes for an empty layer.
func (e *env) emptyMemory(ctx context.Context) (u usage, err error) {
	rm, err := e.p.newRoom()
	if err != nil {
		return u, err
	}
	empty := *e
	empty.rm, empty.f = rm, &fixture{lowers: []string{filepath.Join(rm.dir, "lower")}}
	if err := os.Mkdir(empty.f.lowers[0], 0o755); err != nil {
		return u, err
	}
	m, err := empty.mount(ctx, true)
	if err != nil {
		return u, err
	}
	if err = listRoot(m.target); err == nil {
		u, err = settled(ctx, m)
	}
	return u, errors.Join(err, m.unmount(), removeAll(rm.dir))
}

// containersMemory mounts the same layers several times with uppers of their
// own, reads the same programs and libraries in each, and looks how much less
// memory the machine has: servers, page cache, inodes.
func containersMemory(ctx context.Context, e *env) ([]part, error) {
	programs := e.f.tree.paths(func(en entry) bool {
		return en.kind == aFile && (strings.HasPrefix(en.path, "usr/bin/") || strings.HasPrefix(en.path, "usr/lib/x86_64-linux-gnu/"))
	})
	if err := errors.Join(e.p.sync(), dropCaches()); err != nil {
		return nil, err
	}
	before, err := usedMemory()
	if err != nil {
		return nil, err
	}
	for range e.r.sizes.containers {
		one := *e
		one.undo = nil
		if one.rm, err = e.p.newRoom(); err != nil {
			return nil, err
		}
		if one.m, err = one.mount(ctx, true); err != nil {
			return nil, err
		}
		e.undo = append(e.undo, func() error { return errors.Join(one.m.unmount(), removeAll(one.rm.dir)) })
		w, err := startWorker(ctx, job{Op: "read-small", Dir: one.m.target, Names: programs}, one.m.abort)
		if err != nil {
			return nil, err
		}
		if _, err := w.finish(); err != nil {
			return nil, err
		}
	}
	after, err := usedMemory()
	return []part{{Value: max(after-before, 1), Ops: 1}}, err
}

// usedMemory is the memory of the machine that is not free.
func usedMemory() (float64, error) {
	f := fields("/proc/meminfo", ":")
	total, terr := strconv.ParseFloat(strings.TrimSuffix(f["MemTotal"], " kB"), 64)
	free, ferr := strconv.ParseFloat(strings.TrimSuffix(f["MemFree"], " kB"), 64)
	if err := errors.Join(terr, ferr); err != nil {
		return 0, fmt.Errorf("read memory of the machine: %w", err)
	}
	return (total - free) * 1024, nil
}
