package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/integration/harness"
	"github.com/plyfs/plyfs/integration/oracle"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/explain"
	"github.com/plyfs/plyfs/whiteout"
)

// explainCase is a stack that kernel overlayfs shows and package explain explains.
type explainCase struct {
	rng     *rand.Rand
	dir     string
	dialect string
	stack   harness.Stack // of the kernel
	options explain.Options
	stamped int             // generations of contents
	mounter harness.Mounter // whose view is compared in the end
}

// TestExplainAgreesWithKernel: on random stacks, part of which kernel overlayfs has written
// itself, with redirects and metacopies, explain says of each path what the kernel shows, and
// names the layer that has the content.
func TestExplainAgreesWithKernel(t *testing.T) {
	needOracle(t)
	for seed := range int64(60) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			c := newExplainCase(t, seed, oracle.GenOptions{MaxLowers: 4}, "", "")
			for range c.rng.IntN(4) {
				c.generation(t)
			}
			c.choose()
			c.compare(t)
		})
	}
}

// TestExplainDialects is the same for layers in other dialects than the kernel's.
func TestExplainDialects(t *testing.T) {
	needOracle(t)
	for _, d := range []struct{ name, kernel, ours string }{{"aufs", "", "aufs"}, {"auto", "", "auto"}, {"userxattr", "userxattr", ""}} {
		for seed := range int64(12) {
			t.Run(fmt.Sprintf("%s,seed=%d", d.name, seed), func(t *testing.T) {
				c := newExplainCase(t, seed, oracle.GenOptions{MaxLowers: 5, PlainNames: true}, d.kernel, d.ours)
				c.compare(t)
			})
		}
	}
}

// TestExplainAgreesWithPlyfs is the same with the mount that is to be explained.
func TestExplainAgreesWithPlyfs(t *testing.T) {
	needOracle(t)
	for seed := range int64(30) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			c := newExplainCase(t, seed+1000, oracle.GenOptions{MaxLowers: 4}, "", "")
			for range 1 + c.rng.IntN(3) {
				c.generation(t)
			}
			c.choose()
			c.mounter = subject(t)
			c.compare(t)
		})
	}
}

// newExplainCase builds random layers: for the kernel in one dialect, and, if ours is not
// "", once more in another for us.
func newExplainCase(t *testing.T, seed int64, o oracle.GenOptions, dialect, ours string) *explainCase {
	t.Helper()
	c := &explainCase{rng: rand.New(rand.NewPCG(uint64(seed), 77)), dir: fastTempDir(t), dialect: dialect, mounter: harness.Kernel{}}
	c.stack.Dialect = dialect
	r := oracle.GenRecipe(seed, o)
	for len(r.Lowers) < 2 {
		r.Lowers = append(r.Lowers, oracle.Layer{Entries: []oracle.Entry{{Kind: oracle.Dir, Mode: 0o755}}})
	}
	for i, l := range r.Lowers {
		l.Dialect = dialect
		dir := c.build(t, fmt.Sprintf("lower%d", i), l, i)
		c.stack.Lowers = append(c.stack.Lowers, dir)
		layer := explain.Layer{Label: explain.Label{Name: fmt.Sprintf("layer %d", i)}}
		layer.Path, layer.Dialect = dir, dialectOf(t, dialect)
		if ours != "" {
			if l.Dialect = ours; ours == "auto" && i%2 == 0 {
				l.Dialect = "aufs"
			} else if ours == "auto" {
				l.Dialect = ""
			}
			layer.Path, layer.Dialect = c.build(t, fmt.Sprintf("ours%d", i), l, i), dialectOf(t, ours)
		}
		c.options.Lowers = append(c.options.Lowers, layer)
	}
	c.stamped = len(r.Lowers)
	return c
}

