package ledger

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// successor opens what a process that is killed now would leave.
func successor(t testing.TB, l *Ledger) (*Ledger, *Past) {
	t.Helper()
	fd, err := unix.FcntlInt(l.File().Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	next, past, err := Open(os.NewFile(uintptr(fd), "ledger"))
	if err != nil {
		t.Fatal(err)
	}
	return next, past
}

type one interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func newLedger(t one) *Ledger {
	t.Helper()
	l, err := New(1000)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestSuccessors writes at random, hands over to the next now and then, and expects that
// to know everything.
func TestSuccessors(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		l := newLedger(rt)
		defer func() { _ = l.Close() }()
		want, refs := map[Ref]Record{}, []Ref{}
		pending := map[uint64]Request{}
		ids, unique := uint64(1000), uint64(0)
		for range rapid.IntRange(1, 80).Draw(rt, "steps") {
			switch rapid.SampledFrom([]string{"add", "add", "drop", "renumber", "begin", "answer", "die"}).Draw(rt, "do") {
			case "add":
				r := Record{
					Kind: rapid.SampledFrom([]Kind{Name, Loose, Work, Lower}).Draw(rt, "kind"), ID: l.NextID(),
					Parent: rapid.Uint64().Draw(rt, "parent"), Ino: rapid.Uint64().Draw(rt, "ino"),
					Text: strings.Repeat("n", rapid.IntRange(0, 4096).Draw(rt, "size")),
				}
				if ids++; r.ID != ids {
					rt.Fatalf("id %d, want %d", r.ID, ids)
				}
				r.Ref = l.Add(r.Kind, r.ID, r.Parent, r.Text, r.Ino)
				if _, ok := want[r.Ref]; ok || r.Ref == 0 {
					rt.Fatalf("place %d again", r.Ref)
				}
				want[r.Ref] = r
				refs = append(refs, r.Ref)
			case "drop":
				if len(refs) > 0 {
					i := rapid.IntRange(0, len(refs)-1).Draw(rt, "which")
					l.Drop(refs[i])
					delete(want, refs[i])
					refs = slices.Delete(refs, i, i+1)
				}
			case "renumber":
				if len(refs) > 0 {
					r := want[rapid.SampledFrom(refs).Draw(rt, "which")]
					r.Ino++
					l.SetIno(r.Ref, r.Ino)
					want[r.Ref] = r
				}
			case "begin":
				unique++
				q := Request{Code: Swap, Dir: 1, Dir2: 2, Name: "old", Name2: rapid.StringN(0, 255, 255).Draw(rt, "name")}
				o := l.Begin(unique, q)
				q.Moved = Moved{5, 6, 7, 8}
				o.SetMoved(q.Moved)
				if rapid.Bool().Draw(rt, "armed") {
					o.Set(Armed | Done)
					pending[unique] = q
				}
			case "answer":
				u := rapid.Uint64Range(0, unique).Draw(rt, "which")
				l.Answered(u)
				delete(pending, u)
			case "die":
				next, past := successor(t, l)
				_ = l.Close()
				l = next
				got := map[Ref]Record{}
				for _, r := range past.Records {
					got[r.Ref] = r
				}
				if d := cmp.Diff(want, got); d != "" {
					rt.Fatal(d)
				}
				byName := func(a, b Request) int { return strings.Compare(a.Name2, b.Name2) }
				if d := cmp.Diff(slices.SortedFunc(maps.Values(pending), byName), slices.SortedFunc(slices.Values(past.Pending), byName)); d != "" && len(pending)+len(past.Pending) > 0 {
					rt.Fatal(d)
				}
				for u := range pending {
					if o := l.Begin(u, Request{}); !o.Had(Armed|Done) || o.Had(Passed) {
						rt.Fatalf("request %d: marks %b", u, o.Before)
					}
				}
			}
		}
	})
}

func TestOpens(t *testing.T) {
	l := newLedger(t)
	defer l.Close()
	o, ref := l.AddOpens(5)
	o.Passed.Add(3)
	o.Cached.Add(2)
	o.Writers.Add(1)
	o.Backing.Store(9)
	next, past := successor(t, l)
	defer next.Close()
	if len(past.Opens) != 1 || past.Opens[0].Ref != ref || past.Opens[0].ID != 5 {
		t.Fatalf("%+v", past.Opens)
	}
	p := past.Opens[0].Opens
	if got := []int32{p.Passed.Load(), p.Cached.Load(), p.Writers.Load(), p.Backing.Load()}; !slices.Equal(got, []int32{3, 2, 1, 9}) {
		t.Errorf("counts %d", got)
	}
	next.Drop(ref)
	third, past := successor(t, next)
	defer third.Close()
	if len(past.Opens) != 0 {
		t.Errorf("%+v", past.Opens)
	}
}

