package explain

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// LayerError is an error of reading a layer.
type LayerError struct {
	Layer Label
	Dir   string
	Path  string
	Err   error
}

func (e *LayerError) Error() string {
	return fmt.Sprintf("look at %q in %s (%s): %v", e.Path, e.Layer.Name, e.Dir, e.Err)
}

func (e *LayerError) Unwrap() error { return e.Err }

// follow looks up what a redirect of an object at a place of lv leads to: in the layers
// below that place, from their root, or beside the object if it is a mere name.
func (s *Stack) follow(lv level, layer int, redirect string) (last, blocked *found, err error) {
	rest, absolute := strings.CutPrefix(redirect, "/")
	if !absolute {
		return s.walk(lv.from(layer+1), []string{redirect})
	}
	root, err := s.root(layer + 1)
	if err != nil {
		return nil, nil, err
	}
	return s.walk(root, strings.Split(rest, "/"))
}

// stepRedirected adds to f what the places of lv after number i have, the object of which
// takes its lower content from elsewhere.
func (s *Stack) stepRedirected(f *found, lv level, i int, because *reason) error {
	e := &f.entries[len(f.entries)-1]
	sub, blocked, err := s.follow(lv, e.place.layer, e.t.redirect)
	if err != nil {
		return err
	}
	top := &f.entries[f.served]
	for j := range sub.entries {
		n := sub.entries[j]
		switch n.role {
		case RoleServes, RoleMerged, RoleData:
			n.role = RoleMerged
			if blocked == nil && !n.t.isDir() {
				n.role, n.hidden = RoleHidden, &reason{rule: RuleNotDirectory, by: top.place.layer, at: f.at, in: top.in(), what: "directory"}
			}
		}
		f.entries = append(f.entries, n)
	}
	if blocked != nil && blocked.refused != nil && blocked.refused.rule != RuleTooLong {
		f.refuse(blocked.refused.errno, blocked.refused.rule, blocked.refused.by, blocked.refused.why)
	}
	for _, p := range lv.places[i+1:] {
		t, err := s.look(s.layers[p.layer], p.path, top.name)
		if err != nil {
			return s.problem(p.layer, join(p.path, top.name), err)
		}
		n := entry{place: p, name: top.name, t: t, role: RoleHidden, hidden: p.hidden}
		if n.hidden == nil {
			n.hidden = because
		}
		if t != nil && !slices.ContainsFunc(f.entries, n.same) {
			f.entries = append(f.entries, n)
		}
	}
	slices.SortStableFunc(f.entries, func(a, b entry) int { return a.place.layer - b.place.layer })
	return nil
}

// same reports whether two entries are one.
func (e *entry) same(o entry) bool {
	return e.place.layer == o.place.layer && e.in() == o.in() && e.index == o.index
}

// complete finds the data of a file, and the copy of one that was copied up under another
// name.
func (s *Stack) complete(f *found, lv level) error {
	top := f.top()
	if top == nil || top.t.isDir() || f.refused != nil {
		return nil
	}
	if top.t.malformed != nil {
		s.refuseIndirect(f, top.place.layer, top.t, "metacopy", top.t.malformed)
		return nil
	}
	if top.t.metacopy {
		if err := s.findData(f, lv); err != nil || f.refused != nil {
			return err
		}
	}
	if lv.lower {
		return nil
	}
	return s.lookInIndex(f)
}

// findData finds the data of a file that has attributes only.
func (s *Stack) findData(f *found, lv level) error {
	top := f.top()
	if !s.metacopy {
		s.refuseIndirect(f, top.place.layer, top.t, "metacopy", nil)
		return nil
	}
	redirect := top.t.redirect
	if redirect == "" {
		redirect = top.name
	}
	sub, blocked, err := s.follow(lv, top.place.layer, redirect)
	if err != nil {
		return err
	}
	if blocked != nil && blocked.refused != nil {
		f.refuse(blocked.refused.errno, blocked.refused.rule, blocked.refused.by, blocked.refused.why)
		return nil
	}
	if blocked != nil || sub.top().t.typ() != unix.S_IFREG {
		f.refuse(unix.EIO, RuleDataMissing, top.place.layer, fmt.Sprintf("it has attributes only, and its data, which should be that of %q in the layers below, is not there", redirect))
		return nil
	}
	data := *sub.top()
	if sub.data >= 0 {
		data = sub.entries[sub.data]
	}
	f.setData(data)
	return nil
}

// setData makes e the entry that has the data.
func (f *found) setData(e entry) {
	f.data = slices.IndexFunc(f.entries, e.same)
	if f.data < 0 {
		f.data = len(f.entries)
		f.entries = append(f.entries, e)
	}
	f.entries[f.data].role, f.entries[f.data].hidden = RoleData, nil
}

// lookInIndex replaces a file of the lowers by its copy, if it was copied up under another
// of its names (kernel: ovl_lookup_index).
func (s *Stack) lookInIndex(f *found) error {
	top := f.top()
	upper := s.layers[0]
	if s.index < 0 || top.place.layer == 0 || top.t.st.Nlink < 2 {
		return nil
	}
	if top.t.typ() != unix.S_IFREG && upper.Dialect.Prefix() == whiteout.UserPrefix {
		return nil
	}
	fd, err := s.openEntry(top)
	if err != nil {
		return s.problem(top.place.layer, top.in(), err)
	}
	origin, err := fsat.Origin(fd, "", s.layers[top.place.layer].uuid)
	fsat.Close(fd)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return s.problem(top.place.layer, top.in(), err)
	}
	name := hex.EncodeToString(origin)
	if len(name) > unix.NAME_MAX {
		return nil
	}
	t := &thing{}
	if err := s.lookAtObject(upper, s.index, name, t); err != nil {
		return s.problem(0, "index of the workdir", err)
	}
	if !t.object {
		return nil
	}
	if t.typ() != top.t.typ() {
		f.refuse(unix.EIO, RuleRefused, 0, "the link index of the workdir has something of another type for it")
		return nil
	}
	if t.metacopy && !s.metacopy {
		s.refuseIndirect(f, 0, t, "metacopy", nil)
		return nil
	}
	e := entry{place: place{layer: 0}, name: name, index: name, t: t, role: RoleServes}
	data := *top
	if f.data >= 0 {
		data = f.entries[f.data]
		f.entries[f.data].role = RoleHidden
	}
	for i := range f.entries {
		if o := &f.entries[i]; o.role == RoleServes || o.role == RoleHidden && o.hidden == nil {
			o.role, o.hidden = RoleHidden, &reason{rule: RuleCopiedLink, by: 0, at: f.at, in: "index/" + name, what: "copy"}
		}
	}
	f.entries = slices.Insert(f.entries, 0, e)
	f.served, f.data = 0, -1
	if t.metacopy {
		f.setData(data)
	}
	return nil
}