func dialectOf(t *testing.T, name string) whiteout.Dialect {
	t.Helper()
	if name == "" {
		name = "overlay"
	}
	d, err := whiteout.ParseDialect(name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// build makes a layer and writes into each file who it is.
func (c *explainCase) build(t *testing.T, name string, l oracle.Layer, stamp int) string {
	t.Helper()
	dir := filepath.Join(c.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.Build(dir); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), ".wh.") && l.Dialect == "aufs" {
			return err
		}
		if _, err := unix.Lgetxattr(p, "trusted.overlay.whiteout", nil); err == nil {
			return nil
		}
		if _, err := unix.Lgetxattr(p, "user.overlay.whiteout", nil); err == nil {
			return nil
		}
		return c.write(p, stamp, rel)
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// write replaces a content, and nothing else, by one that no other file has. Times are set
// so that both builds of a layer are equal.
func (c *explainCase) write(p string, stamp int, rel string) error {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return err
	}
	caps := make([]byte, 256)
	n, cerr := unix.Lgetxattr(p, "security.capability", caps)
	if err := os.WriteFile(p, fmt.Appendf(nil, "layer %d %q", stamp, rel), 0); err != nil {
		return err
	}
	if cerr == nil {
		cerr = unix.Lsetxattr(p, "security.capability", caps[:n], 0)
	} else {
		cerr = nil
	}
	return errors.Join(cerr, unix.Chmod(p, st.Mode&0o7777), unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{st.Atim, st.Mtim}, 0))
}

