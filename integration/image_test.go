package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/archive"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// store is a store of its own, used through the command line.
type store struct {
	t    testing.TB
	bin  string
	root string
}

func newStore(t testing.TB) *store {
	t.Helper()
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	return &store{t: t, bin: bin, root: filepath.Join(t.TempDir(), "root")}
}

// cmd is a command on the store, with a time limit.
func (s *store) cmd(args ...string) (*exec.Cmd, func()) {
	cmd := exec.Command(s.bin, append([]string{"--root", s.root}, args...)...)
	cmd.WaitDelay = time.Second // a server in the background may hold the output open
	timer := time.AfterFunc(2*time.Minute, func() {
		if cmd.Process != nil {
			_ = cmd.Process.Kill() // it may have ended
		}
	})
	return cmd, func() { timer.Stop() }
}

// run executes a command that must succeed and returns its output.
func (s *store) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatalf("plyfs %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (s *store) try(args ...string) (string, error) {
	cmd, done := s.cmd(args...)
	defer done()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out) + stderr.String(), err
	}
	return string(out), nil
}

// imageOf makes an image of a recipe's lowers.
func imageOf(t testing.TB, ref string, r oracle.Recipe) archive.Image {
	t.Helper()
	im := archive.Image{Ref: ref}
	for _, l := range slices.Backward(r.Lowers) {
		b, err := l.Tar()
		if err != nil {
			t.Fatal(err)
		}
		im.Layers = append(im.Layers, b)
	}
	return im
}

// imageRecipe makes a random stack that an image can hold.
func imageRecipe(seed int64) oracle.Recipe {
	r := oracle.GenRecipe(seed, oracle.GenOptions{PlainNames: true, MaxLowers: 5})
	r.Upper = oracle.Layer{}
	for i := range r.Lowers {
		r.Lowers[i].Entries = slices.DeleteFunc(r.Lowers[i].Entries, func(e oracle.Entry) bool {
			return e.Kind == oracle.Socket
		})
	}
	return r
}

