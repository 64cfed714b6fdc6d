package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/plyfs/plyfs/integration/oracle"
)

// TestOracleCases runs the scripts of testdata/cases.
func TestOracleCases(t *testing.T) {
	needOracle(t)
	files, err := filepath.Glob("testdata/cases/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		t.Run(name, func(t *testing.T) {
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			tr, err := oracle.Parse(f)
			if err != nil {
				t.Fatal(err)
			}
			tr.Where = fastDir(t)
			runTrial(t, tr, "case-"+name)
		})
	}
}

// nameKinds are the states a name can be in; each is made below the directory
// given, in its layers.
var nameKinds = []struct {
	name              string
	upper, mid, lower []oracle.Entry
}{
	{name: "missing"},
	{name: "ufile", upper: entries("f n upper")},
	{name: "lfile", lower: entries("f n lower")},
	{name: "mfile", upper: entries("f n upper"), lower: entries("f n lower")},
	{name: "whiteout", upper: entries("w n"), lower: entries("f n lower")},
	{name: "udir", upper: entries("d n")},
	{name: "udirfull", upper: entries("d n", "f n/x x")},
	{name: "ldir", lower: entries("d n")},
	{name: "ldirfull", lower: entries("d n", "f n/y y")},
	{name: "mdir", upper: entries("d n"), lower: entries("d n")},
	{name: "mdirfull", upper: entries("d n", "f n/x x"), lower: entries("d n", "f n/y y")},
	{name: "mdirwh", upper: entries("d n", "w n/y"), lower: entries("d n", "f n/y y")},
	{name: "odir", upper: entries("o n"), lower: entries("d n", "f n/y y")},
	{name: "odirfull", upper: entries("o n", "f n/x x"), lower: entries("d n", "f n/y y")},
	{name: "whdir", upper: entries("w n"), lower: entries("d n", "f n/y y")},
	{name: "ldirwh", mid: entries("d n", "w n/y"), lower: entries("d n", "f n/y y")},
	{name: "usym", upper: entries("l n target")},
	{name: "lsym", lower: entries("l n target")},
	{name: "ldirsolo", mid: entries("o n"), lower: entries("d n", "f n/y y")},
}

// entries makes layer entries from "letter path [text]".
func entries(lines ...string) []oracle.Entry {
	var out []oracle.Entry
	for _, l := range lines {
		f := strings.Fields(l)
		e := oracle.Entry{Path: oracle.Name(f[1])}
		switch f[0] {
		case "f":
			e.Kind, e.Text = oracle.File, f[2]
		case "d":
			e.Kind = oracle.Dir
		case "o":
			e.Kind = oracle.Opaque
		case "w":
			e.Kind = oracle.Whiteout
		case "l":
			e.Kind, e.Target = oracle.Symlink, oracle.Name(f[2])
		}
		out = append(out, e)
	}
	return out
}

