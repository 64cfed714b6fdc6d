package unionfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/whiteout"
)

// These tests call the file system as the transport does, without a mount, so
// they need neither root nor FUSE. What needs a kernel is in integration.

// union is a file system under test and a client that counts like the kernel.
type union struct {
	*FS
	t     *testing.T
	dir   string
	known map[uint64]uint64 // node id -> lookups the client owes
}

// newUnion makes a union of lowers, each a list of paths: "d/" is a directory,
// "f" a file that holds its own path, "-p" a whiteout of p.
func newUnion(t *testing.T, writable bool, lowers ...[]string) *union {
	t.Helper()
	return newUnionWith(t, func(*Options) {}, writable, lowers...)
}

// newUnionWith is newUnion with other options; change may also change the
// layers before they are opened.
func newUnionWith(t *testing.T, change func(*Options), writable bool, lowers ...[]string) *union {
	t.Helper()
	u := &union{t: t, dir: t.TempDir(), known: map[uint64]uint64{}}
	o := Options{UpperDialect: whiteout.UserXattr}
	for i, paths := range lowers {
		dir := filepath.Join(u.dir, "lower"+strconv.Itoa(i))
		u.must(os.Mkdir(dir, 0o755))
		for _, p := range paths {
			switch name, white := strings.CutPrefix(p, "-"); {
			case white:
				if err := unix.Mknod(filepath.Join(dir, name), unix.S_IFCHR, 0); err != nil {
					t.Skipf("whiteout devices refused: %v", err)
				}
			case strings.HasSuffix(p, "/"):
				u.must(os.MkdirAll(filepath.Join(dir, p), 0o755))
			default:
				u.must(os.MkdirAll(filepath.Dir(filepath.Join(dir, p)), 0o755))
				u.must(os.WriteFile(filepath.Join(dir, p), []byte(p), 0o644))
			}
		}
		o.Lowers = append(o.Lowers, Layer{Path: dir, Dialect: whiteout.UserXattr})
	}
	if writable {
		o.Upper, o.Work = filepath.Join(u.dir, "upper"), filepath.Join(u.dir, "work")
		u.must(os.Mkdir(o.Upper, 0o755))
		u.must(os.Mkdir(o.Work, 0o755))
	}
	change(&o)
	before := openFds(t)
	fs, err := New(o)
	u.must(err)
	u.FS = fs
	t.Cleanup(func() {
		u.forgetAll()
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
		if after := openFds(t); after != before {
			t.Errorf("%d descriptors open, %d before", after, before)
		}
	})
	return u
}

func openFds(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func (u *union) must(err error) {
	u.t.Helper()
	if err != nil {
		u.t.Fatal(err)
	}
}

func (u *union) ok(s fuse.Status) {
	u.t.Helper()
	if s != fuse.OK {
		u.t.Fatal(s)
	}
}

func header(id uint64) fuse.InHeader {
	return fuse.InHeader{NodeId: id, Caller: fuse.Caller{
		Owner: fuse.Owner{Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}, Pid: uint32(os.Getpid()),
	}}
}

// walk looks a path up; 0 if it does not exist.
func (u *union) walk(path string) uint64 {
	u.t.Helper()
	id := uint64(fuse.FUSE_ROOT_ID)
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		h := header(id)
		var out fuse.EntryOut
		u.ok(u.Lookup(nil, &h, name, &out))
		if out.NodeId == 0 {
			return 0
		}
		u.known[out.NodeId]++
		id = out.NodeId
	}
	return id
}

// forgetAll gives everything back, as the kernel does when it drops caches.
func (u *union) forgetAll() {
	for id, n := range u.known {
		u.Forget(id, n)
	}
	clear(u.known)
}

func (u *union) names(path string) []string {
	u.t.Helper()
	id := u.walk(path)
	var out []string
	for pos := uint64(0); ; {
		buf := make([]byte, 300) // a few entries at a time
		list := fuse.NewDirEntryList(buf, pos)
		u.ok(u.ReadDir(nil, &fuse.ReadIn{InHeader: header(id), Offset: pos}, list))
		entries, err := fuse.ParseDirEntries(list.Bytes())
		u.must(err)
		if len(entries) == 0 {
			return out
		}
		for _, e := range entries {
			if e.Name != "." && e.Name != ".." {
				out = append(out, e.Name)
			}
			pos = e.Off
		}
	}
}

