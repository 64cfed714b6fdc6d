package main

import "fmt"

// walkJob walks the whole mount.
func walkJob(*fixture, *sizes) job { return job{Op: "walk", File: "."} }

func metadataTable(sz *sizes) table {
	lstat := func(f *fixture, _ *sizes) job { return job{Op: "lstat", Names: f.paths} }
	missing := func(f *fixture, _ *sizes) job { return job{Op: "missing", Names: f.absent} }
	list := func(*fixture, *sizes) job { return job{Op: "readdir", File: "wide"} }
	return table{"metadata", "Names and attributes", []scene{
		{name: "walk", fixture: "image", warm: true, steps: []step{
			{phases: []phase{{Name: "walk-cold", Title: "walk + lstat, fresh mount", Goals: least(1, 1, 1)}}, job: walkJob},
			{phases: []phase{{Name: "walk-warm", Title: "walk + lstat again", Goals: least(1.2, 1.2, 1.2)}}, job: walkJob},
			{phases: []phase{{Name: "lstat-warm", Title: "lstat of known paths", Goals: least(1.1, 1.1, 1.1)}}, job: lstat},
		}},
		{name: "walk-disk", fixture: "image", diskOnly: true, steps: []step{
			{phases: []phase{{Name: "walk-all-cold", Title: "walk + lstat, all cold"}}, job: walkJob, drop: true},
		}},
		{name: "missing", fixture: "image", warm: true, steps: []step{
			// The directories are known: one request for each name, no more.
			{job: func(f *fixture, _ *sizes) job { return job{Op: "lstat", Names: f.dirs} }},
			{phases: []phase{{Name: "missing-first", Title: "lstat of missing names, first time"}}, job: missing},
			{phases: []phase{{Name: "missing-again", Title: "lstat of missing names again", Goals: least(0.9, 0.9, 0.9)}}, job: func(f *fixture, _ *sizes) job {
				return job{Op: "missing", Names: f.absent, Count: 4}
			}},
		}},
		{name: "readdir", fixture: "wide", warm: true, steps: []step{
			{phases: []phase{{Name: "readdir-cold", Title: fmt.Sprintf("list %d names, fresh mount", sz.wide)}}, job: list},
			{phases: []phase{{Name: "readdir-warm", Title: fmt.Sprintf("list %d names again", sz.wide)}}, job: list},
		}},
	}}
}

func smallTable() table {
	read := func(threads int) func(*fixture, *sizes) job {
		return func(f *fixture, _ *sizes) job { return job{Op: "read-small", Names: f.files, Threads: threads} }
	}
	return table{"small", "Small files: open, read, close", []scene{
		{name: "small", fixture: "image", warmContent: true, steps: []step{
			{phases: []phase{{Name: "small-first", Title: "first time", Goals: least(0.3, 0.5, 0.5)}}, job: read(1)},
			{phases: []phase{{Name: "small-again", Title: "again", Goals: least(0.4, 1, 1)}}, job: read(1)},
		}},
		{name: "small-4", fixture: "image", warmContent: true, steps: []step{
			{phases: []phase{{Name: "small-4-first", Title: "4 threads, first time", Goals: least(0.3, 0.5, 0)}}, job: read(4)},
			{phases: []phase{{Name: "small-4-again", Title: "4 threads again"}}, job: read(4)},
		}},
	}}
}

// bigBlock is the size of a sequential read or write.
const bigBlock = 128 << 10

