package unionfs

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// plusEntry is an entry of READDIRPLUS.
type plusEntry struct {
	name   string
	cookie uint64
	entry  fuse.EntryOut
}

// Sizes of struct fuse_entry_out and fuse_dirent (include/uapi/linux/fuse.h).
const (
	entryOutSize = 128
	direntSize   = 24
)

// parsePlus decodes the answer to READDIRPLUS.
func parsePlus(t testing.TB, b []byte) (entries []plusEntry) {
	t.Helper()
	u64 := binary.NativeEndian.Uint64
	for len(b) >= entryOutSize+direntSize {
		d := b[entryOutSize:]
		n := int(binary.NativeEndian.Uint32(d[16:]))
		size := entryOutSize + (direntSize+n+7)&^7
		if size > len(b) {
			t.Fatalf("an entry of %d bytes, and %d are left", size, len(b))
		}
		e := plusEntry{name: string(d[direntSize : direntSize+n]), cookie: u64(d[8:])}
		e.entry.NodeId, e.entry.Ino, e.entry.Size = u64(b), u64(b[40:]), u64(b[48:])
		e.entry.Mode = binary.NativeEndian.Uint32(b[100:])
		entries = append(entries, e)
		b = b[size:]
	}
	return entries
}

// listPlus reads a whole directory with the attributes of what lies in it, "." and ".."
// left out.
func listPlus(t testing.TB, fs *FS, dir uint64, buf []byte) (all []plusEntry) {
	t.Helper()
	for pos := uint64(0); ; {
		list := fuse.NewDirEntryList(buf, pos)
		if s := fs.ReadDirPlus(nil, &fuse.ReadIn{InHeader: header(dir), Offset: pos, Size: uint32(len(buf))}, list); s != fuse.OK {
			t.Fatal(s)
		}
		entries := parsePlus(t, list.Bytes())
		if len(entries) == 0 {
			return all
		}
		for _, e := range entries {
			if pos = e.cookie; e.name != "." && e.name != ".." {
				all = append(all, e)
			}
		}
	}
}

// plus lists a directory, with attributes.
func (u *union) plus(path string) (names []string) {
	u.t.Helper()
	for _, e := range listPlus(u.t, u.FS, u.walk(path), make([]byte, 4096)) {
		if e.entry.NodeId == 0 {
			u.t.Errorf("%s/%s comes without attributes", path, e.name)
		}
		u.known[e.entry.NodeId]++
		names = append(names, e.name)
	}
	return names
}

// walkOn lists directories as one walk, however slow the machine is.
func (u *union) walkOn(dirs ...string) {
	u.t.Helper()
	p := u.lowers.(*scan).ahead
	for _, dir := range dirs {
		p.mu.Lock()
		p.last = time.Now().Add(time.Hour)
		p.mu.Unlock()
		u.plus(dir)
		p.drop.Stop()
	}
}

// walkTree is a tree of directories 0 to 4 in each other's and each directory, three
// deep, with a file in each.
func walkTree() (paths []string) {
	for i := range 5 {
		for j := range 5 {
			paths = append(paths, fmt.Sprintf("%d/%d/deep/file", i, j), fmt.Sprintf("%d/%d/file", i, j))
		}
	}
	return paths
}

// listed says which directories of a scan have been read.
func listed(t *testing.T, s *scan, paths ...string) []bool {
	t.Helper()
	var out []bool
	for _, p := range paths {
		o, err := s.lookup(p)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, o.(*scanObj).dir.listing.Load() != nil)
	}
	return out
}

// idle does a piece of work ahead; false: there is none.
func (u *union) idle() bool { return u.HasWork() && u.lowers.(*scan).ahead.step() }

func TestPrefetchBeginsWithAWalk(t *testing.T) {
	u := newUnion(t, true, walkTree(), []string{"0/0/deep/below"})
	if u.idle() {
		t.Error("there is work before anything is listed")
	}
	for i, dir := range []string{"", "0", "0/0"} {
		u.walkOn(dir)
		if i < 2 && u.idle() {
			t.Errorf("%d listed directories are a walk already", i+1)
		}
	}
	// The third that lies in a listed one.
	u.walkOn("0/0/deep")
	s := u.lowers.(*scan)
	if !u.idle() {
		// "deep" has no directories in it: the next listing shows the walk goes on.
		u.walkOn("0/1")
		if !u.idle() {
			t.Fatal("a walk is going on, and nothing is done")
		}
	}
	steps := 1
	for u.idle() {
		if steps++; steps > 100 {
			t.Fatal("the work has no end")
		}
	}
	if got := listed(t, s, "0/1/deep"); !got[0] {
		t.Errorf("what comes next has not been looked into (%d steps)", steps)
	}
	if got := listed(t, s, "3/3"); got[0] {
		t.Error("looked into a directory that nobody is near")
	}
}