// generation has kernel overlayfs write an upper, which becomes the topmost lower.
func (c *explainCase) generation(t *testing.T) {
	t.Helper()
	upper, m := c.mountUpper(t, []string{"redirect_dir=on", "metacopy=on", "index=off"})
	for range 5 + c.rng.IntN(25) {
		c.change(m.Target())
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	c.stack.Lowers = slices.Insert(c.stack.Lowers, 0, upper)
	l := explain.Layer{Label: explain.Label{Name: filepath.Base(upper)}}
	l.Path = upper
	c.options.Lowers = slices.Insert(c.options.Lowers, 0, l)
	c.stamped++
}

func (c *explainCase) mountUpper(t *testing.T, options []string) (upper string, m harness.Mount) {
	t.Helper()
	s := c.stack
	upper = filepath.Join(c.dir, fmt.Sprintf("upper%d", c.stamped))
	s.Upper, s.Work, s.Options = upper, upper+".work", options
	target := filepath.Join(c.dir, "mnt")
	for _, d := range []string{s.Upper, s.Work, target} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m, err := harness.Kernel{}.Mount(s, target)
	if err != nil {
		t.Fatal(err)
	}
	return upper, m
}

// change does something at random in a mount; what fails does nothing.
func (c *explainCase) change(mnt string) {
	var all, dirs []string
	_ = filepath.WalkDir(mnt, func(p string, d fs.DirEntry, err error) error {
		if err == nil && p != mnt {
			all = append(all, p)
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	if len(all) == 0 {
		return
	}
	p, d := all[c.rng.IntN(len(all))], dirs[c.rng.IntN(len(dirs))]
	name := filepath.Join(d, []string{"a", "b", "c", "d", "moved"}[c.rng.IntN(5)])
	st, err := os.Lstat(p)
	if err != nil {
		return
	}
	switch n := c.rng.IntN(100); {
	case n < 35:
		_ = unix.Rename(p, name)
	case n < 55 && st.Mode()&fs.ModeSymlink == 0:
		_ = unix.Chmod(p, uint32(0o600+c.rng.IntN(0o177)))
	case n < 60:
		_ = unix.Lchown(p, c.rng.IntN(3000), 7)
	case n < 70 && st.Mode().IsRegular():
		_ = os.WriteFile(p, fmt.Appendf(nil, "layer %d %q %d", c.stamped, p, c.rng.Int()), 0o644)
	case n < 80:
		_ = os.RemoveAll(p)
	case n < 88:
		_ = os.RemoveAll(name)
		_ = os.Mkdir(name, 0o750)
	case n < 93:
		_ = unix.Link(p, name)
	default:
		if st, err := os.Stat(name); err == nil && !st.Mode().IsRegular() {
			return // a fifo has no reader
		}
		_ = os.WriteFile(name, fmt.Appendf(nil, "layer %d %q %d", c.stamped, name, c.rng.Int()), 0o644)
	}
}

// choose sets how the stack is looked at in the end: with an upper that was written to, or
// without, and whose redirects and metacopies are followed.
func (c *explainCase) choose() {
	switch c.rng.IntN(6) {
	case 0:
		c.stack.Options = []string{"redirect_dir=nofollow"}
		c.options.Redirect = unionfs.RedirectRefuse
	case 1:
		c.stack.Options = []string{"redirect_dir=follow"}
		c.options.Redirect = unionfs.RedirectFollow
	default:
		c.stack.Options = []string{"redirect_dir=on", "metacopy=on"}
		c.options.Redirect, c.options.Metacopy = unionfs.RedirectOn, true
		if c.rng.IntN(2) == 0 {
			c.stack.Options = append(c.stack.Options, "index=on")
			c.stack.Upper = "yes"
		}
	}
}

// compare compares all paths that could mean something.
func (c *explainCase) compare(t *testing.T) {
	t.Helper()
	target := filepath.Join(c.dir, "final")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if c.stack.Upper != "" {
		upper, m := c.mountUpper(t, c.stack.Options)
		for range 5 + c.rng.IntN(25) {
			c.change(m.Target())
		}
		if err := m.Unmount(); err != nil {
			t.Fatal(err)
		}
		c.stack.Upper, c.stack.Work = upper, upper+".work"
		l := explain.Layer{Label: explain.Label{Name: "upper"}}
		l.Path = upper
		// The kernel's workdir has its index in a directory of that name, too.
		c.options.Upper, c.options.Work = &l, c.stack.Work
	}
	m, err := c.mounter.Mount(c.stack, target)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	s, err := explain.Open(c.options)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	root, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	exist := map[string]bool{}
	bad, seen := 0, map[string]int{}
	for _, p := range c.universe(target) {
		r, err := s.Explain(p)
		if err != nil {
			t.Errorf("explain %q: %v", p, err)
			continue
		}
		if diff := c.differs(root, p, r); diff != "" && bad < 5 {
			bad++
			t.Errorf("%q: %s\n\tanswer: %s\n\t%s", p, diff, r.Answer, entriesText(r))
		}
		if r.Exists && len(r.Links) == 0 {
			exist[string(r.Path)] = true
		}
		for _, e := range r.Entries {
			seen[e.Role+" "+e.Rule]++
		}
	}
	t.Logf("%v", seen)
	c.compareTree(t, s, exist)
}

// universe is every path that a layer or the mount has, and some that nobody has.
func (c *explainCase) universe(target string) []string {
	paths := map[string]bool{"/": true, "/none": true, "/none/a": true}
	add := func(dir string) {
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // others have the name
			}
			rel, _ := filepath.Rel(dir, p)
			base := filepath.Base(rel)
			paths["/"+rel] = true
			paths["/"+rel+"/below"] = true
			paths["/"+filepath.Join(filepath.Dir(rel), strings.TrimPrefix(base, ".wh."))] = true
			return nil
		})
	}
	for _, l := range c.options.Lowers {
		add(l.Path)
	}
	if c.options.Upper != nil {
		add(c.options.Upper.Path)
	}
	add(target)
	return slices.Sorted(maps.Keys(paths))
}

// differs compares what explain says of a path with what the kernel shows.
func (c *explainCase) differs(root int, p string, r *explain.Report) string {
	var st unix.Stat_t
	fd, err := fsat.OpenInRoot(root, strings.TrimPrefix(p, "/")+"/.", unix.O_PATH)
	if p != "/" {
		fsat.Close(fd)
		fd, err = fsat.OpenInRoot(root, p, unix.O_PATH|unix.O_NOFOLLOW)
	}
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	defer fsat.Close(fd)
	if err != nil {
		errno := unix.ErrnoName(err.(unix.Errno)) //nolint:errorlint // a bare one
		if r.Rule == explain.RuleRefused && c.options.Redirect == unionfs.RedirectRefuse && c.mounter.Name() == "kernel" {
			return "" // see below
		}
		if r.Exists || errno != r.Errno {
			return fmt.Sprintf("kernel: %s, explain: exists %v %s", errno, r.Exists, r.Errno)
		}
		return ""
	}
	if !r.Exists && r.Rule == explain.RuleRefused && c.options.Redirect == unionfs.RedirectRefuse && c.mounter.Name() == "kernel" {
		return "" // differs: the kernel does not look at the redirect of a directory below which there is no layer
	}
	if !r.Exists {
		return fmt.Sprintf("kernel shows it (mode %o), explain: %s", st.Mode, r.Errno)
	}
	want := fmt.Sprintf("%s %04o %d:%d", kindOf(st.Mode), st.Mode&0o7777, st.Uid, st.Gid)
	got := fmt.Sprintf("%s %v %d:%d", r.Attr.Kind, r.Attr.Mode, r.Attr.UID, r.Attr.GID)
	top := r.Entries[slices.IndexFunc(r.Entries, func(e explain.Entry) bool { return e.Role == explain.RoleServes })]
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		want += fmt.Sprintf(" size %d time %d.%09d rdev %d:%d", st.Size, st.Mtim.Sec, st.Mtim.Nsec, unix.Major(st.Rdev), unix.Minor(st.Rdev))
		rdev := r.Attr.Rdev
		if rdev == "" {
			rdev = "0:0"
		}
		got += fmt.Sprintf(" size %d time %d.%09d rdev %s", r.Attr.Size, r.Attr.MTime.Unix(), r.Attr.MTime.Nanosecond(), rdev)
		if !slices.ContainsFunc(top.Private, func(x explain.Xattr) bool { return strings.HasSuffix(x.Name, ".origin") }) && top.Links == 1 && c.options.Lowers[0].Path == c.stack.Lowers[0] {
			want, got = want+fmt.Sprint(" ino ", st.Ino), got+fmt.Sprint(" ino ", top.Ino)
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		want += " content " + contentOf(fsat.ProcPath(fd))
		e := top
		for _, o := range r.Entries {
			if o.Role == explain.RoleData {
				e = o
			}
		}
		dir := string(r.Layers[e.Layer].Dir)
		if rest, ok := strings.CutPrefix(string(e.In), "(workdir)/"); ok {
			dir, e.In = c.stack.Work, explain.Path("/"+rest)
		}
		got += " content " + contentOf(dir+string(e.In))
	case unix.S_IFLNK:
		target, _ := fsat.Readlink(fd, "")
		want, got = want+" to "+target, got+" to "+string(r.Attr.Target)
	}
	if want != got {
		return fmt.Sprintf("kernel: %s\n\texplain: %s", want, got)
	}
	return ""
}

func kindOf(mode uint32) string {
	return map[uint32]string{
		unix.S_IFREG: "file", unix.S_IFDIR: "directory", unix.S_IFLNK: "symlink", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
		unix.S_IFCHR: "character device", unix.S_IFBLK: "block device",
	}[mode&unix.S_IFMT]
}

func contentOf(p string) string {
	b, err := os.ReadFile(p)
	if err != nil {
		return err.Error()
	}
	return string(b[:min(len(b), 200)])
}

func entriesText(r *explain.Report) string {
	var lines []string
	for _, e := range r.Entries {
		lines = append(lines, fmt.Sprintf("%s %s %s %s white %q opaque %q redirect %v meta %v: %s", r.Layers[e.Layer].Name, e.In, e.Role, e.Rule, e.Whiteout, e.Opaque, e.Redirect != "", e.Metacopy, e.Why))
	}
	return strings.Join(lines, "\n\t")
}

// compareTree: the tree has the names that exist, and those only.
func (c *explainCase) compareTree(t *testing.T, s *explain.Stack, exist map[string]bool) {
	t.Helper()
	got := map[string]bool{"/": true}
	_, err := s.Tree(t.Context(), "/", explain.TreeOptions{}, func(l explain.Line) error {
		if l.Exists {
			got[string(l.At)] = true
		}
		return nil
	})
	if err != nil {
		t.Errorf("tree: %v", err)
	}
	var missing []string
	for p := range exist {
		if !got[p] {
			missing = append(missing, "not in the tree: "+p)
		}
	}
	for p := range got {
		if !exist[p] {
			missing = append(missing, "in the tree alone: "+p)
		}
	}
	slices.Sort(missing)
	if len(missing) > 0 {
		t.Errorf("tree: %q", missing[:min(len(missing), 5)])
	}
}
