package explain

import (
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// place is a directory of a layer in which names are looked up.
type place struct {
	layer  int
	path   string
	hidden *reason // nil: it is a part of the directory that the mount shows
}

// reason is why something is hidden.
type reason struct {
	rule string
	by   int    // layer
	at   string // path in the mount
	in   string // path in the layer
	what string // the form of what hides, or its kind
}

// level is a directory of the mount: its places, of the topmost layer first. One without
// visible places does not exist; then it is only known who has something there.
type level struct {
	at     string // path in the mount
	places []place
	lower  bool // it is of the tree of some lowers, not of the mount
}

// from keeps the places of layer i and those below it.
func (lv level) from(i int) level {
	return level{at: lv.at, lower: true, places: slices.DeleteFunc(slices.Clone(lv.places), func(p place) bool { return p.layer < i })}
}

// found is what the layers have under a name.
type found struct {
	at      string
	entries []entry
	served  int      // in entries; -1: nothing shows
	data    int      // in entries: who has the data, if it is not served; -1
	refused *refusal // it cannot be looked at
	next    level    // if something is a directory
}

// refusal is why an object that is there cannot be looked at.
type refusal struct {
	errno unix.Errno
	rule  string
	by    int // layer
	why   string
}

// entry is one thing with its role.
type entry struct {
	place  place // that it lies in
	name   string
	index  string // name in the link index, if it lies there
	t      *thing
	role   string
	hidden *reason
}

func (e *entry) in() string { return join(e.place.path, e.name) }

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// root is the root of the mount, of the layers from i on.
func (s *Stack) root(i int) (level, error) {
	lv := level{at: "/", lower: i > 0}
	var hidden *reason
	for ; i < len(s.layers); i++ {
		lv.places = append(lv.places, place{layer: i, hidden: hidden})
		form, err := s.layers[i].opaque(s.layers[i].root, true)
		if err != nil {
			return lv, s.problem(i, "", err)
		}
		if form != "" && hidden == nil {
			hidden = &reason{rule: RuleOpaque, by: i, at: "/", what: form}
		}
	}
	return lv, nil
}

// step looks a name up in a directory. This is the rule of whiteout/merge, which a test
// holds it to, with reasons; and of unionfs what examineDir, examineFile, mergedWith and
// lowerLink do.
func (s *Stack) step(lv level, name string) (*found, error) {
	f := &found{at: child(lv.at, name), served: -1, data: -1}
	if len(name) > unix.NAME_MAX {
		f.refused = &refusal{errno: unix.ENAMETOOLONG, rule: RuleTooLong, why: "a name has at most 255 bytes"}
		return f, nil
	}
	var stop *reason
	for i, p := range lv.places {
		l := s.layers[p.layer]
		t, err := s.look(l, p.path, name)
		if err != nil && (p.hidden == nil || errors.Is(err, errTooMuch)) {
			return nil, s.problem(p.layer, join(p.path, name), err)
		}
		if err != nil || t == nil { // what is hidden may be anything
			continue
		}
		e := entry{place: p, name: name, t: t, hidden: p.hidden}
		if e.hidden == nil {
			e.hidden = stop
		}
		if e.hidden != nil {
			e.role = RoleHidden
			f.entries = append(f.entries, e)
			continue
		}
		because := func(rule, what string) *reason {
			return &reason{rule: rule, by: p.layer, at: f.at, in: e.in(), what: what}
		}
		switch {
		case !t.object:
			e.role = RoleDeletes
		case f.served < 0:
			f.served, e.role = len(f.entries), RoleServes
			if !t.isDir() {
				stop = because(RuleShadowed, Kind(t.st.Mode))
			}
		case t.isDir():
			e.role = RoleMerged
		default:
			e.role = RoleHidden
			top := &f.entries[f.served]
			e.hidden = &reason{rule: RuleNotDirectory, by: top.place.layer, at: f.at, in: top.in(), what: "directory"}
			stop = because(RuleMergeEnded, Kind(t.st.Mode))
		}
		if stop == nil && t.isDir() && t.opaque != "" {
			stop = because(RuleOpaque, t.opaque)
		}
		if stop == nil && t.whiteout != "" {
			stop = because(RuleWhiteout, t.whiteout)
		}
		f.entries = append(f.entries, e)
		if !t.isDir() || e.role == RoleHidden || t.opaque != "" {
			continue
		}
		if s.inTrap(p.layer, t) {
			f.refuse(unix.ELOOP, RuleOwnDirectory, p.layer, "it is the upper or the workdir of this very mount, which lies in a lower")
		}
		if t.malformed == nil && t.redirect == "" {
			continue
		}
		if !s.redirect || t.malformed != nil {
			s.refuseIndirect(f, p.layer, t, "redirect", t.malformed)
			continue
		}
		// Everything below comes from there, and nothing from the name itself.
		if err := s.stepRedirected(f, lv, i, because(RuleRedirected, t.redirect)); err != nil {
			return nil, err
		}
		break
	}
	if err := s.complete(f, lv); err != nil {
		return nil, err
	}
	f.descend(lv.lower)
	return f, nil
}

// descend makes the level below what was found.
func (f *found) descend(lower bool) {
	f.next.at, f.next.lower = f.at, lower
	for i := range f.entries {
		e := &f.entries[i]
		if e.t.isDir() && len(f.next.places) < maxPlaces {
			f.next.places = append(f.next.places, place{layer: e.place.layer, path: e.in(), hidden: e.hidden})
		}
	}
}

func (f *found) refuse(errno unix.Errno, rule string, by int, why string) {
	if f.refused == nil {
		f.refused = &refusal{errno, rule, by, why}
	}
}

// refuseIndirect refuses an object whose attribute is not followed, or is malformed.
func (s *Stack) refuseIndirect(f *found, layer int, t *thing, attr string, malformed error) {
	attr = s.layers[layer].Dialect.Attr(attr)
	if malformed != nil && (s.redirect || !errors.Is(malformed, whiteout.ErrMalformed)) {
		f.refuse(unix.EIO, RuleRefused, layer, malformed.Error())
		return
	}
	f.refuse(unix.EPERM, RuleRefused, layer, "it has the attribute "+attr+", which this mount does not follow: shown without, it would be incomplete")
}

func (s *Stack) inTrap(layer int, t *thing) bool {
	return !s.layers[layer].upper && slices.Contains(s.traps, t.id)
}

// exists reports whether the mount shows the name.
func (f *found) exists() bool { return f.served >= 0 && f.refused == nil }

// top is the entry that serves, nil if none does.
func (f *found) top() *entry {
	if f.served < 0 {
		return nil
	}
	return &f.entries[f.served]
}

// deletes returns the entry of the whiteout that deletes the name.
func (f *found) deletes() *entry {
	for i := range f.entries {
		if f.served < 0 && f.entries[i].role == RoleDeletes {
			return &f.entries[i]
		}
	}
	return nil
}

// walk goes down a path without following links, also where nothing is to be seen any
// more. blocked is the first name that is not, or no directory.
func (s *Stack) walk(lv level, names []string) (last *found, blocked *found, err error) {
	for i, name := range names {
		f, err := s.step(lv, name)
		if err != nil {
			return nil, nil, err
		}
		last, lv = f, f.next
		if blocked == nil && (!f.exists() || i < len(names)-1 && !f.top().t.isDir()) {
			blocked = f
		}
	}
	return last, blocked, nil
}

func child(dir, name string) string { return strings.TrimSuffix(dir, "/") + "/" + name }

// problem is an error of a layer.
func (s *Stack) problem(layer int, path string, err error) error {
	if errors.Is(err, errTooMuch) {
		return err
	}
	return &LayerError{Layer: s.layers[layer].Label, Dir: s.layers[layer].Path, Path: "/" + path, Err: err}
}

// openEntry opens the object of an entry (O_PATH).
func (s *Stack) openEntry(e *entry) (int, error) {
	if e.index != "" {
		return fsat.OpenBeneath(s.index, e.index, unix.O_PATH|unix.O_NOFOLLOW)
	}
	return fsat.OpenBeneath(s.layers[e.place.layer].root, e.in(), unix.O_PATH|unix.O_NOFOLLOW)
}
