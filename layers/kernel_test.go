package layers

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

var (
	kernelSeed  = flag.Uint64("kernel.seed", 1, "first seed of TestUppersOfTheKernel")
	kernelSeeds = flag.Uint64("kernel.seeds", 25, "number of seeds of TestUppersOfTheKernel")
)

// TestUppersOfTheKernel lets kernel overlayfs, with everything turned on that
// makes an upper refer to its lowers, change a small stack at random. A view of
// the stack, and the layer made of the upper, must show what the kernel showed.
func TestUppersOfTheKernel(t *testing.T) {
	needRoot(t)
	s := openStore(t)
	for seed := *kernelSeed; seed < *kernelSeed+*kernelSeeds; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			r := &randomStack{t: t, rand: rand.New(rand.NewPCG(seed, 0))}
			st := r.stack()
			for round := range 2 { // the second one on what the first one left
				want := r.change(st, round)
				if want == nil {
					t.Skip("needs to mount kernel overlayfs with redirect_dir, metacopy and index")
				}
				union, err := openUnion(t.Context(), st)
				must(t, err)
				d := cmp.Diff(want, viewLines(t, union))
				union.Close()
				if d != "" {
					t.Errorf("round %d: the kernel shows another tree: %s", round, d)
				}
				var buf bytes.Buffer
				_, err = writeUpper(t.Context(), &buf, st)
				must(t, err)
				sameTree(t, s, st, buf.Bytes())
				sameChanges(t, st)
				if t.Failed() {
					t.Fatalf("operations:\n%s", strings.Join(r.log, "\n"))
				}
			}
		})
	}
}

// sameChanges checks that diff says what a comparison of the trees says, but for
// names that were touched and are as before.
func sameChanges(t testing.TB, st Stack) {
	t.Helper()
	got, err := diffStack(t.Context(), st)
	must(t, err)
	union, err := openUnion(t.Context(), st)
	must(t, err)
	defer union.Close()
	lower, err := openView(t.Context(), st.Lowers)
	must(t, err)
	defer lower.Close()
	a, err := lower.root()
	must(t, err)
	b, err := union.root()
	must(t, err)
	c := comparer{ctx: t.Context(), a: lower, b: union}
	_, err = c.dir(a, b)
	must(t, err)
	said := map[Change]bool{}
	for _, x := range got {
		said[x] = x.Kind == "C"
	}
	for _, x := range c.out {
		if _, ok := said[x]; !ok {
			t.Errorf("diff does not say %v", x)
		}
		delete(said, x)
	}
	for x, touched := range said {
		if !touched {
			t.Errorf("diff says %v", x)
		}
	}
}

type randomStack struct {
	t    *testing.T
	rand *rand.Rand
	log  []string
}

// dir and path choose from few names, so that the same ones meet.
func (r *randomStack) dir() string {
	var p []string
	for range r.rand.IntN(4) {
		p = append(p, []string{"a", "b", "c"}[r.rand.IntN(3)])
	}
	return strings.Join(p, "/")
}

func (r *randomStack) path() string {
	return join(r.dir(), []string{"a", "b", "c", "f", "g"}[r.rand.IntN(5)])
}

// stack makes three lowers with objects of all kinds, hard links, whiteouts and
// opaque directories.
func (r *randomStack) stack() Stack {
	base := r.t.TempDir()
	st := Stack{Upper: base + "/upper", Work: base + "/work", Dialect: whiteout.Overlay}
	must(r.t, os.Mkdir(st.Upper, 0o755), os.Mkdir(st.Work, 0o700))
	for i := range 3 {
		root := fmt.Sprintf("%s/lower%d", base, i)
		must(r.t, os.Mkdir(root, 0o755))
		var files []string
		for n := range 25 {
			rel := r.path()
			p := filepath.Join(root, rel)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				continue // a file is in the way
			}
			var err error
			switch k := r.rand.IntN(12); {
			case k < 4:
				if _, err = os.Lstat(p); err != nil {
					err = os.WriteFile(p, fmt.Appendf(nil, "layer %d file %d", i, n), 0o644)
					files = append(files, p)
				}
			case k < 6 && len(files) > 0:
				err = os.Link(files[r.rand.IntN(len(files))], p)
			case k < 9:
				err = os.Mkdir(p, 0o755)
			case k < 10:
				if err = os.Symlink("../a", p); err == nil {
					files = append(files, p)
				}
			case k < 11:
				err = whiteout.CreateDevice(unix.AT_FDCWD, p)
			default:
				if err = os.Mkdir(p, 0o700); err == nil {
					err = unix.Setxattr(p, st.Dialect.Attr("opaque"), []byte("y"), 0)
				}
			}
			if err != nil && !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTDIR) {
				r.t.Fatal(err)
			}
		}
		st.Lowers = append(st.Lowers, LayerDir{Path: root, Dialect: st.Dialect})
	}
	return st
}

