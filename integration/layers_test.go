package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
)

// TestLowerFileSystems compares random runs whose lowers lie on another file
// system than the upper: other inode numbers, other file handles or none, no
// whiteout devices. The upper is on disk.
func TestLowerFileSystems(t *testing.T) {
	needOracle(t)
	for _, fs := range []string{"tmpfs", "xfs", "btrfs", "ext4", "kernel", subject(t).Name()} {
		t.Run(fs, func(t *testing.T) {
			needPlace(t, fs)
			_, union := harness.NewMounter(fs)
			for seed := range int64(len(mountOptions)) {
				o := oracle.GenOptions{Ops: 150, XWhiteouts: union == nil, NoLinks: union == nil, NoHardlinks: fs == "btrfs"}
				tr := &oracle.Trial{Seed: seed, Where: base, Options: mountOptions[seed], LowersOn: fs}
				tr.Recipe = oracle.GenRecipe(seed, o)
				tr.Gen = oracle.NewGenerator(seed, o)
				runTrial(t, tr, fmt.Sprintf("lower-%s-%d", fs, seed))
				if t.Failed() {
					return
				}
			}
		})
	}
}

// TestUpperFileSystems compares random runs whose upper lies on another file
// system than the lowers.
func TestUpperFileSystems(t *testing.T) {
	needOracle(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			needPlace(t, fs)
			for seed := range int64(len(mountOptions)) {
				o := oracle.GenOptions{Ops: 150}
				tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Options: mountOptions[seed], UpperOn: fs}
				tr.Recipe = oracle.GenRecipe(seed, o)
				tr.Gen = oracle.NewGenerator(seed, o)
				runTrial(t, tr, fmt.Sprintf("upper-%s-%d", fs, seed))
				if t.Failed() {
					return
				}
			}
		})
	}
}

// TestUpperOnUnion puts the upper of plyfs on a writable union, where whiteouts
// cannot be devices, and compares with the kernel on a plain directory. Both
// layers of unions are mounted again.
func TestUpperOnUnion(t *testing.T) {
	needOracle(t)
	for _, fs := range []string{subject(t).Name(), "kernel"} {
		t.Run(fs, func(t *testing.T) {
			for seed := range int64(len(mountOptions)) {
				o := oracle.GenOptions{Ops: 150, XWhiteouts: true}
				tr := &oracle.Trial{Seed: seed, Where: base, Options: mountOptions[seed], SubjectUpperOn: fs}
				tr.Recipe = oracle.GenRecipe(seed, o)
				tr.Recipe.Upper = oracle.Layer{}
				tr.Gen = oracle.NewGenerator(seed, o)
				runTrial(t, tr, fmt.Sprintf("upper-on-%s-%d", fs, seed))
				if t.Failed() {
					return
				}
			}
		})
	}
}

// TestKernelUpperOnUnion: the kernel takes no upper on a union, as none of them
// has RENAME_WHITEOUT; plyfs is refused as the kernel's own is.
func TestKernelUpperOnUnion(t *testing.T) {
	needOracle(t)
	for _, by := range []harness.Mounter{subject(t), harness.Kernel{}} {
		stack, target := tempStack(t, filepath.Join(base, "upper-on-"+by.Name()), oracle.Layer{})
		m, err := by.Mount(stack, target)
		if err != nil {
			t.Fatal(err)
		}
		nested := harness.Stack{Lowers: stack.Lowers, Upper: filepath.Join(target, "upper"), Work: filepath.Join(target, "work")}
		c := agent(t, m)
		mustDo(t, c, "mkdir upper mode=0755")
		mustDo(t, c, "mkdir work mode=0755")
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		on := filepath.Join(base, "on-"+by.Name())
		if err := os.Mkdir(on, 0o755); err != nil {
			t.Fatal(err)
		}
		if m, err := (harness.Kernel{}).Mount(nested, on); !errors.Is(err, unix.EINVAL) {
			t.Errorf("upper on %s: %v, not EINVAL", by.Name(), err)
			if err == nil {
				t.Error(m.Unmount())
			}
		}
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}
}