// TestGrowth fills more than the file has at first, and empties it again: the room is
// used again.
func TestGrowth(t *testing.T) {
	l := newLedger(t)
	defer l.Close()
	fill := func() (refs []Ref) {
		for i := range 100_000 {
			r := l.Add(Name, uint64(i), 1, fmt.Sprint("file", i), 0)
			if r == 0 {
				t.Fatal("full")
			}
			refs = append(refs, r)
		}
		return refs
	}
	refs := fill()
	end := l.head.end.Load()
	for _, r := range refs {
		l.Drop(r)
	}
	fill()
	if got := l.head.end.Load(); got != end {
		t.Errorf("%d units after the second time, %d after the first", got, end)
	}
	next, past := successor(t, l)
	defer next.Close()
	if len(past.Records) != 100_000 {
		t.Errorf("%d records", len(past.Records))
	}
}

// TestSuspects: of a request that was being answered when servers ended it is known how many
// those are, also if one in between was killed or had not read it yet.
func TestSuspects(t *testing.T) {
	l := newLedger(t)
	defer func() { _ = l.Close() }()
	next := func(crashed bool, want map[uint64]int) {
		t.Helper()
		n, _ := successor(t, l)
		_ = l.Close()
		l = n
		if d := cmp.Diff(want, l.Suspects(crashed)); d != "" {
			t.Error(d)
		}
	}
	l.Run(0, 10, 0)
	l.Run(1, 11, 0)
	l.Run(1, 12, 0) // 11 has been answered
	next(false, map[uint64]int{})
	l.Run(0, 10, 0)
	l.Run(1, 12, 0)
	next(true, map[uint64]int{10: 1, 12: 1})
	l.Run(0, 12, 1)
	l.Acquit(12)
	next(false, map[uint64]int{10: 1}) // killed before 10 has come again
	l.Run(5, 10, 1)
	l.Run(6, 13, 0)
	next(true, map[uint64]int{10: 2, 13: 1})
	l.Acquit(10)
	l.Run(511, 13, 1)
	l.Run(512, 14, 0)
	next(true, map[uint64]int{13: 2})
}

func TestTooLong(t *testing.T) {
	l := newLedger(t)
	defer l.Close()
	if r := l.Add(Lower, 1, 0, strings.Repeat("x", maxText), 0); r != 0 || l.Complete() {
		t.Errorf("a text without room: place %d, complete: %v", r, l.Complete())
	}
	fd, err := unix.FcntlInt(l.File().Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(os.NewFile(uintptr(fd), "ledger")); !errors.Is(err, ErrIncomplete) {
		t.Errorf("an incomplete ledger: %v", err)
	}
}

// TestNil: a mount without a ledger calls the same methods.
func TestNil(t *testing.T) {
	var l *Ledger
	l.Drop(l.Add(Name, 1, 1, "x", 1))
	l.SetIno(1, 1)
	o := l.Begin(1, Request{})
	o.Set(Armed)
	o.Clear(Armed)
	o.SetMoved(Moved{Node: 1})
	l.Answered(1)
	l.Run(0, 1, 0)
	l.Acquit(1)
	opens, ref := l.AddOpens(1)
	if o.Had(Armed) || o.Moved() != (Moved{}) || opens != nil || ref != 0 || l.Complete() || len(l.Suspects(true)) > 0 || l.File() != nil || l.Close() != nil {
		t.Error("nil remembers something")
	}
}

// FuzzOpen: no content is trusted.
func FuzzOpen(f *testing.F) {
	l := newLedger(f)
	l.Add(Name, 1, 2, "name", 3)
	l.AddOpens(4)
	l.Begin(5, Request{Code: Move, Name: "a", Name2: "b"}).Set(Armed)
	f.Add(slices.Clone(l.mem[:first+10*unitSize]))
	f.Fuzz(func(t *testing.T, b []byte) {
		fd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(fd), "fuzz")
		if _, err := file.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := file.Truncate(growth); err != nil {
			t.Fatal(err)
		}
		if l, _, err := Open(file); err == nil {
			l.Drop(l.Add(Name, 1, 2, "name", 3))
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}
