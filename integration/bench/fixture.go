package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// sizes is how much of everything there is.
type sizes struct {
	imageScale float64
	many       int   // files to be changed
	big        int64 // bytes of the large file
	written    int64 // bytes that are written
	random     int   // random reads that hit the page cache
	randomCold int   // random reads of the disk, and random writes
	wide       int   // names in the wide directory
	stackFiles int   // files in a stack of many layers
	stacks     []int
	created    int // files that are created, renamed, removed
	missing    int // names that are not there
	containers int
	debFiles   int
}

var (
	fullSizes = sizes{
		imageScale: 1, many: 2500, big: 512 << 20, written: 256 << 20, random: 65536, randomCold: 8192, wide: 100_000,
		stackFiles: 2000, stacks: []int{1, 10, 100, 500}, created: 5000, missing: 5000, containers: 10, debFiles: 300,
	}
	quickSizes = sizes{
		imageScale: 0.05, many: 150, big: 16 << 20, written: 8 << 20, random: 2048, randomCold: 256, wide: 2000,
		stackFiles: 200, stacks: []int{1, 10, 40}, created: 200, missing: 200, containers: 3, debFiles: 20,
	}
)

// fixture is a stack of layers that all systems share; nobody writes to it.
type fixture struct {
	name   string
	dir    string
	lowers []string  // topmost first
	spec   stackSpec // bottom first; nil if the content comes from elsewhere
	tree   layerSpec // the merged tree; nil likewise
	files  []string  // paths that the phases use; which is up to the fixture
	paths  []string  // all paths
	dirs   []string  // all directories
	absent []string  // paths that do not exist
	args   []string  // further words for programs
	plain  string    // the merged tree as a plain directory, once somebody asked
	// archived: there is an archive of it; loaded: it is in the store of plyfs.
	archived, loaded bool
}

// makeFixture makes one of the fixtures:
//
//	image      like a Debian image: for names, small files, archives
//	many       small files in a lower layer, to be changed
//	big        one large file
//	wide       one directory with very many names, from two layers
//	stackN     the same tree, spread over N layers
//	source, build, deb    for programs, see fixture_program.go
func makeFixture(ctx context.Context, name, dir string, sz *sizes) (*fixture, error) {
	f := &fixture{name: name, dir: dir}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	n, isStack := strings.CutPrefix(name, "stack")
	switch {
	case name == "image":
		f.spec = imageSpec(sz.imageScale)
	case name == "many":
		f.spec = manySpec(sz.many)
	case name == "big":
		f.spec = bigSpec(sz.big)
	case name == "wide":
		f.spec = wideSpec(sz.wide)
	case isStack:
		count, err := strconv.Atoi(n)
		if err != nil {
			return nil, fmt.Errorf("number of layers: %w", err)
		}
		f.spec = spreadSpec(count, sz.stackFiles)
	case name == "source":
		return f, f.makeSource(ctx)
	case name == "build":
		return f, f.makeBuild(ctx)
	case name == "deb":
		return f, f.makeDeb(ctx, sz.debFiles)
	default:
		return nil, fmt.Errorf("unknown fixture %q", name)
	}
	for i, layer := range f.spec {
		d := filepath.Join(dir, strconv.Itoa(i))
		if err := layer.write(d); err != nil {
			return nil, err
		}
		f.lowers = append([]string{d}, f.lowers...)
	}
	f.tree = f.spec.merged()
	f.paths = f.tree.paths(func(entry) bool { return true })
	f.files = f.tree.paths(func(e entry) bool { return e.kind == aFile && e.size <= maxSmall })
	random := rand.New(rand.NewPCG(5, 6))
	shuffle := func(s []string) { random.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) }
	if isStack {
		shuffle(f.files)
	}
	f.dirs = f.tree.paths(func(e entry) bool { return e.kind == aDir })
	for i := range sz.missing {
		f.absent = append(f.absent, fmt.Sprintf("%s/no-such-name-%d", f.dirs[i%len(f.dirs)], i))
	}
	return f, nil
}