// readSteps read one large file in all ways. file is below the mount.
func readSteps(file, where, name string, cold, warm []goal, size func(*sizes) int64) []step {
	seq := func(*fixture, *sizes) job { return job{Op: "read", File: file, Block: bigBlock} }
	mapped := func(*fixture, *sizes) job { return job{Op: "read-mapped", File: file} }
	random := func(count func(*sizes) int) func(*fixture, *sizes) job {
		return func(_ *fixture, sz *sizes) job {
			return job{Op: "read-random", File: file, Block: 4096, Size: size(sz), Count: count(sz)}
		}
	}
	many := func(sz *sizes) int { return sz.random }
	few := func(sz *sizes) int { return sz.randomCold }
	return []step{
		{phases: []phase{{Name: "read-" + name + "-cold", Title: "sequential, " + where + ", cold", Unit: perSecondBytes, Goals: cold}}, job: seq, drop: true},
		{phases: []phase{{Name: "read-" + name + "-warm", Title: "sequential, " + where + ", warm", Unit: perSecondBytes, Goals: warm}}, job: seq},
		{phases: []phase{{Name: "random-" + name + "-warm", Title: "random 4 KiB, " + where + ", warm", Goals: warm}}, job: random(many)},
		{phases: []phase{{Name: "mapped-" + name + "-warm", Title: "mmap, " + where + ", warm", Unit: perSecondBytes}}, job: mapped},
		{phases: []phase{{Name: "random-" + name + "-cold", Title: "random 4 KiB, " + where + ", cold", Goals: cold}}, job: random(few), drop: true},
		{phases: []phase{{Name: "mapped-" + name + "-cold", Title: "mmap, " + where + ", cold", Unit: perSecondBytes}}, job: mapped, drop: true},
	}
}

func largeTable(*sizes) table {
	bigSize := func(sz *sizes) int64 { return sz.big }
	writtenSize := func(sz *sizes) int64 { return sz.written }
	upper := append([]step{{job: func(_ *fixture, sz *sizes) job {
		return job{Op: "write", File: "big-upper", Block: bigBlock, Size: sz.written}
	}}}, readSteps("big-upper", "upper", "upper", least(0.95, 0, 0), least(0.95, 0, 0), writtenSize)...)
	return table{"large", "Large files: reading", []scene{
		{name: "large-lower", fixture: "big", steps: readSteps("data/big", "lower", "lower", least(0.3, 0, 0.95), least(0.9, 0, 0.95), bigSize)},
		{name: "large-upper", fixture: "many", writes: true, steps: upper},
	}}
}

func layersTable(sz *sizes) table {
	t := table{"layers", "Number of layers", nil}
	unions := named("plyfs", "plyfs-base", "plyfs-store", "kernel", "fuse-overlayfs")
	for _, n := range sz.stacks {
		name := fmt.Sprintf("stack%d", n)
		layers := fmt.Sprintf("%d layers", n)
		if n == 1 {
			layers = "1 layer"
		}
		t.scenes = append(
			t.scenes,
			scene{name: "mount-" + name, fixture: name, warm: true, unmounted: true, only: unions, steps: []step{
				{phases: []phase{{Name: fmt.Sprintf("mount-%d", n), Title: "mount, to the first listing, " + layers, Unit: duration, Goals: []goal{{Column: "S", AtMost: 0.08}}}}, special: mountAndList},
				{phases: []phase{{Name: fmt.Sprintf("walk-%d", n), Title: "walk + lstat, fresh mount, " + layers}}, job: walkJob},
			}},
			scene{name: "lookup-" + name, fixture: name, warm: true, only: unions, steps: []step{
				{phases: []phase{{Name: fmt.Sprintf("lookup-%d", n), Title: "lstat of known paths, fresh mount, " + layers}}, job: func(f *fixture, _ *sizes) job {
					return job{Op: "lstat", Names: f.files}
				}},
			}},
		)
	}
	first, last := sz.stacks[0], sz.stacks[len(sz.stacks)-1]
	growth := func(what string) phase {
		return phase{
			Name: what + "-growth", Title: fmt.Sprintf("%s, fresh mount: time with %d layers / with %d", what, last, first), Unit: factor,
			Goals:  stored(atMost(1.1)),
			growth: [2]string{fmt.Sprintf("%s-%d", what, first), fmt.Sprintf("%s-%d", what, last)},
		}
	}
	t.scenes = append(t.scenes, scene{
		name: "growth", only: func(system) bool { return false },
		steps: []step{{phases: []phase{growth("lookup"), growth("walk")}}},
	})
	return t
}