func (u *union) read(path string) string {
	u.t.Helper()
	id := u.walk(path)
	if id == 0 {
		return "ENOENT"
	}
	buf := make([]byte, 4096)
	res, s := u.Read(nil, &fuse.ReadIn{InHeader: header(id)}, buf)
	if s != fuse.OK {
		return s.String()
	}
	data, _ := res.Bytes(buf)
	return string(data)
}

func (u *union) write(path, data string) {
	u.t.Helper()
	dir, name := filepath.Split(path)
	if id := u.walk(path); id != 0 {
		var out fuse.OpenOut
		u.ok(u.Open(nil, &fuse.OpenIn{InHeader: header(id), Flags: unix.O_WRONLY | unix.O_TRUNC}, &out))
		_, s := u.Write(nil, &fuse.WriteIn{InHeader: header(id)}, []byte(data))
		u.ok(s)
		u.Release(nil, &fuse.ReleaseIn{InHeader: header(id), Flags: unix.O_WRONLY})
		return
	}
	var out fuse.CreateOut
	u.ok(u.Create(nil, &fuse.CreateIn{InHeader: header(u.walk(dir)), Flags: unix.O_WRONLY, Mode: 0o644}, name, &out))
	u.known[out.NodeId]++
	_, s := u.Write(nil, &fuse.WriteIn{InHeader: header(out.NodeId)}, []byte(data))
	u.ok(s)
	u.Release(nil, &fuse.ReleaseIn{InHeader: header(out.NodeId), Flags: unix.O_WRONLY})
}

func (u *union) remove(path string) {
	u.t.Helper()
	dir, name := filepath.Split(path)
	h := header(u.walk(dir))
	u.ok(u.Unlink(nil, &h, name))
}

func TestMergedTree(t *testing.T) {
	u := newUnion(t, false,
		[]string{"d/top", "-gone", "d/-x"},
		[]string{"d/mid", "gone", "only/deep/f", "d/same"},
		[]string{"d/low", "d/same", "gone"})
	for path, want := range map[string][]string{
		"":          {"d", "only"},
		"d":         {"-x", "low", "mid", "same", "top"},
		"only/deep": {"f"},
	} {
		if d := cmp.Diff(want, u.names(path)); d != "" {
			t.Errorf("%q (-want +got):\n%s", path, d)
		}
	}
	if got := u.read("d/low"); got != "d/low" {
		t.Errorf("content %q", got)
	}
	if u.walk("gone") != 0 {
		t.Error("a whited-out name is found")
	}
	h := header(fuse.FUSE_ROOT_ID)
	if s := u.Mkdir(nil, &fuse.MkdirIn{InHeader: h, Mode: 0o755}, "new", &fuse.EntryOut{}); s != fuse.EROFS {
		t.Errorf("mkdir without an upper: %v", s)
	}
}

func TestNodeIDs(t *testing.T) {
	u := newUnion(t, true, []string{"a", "b"})
	a := u.walk("a")
	if a >= upperIDs {
		t.Errorf("lower object has node id %#x", a)
	}
	u.write("new", "x")
	if n := u.walk("new"); n < upperIDs {
		t.Errorf("upper object has node id %#x", n)
	}
	u.write("a", "changed")
	if again := u.walk("a"); again != a {
		t.Errorf("copy-up changed the node id from %#x to %#x", a, again)
	}
	var before, after fuse.AttrOut
	u.ok(u.GetAttr(nil, &fuse.GetAttrIn{InHeader: header(u.walk("b"))}, &before))
	u.write("b", "changed")
	u.ok(u.GetAttr(nil, &fuse.GetAttrIn{InHeader: header(u.walk("b"))}, &after))
	if before.Ino != after.Ino {
		t.Errorf("copy-up changed the inode number from %d to %d", before.Ino, after.Ino)
	}
}