// manySpec is a layer with n files of 4 KiB in directories of 50, below one
// that only has a few names in the same directories.
func manySpec(n int) stackSpec {
	bottom, top := newBuilder(), newBuilder()
	for i := range n {
		bottom.file(fmt.Sprintf("tree/dir%d/file-%d.txt", i/50, i), 4096)
		if i%500 == 0 {
			top.file(fmt.Sprintf("tree/dir%d/above-%d.txt", i/50, i), 4096)
		}
	}
	return stackSpec{bottom.spec, top.spec}
}

func bigSpec(size int64) stackSpec {
	bottom, top := newBuilder(), newBuilder()
	bottom.file("data/big", size)
	top.file("data/small", 10)
	return stackSpec{bottom.spec, top.spec}
}

// wideSpec is one directory with n names; a tenth of them is in both layers.
func wideSpec(n int) stackSpec {
	bottom, top := newBuilder(), newBuilder()
	for i := range n {
		name := fmt.Sprintf("wide/some-file-name-%06d", i)
		if i < n*6/10 {
			bottom.file(name, 0)
		}
		if i >= n*5/10 {
			top.file(name, 0)
		}
	}
	return stackSpec{bottom.spec, top.spec}
}

// spreadSpec deals a tree of files out to n layers, so that a directory has
// parts in many of them.
func spreadSpec(n, files int) stackSpec {
	layers := make([]*builder, n)
	for i := range layers {
		layers[i] = newBuilder()
		layers[i].file(fmt.Sprintf("layers/l%d", i), 100)
	}
	for i := range files {
		layers[i%n].file(fmt.Sprintf("usr/dir%d/sub%d/file-%d", i%7, i%40, i), 300)
	}
	var s stackSpec
	for _, b := range layers {
		s = append(s, b.spec)
	}
	return s
}

// plainTree returns the merged tree as a plain directory, to be read only.
func (f *fixture) plainTree(ctx context.Context) (string, error) {
	if f.plain != "" {
		return f.plain, nil
	}
	dir := filepath.Join(f.dir, "plain")
	if err := f.copyPlain(ctx, dir); err != nil {
		return "", err
	}
	f.plain = dir
	return dir, nil
}

// copyPlain makes the merged tree anew, to be changed.
func (f *fixture) copyPlain(ctx context.Context, dir string) error {
	if f.tree != nil {
		return plainSpec(f.tree).write(dir)
	}
	if len(f.lowers) != 1 {
		return fmt.Errorf("fixture %s has %d layers, and no description", f.name, len(f.lowers))
	}
	_, err := run(ctx, "cp", "-a", f.lowers[0], dir)
	return err
}

// plainSpec turns hard links whose file is hidden into files.
func plainSpec(l layerSpec) layerSpec {
	b := newBuilder()
	files := map[string]entry{}
	var links layerSpec
	for _, e := range l {
		if e.kind == aHardlink {
			links = append(links, e)
			continue
		}
		if e.kind == aFile {
			files[e.path] = e
		}
		b.add(e)
	}
	for _, e := range links {
		if _, ok := files[e.target]; !ok {
			e = entry{path: e.path, kind: aFile, size: 100, mode: 0o644}
		}
		b.add(e)
	}
	return b.spec
}

// warm reads all names of the layers, and the content of small files, so that
// the first access through a mount does not go to the disk.
func (f *fixture) warm(content bool) error {
	buf := make([]byte, 64<<10)
	for _, l := range append([]string{f.plain}, f.lowers...) {
		if l == "" {
			continue
		}
		err := filepath.WalkDir(l, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil || !content || !info.Mode().IsRegular() || info.Size() > maxSmall {
				return err
			}
			r, err := os.Open(path)
			if err != nil {
				return err
			}
			_, rerr := r.Read(buf)
			if info.Size() == 0 {
				rerr = nil
			}
			return errors.Join(rerr, r.Close())
		})
		if err != nil {
			return fmt.Errorf("read layer: %w", err)
		}
	}
	return nil
}
