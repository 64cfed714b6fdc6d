package explain

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout/override"
)

// Explain explains a path in the mount.
func (s *Stack) Explain(path string) (*Report, error) {
	s.looks = maxLooks
	r := &Report{Asked: Path(path), Layers: s.Layers()}
	w, err := s.resolve(path)
	if err != nil {
		return nil, err
	}
	r.Links, r.Components = w.links, w.components
	f, stopped := w.last, w.blocked
	r.Path = Path(f.at)
	for i := range f.entries {
		e, err := s.entry(f, &f.entries[i])
		if err != nil {
			return nil, err
		}
		r.Entries = append(r.Entries, e)
	}
	if r.Entries == nil {
		r.Entries = []Entry{}
	}
	switch {
	case stopped == nil && f.exists():
		r.Exists = true
		r.Layer = number(f.top().place.layer)
		if f.data >= 0 {
			r.Data = number(f.entries[f.data].place.layer)
		}
		r.Attr = r.Entries[f.served].Attr
		r.CopyUp = s.copyUp(f, r)
	default:
		if stopped == nil {
			stopped = f
		}
		r.Errno, r.Rule = verdict(f, stopped, w.loop)
	}
	r.Answer = s.answer(r, f, stopped)
	if w.loop {
		r.Answer = fmt.Sprintf("%q leads through more than %d symbolic links.", path, maxLinks)
	}
	return r, nil
}

// verdict is the error of a path that is stopped somewhere, and the rule behind it.
func verdict(f, stopped *found, loop bool) (errno, rule string) {
	switch {
	case loop:
		return "ELOOP", RuleRefused
	case stopped.refused != nil:
		return unix.ErrnoName(stopped.refused.errno), stopped.refused.rule
	}
	errno, rule = "ENOENT", RuleAbsent
	if stopped.served >= 0 && stopped.at != f.at { // something that is no directory
		errno, rule = "ENOTDIR", parentPrefix+RuleShadowed
	}
	if d := f.deletes(); d != nil {
		return errno, RuleWhiteout
	}
	for i := range f.entries {
		if h := f.entries[i].hidden; h != nil && f.entries[i].t.object {
			return errno, h.code(f.at)
		}
	}
	return errno, rule
}

// way is how a path was resolved.
type way struct {
	last, blocked *found
	links         []Link
	components    []Component
	loop          bool
}

// resolve walks down a path, follows the links on the way, and goes on where nothing is
// seen any more: some layer may have something there.
func (s *Stack) resolve(path string) (*way, error) {
	root, err := s.root(0)
	if err != nil {
		return nil, err
	}
	top, err := s.rootFound(root)
	if err != nil {
		return nil, err
	}
	w := &way{}
	stack := []*found{top}
	todo := strings.Split(path, "/")
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		cur := stack[len(stack)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
				if w.blocked == cur {
					w.blocked = nil
				}
			}
			continue
		}
		f, err := s.step(cur.next, name)
		if err != nil {
			return nil, err
		}
		last := !slices.ContainsFunc(todo, func(n string) bool { return n != "" && n != "." })
		if w.blocked == nil && !last && f.exists() && f.top().t.typ() == unix.S_IFLNK {
			if len(w.links) == maxLinks {
				w.loop = true
				w.blocked = f
			} else {
				target, err := s.target(f.top())
				if err != nil {
					return nil, err
				}
				w.links = append(w.links, Link{At: Path(f.at), Target: Path(target), Layer: f.top().place.layer, Hides: len(f.entries) - 1})
				if strings.HasPrefix(target, "/") {
					stack = stack[:1]
				}
				todo = append(strings.Split(target, "/"), todo...)
				continue
			}
		}
		if w.blocked == nil && (!f.exists() || !last && !f.top().t.isDir()) {
			w.blocked = f
		}
		stack = append(stack, f)
	}
	w.last = stack[len(stack)-1]
	for _, f := range stack[:len(stack)-1] {
		w.components = append(w.components, f.component())
	}
	return w, nil
}

// rootFound is the root of the mount in the form of every other object.
func (s *Stack) rootFound(root level) (*found, error) {
	f := &found{at: "/", served: 0, data: -1, next: root}
	for _, p := range root.places {
		l := s.layers[p.layer]
		t := &thing{object: true}
		err := fsat.Fstat(l.root, &t.st)
		if err == nil {
			t.id = id{t.st.Dev, t.st.Ino}
			t.malformed = s.describe(l, l.root, &t.st)
			t.opaque, err = l.opaque(l.root, true)
		}
		if err != nil {
			return nil, s.problem(p.layer, "", err)
		}
		e := entry{place: p, t: t, role: RoleMerged, hidden: p.hidden}
		switch {
		case p.hidden != nil:
			e.role = RoleHidden
		case len(f.entries) == 0:
			e.role = RoleServes
		}
		f.entries = append(f.entries, e)
	}
	return f, nil
}

func (f *found) component() Component {
	c := Component{At: Path(f.at)}
	if f.exists() {
		c.Kind = Kind(f.top().t.st.Mode)
	}
	for i := range f.entries {
		switch e := &f.entries[i]; e.role {
		case RoleServes, RoleMerged:
			c.Layers = append(c.Layers, e.place.layer)
		case RoleHidden:
			c.Hidden++
		}
	}
	return c
}

// attr describes the object of an entry.
func (s *Stack) attr(e *entry) (*Attr, error) {
	st := &e.t.st
	a := &Attr{
		Kind: Kind(st.Mode), Mode: Mode(st.Mode & 0o7777), UID: st.Uid, GID: st.Gid, Size: st.Size,
		MTime: time.Unix(st.Mtim.Unix()).UTC(),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		a.Rdev = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFLNK:
		target, err := s.target(e)
		if err != nil {
			return nil, err
		}
		a.Target = Path(target)
	}
	return a, nil
}