// TestInsideLower puts the upper, the workdir and the mount point into a lower, as
// with lowerdir=/: none of them shows what is written to the union.
func TestInsideLower(t *testing.T) {
	needOracle(t)
	lower := oracle.Layer{Entries: []oracle.Entry{
		{Path: "f", Kind: oracle.File, Text: "lower"},
		{Path: "d", Kind: oracle.Dir},
		{Path: "d/mnt", Kind: oracle.Dir},
		{Path: "d/x", Kind: oracle.File, Text: "x"},
	}}
	script := []string{
		"lstat in/upper", "readdir in/upper", "lstat in/work", "lstat in/work/work", "lstat in", "readdir in", "readdir d/mnt",
		"put f text=changed", "cat f", "put new text=new", "put in/other text=other", "readdir in", "rename d/x in/x", "readdir d",
		"unlink in/x", "rmdir in/upper", "put in/upper/f text=x", "mkdir in/upper/d mode=0755", "rename in/other in/upper/other",
		"put d/mnt/f text=below", "readdir d/mnt", "lstat d/mnt/d", "readdir .",
	}
	results := make(map[string][]string)
	for _, by := range []harness.Mounter{harness.Kernel{}, subject(t)} {
		dir := filepath.Join(base, "inside-"+by.Name())
		stack := harness.Stack{Lowers: []string{dir}, Upper: filepath.Join(dir, "in", "upper"), Work: filepath.Join(dir, "in", "work")}
		for _, d := range []string{stack.Upper, stack.Work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := lower.Build(dir); err != nil {
			t.Fatal(err)
		}
		m, err := by.Mount(stack, filepath.Join(dir, "d", "mnt"))
		if err != nil {
			t.Fatal(err)
		}
		c := agent(t, m)
		for _, line := range script {
			r, err := c.Do(op(t, line))
			if err != nil {
				t.Fatal(err)
			}
			results[by.Name()] = append(results[by.Name()], r.String())
		}
		if err := errors.Join(c.Close(), m.Unmount()); err != nil {
			t.Error(err)
		}
	}
	want, got := results["kernel"], results[subject(t).Name()]
	for i, line := range script {
		if want[i] != got[i] {
			t.Errorf("%s\n\tkernel:  %s\n\tsubject: %s", line, want[i], got[i])
		}
	}
}

// TestSameUUID: two layers on copies of one disk image, which have the same inode
// numbers and file handles for different files.
func TestSameUUID(t *testing.T) {
	needOracle(t)
	needPlace(t, "ext4")
	dir := filepath.Join(base, "same-uuid")
	path := func(name string) string { return filepath.Join(dir, name) }
	stack := harness.Stack{Upper: path("upper"), Work: path("work")}
	for _, d := range []string{path("merged"), path("1"), path("2"), stack.Upper, stack.Work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	command := func(script string) {
		t.Helper()
		cmd := exec.Command("sh", "-ec", script)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	command(`truncate -s 16M 1.img; mkfs.ext4 -q 1.img; mount -o loop 1.img 1; echo > 1/x; ln 1/x 1/y; umount 1; cp 1.img 2.img`)
	t.Cleanup(func() { command("umount 1; umount 2; rm 1.img 2.img") })
	command(`for i in 1 2; do mount -o loop $i.img $i; mkdir $i/in$i; mv $i/x $i/y $i/in$i; echo image $i > $i/in$i/x; done`)
	stack.Lowers = []string{path("1"), path("2")}
	for range 2 { // the second time from what the first has written
		m, err := subject(t).Mount(stack, path("merged"))
		if err != nil {
			t.Fatal(err)
		}
		c := agent(t, m)
		for i, want := range []string{`"image 1\nmore"`, `"image 2\nmore"`} {
			p := oracle.Name(fmt.Sprintf("in%d/x", i+1))
			r, err := c.Do(oracle.Op{Op: "cat", Path: p})
			if err != nil {
				t.Fatal(err)
			}
			if r.Out != want {
				mustDo(t, c, fmt.Sprintf("put %s text=more flags=APPEND", p))
				r = mustDo(t, c, fmt.Sprintf("cat %s", p))
			}
			if r.Out != want {
				t.Errorf("%s: %s, not %s", p, r.Out, want)
			}
			if r := mustDo(t, c, fmt.Sprintf("cat in%d/y", i+1)); r.Out != fmt.Sprintf(`"image %d\n"`, i+1) {
				t.Errorf("in%d/y: %s", i+1, r.Out)
			}
		}
		if err := errors.Join(c.Close(), m.Unmount()); err != nil {
			t.Error(err)
		}
	}
}

// TestDialectOptions is TestDialects with every choice of mount options that
// the dialect allows.
func TestDialectOptions(t *testing.T) {
	needOracle(t)
	for _, tc := range []struct {
		name             string
		dialect, convert string
		options          [][]string
	}{
		{"aufs", "", "aufs", mountOptions[1:]},
		{"auto", "", "auto", mountOptions[1:]},
		{"userxattr", "userxattr", "", mountOptions[1:2]},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for i, options := range tc.options {
				seed := int64(100 + i)
				o := oracle.GenOptions{PlainNames: true, Ops: 200}
				tr := &oracle.Trial{Seed: seed, Where: fastDir(t), Dialect: tc.dialect, Convert: tc.convert, Options: options}
				tr.Recipe = oracle.GenRecipe(seed, o)
				tr.Gen = oracle.NewGenerator(seed, o)
				runTrial(t, tr, fmt.Sprintf("dialect-%s-%d", tc.name, seed))
			}
		})
	}
}

// needPlace skips where a file system cannot be made.
func needPlace(t *testing.T, name string) {
	t.Helper()
	place, err := harness.NewPlace(name)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "probe")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	remove, err := place(dir, func() error { return nil })
	if errors.Is(err, harness.ErrNoPlace) {
		harness.Skip(t, "%v", err)
	}
	if err := errors.Join(err, remove()); err != nil {
		t.Fatal(err)
	}
}

