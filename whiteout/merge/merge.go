package merge

import (
	"slices"
	"strings"
)

// Kind is what the rule needs to know about an object.
type Kind uint8

const (
	// Other is anything that is neither of the two below.
	Other Kind = iota
	// Dir is a directory.
	Dir
	// Whiteout deletes the name in the layers below.
	Whiteout
)

// Entry is one name in one layer's directory. A name occurs at most twice in a
// listing: once as an object and once as a whiteout.
type Entry struct {
	Name string
	Kind Kind
}

// Listing is a directory as one layer has it.
type Listing struct {
	Opaque  bool
	Entries []Entry
}

// Ref points into the listings given to Merge.
type Ref struct {
	Listing int32
	Entry   int32
}

// Merged is one name of the merged directory. Refs[0] is the object that shows;
// for a directory the others are the directories merged with it, topmost first.
type Merged struct {
	Name string
	Kind Kind // Dir or Other
	Refs []Ref
}

// Merge combines the listings of one directory, topmost first, and returns the
// names that remain, sorted bytewise.
func Merge(listings []Listing) []Merged {
	for i := range listings {
		if listings[i].Opaque {
			listings = listings[:i+1]
			break
		}
	}
	if len(listings) == 1 {
		return single(listings[0].Entries)
	}
	m := merger{index: make(map[string]int)}
	for i := range listings {
		// Objects first: a whiteout never hides a name of its own layer.
		for j, e := range listings[i].Entries {
			if e.Kind != Whiteout {
				m.object(e, Ref{int32(i), int32(j)})
			}
		}
		for _, e := range listings[i].Entries {
			if e.Kind == Whiteout {
				m.whiteout(e.Name)
			}
		}
	}
	out := make([]Merged, 0, len(m.names))
	for i := range m.names {
		if len(m.names[i].Refs) > 0 {
			out = append(out, m.names[i].Merged)
		}
	}
	sortByName(out)
	return out
}

// single is Merge for the common case: one layer has the directory.
func single(entries []Entry) []Merged {
	out := make([]Merged, 0, len(entries))
	refs := make([]Ref, len(entries))
	for j, e := range entries {
		if e.Kind == Whiteout {
			continue
		}
		refs[j] = Ref{0, int32(j)}
		out = append(out, Merged{Name: e.Name, Kind: e.Kind, Refs: refs[j : j+1 : j+1]})
	}
	sortByName(out)
	return out
}

func sortByName(ms []Merged) {
	slices.SortFunc(ms, func(a, b Merged) int { return strings.Compare(a.Name, b.Name) })
}

type pending struct {
	Merged
	closed bool // no layer below may add to it
}

type merger struct {
	index map[string]int
	names []pending
}

func (m *merger) object(e Entry, r Ref) {
	i, seen := m.index[e.Name]
	if !seen {
		m.index[e.Name] = len(m.names)
		m.names = append(m.names, pending{
			Merged: Merged{Name: e.Name, Kind: e.Kind, Refs: []Ref{r}},
			closed: e.Kind != Dir,
		})
		return
	}
	p := &m.names[i]
	switch {
	case p.closed:
	case e.Kind == Dir:
		p.Refs = append(p.Refs, r)
	default:
		p.closed = true
	}
}

func (m *merger) whiteout(name string) {
	if i, seen := m.index[name]; seen {
		m.names[i].closed = true
		return
	}
	m.index[name] = len(m.names)
	m.names = append(m.names, pending{Merged: Merged{Name: name}, closed: true})
}