// TestForgetGivesEverythingBack checks that what the kernel forgets is
// forgotten here too, whatever the order.
func TestForgetGivesEverythingBack(t *testing.T) {
	u := newUnion(t, true, []string{"d/e/f", "d/g", "h"})
	u.write("d/e/new", "1")
	u.write("d/g", "2")
	h := header(u.walk(""))
	var out fuse.EntryOut
	u.ok(u.Link(nil, &fuse.LinkIn{InHeader: h, Oldnodeid: u.walk("d/g")}, "link", &out))
	u.known[out.NodeId]++
	u.remove("h")
	u.forgetAll()
	live := 0
	for i := range u.nodes.shards {
		live += len(u.nodes.shards[i].nodes) + len(u.nodes.shards[i].upper)
	}
	if live != 1 {
		t.Errorf("%d objects are left, want the root", live)
	}
	if got := u.root.refs.Load(); got != 1 {
		t.Errorf("the root has %d references", got)
	}
	// And everything can be found again.
	if a, b := u.walk("d/g"), u.walk("link"); a != b || a == 0 {
		t.Errorf("two names of one file are nodes %d and %d", a, b)
	}
	if got := u.read("d/e/new"); got != "1" {
		t.Errorf("content %q", got)
	}
}

func TestReadBeforeAndAfterCopyUp(t *testing.T) {
	u := newUnion(t, true, []string{"f"})
	id := u.walk("f")
	var out fuse.OpenOut
	u.ok(u.Open(nil, &fuse.OpenIn{InHeader: header(id), Flags: unix.O_RDONLY}, &out))
	u.write("f", "written later")
	buf := make([]byte, 100)
	res, s := u.Read(nil, &fuse.ReadIn{InHeader: header(id), Fh: out.Fh}, buf)
	u.ok(s)
	if data, _ := res.Bytes(buf); !bytes.Equal(data, []byte("written later")) {
		t.Errorf("the early reader sees %q", data)
	}
	if b, err := os.ReadFile(filepath.Join(u.dir, "lower0", "f")); err != nil || string(b) != "f" {
		t.Errorf("the lower file is now %q, %v", b, err)
	}
}

func TestOpenUnlinked(t *testing.T) {
	u := newUnion(t, true, []string{"low"})
	u.write("up", "upper data")
	for name, want := range map[string]string{"low": "low", "up": "upper data"} {
		id := u.walk(name)
		u.remove(name)
		buf := make([]byte, 100)
		res, s := u.Read(nil, &fuse.ReadIn{InHeader: header(id)}, buf)
		u.ok(s)
		if data, _ := res.Bytes(buf); string(data) != want {
			t.Errorf("%s: read %q after unlink", name, data)
		}
		if _, s := u.Write(nil, &fuse.WriteIn{InHeader: header(id)}, []byte("W")); s != fuse.OK {
			t.Errorf("%s: write after unlink: %v", name, s)
		}
		var out fuse.AttrOut
		u.ok(u.GetAttr(nil, &fuse.GetAttrIn{InHeader: header(id)}, &out))
		if out.Nlink != 0 {
			t.Errorf("%s: %d links after unlink", name, out.Nlink)
		}
	}
	if got := u.names(""); len(got) != 0 {
		t.Errorf("still listed: %q", got)
	}
}

// TestIndirectObjectsAreRefused: their data or content is elsewhere, and an
// image could have made them up.
func TestIndirectObjectsAreRefused(t *testing.T) {
	u := newUnion(t, true, []string{"file", "dir/x", "plain"})
	lower := filepath.Join(u.dir, "lower0")
	for name, attr := range map[string]string{"file": "metacopy", "dir": "redirect"} {
		if err := unix.Setxattr(filepath.Join(lower, name), "user.overlay."+attr, []byte("/plain"), 0); err != nil {
			t.Skipf("no user attributes here: %v", err)
		}
		h := header(fuse.FUSE_ROOT_ID)
		if s := u.Lookup(nil, &h, name, &fuse.EntryOut{}); s != fuse.EPERM {
			t.Errorf("lookup of a %s object: %v, want EPERM", attr, s)
		}
	}
	if got := u.read("plain"); got != "plain" {
		t.Errorf("its neighbour reads %q", got)
	}
}

