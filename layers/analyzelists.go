package layers

import (
	"cmp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/plyfs/plyfs/metadata/chainindex"
)

// atMost is how many entries of a list are wanted.
func atMost[T any](list []T, n int) []T {
	if n >= 0 && len(list) > n {
		return list[:n:n]
	}
	return list
}

// trim keeps the n first entries of a list that grows, now and then.
func trim[T any](list []T, n int, order func(a, b T) int) []T {
	if n < 0 || len(list) < 4*n+1024 {
		return list
	}
	slices.SortFunc(list, order)
	return list[:n]
}

func largestFirst(a, b LargeFile) int {
	return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.Path, b.Path))
}

func largestDirectoryFirst(a, b LargeDirectory) int {
	return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.Path, b.Path))
}

func (w *analyzer) large(f LargeFile) {
	w.out.Largest = trim(append(w.out.Largest, f), w.opt.Largest, largestFirst)
}

func (w *analyzer) largeDirectory(d LargeDirectory) {
	w.out.LargestDirectories = trim(append(w.out.LargestDirectories, d), w.opt.Directories, largestDirectoryFirst)
}

// finish makes the sums and lists once everything was walked.
func (w *analyzer) finish() error {
	a := w.out
	for _, f := range w.linked {
		if !f.visible {
			w.waste(f)
		}
	}
	for _, l := range a.Layers {
		a.Size += l.Size
		a.Wasted += l.Wasted
		a.Deleted += l.Deleted.Bytes
		a.WastedFiles += l.WastedFiles
	}
	a.Efficiency = 1
	if a.Size > 0 {
		a.Efficiency = 1 - float64(a.Wasted)/float64(a.Size)
	}
	slices.SortFunc(a.Largest, largestFirst)
	a.Largest = atMost(a.Largest, w.opt.Largest)
	slices.SortFunc(a.LargestDirectories, largestDirectoryFirst)
	a.LargestDirectories = atMost(a.LargestDirectories, w.opt.Directories)
	for _, p := range w.wasted {
		slices.SortFunc(p.Versions, func(a, b WastedFile) int { return cmp.Compare(a.Layer, b.Layer) })
		a.WastedPaths = append(a.WastedPaths, *p)
	}
	slices.SortFunc(a.WastedPaths, func(a, b WastedPath) int {
		return cmp.Or(cmp.Compare(b.Wasted, a.Wasted), cmp.Compare(a.Path, b.Path))
	})
	a.WastedDirectories = atMost(append(a.WastedDirectories, wastedDirectories(a.WastedPaths)...), w.opt.Wasted)
	a.WastedPaths = atMost(a.WastedPaths, w.opt.Wasted)
	return w.duplicates()
}

// wastedDirectories sums wasted files up by the directories that they are in.
func wastedDirectories(paths []WastedPath) (out []LargeDirectory) {
	sums := map[Path]*LargeDirectory{}
	inOne := map[Path]int64{} // the most that one directory in this one has
	for _, p := range paths {
		for at := parentPath(p.Path); at != ""; at = parentPath(at) {
			d := sums[at]
			if d == nil {
				d = &LargeDirectory{Path: at}
				sums[at] = d
			}
			d.Size += p.Wasted
			d.Files += len(p.Versions)
		}
	}
	for at, d := range sums {
		above := parentPath(at)
		inOne[above] = max(inOne[above], d.Size)
	}
	for at, d := range sums {
		if mostlyItsOwn(d.Size, inOne[at]) {
			out = append(out, *d)
		}
	}
	slices.SortFunc(out, largestDirectoryFirst)
	return out
}

// parentPath is the directory of an absolute path, "" if that is the root.
func parentPath(p Path) Path { return p[:strings.LastIndexByte(string(p), '/')] }

// mostlyItsOwn: of a directory less than nine tenths are in one directory in it.
func mostlyItsOwn(all, inOne int64) bool { return inOne*10 < all*9 }

// duplicates looks for files with the same content. Only those are read that are as large
// as another one.
func (w *analyzer) duplicates() error {
	slices.SortStableFunc(w.candidates, func(a, b *inode) int { return cmp.Compare(b.size, a.size) })
	for all := w.candidates; len(all) > 0; {
		n := 1
		for n < len(all) && all[n].size == all[0].size {
			n++
		}
		if n > 1 {
			if err := w.sameSize(all[:n]); err != nil {
				return err
			}
		}
		all = all[n:]
	}
	slices.SortStableFunc(w.out.Duplicates, func(a, b Duplicate) int {
		return cmp.Or(cmp.Compare(b.Extra, a.Extra), strings.Compare(string(a.Digest), string(b.Digest)))
	})
	w.out.Duplicates = atMost(w.out.Duplicates, w.opt.Duplicates)
	return nil
}

// sameSize finds those of some files of one size that have the same content.
func (w *analyzer) sameSize(all []*inode) error {
	type onDisk struct {
		cacheID string
		slot    chainindex.Slot
	}
	read := map[onDisk]digest.Digest{} // a layer that the image has twice is read once
	groups := map[digest.Digest][]*inode{}
	for _, f := range all {
		at := onDisk{w.dirs[f.layer].CacheID, f.slot}
		d := read[at]
		if d == "" {
			var err error
			if d, err = w.files.digest(w.ctx, f.layer, f.path); err != nil {
				return err
			}
			read[at] = d
		}
		groups[d] = append(groups[d], f)
	}
	for d, files := range groups {
		if len(files) < 2 {
			continue
		}
		out := Duplicate{Digest: d, Size: files[0].size, Extra: files[0].size * int64(len(files)-1)}
		for _, f := range files {
			out.Files = append(out.Files, DuplicateFile{Path: absolute(f.path), Layer: f.layer + 1, Visible: f.visible})
		}
		slices.SortFunc(out.Files, func(a, b DuplicateFile) int {
			return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.Layer, b.Layer))
		})
		w.out.Duplicated += out.Extra
		w.out.Duplicates = append(w.out.Duplicates, out)
	}
	return nil
}