// target reads a symbolic link.
func (s *Stack) target(e *entry) (string, error) {
	fd, err := s.openEntry(e)
	if err != nil {
		return "", s.problem(e.place.layer, e.in(), err)
	}
	defer fsat.Close(fd)
	form := s.layers[e.place.layer].Override
	target, err := fsat.Readlink(fd, "")
	if form != override.None && (err == unix.EINVAL || err == unix.ENOENT) {
		target, err = form.Readlink(fd, "")
	}
	if err != nil {
		return "", s.problem(e.place.layer, e.in(), err)
	}
	return target, nil
}

// entry describes an entry, with what takes more looks.
func (s *Stack) entry(f *found, e *entry) (out Entry, err error) {
	l := s.layers[e.place.layer]
	out = Entry{
		Layer: e.place.layer, In: Path("/" + e.in()), Whiteout: e.t.whiteout, Role: e.role, Opaque: e.t.opaque,
		Ino: e.t.id.ino, Dev: fmt.Sprintf("%d:%d", unix.Major(e.t.id.dev), unix.Minor(e.t.id.dev)), Links: uint64(e.t.st.Nlink),
	}
	if e.index != "" {
		out.In = Path("(workdir)/index/" + e.index)
	}
	if e.t.malformed != nil {
		out.Problem = e.t.malformed.Error()
	}
	if e.hidden != nil {
		out.Rule, out.By, out.Why = e.hidden.code(f.at), number(e.hidden.by), s.sentence(e.hidden, f.at, s.said(e.hidden.by))
	}
	if e.role == RoleDeletes {
		out.Rule, out.Why = RuleWhiteout, "it deletes the name in all layers below"
	}
	if f.refused != nil && e == f.top() {
		out.Problem = f.refused.why
	}
	if !e.t.object {
		return out, nil
	}
	if out.Attr, err = s.attr(e); err != nil {
		return out, err
	}
	out.Metacopy = e.t.metacopy
	out.Redirect = Path(e.t.redirect)
	fd, err := s.openEntry(e)
	if err != nil {
		return out, s.problem(e.place.layer, e.in(), err)
	}
	defer fsat.Close(fd)
	s.readPrivate(l, fd, e, &out)
	if l.upper {
		out.Origin = s.origin(f, fd)
	}
	return out, nil
}

// readPrivate lists the attributes that users of the mount do not see. What cannot be read
// is left out: it matters to nobody but the curious.
func (s *Stack) readPrivate(l *layer, fd int, e *entry, out *Entry) {
	names, err := fsat.Listxattr(fd, "")
	if err != nil {
		return
	}
	for _, name := range names {
		if !l.private(e.t.typ(), name) {
			continue
		}
		if len(out.Private) == maxXattrs {
			return
		}
		v, err := fsat.GetxattrValue(fd, "", name)
		if err != nil {
			continue
		}
		value := string(v[:min(len(v), maxValue)])
		if strings.HasSuffix(name, ".origin") || strings.HasSuffix(name, ".metacopy") {
			value = hex.EncodeToString(v[:min(len(v), maxValue)])
		}
		out.Private = append(out.Private, Xattr{Name: name, Value: Path(value)})
	}
}

// origin finds what an object of the upper was copied from; nil if it does not say so.
func (s *Stack) origin(f *found, fd int) *Origin {
	v, err := fsat.GetxattrValue(fd, "", s.layers[0].Dialect.Attr("origin"))
	if err != nil || len(v) == 0 {
		return nil
	}
	o := &Origin{Handle: hex.EncodeToString(v)}
	// Mostly it has the name still.
	for i := range f.entries {
		e := &f.entries[i]
		if s.layers[e.place.layer].upper || !e.t.object {
			continue
		}
		low, err := s.openEntry(e)
		if err != nil {
			continue
		}
		have, err := fsat.Origin(low, "", s.layers[e.place.layer].uuid)
		fsat.Close(low)
		if err == nil && bytes.Equal(have, v) {
			o.Layer, o.In = number(e.place.layer), Path("/"+e.in())
			return o
		}
	}
	// It takes a privilege to find it elsewhere.
	for i, l := range s.layers {
		if l.upper {
			continue
		}
		low, err := fsat.OpenOrigin(l.root, l.uuid, v)
		if err != nil {
			continue
		}
		path, err := readProc(low)
		fsat.Close(low)
		root, rerr := readProc(l.root)
		if err != nil || rerr != nil {
			continue
		}
		if in, ok := strings.CutPrefix(path, strings.TrimSuffix(root, "/")+"/"); ok {
			o.Layer, o.In = number(i), Path("/"+in)
			return o
		}
	}
	return o
}

// readProc is the path of an open descriptor, as far as procfs knows it.
func readProc(fd int) (string, error) {
	return fsat.Readlink(unix.AT_FDCWD, fsat.ProcPath(fd))
}

// copyUp says what became of the object in the upper.
func (s *Stack) copyUp(f *found, r *Report) string {
	e := &r.Entries[f.served]
	if !s.layers[e.Layer].upper {
		return CopyNone
	}
	switch {
	case e.Metacopy:
		return CopyMetadata
	case f.top().t.isDir():
		for i := range f.entries {
			if f.entries[i].role == RoleMerged {
				return CopyMerged
			}
		}
		return CopyNew
	case e.Origin != nil:
		return CopyFull
	}
	return CopyNew
}
