package explain

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Kind names the type in st_mode of an object.
func Kind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	}
	return fmt.Sprintf("object of type %#o", mode&unix.S_IFMT)
}

// rule is the code of a reason for what is at a path.
func (r *reason) code(at string) string {
	if r.at != at && strings.HasPrefix(at, strings.TrimSuffix(r.at, "/")+"/") {
		return parentPrefix + r.rule
	}
	return r.rule
}

// said is a layer's name in a sentence.
func (s *Stack) said(i int) string {
	name := s.layers[i].Name
	if strings.HasPrefix(name, "layer ") || strings.HasPrefix(name, "lower ") { // they have a number
		return name
	}
	return "the " + name
}

// sentence says why something at a path is hidden, by a layer that is called by.
func (s *Stack) sentence(r *reason, at, by string) string {
	where := fmt.Sprintf("%q", r.at)
	if r.at == at {
		where = "it"
	}
	switch r.rule {
	case RuleShadowed:
		if r.at == at {
			return fmt.Sprintf("%s has a %s of this name, and the topmost layer counts", by, r.what)
		}
		return fmt.Sprintf("%s is a %s in %s, so no directory of that name below it shows", where, r.what, by)
	case RuleWhiteout:
		return fmt.Sprintf("%s deletes %s (whiteout: %s)", by, where, r.what)
	case RuleOpaque:
		if r.at == at {
			return fmt.Sprintf("this directory is opaque (%s) in %s, which hides it in all layers below", r.what, by)
		}
		return fmt.Sprintf("the directory %s is opaque (%s) in %s, which hides what layers below have in it", where, r.what, by)
	case RuleNotDirectory:
		return fmt.Sprintf("%s has a directory of this name, into which only directories are merged", by)
	case RuleMergeEnded:
		return fmt.Sprintf("in %s %s is a %s, which ends the merge of directories", by, where, r.what)
	case RuleRedirected:
		return fmt.Sprintf("in %s %s was renamed from %q, and its lower content comes from there", by, where, r.what)
	case RuleCopiedLink:
		return fmt.Sprintf("%s has a copy of it, made under another of its hard links", by)
	}
	return r.rule
}

// Step is the text of a step of a history without what builders put around it, on one line.
func Step(createdBy string) string {
	s := strings.Join(strings.Fields(createdBy), " ")
	s = strings.TrimSuffix(s, " # buildkit")
	s = strings.Replace(s, "RUN /bin/sh -c ", "RUN ", 1)
	if rest, ok := strings.CutPrefix(s, "/bin/sh -c "); ok {
		if nop, ok := strings.CutPrefix(rest, "#(nop) "); ok {
			return strings.TrimSpace(nop)
		}
		return "RUN " + rest
	}
	return s
}

// from names a layer with what has made it.
func (s *Stack) from(i int) string {
	const most = 60
	l := s.layers[i]
	by := []rune(Step(l.CreatedBy))
	switch {
	case len(by) > most:
		by = append(by[:most-1], '…')
	case len(by) > 0:
	case l.DiffID != "" || l.upper:
		return s.said(i)
	default: // a plain directory, of whose path the end tells most
		if by = []rune(l.Path); len(by) > most {
			by = append([]rune("…"), by[len(by)-most+1:]...)
		}
	}
	return fmt.Sprintf("%s (%s)", s.said(i), string(by))
}

// names lists layers.
func (s *Stack) names(layers []int) string {
	const most = 4
	var out []string
	for i, l := range layers {
		if i == most && len(layers) > most+1 {
			out = append(out, fmt.Sprintf("%d more", len(layers)-most))
			break
		}
		out = append(out, s.said(l))
	}
	if n := len(out); n > 1 {
		return strings.Join(out[:n-1], ", ") + " and " + out[n-1]
	}
	return strings.Join(out, "")
}

// article puts "a" or "an" before a kind.
func article(k string) string {
	if strings.HasPrefix(k, "o") {
		return "an " + k
	}
	return "a " + k
}

// answer is the one sentence.
func (s *Stack) answer(r *Report, f *found, stopped *found) string {
	top := f.top()
	if r.Exists {
		k := r.Attr.Kind
		say := fmt.Sprintf("%q is %s from %s", r.Path, article(k), s.from(top.place.layer))
		switch {
		case k == "directory":
			var merged []int
			for _, e := range r.Entries {
				if e.Role == RoleMerged {
					merged = append(merged, e.Layer)
				}
			}
			if len(merged) > 0 {
				say += ", merged with the one of " + s.names(merged)
				if len(merged) > 1 {
					say = strings.Replace(say, "the one of", "those of", 1)
				}
			}
		case r.Data != nil:
			say += ", which has its attributes only (metacopy); its data is that of " + s.from(*r.Data)
		case top.index != "":
			say += ", copied up under another of its hard links"
		case r.CopyUp == CopyFull:
			say += ", copied up with its data"
		}
		if n := r.hidden(); n > 0 {
			say += fmt.Sprintf("; it hides %s below", count(n, "entry", "entries"))
		}
		return say + "."
	}
	if stopped.refused != nil {
		at := fmt.Sprintf("%q", stopped.at)
		return fmt.Sprintf("%s cannot be looked at (%s): %s.", at, unix.ErrnoName(stopped.refused.errno), stopped.refused.why)
	}
	say := fmt.Sprintf("%q does not exist", r.Path)
	var have []int
	for _, e := range r.Entries {
		if e.Attr != nil && (len(have) == 0 || have[len(have)-1] != e.Layer) {
			have = append(have, e.Layer)
		}
	}
	if len(have) == 0 {
		if d := f.deletes(); d != nil {
			return say + fmt.Sprintf(": %s deletes it (whiteout), but no layer below has anything of the name.", s.from(d.place.layer))
		}
		if stopped.at != f.at {
			if stopped.served >= 0 {
				return say + fmt.Sprintf(": %q is %s, from %s.", stopped.at, article(Kind(stopped.top().t.st.Mode)), s.from(stopped.top().place.layer))
			}
			return say + fmt.Sprintf(": there is no %q, and no layer has anything at this path.", stopped.at)
		}
		return say + ": no layer has anything of this name there."
	}
	first := f.entries[0]
	for _, e := range f.entries {
		if e.hidden != nil && e.t.object {
			first = e
			break
		}
	}
	verb := " has"
	if len(have) > 1 {
		verb = " have"
	}
	return say + fmt.Sprintf(": %s%s it, but %s.", s.names(have), verb, s.sentence(first.hidden, f.at, s.from(first.hidden.by)))
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// hidden counts the hidden objects.
func (r *Report) hidden() (n int) {
	for _, e := range r.Entries {
		if e.Role == RoleHidden && e.Attr != nil {
			n++
		}
	}
	return n
}