// TestRenameMatrix renames every kind of name over every other, plain and with
// each flag.
func TestRenameMatrix(t *testing.T) {
	needOracle(t)
	for _, variant := range []struct{ flag, redirect string }{
		{"", "off"},
		{"NOREPLACE", "off"},
		{"EXCHANGE", "off"},
		{"", "on"},
		{"EXCHANGE", "on"},
	} {
		flag := variant.flag
		t.Run("flags="+flag+",redirect="+variant.redirect, func(t *testing.T) {
			tr := &oracle.Trial{Where: fastDir(t), Options: []string{"redirect_dir=" + variant.redirect}}
			upper := oracle.Layer{Entries: []oracle.Entry{{Kind: oracle.Dir, Mode: 0o777}}}
			mid := oracle.Layer{Entries: []oracle.Entry{{Kind: oracle.Dir}}}
			lower := oracle.Layer{Entries: []oracle.Entry{{Kind: oracle.Dir}}}
			// place puts the entries of a kind below dir, as dir/as.
			place := func(l *oracle.Layer, dir, as string, es []oracle.Entry) {
				for _, e := range es {
					e.Path = oracle.Name(dir + "/" + as + strings.TrimPrefix(string(e.Path), "n"))
					l.Entries = append(l.Entries, e)
				}
			}
			for _, src := range nameKinds {
				for _, dst := range nameKinds {
					dir := src.name + "-" + dst.name
					for _, l := range []*oracle.Layer{&upper, &mid, &lower} {
						l.Entries = append(l.Entries, oracle.Entry{Path: oracle.Name(dir), Kind: oracle.Dir})
					}
					place(&upper, dir, "src", src.upper)
					place(&mid, dir, "src", src.mid)
					place(&lower, dir, "src", src.lower)
					place(&upper, dir, "dst", dst.upper)
					place(&mid, dir, "dst", dst.mid)
					place(&lower, dir, "dst", dst.lower)
					from, to := oracle.Name(dir+"/src"), oracle.Name(dir+"/dst")
					tr.Ops = append(tr.Ops,
						oracle.Op{Op: "rename", Path: from, To: to, Flags: flag},
						oracle.Op{Op: "snapshot", Path: oracle.Name(dir)},
						// What was moved must be usable, and so must its old name.
						oracle.Op{Op: "mkdir", Path: from, Mode: 0o755},
						oracle.Op{Op: "put", Path: to + "/x", Text: "inside"},
						oracle.Op{Op: "readdir", Path: from},
						oracle.Op{Op: "rename", Path: to, To: from},
						oracle.Op{Op: "readdir", Path: from},
						oracle.Op{Op: "rmdir", Path: to},
						oracle.Op{Op: "unlink", Path: to},
					)
				}
			}
			tr.Recipe = oracle.Recipe{Upper: upper, Lowers: []oracle.Layer{mid, lower}}
			runTrial(t, tr, "rename-matrix-"+flag+"-"+variant.redirect)
		})
	}
}

// manyLowers is a stack of layers, each with a name of its own, one that all
// have and one that some hide.
func manyLowers(n int) oracle.Recipe {
	r := oracle.Recipe{Upper: oracle.Layer{Entries: []oracle.Entry{{Kind: oracle.Dir}}}}
	for i := range n {
		l := oracle.Layer{Entries: []oracle.Entry{
			{Path: "d", Kind: oracle.Dir},
			{Path: oracle.Name(fmt.Sprintf("d/only%d", i)), Kind: oracle.File, Text: fmt.Sprint(i)},
			{Path: "d/all", Kind: oracle.File, Text: fmt.Sprint(i)},
		}}
		if i%3 == 0 && i > 0 {
			l.Entries = append(l.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("d/only%d", i+1)), Kind: oracle.Whiteout})
		}
		if i == n*3/4 {
			l.Entries = append(l.Entries, oracle.Entry{Path: "d/o", Kind: oracle.Opaque})
		} else if i%10 == 0 {
			l.Entries = append(l.Entries, oracle.Entry{Path: "d/o", Kind: oracle.Dir}, oracle.Entry{Path: oracle.Name(fmt.Sprintf("d/o/%d", i)), Kind: oracle.File, Text: "o"})
		}
		r.Lowers = append(r.Lowers, l)
	}
	return r
}

// manyLowersOps looks at and changes names of the top, the middle and the bottom.
func manyLowersOps(t *testing.T, lowers int) []oracle.Op {
	last := fmt.Sprint(lowers - 1)
	var ops []oracle.Op
	for _, line := range []string{
		"readdir d", "dirseek d", "readdir d/o", "cat d/all", "put d/all text=top flags=TRUNC", "cat d/only" + last, "unlink d/only" + last,
		"lstat d/only4", "rename d/only0 d/only" + last, "chmod d/only50 mode=0600", "inos d", "rename d/o o", "readdir o", "rename d e", "readdir e",
	} {
		ops = append(ops, op(t, line))
	}
	return ops
}

// TestManyLowers mounts 200 layers.
func TestManyLowers(t *testing.T) {
	needOracle(t)
	tr := &oracle.Trial{Where: fastDir(t), Recipe: manyLowers(200), Options: []string{"redirect_dir=on"}, Ops: manyLowersOps(t, 200)}
	runTrial(t, tr, "many-lowers")
}