// TestPoorFileSystems puts the upper where there are no extended attributes and no devices
// can be made, or where renames take no flags either, and compares with the kernel on a
// plain directory; and the lowers of both where nothing lasts.
func TestPoorFileSystems(t *testing.T) {
	needOracle(t)
	plain := oracle.GenOptions{Ops: 200, NoXattrs: true, PlainNames: true, NoHardlinks: true, NoXWhiteouts: true}
	nfs, lowers := plain, plain
	nfs.LikeNFS = true
	lowers.LikeNFS, lowers.NoLinks, lowers.Unprivileged = true, true, true
	for _, c := range []struct {
		name          string
		upper, lowers string
		o             oracle.GenOptions
	}{
		{"upper without attributes", "plyfs:noxattrs=1", "", plain},
		{"upper on NFS", "like-nfs", "", nfs},
		{"lowers on NFS", "", "like-nfs", lowers},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range int64(8) {
				tr := &oracle.Trial{Seed: seed, Where: base, SubjectUpperOn: c.upper, LowersOn: c.lowers}
				tr.Recipe = oracle.GenRecipe(seed, c.o)
				if c.upper != "" {
					tr.Recipe.Upper = oracle.Layer{}
				}
				tr.Gen = oracle.NewGenerator(seed, c.o)
				runTrial(t, tr, fmt.Sprintf("%s-%d", strings.ReplaceAll(c.name, " ", "-"), seed))
				if t.Failed() {
					return
				}
			}
		})
	}
}

// TestUpperWithDevicesAlone puts it where devices can be made, but there are no
// attributes.
func TestUpperWithDevicesAlone(t *testing.T) {
	needOracle(t)
	for _, name := range []string{"mkdir-over-whiteout", "rename-over-whiteout", "rmdir-only-whiteouts", "removed-directory", "unlink-create", "exchange"} {
		t.Run(name, func(t *testing.T) {
			tr := loadCase(t, name)
			tr.Options, tr.SubjectUpperOn, tr.Where = nil, "ramfs", base
			runTrial(t, tr, "devices-alone-"+name)
		})
	}
}
