package merge

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func dir(name string) Entry   { return Entry{name, Dir} }
func file(name string) Entry  { return Entry{name, Other} }
func white(name string) Entry { return Entry{name, Whiteout} }

// show renders a merged listing as "name:kind<-layer,layer".
func show(ms []Merged) []string {
	out := []string{}
	for _, m := range ms {
		s := m.Name + ":file<-"
		if m.Kind == Dir {
			s = m.Name + ":dir<-"
		}
		for i, r := range m.Refs {
			if i > 0 {
				s += ","
			}
			s += fmt.Sprint(r.Listing)
		}
		out = append(out, s)
	}
	return out
}

func TestMerge(t *testing.T) {
	l := func(es ...Entry) Listing { return Listing{Entries: es} }
	opaque := func(es ...Entry) Listing { return Listing{Opaque: true, Entries: es} }
	for _, tc := range []struct {
		name string
		in   []Listing
		want []string
	}{
		{"nothing", nil, []string{}},
		{"one layer", []Listing{l(file("b"), dir("a"))}, []string{"a:dir<-0", "b:file<-0"}},
		{"one layer's whiteouts vanish", []Listing{l(white("a"), file("b"))}, []string{"b:file<-0"}},
		{"upper file hides lower file", []Listing{l(file("a")), l(file("a"))}, []string{"a:file<-0"}},
		{"directories merge", []Listing{l(dir("a")), l(dir("a")), l(dir("a"))}, []string{"a:dir<-0,1,2"}},
		{"a file ends the merging of directories", []Listing{l(dir("a")), l(file("a")), l(dir("a"))}, []string{"a:dir<-0"}},
		{"a file hides directories", []Listing{l(file("a")), l(dir("a"))}, []string{"a:file<-0"}},
		{"whiteout hides everything below", []Listing{l(), l(white("a")), l(file("a")), l(dir("a"))}, []string{}},
		{"whiteout between directories", []Listing{l(dir("a")), l(white("a")), l(dir("a"))}, []string{"a:dir<-0"}},
		{"resurrected above a whiteout", []Listing{l(file("a")), l(white("a")), l(dir("a"))}, []string{"a:file<-0"}},
		{"whiteout of nothing", []Listing{l(white("x")), l(file("a"))}, []string{"a:file<-1"}},
		{"opaque stops", []Listing{l(file("u")), opaque(file("m")), l(file("l"))}, []string{"m:file<-1", "u:file<-0"}},
		{"opaque layer's own whiteouts vanish", []Listing{opaque(white("l")), l(file("l"))}, []string{}},
		{"object and whiteout in one layer", []Listing{l(white("a"), dir("a")), l(dir("a"))}, []string{"a:dir<-0"}},
		{"the same in the other order", []Listing{l(dir("a"), white("a")), l(dir("a"))}, []string{"a:dir<-0"}},
		{"object and whiteout below a directory", []Listing{l(dir("a")), l(dir("a"), white("a")), l(dir("a"))}, []string{"a:dir<-0,1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if d := cmp.Diff(tc.want, show(Merge(tc.in))); d != "" {
				t.Errorf("merged listing (-want +got):\n%s", d)
			}
		})
	}
}

// genListing makes a listing over few names, so that layers meet often.
func genListing(t *rapid.T) Listing {
	l := Listing{Opaque: rapid.IntRange(0, 7).Draw(t, "opaque") == 0}
	for _, name := range []string{"a", "b", "c", "d"} {
		switch rapid.IntRange(0, 5).Draw(t, "kind "+name) {
		case 0:
			l.Entries = append(l.Entries, file(name))
		case 1, 2:
			l.Entries = append(l.Entries, dir(name))
		case 3:
			l.Entries = append(l.Entries, white(name))
		case 4:
			l.Entries = append(l.Entries, white(name), dir(name))
		}
	}
	return l
}

// naive is the rule as the package comment words it, one name at a time.
func naive(ls []Listing) map[string]string {
	out := map[string]string{}
	for _, name := range []string{"a", "b", "c", "d"} {
		s, kind := "", Whiteout
		for i, l := range ls {
			var obj, hide bool
			k := Other
			for _, e := range l.Entries {
				if e.Name == name && e.Kind == Whiteout {
					hide = true
				} else if e.Name == name {
					obj, k = true, e.Kind
				}
			}
			if obj && kind == Whiteout {
				kind, s = k, fmt.Sprint(i)
			} else if obj && kind == Dir && k == Dir {
				s += fmt.Sprintf(",%d", i)
			} else if obj {
				break
			}
			if hide || l.Opaque || obj && k != Dir {
				break
			}
		}
		if kind != Whiteout {
			out[name] = fmt.Sprintf("%d<-%s", kind, s)
		}
	}
	return out
}

func TestMergeAgainstNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ls := rapid.SliceOfN(rapid.Custom(genListing), 1, 5).Draw(t, "layers")
		got := map[string]string{}
		for _, m := range Merge(ls) {
			s := fmt.Sprintf("%d<-", m.Kind)
			for i, r := range m.Refs {
				if i > 0 {
					s += ","
				}
				s += fmt.Sprint(r.Listing)
				if e := ls[r.Listing].Entries[r.Entry]; e.Name != m.Name || e.Kind == Whiteout {
					t.Fatalf("%s refers to entry %+v", m.Name, e)
				}
			}
			got[m.Name] = s
		}
		if d := cmp.Diff(naive(ls), got); d != "" {
			t.Fatalf("(-naive +Merge):\n%s", d)
		}
	})
}

// TestMergeAssociative checks what the union file system relies on: it merges
// its upper with the lowers' merged listing.
func TestMergeAssociative(t *testing.T) {
	names := func(ms []Merged) map[string]Kind {
		out := map[string]Kind{}
		for _, m := range ms {
			out[m.Name] = m.Kind
		}
		return out
	}
	rapid.Check(t, func(t *rapid.T) {
		ls := rapid.SliceOfN(rapid.Custom(genListing), 2, 5).Draw(t, "layers")
		var lower Listing
		for _, m := range Merge(ls[1:]) {
			lower.Entries = append(lower.Entries, Entry{m.Name, m.Kind})
		}
		all, two := names(Merge(ls)), names(Merge([]Listing{ls[0], lower}))
		if d := cmp.Diff(all, two); d != "" {
			t.Fatalf("(-all at once +in two steps):\n%s", d)
		}
	})
}

func FuzzMerge(f *testing.F) {
	f.Add([]byte("\x01\x02\x03\x04"), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, layers uint8) {
		ls := make([]Listing, int(layers)%6)
		for i := range ls {
			seen := map[Entry]bool{}
			for range 4 {
				if len(data) == 0 {
					break
				}
				e := Entry{string('a' + rune(data[0]>>4&3)), Kind(data[0] % 3)}
				ls[i].Opaque = data[0] > 240
				data = data[1:]
				obj, wh := Entry{e.Name, Other}, Entry{e.Name, Whiteout}
				if e.Kind == Whiteout && seen[wh] || e.Kind != Whiteout && seen[obj] {
					continue
				}
				seen[wh] = seen[wh] || e.Kind == Whiteout
				seen[obj] = seen[obj] || e.Kind != Whiteout
				ls[i].Entries = append(ls[i].Entries, e)
			}
		}
		if d := cmp.Diff(len(naive(ls)), len(Merge(ls))); d != "" {
			t.Fatalf("%v: %s", ls, d)
		}
	})
}
