package lint

import (
	"slices"
	"strings"
	"testing"
)

// may says which packages of ours a part of the tree may import besides its own packages. A pattern ending in /... stands for
// the directory and all below it. The longest matching key decides. Tests of a package obey the same rule, except that they may
// use its own subpackages for tests.
var may = map[string][]string{
	"cmd/plyfs":           {"mountd/...", "layers", "layers/registry", "snapshotter", "unionfs", "unionfs/counters", "unionfs/explain", "unionfs/inject", "unionfs/trace", "whiteout"},
	"snapshotter":         {"mountd", "mountd/holder", "layers", "unionfs"},
	"mountd":              {"mountd/...", "unionfs/...", "layers", "layers/registry", "metadata", "metadata/chainindex", "whiteout", "whiteout/override", "cow/fsat", "cow/fault"},
	"mountd/events":       {},
	"mountd/metrics":      {},
	"mountd/sandbox":      {"cow/fsat"},
	"unionfs/counters":    {},
	"unionfs/fuseop":      {},
	"unionfs/trace":       {"unionfs/fuseop"},
	"unionfs/inject":      {"unionfs/trace"},
	"unionfs":             {"unionfs/...", "cow/...", "whiteout/...", "metadata/chainindex"},
	"layers/boundedjson":  {},
	"layers/foreign":      {"layers/boundedjson", "cow/fsat", "whiteout"},
	"layers":              {"layers/...", "metadata", "metadata/chainindex", "metadata/metatest", "whiteout/...", "cow/fsat"},
	"layers/registry":     {},
	"cow":                 {"cow/...", "whiteout"},
	"cow/fsat":            {"whiteout/xattrat"},
	"metadata":            {},
	"metadata/metatest":   {"metadata"},
	"metadata/chainindex": {},
	"whiteout":            {"whiteout/xattrat"},
	"whiteout/merge":      {},
	"whiteout/xattrat":    {},
	"whiteout/override":   {"whiteout/xattrat"},
	"integration":         {"..."},
}

// leaves depend, tests aside, on nothing but the standard library, golang.org/x/sys and each other: they can be lifted out and fuzzed alone.
var leaves = []string{"cow/fault", "cow/fsat", "metadata/chainindex", "mountd/events", "mountd/metrics", "unionfs/counters", "unionfs/fuseop", "whiteout", "whiteout/merge", "whiteout/override", "whiteout/xattrat"}

// only names the parts of the tree that may import a foreign module directly.
var only = map[string][]string{
	"go.etcd.io/bbolt":             {"metadata/...", "snapshotter"}, // a database of its own, which is no store
	"google.golang.org/grpc":       {"snapshotter"},
	"google.golang.org/protobuf":   {"snapshotter"},
	"github.com/hanwen/go-fuse/v2": {"unionfs/...", "mountd/..."},
	"github.com/spf13/cobra":       {"cmd/..."},
	"oras.land/oras-go/v2":         {"layers/registry"},
	// In tests: see the package.
	"github.com/prometheus/common": {"mountd/metrics"},
}

// never lists what must not be reached from a part of the tree, not even through others.
var never = map[string][]string{
	"unionfs":  {"go.etcd.io/bbolt", module + "/layers", module + "/metadata", module + "/mountd"},
	"layers":   {"github.com/hanwen/go-fuse/v2", module + "/unionfs", module + "/mountd", module + "/cow"},
	"cow":      {"go.etcd.io/bbolt", "github.com/hanwen/go-fuse/v2", "go.uber.org/zap"},
	"metadata": {"github.com/hanwen/go-fuse/v2"},
	"whiteout": {"go.uber.org/zap"},
}

// matches reports whether path is pattern, or lies below it when the pattern ends in "/...".
func matches(pattern, path string) bool {
	if pattern == "..." {
		return true
	}
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == dir || strings.HasPrefix(path, dir+"/")
	}
	return pattern == path
}

func matchesAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, path) })
}

// ruleOf returns the key of may that governs the package.
func ruleOf(rel string) (string, bool) {
	for key := rel; ; {
		if _, ok := may[key]; ok {
			return key, true
		}
		i := strings.LastIndexByte(key, '/')
		if i < 0 {
			return "", false
		}
		key = key[:i]
	}
}

func TestImportDirections(t *testing.T) {
	for _, p := range packages(t) {
		key, ok := ruleOf(p.rel())
		if !ok {
			t.Errorf("%s: no rule says what it may import: add it to may", p.rel())
			continue
		}
		for _, imp := range p.allImports() {
			rel, ours := strings.CutPrefix(imp, module+"/")
			if !ours {
				continue
			}
			inTests := !slices.Contains(p.Imports, imp)
			switch {
			case rel == p.rel(): // an external test imports the package under test
			case matchesAny(may[key], rel):
			case inTests && strings.HasPrefix(rel, key+"/"):
			case matches("integration/...", rel) && !matches("integration/...", p.rel()):
				t.Errorf("%s imports %s: integration is imported by none", p.rel(), rel)
			default:
				t.Errorf("%s imports %s: %s may import %v of ours", p.rel(), rel, key, may[key])
			}
		}
	}
}

func TestForeignImports(t *testing.T) {
	for _, p := range packages(t) {
		if matches("integration/...", p.rel()) {
			continue
		}
		for _, imp := range p.allImports() {
			for mod, allowed := range only {
				if matches(mod+"/...", imp) && !matchesAny(allowed, p.rel()) {
					t.Errorf("%s imports %s: only %v may", p.rel(), imp, allowed)
				}
			}
		}
	}
}

func TestLeaves(t *testing.T) {
	seen := 0
	for _, p := range packages(t) {
		if !slices.Contains(leaves, p.rel()) {
			continue
		}
		seen++
		for _, dep := range p.Deps {
			first, _, _ := strings.Cut(dep, "/")
			std := !strings.Contains(first, ".")
			leaf := slices.Contains(leaves, strings.TrimPrefix(dep, module+"/"))
			if !std && !leaf && !matches("golang.org/x/sys/...", dep) && !strings.HasPrefix(dep, "vendor/") {
				t.Errorf("%s depends on %s: it is a leaf (standard library, golang.org/x/sys and other leaves only)", p.rel(), dep)
			}
		}
	}
	if seen != len(leaves) {
		t.Errorf("found %d of the leaves %v", seen, leaves)
	}
}

func TestNeverReached(t *testing.T) {
	for _, p := range packages(t) {
		key, _ := ruleOf(p.rel())
		top, _, _ := strings.Cut(key, "/")
		if p.rel() != top && !matches("unionfs/...", p.rel()) && !matches("layers/...", p.rel()) {
			continue
		}
		for _, dep := range p.Deps {
			for _, banned := range never[top] {
				// A leaf below a banned package of ours (cow/fsat, metadata/chainindex) is another package.
				if dep == banned || !strings.HasPrefix(banned, module) && matches(banned+"/...", dep) {
					t.Errorf("%s reaches %s through its imports", p.rel(), dep)
				}
			}
		}
	}
}
