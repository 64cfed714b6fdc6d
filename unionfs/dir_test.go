package unionfs

import (
	"fmt"
	"slices"
	"sort"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// fakeList is a lower listing of regular files.
type fakeList []string

type fakeObj uint64

func (o fakeObj) slot() uint64 { return uint64(o) }
func (o fakeObj) ino() uint64  { return uint64(o) + 1000 }
func (o fakeObj) typ() uint8   { return unix.DT_REG }

func (l fakeList) length() int                   { return len(l) }
func (l fakeList) at(pos int) (string, lowerObj) { return l[pos], fakeObj(pos + 2) }
func (l fakeList) find(name string) (int, bool) {
	return sort.Find(len(l), func(i int) int { return cmpString(name, l[i]) })
}

func cmpString(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// TestDirAgainstModel changes a directory at random and checks after every step
// that listing it, from the start or from any position ever handed out, shows
// each name once, in one order, and that a reader who resumes misses no name
// that was there all the time.
func TestDirAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lower := fakeList{}
		for i := range rapid.IntRange(0, 6).Draw(t, "lower names") {
			lower = append(lower, fmt.Sprintf("l%d", i))
		}
		d := newDirState()
		d.loaded, d.names, d.list = true, map[string]*dirent{}, lower
		want := map[string]bool{}
		for _, n := range lower {
			want[n] = true
		}
		names := append(slices.Clone(lower), "u0", "u1", "u2", "u3")
		inode := func() *inode { return newInode(1, 1, unix.S_IFREG, nil) }

		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			name := rapid.SampledFrom(names).Draw(t, "name")
			before := d.entriesAfter(0, 1000, nil)
			f := d.find(name, false)
			if f.visible() != want[name] {
				t.Fatalf("%s visible = %v, want %v", name, f.visible(), want[name])
			}
			switch op := rapid.SampledFrom([]string{"create", "remove", "copy up", "replace"}).Draw(t, "op"); {
			case op == "create" && !want[name]:
				d.setUpper(name, inode())
				want[name] = true
			case op == "remove" && want[name]:
				d.setGone(name, f.needsWhiteout(), false)
				want[name] = false
			case op == "copy up" && want[name] && !f.upper:
				d.setUpper(name, inode())
			case op == "replace" && want[name]:
				d.setUpper(name, inode())
			}
			after := d.entriesAfter(0, 1000, nil)
			got := map[string]bool{}
			last := uint64(0)
			for _, e := range after {
				if got[e.name] {
					t.Fatalf("%s is listed twice", e.name)
				}
				if e.cookie <= last {
					t.Fatalf("position %d of %s does not follow %d", e.cookie, e.name, last)
				}
				got[e.name], last = true, e.cookie
			}
			for _, n := range names {
				if got[n] != want[n] {
					t.Fatalf("%s listed = %v, want %v", n, got[n], want[n])
				}
			}
			// A reader stopped anywhere before the change and goes on now.
			stop := rapid.IntRange(0, len(before)).Draw(t, "stop")
			seen := map[string]int{}
			pos := uint64(0)
			for _, e := range before[:stop] {
				seen[e.name]++
				pos = e.cookie
			}
			for _, e := range d.entriesAfter(pos, 1000, nil) {
				seen[e.name]++
			}
			for _, e := range before {
				if e.name != name && seen[e.name] != 1 {
					t.Fatalf("%s was there all the time and is seen %d times", e.name, seen[e.name])
				}
			}
		}
	})
}

// TestDirEnds: a reader who renames each name that it sees, away and back, comes
// to the end.
func TestDirEnds(t *testing.T) {
	d := newDirState()
	d.loaded, d.names, d.list = true, map[string]*dirent{}, fakeList{"a", "b", "c"}
	const n = 1000
	for i := range n {
		d.setUpper(fmt.Sprint(i), newInode(1, 1, unix.S_IFREG, nil))
	}
	for _, temp := range []func(i int) string{
		func(int) string { return "temp" },
		func(i int) string { return fmt.Sprint("temp", i) },
	} {
		seen := 0
		for es := d.entriesAfter(0, 1, nil); len(es) > 0; es = d.entriesAfter(es[0].cookie, 1, nil) {
			if seen++; seen > 3*n {
				t.Fatalf("%d names seen of %d, and no end", seen, n)
			}
			name, tempName := es[0].name, temp(seen)
			for _, move := range [][2]string{{name, tempName}, {tempName, name}} {
				if move[0] == move[1] {
					continue
				}
				f := d.find(move[0], false)
				d.setGone(move[0], f.needsWhiteout(), false)
				d.setUpper(move[1], newInode(1, 1, unix.S_IFREG, nil))
			}
		}
	}
}

func TestDirInSmallPieces(t *testing.T) {
	d := newDirState()
	d.loaded, d.names, d.list = true, map[string]*dirent{}, fakeList{"a", "b", "c"}
	for i := range 500 {
		d.setUpper(fmt.Sprint(i), newInode(1, 1, unix.S_IFREG, nil))
	}
	for i := range 400 { // enough to compact
		d.setGone(fmt.Sprint(i), false, false)
	}
	var names []string
	for pos := uint64(0); ; {
		es := d.entriesAfter(pos, 7, nil)
		for _, e := range es {
			names = append(names, e.name)
			pos = e.cookie
		}
		if len(es) < 7 {
			break
		}
	}
	if len(names) != 103 {
		t.Errorf("%d names, want 103", len(names))
	}
	if len(d.born) > 300 {
		t.Errorf("%d entries are kept for %d names", len(d.born), len(names))
	}
}

// TestDirCollisions: names that have one hash are listed one behind the other, wherever
// a reader stops, and keep their positions when one of them goes or another comes.
func TestDirCollisions(t *testing.T) {
	d := newDirState()
	d.loaded = true
	add := func(names ...string) {
		for _, name := range names {
			d.setUpper(name, newInode(1, 1, unix.S_IFREG, nil))
			d.fresh[len(d.fresh)-1].cookie = cookieBorn + uint64(name[0]-'a')
		}
	}
	list := func() (out []string) {
		for es := d.entriesAfter(0, 1, nil); len(es) > 0; es = d.entriesAfter(es[0].cookie, 1, nil) {
			out = append(out, fmt.Sprint(es[0].name, " ", es[0].cookie-cookieBorn))
		}
		return out
	}
	check := func(want ...string) {
		t.Helper()
		if got := list(); !slices.Equal(got, want) {
			t.Errorf("listed %q, want %q", got, want)
		}
	}
	add("c1", "a2", "a1", "a3", "f1")
	check("a1 0", "a2 1", "a3 2", "c1 3", "f1 5")
	d.setGone("a2", false, false)
	add("a0", "b1")
	check("a1 0", "a0 1", "a3 2", "c1 3", "b1 4", "f1 5")
}