// TestPrefetchIsUsed: what has been found out ahead is what admit says, once.
func TestPrefetchIsUsed(t *testing.T) {
	u := newUnion(t, true, walkTree())
	s := u.lowers.(*scan)
	u.walkOn("", "0", "1", "2")
	for u.idle() {
	}
	p := s.ahead
	count := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.ready)
	}
	o, err := s.lookup("2/0/file")
	u.must(err)
	before := count()
	if before == 0 {
		t.Fatal("nothing has been found out")
	}
	ahead, err := s.admit(o)
	u.must(err)
	if after := count(); after != before-1 {
		t.Fatalf("%d are kept, %d before somebody came for one", after, before)
	}
	now, err := s.look(o.(*scanObj))
	u.must(err)
	if ahead != now {
		t.Errorf("found out ahead: %+v\nnow: %+v", ahead, now)
	}
	if _, ok := p.take(o.(*scanObj)); ok {
		t.Error("it is given out twice")
	}

	// What is listed then is the same as without.
	if got, want := u.plus("2/0"), []string{"deep", "file"}; !slices.Equal(got, want) {
		t.Errorf("listed %q, want %q", got, want)
	}
	p.forget()
	if n := count(); n != 0 || u.idle() {
		t.Errorf("%d are kept after all have been forgotten", n)
	}
	if got := u.read("1/1/file"); got != "1/1/file" {
		t.Errorf("content %q", got)
	}
}

// TestPrefetchEndsWithTheWalk: what was to come is dropped when the next directory is
// listed after a pause.
func TestPrefetchEndsWithTheWalk(t *testing.T) {
	u := newUnion(t, false, walkTree())
	u.walkOn("", "0", "1", "2")
	p := u.lowers.(*scan).ahead
	p.mu.Lock()
	if p.streak < walkBegins || len(p.stack) == 0 {
		t.Errorf("streak %d, %d directories wait", p.streak, len(p.stack))
	}
	p.last = p.last.Add(-2 * walkPause)
	p.mu.Unlock()
	u.plus("3")
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.streak != 1 || len(p.stack) != 0 || len(p.ready) != 0 {
		t.Errorf("after a pause: streak %d, %d directories wait, %d objects are kept", p.streak, len(p.stack), len(p.ready))
	}
}

// TestPrefetchIsBounded lists a directory of very many.
func TestPrefetchIsBounded(t *testing.T) {
	var paths []string
	for i := range 3 * prefetchMax {
		paths = append(paths, fmt.Sprintf("many/%03d/", i))
	}
	u := newUnion(t, false, append(paths, "a/", "b/", "c/"))
	u.walkOn("", "a", "b", "c", "many")
	p := u.lowers.(*scan).ahead
	p.mu.Lock()
	if len(p.stack) != prefetchMax {
		t.Errorf("%d directories wait, want %d", len(p.stack), prefetchMax)
	}
	if next := p.stack[len(p.stack)-1].name(); next != "000" {
		t.Errorf("%q comes next, want what the walk comes to first", next)
	}
	p.mu.Unlock()
	for u.idle() {
	}
	u.forgetAll() // the directories are let go while something is kept of them
}

// TestPrefetchOfTheMissing: what cannot be looked into ahead says so to who asks.
func TestPrefetchOfTheMissing(t *testing.T) {
	u := newUnion(t, false, walkTree())
	u.walkOn("", "0", "1", "2")
	u.must(os.RemoveAll(filepath.Join(u.dir, "lower0", "2", "0")))
	for u.idle() {
	}
	h := header(u.walk("2"))
	var out fuse.EntryOut
	if s := u.Lookup(nil, &h, "0", &out); s == fuse.OK && out.NodeId != 0 {
		u.known[out.NodeId]++
		list := fuse.NewDirEntryList(make([]byte, 4096), 0)
		if s := u.ReadDir(nil, &fuse.ReadIn{InHeader: header(out.NodeId)}, list); s == fuse.OK {
			t.Error("a directory that is gone is listed")
		}
	} else if s != fuse.Status(unix.ENOENT) && s != fuse.OK {
		t.Errorf("lookup: %v", s)
	}
}

// TestPrefetchIsDropped: nobody comes for it.
func TestPrefetchIsDropped(t *testing.T) {
	u := newUnion(t, false, walkTree())
	p := u.lowers.(*scan).ahead
	u.walkOn("", "0", "1", "2")
	p.drop.Reset(time.Millisecond)
	for end := time.Now().Add(20 * time.Second); ; {
		p.mu.Lock()
		n := len(p.stack)
		p.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d directories still wait", n)
		}
	}
}