func TestVolatileMark(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"l", "u", "w"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	o := Options{
		Lowers: []Layer{{Path: filepath.Join(dir, "l")}}, Upper: filepath.Join(dir, "u"), Work: filepath.Join(dir, "w"),
		UpperDialect: whiteout.UserXattr, Volatile: true,
	}
	fs, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	mark := filepath.Join(dir, "w/work/incompat/volatile/dirty")
	if _, err := os.Stat(mark); err != nil {
		t.Errorf("a volatile union leaves no mark: %v", err)
	}
	if err := fs.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(mark); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mark is still there after a synced end: %v", err)
	}
	// After a crash, ours or the kernel's, it is; no mount takes such an upper.
	if err := os.MkdirAll(mark, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, o.Volatile = range []bool{false, true} {
		if fs, err := New(o); !errors.Is(err, cow.ErrVolatile) {
			t.Errorf("volatile=%v: New = %v, %v; want ErrVolatile", o.Volatile, fs, err)
		}
	}
}

// TestManyOpenUnlinked: beyond a limit, files without a name are kept by a name
// in the workdir instead of a descriptor.
func TestManyOpenUnlinked(t *testing.T) {
	u := newUnion(t, true, []string{"low"})
	u.maxOrphans = 3
	before := openFds(t)
	ids := map[string]uint64{}
	for i := range 40 {
		name := fmt.Sprint("f", i)
		u.write(name, "data of "+name)
		ids[name] = u.walk(name)
		if i%2 == 0 {
			u.remove(name)
			continue
		}
		// Replaced by a rename.
		u.write("other", "o")
		h := header(fuse.FUSE_ROOT_ID)
		u.ok(u.Rename(nil, &fuse.RenameIn{InHeader: h, Newdir: fuse.FUSE_ROOT_ID}, "other", name))
		u.remove(name)
	}
	u.fds.shrink(0)
	if n := openFds(t) - before; n > 3+1 { // and the directory
		t.Errorf("%d descriptors are open", n)
	}
	for name, id := range ids {
		buf := make([]byte, 100)
		res, s := u.Read(nil, &fuse.ReadIn{InHeader: header(id)}, buf)
		u.ok(s)
		if data, _ := res.Bytes(buf); string(data) != "data of "+name {
			t.Errorf("%s: read %q after unlink", name, data)
		}
		var out fuse.AttrOut
		u.ok(u.GetAttr(nil, &fuse.GetAttrIn{InHeader: header(id)}, &out))
		if out.Nlink != 0 {
			t.Errorf("%s: %d links after unlink", name, out.Nlink)
		}
	}
	if got := u.names(""); !slices.Equal(got, []string{"low"}) {
		t.Errorf("listed: %q", got)
	}
	u.forgetAll()
	left, err := os.ReadDir(filepath.Join(u.dir, "work", "work"))
	u.must(err)
	if len(left) != 0 {
		t.Errorf("left in the workdir: %v", left)
	}
	if n := u.orphans.Load(); n != 0 {
		t.Errorf("%d orphans are counted", n)
	}
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	mk := func(names ...string) {
		for _, n := range names {
			if err := os.MkdirAll(filepath.Join(dir, n), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	mk("l", "u", "u/l", "w", "u/w")
	p := func(n string) string { return filepath.Join(dir, n) }
	low := []Layer{{Path: p("l")}}
	for _, tc := range []struct {
		name string
		o    Options
		want error
	}{
		{"no lower", Options{}, ErrInvalid},
		{"missing lower", Options{Lowers: []Layer{{Path: p("none")}}}, unix.ENOENT},
		{"upper without workdir", Options{Lowers: low, Upper: p("u")}, ErrInvalid},
		{"workdir inside the upper", Options{Lowers: low, Upper: p("u"), Work: p("u/w")}, ErrInvalid},
		{"lower inside the upper", Options{Lowers: []Layer{{Path: p("u/l")}}, Upper: p("u"), Work: p("w")}, ErrInvalid},
		{"lower is the upper", Options{Lowers: []Layer{{Path: p("u")}}, Upper: p("u"), Work: p("w")}, ErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := openFds(t)
			if fs, err := New(tc.o); !errors.Is(err, tc.want) {
				t.Errorf("New = %v, %v; want %v", fs, err, tc.want)
			}
			if after := openFds(t); after != before {
				t.Errorf("%d descriptors leaked", after-before)
			}
		})
	}
	o := Options{Lowers: low, Upper: p("u"), Work: p("w"), UpperDialect: whiteout.UserXattr}
	if err := os.RemoveAll(p("u/w")); err != nil {
		t.Fatal(err)
	}
	first, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, err := New(o); !errors.Is(err, cow.ErrInUse) {
		t.Errorf("a second union on one upper: %v, want ErrInUse", err)
	}
}