// TestThousandLowers mounts 1000 layers, of which the kernel, which stops at
// 500, gets what they show in one.
func TestThousandLowers(t *testing.T) {
	needOracle(t)
	r := manyLowers(1000)
	tr := &oracle.Trial{Where: fastDir(t), Recipe: r, ModelRecipe: flatten(r), Ops: manyLowersOps(t, 1000), Options: []string{"redirect_dir=on"}}
	runTrial(t, tr, "thousand-lowers")
}

// flatten merges the lowers of a recipe that has only files, directories,
// opaque directories and whiteouts.
func flatten(r oracle.Recipe) *oracle.Recipe {
	tree := make(map[oracle.Name]oracle.Entry)
	hide := func(p oracle.Name) {
		for have := range tree {
			if have == p || strings.HasPrefix(string(have), string(p)+"/") {
				delete(tree, have)
			}
		}
	}
	for _, l := range slices.Backward(r.Lowers) {
		for _, e := range l.Entries {
			if e.Kind != oracle.Dir || tree[e.Path].Kind != oracle.Dir {
				hide(e.Path)
			}
			if e.Kind == oracle.Opaque {
				e.Kind = oracle.Dir
			}
			if e.Kind != oracle.Whiteout {
				tree[e.Path] = e
			}
		}
	}
	var flat oracle.Layer
	for _, p := range slices.Sorted(maps.Keys(tree)) {
		flat.Entries = append(flat.Entries, tree[p])
	}
	return &oracle.Recipe{Upper: r.Upper, Lowers: []oracle.Layer{flat}}
}

// TestBigDirectory lists and changes a directory of 20 000 names, half of them
// in a lower.
func TestBigDirectory(t *testing.T) {
	needOracle(t)
	tr := &oracle.Trial{Where: fastDir(t), NoTree: true, Recipe: oracle.Recipe{Upper: oracle.Layer{Entries: []oracle.Entry{{Kind: oracle.Dir}}}}}
	lower := oracle.Layer{Entries: []oracle.Entry{{Path: "big", Kind: oracle.Dir}}}
	for i := range 10000 {
		lower.Entries = append(lower.Entries, oracle.Entry{Path: oracle.Name(fmt.Sprintf("big/low%05d", i)), Kind: oracle.File})
	}
	tr.Recipe.Lowers = []oracle.Layer{lower}
	for _, line := range []string{
		"count big", "fill big len=10000 text=up", "count big", "dirseek big", "unlink big/low00000", "unlink big/up000000", "count big",
		"readdir big", "rename big/low00001 big/zzz", "lstat big/low00001", "count big",
	} {
		tr.Ops = append(tr.Ops, op(t, line))
	}
	runTrial(t, tr, "big-directory")
}

// TestHugeDirectory lists and changes a directory of 200 000 names, most of them
// in a lower.
func TestHugeDirectory(t *testing.T) {
	needOracle(t)
	if testing.Short() {
		t.Skip("short run")
	}
	tr := &oracle.Trial{Where: fastDir(t), NoTree: true}
	lower := oracle.Layer{Entries: []oracle.Entry{{Path: "huge", Kind: oracle.Dir, Fill: 190000}}}
	tr.Recipe.Lowers = []oracle.Layer{lower}
	for _, line := range []string{
		"lstat huge/low000005", "fill huge len=10000 text=up", "count huge", "unlink huge/low000000", "unlink huge/low189999",
		"rename huge/low000001 huge/up000000", "mkdir huge/low000000 mode=0755", "put huge/low100000 text=x", "count huge", "lstat huge/up000000",
		"lstat huge/low000001", "rmdir huge", "rename huge/low000002 huge/low000003", "count huge",
	} {
		tr.Ops = append(tr.Ops, op(t, line))
	}
	runTrial(t, tr, "huge-directory")
}

// op parses an operation in text form.
func op(t testing.TB, line string) oracle.Op {
	t.Helper()
	o, err := oracle.ParseOp(line)
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return o
}
