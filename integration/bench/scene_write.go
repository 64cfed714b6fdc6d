package main

import "fmt"

func writeTable(*sizes) table {
	file := func(op string) func(*fixture, *sizes) job {
		return func(_ *fixture, sz *sizes) job {
			j := job{Op: op, File: "written", Block: bigBlock, Size: sz.written}
			if op == "write-random" {
				j.Block, j.Count = 4096, sz.randomCold
			}
			return j
		}
	}
	return table{"write", "Large files: writing", []scene{
		{name: "write", fixture: "many", writes: true, steps: []step{
			{phases: []phase{
				{Name: "write-seq", Title: "sequential, new file", Unit: perSecondBytes, Goals: least(0.9, 0, 0)},
				{Name: "write-seq-fsync", Title: "the same with fsync at the end", Unit: perSecondBytes},
			}, job: file("write")},
			{phases: []phase{
				{Name: "write-random", Title: "random 4 KiB, same file", Goals: least(0.9, 0, 0)},
				{Name: "write-random-fsync", Title: "the same with fsync at the end"},
			}, job: file("write-random")},
		}},
	}}
}

// perDir is how many names are created in a directory.
const perDir = 500

// createdNames are the files that namesTable works on.
func createdNames(sz *sizes) (dirs, files []string) {
	for i := range sz.created {
		if i%perDir == 0 {
			dirs = append(dirs, fmt.Sprintf("new%d", i/perDir))
		}
		files = append(files, fmt.Sprintf("new%d/file-%d", i/perDir, i))
	}
	return dirs, files
}

func namesTable(sz *sizes) table {
	dirs, files := createdNames(sz)
	var renamed []string
	for _, f := range files {
		renamed = append(renamed, f+".renamed")
	}
	names := func(op string, names []string) func(*fixture, *sizes) job {
		return func(*fixture, *sizes) job { return job{Op: op, Names: names, Block: 512} }
	}
	return table{"names", "New files in the upper", []scene{
		{name: "names", fixture: "many", writes: true, steps: []step{
			{job: names("mkdir", dirs)},
			{phases: []phase{{Name: "create", Title: "create, write 512 bytes, close", Goals: leastOn(0.85, 0.4)}}, job: names("create", files)},
			{phases: []phase{{Name: "rename", Title: "rename", Goals: leastOn(0.5, 0.4)}}, job: names("rename", files)},
			{phases: []phase{{Name: "unlink", Title: "unlink", Goals: leastOn(0.7, 0.4)}}, job: names("unlink", renamed)},
		}},
	}}
}

// some is the part of the files that phases copy up one by one: with a disk
// each costs a sync.
func some(files []string) []string { return files[:len(files)*2/5] }

func copyUpTable(*sizes) table {
	names := func(op string) func(*fixture, *sizes) job {
		return func(f *fixture, _ *sizes) job { return job{Op: op, Names: some(f.files), Block: 10} }
	}
	tree := func(op string) func(*fixture, *sizes) job {
		return func(*fixture, *sizes) job { return job{Op: op, File: "tree"} }
	}
	one := func(name string, ph phase, j func(*fixture, *sizes) job) scene {
		return scene{name: name, fixture: "many", writes: true, warmContent: true, steps: []step{{phases: []phase{ph}, job: j}}}
	}
	metacopy := func(sc scene) scene {
		sc.options = []string{"redirect_dir=on", "metacopy=on"}
		sc.only = kinds(plyfs, kernel)
		return sc
	}
	big := one("append-big", phase{Name: "append-big", Title: "append to a large file", Unit: duration, Goals: least(1, 0, 0)}, func(*fixture, *sizes) job {
		return job{Op: "append", Names: []string{"data/big"}, Block: 10}
	})
	big.fixture, big.warmContent, big.few = "big", false, 3
	big.only = func(s system) bool { return s.kind != native && s.kind != program }
	return table{"copyup", "Changing what a layer has", []scene{
		one("append-small", phase{Name: "append-small", Title: "append to small files", Goals: leastOn(1, 0.4)}, names("append")),
		big,
		one("chmod", phase{Name: "chmod", Title: "chmod"}, names("chmod")),
		metacopy(one("chmod-metacopy", phase{Name: "chmod-metacopy", Title: "chmod with metacopy=on", Goals: stored(leastOn(1.5, 0.5))}, names("chmod"))),
		one("chown", phase{Name: "chown", Title: "chown -R"}, tree("chown")),
		metacopy(one("chown-metacopy", phase{Name: "chown-metacopy", Title: "chown -R with metacopy=on"}, tree("chown"))),
		one("unlink-lower", phase{Name: "unlink-lower", Title: "unlink", Goals: leastOn(0.7, 0.4)}, names("unlink")),
		one("remove-lower", phase{Name: "remove-lower", Title: "rm -rf", Goals: leastOn(0.8, 0.5)}, tree("remove")),
	}}
}
