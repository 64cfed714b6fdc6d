package merge

import (
	"cmp"
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
	total := 0
	for i := range listings {
		total += len(listings[i].Entries)
		if listings[i].Opaque {
			listings = listings[:i+1]
			break
		}
	}
	items := make([]item, 0, total)
	for i := range listings {
		for j, e := range listings[i].Entries {
			items = append(items, item{e, Ref{int32(i), int32(j)}})
		}
	}
	slices.SortFunc(items, compare)
	out := make([]Merged, 0, total)
	refs := make([]Ref, 0, total)
	for len(items) > 0 {
		n := 1
		for n < len(items) && items[n].Name == items[0].Name {
			n++
		}
		var kind Kind
		if kind, refs = resolve(items[:n], refs); len(refs) > 0 {
			out = append(out, Merged{Name: items[0].Name, Kind: kind, Refs: refs[:len(refs):len(refs)]})
			refs = refs[len(refs):]
		}
		items = items[n:]
	}
	return out
}

// item is one entry of one listing.
type item struct {
	Entry
	ref Ref
}

// compare orders by name, then topmost first; objects come before whiteouts, because
// a whiteout never hides a name of its own layer.
func compare(a, b item) int {
	if c := strings.Compare(a.Name, b.Name); c != 0 {
		return c
	}
	if c := cmp.Compare(a.ref.Listing, b.ref.Listing); c != 0 {
		return c
	}
	return cmp.Compare(a.Kind, b.Kind)
}

// resolve appends to refs what one name stands for, given all that the listings say
// about it.
func resolve(same []item, refs []Ref) (Kind, []Ref) {
	kind := Other
	for _, e := range same {
		switch {
		case e.Kind == Whiteout:
			return kind, refs
		case len(refs) == 0:
			kind, refs = e.Kind, append(refs, e.ref)
			if kind != Dir {
				return kind, refs
			}
		case e.Kind == Dir:
			refs = append(refs, e.ref)
		default: // it ends what merges from below
			return kind, refs
		}
	}
	return kind, refs
}