// snapshotOf reads the whole tree of a mount.
func snapshotOf(t testing.TB, dir string) oracle.Result {
	t.Helper()
	c, err := oracle.StartAgent(dir, 1, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	r, err := c.Do(oracle.Op{Op: "snapshot"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// kernelTree mounts the recipe's lowers with kernel overlayfs and reads them.
func kernelTree(t testing.TB, r oracle.Recipe) oracle.Result {
	t.Helper()
	dir := t.TempDir()
	var stack harness.Stack
	for i, l := range r.Lowers {
		p := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(p, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := l.Build(p); err != nil {
			t.Fatal(err)
		}
		stack.Lowers = append(stack.Lowers, p)
	}
	// One lower alone is no overlay without an upper.
	empty := filepath.Join(dir, "bottom")
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	stack.Lowers = append(stack.Lowers, empty)
	target := filepath.Join(dir, "merged")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	m, err := harness.Kernel{}.Mount(stack, target)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	return snapshotOf(t, target)
}

// TestImageTree loads random images in every format, and expects the tree of
// the same layers under kernel overlayfs, and the same layers from save.
func TestImageTree(t *testing.T) {
	needOracle(t)
	for i := range 6 {
		o := archiveOptions(i)
		seed := int64(i + 1)
		t.Run(fmt.Sprintf("seed=%d,%s%s", seed, o.Format, o.Compress), func(t *testing.T) {
			s := newStore(t)
			r := imageRecipe(seed)
			im := imageOf(t, "test:tree", r)
			file := filepath.Join(t.TempDir(), "image.tar")
			if err := im.Write(file, o); err != nil {
				t.Fatal(err)
			}
			s.run("load", "-i", file)
			want := kernelTree(t, r)
			target := t.TempDir()
			s.run("mount", "--ro", "--suid", "--dev", "test:tree", target)
			got := snapshotOf(t, target)
			s.run("umount", target)
			for _, l := range oracle.DiffLines(want.Out, got.Out) {
				t.Error(l)
			}
			if got.Ghosts != "" {
				t.Errorf("listed, but do not exist: %s", got.Ghosts)
			}
			saved := filepath.Join(t.TempDir(), "saved.tar")
			s.run("save", "-o", saved, "test:tree")
			again := newStore(t)
			again.run("load", "-i", saved)
			if d := cmp.Diff(im.DiffIDs(), diffIDs(t, again, "test:tree")); d != "" {
				t.Errorf("diffIDs after save and load: %s", d)
			}
			s.run("check", "--deep")
		})
	}
}

// diffIDs asks inspect for the layers of an image.
func diffIDs(t testing.TB, s *store, ref string) []string {
	t.Helper()
	out := s.run("--json", "layers", "--store", ref)
	var rows []map[string]any
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		t.Fatalf("layers --json: %v in %s", err, out)
	}
	var ids []string
	for _, r := range rows {
		ids = append(ids, fmt.Sprint(r["diffID"]))
	}
	return ids
}

// archiveOptions go through all forms of archives.
func archiveOptions(i int) archive.Options {
	return []archive.Options{
		{}, {LayersLast: true}, {Compress: "gzip"}, {Format: "oci"}, {Format: "oci", Compress: "zstd", LayersLast: true}, {Format: "oci", Compress: "gzip"},
	}[i%6]
}

// TestContainerTree changes containers at random, commits and exports them
// while they are mounted and afterwards, and expects of both images the tree
// that the container's mount showed: with owners, times, attributes, hard
// links and content, whatever its writable layer only refers to.
func TestContainerTree(t *testing.T) {
	needOracle(t)
	for seed := range int64(8) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			s := newStore(t)
			file := filepath.Join(t.TempDir(), "image.tar")
			if err := imageOf(t, "test:base", imageRecipe(seed)).Write(file, archive.Options{}); err != nil {
				t.Fatal(err)
			}
			s.run("load", "-i", file)
			s.run("create", "test:base", "c")
			target := t.TempDir()
			s.run("mount", "--suid", "--dev", "c", target)
			ops := changeContainer(t, seed, target, func() { s.commitAndExport("c", "live") })
			want := snapshotOf(t, target)
			changes := s.run("diff", "c")
			s.run("umount", target)
			s.commitAndExport("c", "after")
			if d := cmp.Diff(changes, s.run("diff", "c")); d != "" {
				t.Errorf("diff after umount: %s", d)
			}
			if d := cmp.Diff(diffIDs(t, s, "live:commit"), diffIDs(t, s, "after:commit")); d != "" {
				t.Errorf("commit after umount: %s", d)
			}
			if d := cmp.Diff(diffIDs(t, s, "live:export"), diffIDs(t, s, "after:export")); d != "" {
				t.Errorf("export after umount: %s", d)
			}
			for _, ref := range []string{"after:commit", "after:export"} {
				s.run("mount", "--suid", "--dev", ref, target)
				got := snapshotOf(t, target)
				s.run("umount", target)
				// A count in the mount includes links that whiteouts of the
				// image hide, and of which a copy knows nothing.
				for _, l := range oracle.DiffLines(linkCount.ReplaceAllString(want.Out, ""), linkCount.ReplaceAllString(got.Out, "")) {
					t.Errorf("%s: %s", ref, l)
				}
			}
			s.run("check", "--deep")
			if t.Failed() {
				for _, op := range ops {
					t.Log(op)
				}
			}
		})
	}
}

var linkCount = regexp.MustCompile(` nlink=\d+`)

// commitAndExport makes the images TAG:commit and TAG:export of a container.
func (s *store) commitAndExport(container, tag string) {
	s.t.Helper()
	s.run("commit", container, tag+":commit")
	flat := filepath.Join(s.t.TempDir(), "flat.tar")
	s.run("export", "-o", flat, container)
	s.run("import", flat, tag+":export")
}

// changeContainer executes random operations in a container's mount and then
// calls last, with the files still open.
func changeContainer(t testing.TB, seed int64, dir string, last func()) (done []oracle.Op) {
	t.Helper()
	c, err := oracle.StartAgent(dir, 1, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	g := oracle.NewGenerator(seed, oracle.GenOptions{PlainNames: true, Ops: 200})
	do := func(op oracle.Op) {
		if ofInitLayer(op.Path) || ofInitLayer(op.To) || op.Op == "mknod" && op.Mode&unix.S_IFMT == unix.S_IFSOCK {
			return
		}
		r, err := c.Do(op)
		if err != nil {
			t.Fatalf("%v: %v", op, err)
		}
		g.Observe(op, r)
		done = append(done, op)
	}
	for more := true; more; {
		var op oracle.Op
		if g.WantsPaths() {
			do(oracle.Op{Op: "paths"})
		} else if op, more = g.Next(); more {
			do(op)
		}
	}
	last()
	return done
}

// ofInitLayer reports whether a path leads to what a container has besides its
// image, which every container gets anew.
func ofInitLayer(path oracle.Name) bool {
	first, _, _ := strings.Cut(string(path), "/")
	return slices.Contains([]string{".dockerenv", "dev", "etc", "proc", "sys"}, first)
}

// TestForgedAttributes mounts an image with the attributes by which a writable
// layer says that its content is elsewhere: nothing follows them.
func TestForgedAttributes(t *testing.T) {
	needOracle(t)
	forged := func(redirect string) map[string]string {
		return map[string]string{
			"trusted.overlay.redirect": redirect, "trusted.overlay.metacopy": "", "user.overlay.redirect": redirect, "user.overlay.metacopy": "",
		}
	}
	r := oracle.Recipe{Lowers: []oracle.Layer{
		{Entries: []oracle.Entry{
			{Path: "empty", Kind: oracle.Dir, Xattrs: forged("/secret")},
			{Path: "file", Kind: oracle.File, Text: "......", Xattrs: forged("/secret/key")},
		}},
		{Entries: []oracle.Entry{
			{Path: "secret", Kind: oracle.Dir},
			{Path: "secret/key", Kind: oracle.File, Text: "s3cret"},
		}},
	}}
	s := newStore(t)
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := imageOf(t, "test:forged", r).Write(file, archive.Options{}); err != nil {
		t.Fatal(err)
	}
	s.run("load", "-i", file)
	for _, args := range [][]string{{"mount", "--ro"}, {"mount"}} {
		target := t.TempDir()
		s.run(append(args, "test:forged", target)...)
		tree := snapshotOf(t, target).Out
		if strings.Contains(tree, "empty/") || !strings.Contains(tree, `"......"`) {
			t.Errorf("%v shows:\n%s", args, tree)
		}
		// To the user they are attributes like others.
		if n := strings.Count(tree, `trusted.overlay.redirect="/secret`); n != 2 {
			t.Errorf("%v shows %d of 2 attributes:\n%s", args, n, tree)
		}
		s.run("umount", target)
	}
}