// change mounts the stack, changes it, and returns what the mount shows then;
// nil if this kernel cannot mount it.
func (r *randomStack) change(st Stack, round int) []string {
	target := r.t.TempDir()
	var lowers []string
	for _, l := range st.Lowers {
		lowers = append(lowers, l.Path)
	}
	o := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=on,metacopy=on,index=on", strings.Join(lowers, ":"), st.Upper, st.Work)
	if err := unix.Mount("overlay", target, "overlay", 0, o); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		r.t.Fatal(err)
	}
	defer func() { must(r.t, unix.Unmount(target, 0)) }()
	for i := range 30 {
		what, err := r.operation(target, fmt.Sprintf("round %d step %d", round, i))
		r.log = append(r.log, fmt.Sprintf("%s: %v", what, err))
	}
	return treeLines(r.t, target)
}

// operation does something at random, which may fail.
func (r *randomStack) operation(root, unique string) (what string, err error) {
	one, two := r.path(), r.path()
	p, q := filepath.Join(root, one), filepath.Join(root, two)
	switch k := r.rand.IntN(20); {
	case k < 7:
		return "rename " + one + " " + two, unix.Rename(p, q)
	case k < 8:
		return "exchange " + one + " " + two, unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, q, unix.RENAME_EXCHANGE)
	case k < 10:
		return "chmod " + one, unix.Fchmodat(unix.AT_FDCWD, p, 0o600|r.rand.Uint32N(0o100), unix.AT_SYMLINK_NOFOLLOW)
	case k < 11:
		return "chown " + one, os.Lchown(p, r.rand.IntN(3), r.rand.IntN(3))
	case k < 13:
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
		if err == nil {
			_, err = f.WriteString(unique)
			err = errors.Join(err, f.Close())
		}
		return "append " + one, err
	case k < 14:
		fd, err := unix.Open(p, unix.O_WRONLY|unix.O_NOFOLLOW, 0)
		if err == nil {
			err = errors.Join(unix.Ftruncate(fd, r.rand.Int64N(20)), unix.Close(fd))
		}
		return "truncate " + one, err
	case k < 16:
		return "link " + one + " " + two, unix.Link(p, q)
	case k < 17:
		return "unlink " + one, unix.Unlink(p)
	case k < 18:
		return "remove " + one, os.RemoveAll(p)
	case k < 19:
		return "mkdir " + one, os.Mkdir(p, 0o755)
	default:
		return "setxattr " + one, unix.Lsetxattr(p, "user.test", []byte(unique), 0)
	}
}

// treeLines is viewLines for a directory.
func treeLines(t testing.TB, root string) (out []string) {
	t.Helper()
	groups := map[linkKey]string{}
	var walk func(rel string)
	walk = func(rel string) {
		fd, err := unix.Open(filepath.Join(root, rel), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			return // a whiteout in a directory that is not merged: listed only
		}
		must(t, err)
		defer fsat.Close(fd)
		a, st, err := readAttrs(fd, encoding{dialect: whiteout.Overlay})
		must(t, err)
		line := fmt.Sprintf("%q %o %s", rel, st.Mode&unix.S_IFMT, a)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(fsat.ProcPath(fd))
			must(t, err)
			line += fmt.Sprintf(" %q", b)
		case unix.S_IFLNK:
			to, err := fsat.Readlink(fd, "")
			must(t, err)
			line += " @" + to
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			k := linkKey{0, st.Dev, st.Ino}
			if first := groups[k]; first != "" {
				line += " >" + first
			} else {
				groups[k] = rel
			}
		}
		out = append(out, line)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		var names []string
		must(t, fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { names = append(names, e.Name); return nil }))
		sort.Strings(names)
		for _, n := range names {
			walk(join(rel, n))
		}
	}
	walk("")
	return out
}
