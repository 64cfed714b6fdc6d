package explain

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
)

// TreeOptions bound a tree.
type TreeOptions struct {
	Depth int // levels below the directory; 0: any
	Limit int // lines; 0: any
}

// errLimit ends a tree that has enough lines.
var errLimit = errors.New("limit of lines")

// Tree calls line for every name below a directory, also those that do not show, parents
// before what is in them, sorted. more reports that the limit has cut it off.
func (s *Stack) Tree(ctx context.Context, dir string, o TreeOptions, line func(Line) error) (more bool, err error) {
	s.looks = maxLooks
	w, err := s.resolve(dir)
	if err != nil {
		return false, err
	}
	if f := w.last; w.blocked == nil && f.exists() && f.top().t.typ() == unix.S_IFLNK { // a tree is about what is in it
		target, err := s.target(f.top())
		if err != nil {
			return false, err
		}
		if target[0] != '/' {
			target = dir + "/../" + target
		}
		if w, err = s.resolve(target); err != nil {
			return false, err
		}
	}
	t := tree{s: s, o: o, line: line}
	if w.blocked != nil || !w.last.top().t.isDir() {
		return false, fmt.Errorf("%q is no directory in the mount: explain it without --tree: %w", dir, unix.ENOTDIR)
	}
	err = t.dir(ctx, w.last.next, 1)
	if errors.Is(err, errLimit) {
		return true, nil
	}
	return false, err
}

type tree struct {
	s     *Stack
	o     TreeOptions
	line  func(Line) error
	lines int
}

func (t *tree) dir(ctx context.Context, lv level, depth int) error {
	names, err := t.s.list(lv)
	if err != nil {
		return err
	}
	sorted := make([]string, 0, len(names))
	for n := range names {
		sorted = append(sorted, n)
	}
	slices.Sort(sorted)
	for _, name := range sorted {
		if err := ctx.Err(); err != nil {
			return err
		}
		if t.o.Limit > 0 && t.lines == t.o.Limit {
			return errLimit
		}
		t.s.looks = maxLooks
		only := level{at: lv.at, lower: lv.lower}
		for _, i := range names[name] {
			only.places = append(only.places, lv.places[i])
		}
		// A redirect to a name beside it, and data of that name, need the others.
		f, err := t.s.step(only, name)
		if err == nil && f.needsAll() {
			f, err = t.s.step(lv, name)
		}
		if err != nil {
			return err
		}
		if len(f.entries) == 0 {
			continue // it went away
		}
		l, err := t.s.lineOf(f)
		if err != nil {
			return err
		}
		t.lines++
		if err := t.line(l); err != nil {
			return err
		}
		if l.Exists && f.top().t.isDir() && (t.o.Depth == 0 || depth < t.o.Depth) {
			if err := t.dir(ctx, f.next, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// needsAll reports whether other names of the directory decide what this one is.
func (f *found) needsAll() bool {
	return slices.ContainsFunc(f.entries, func(e entry) bool { return e.t.redirect != "" || e.t.metacopy })
}

// lineOf describes a name.
func (s *Stack) lineOf(f *found) (l Line, err error) {
	l = Line{At: Path(f.at), Exists: f.exists()}
	l.Errno, l.Rule = "", ""
	if !l.Exists {
		l.Errno, l.Rule = verdict(f, f, false)
	}
	if d := f.deletes(); d != nil {
		l.Layer = number(d.place.layer)
	}
	for i := range f.entries {
		switch e := &f.entries[i]; e.role {
		case RoleServes:
			l.Layer = number(e.place.layer)
			if l.Attr, err = s.attr(e); err != nil {
				return l, err
			}
			l.Opaque = e.t.opaque != ""
		case RoleMerged:
			l.Merged = append(l.Merged, e.place.layer)
			l.Opaque = l.Opaque || e.t.opaque != ""
		case RoleData:
			l.Data = number(e.place.layer)
		case RoleHidden:
			l.Hidden++
			if l.Layer == nil {
				l.Layer = number(e.hidden.by)
			}
		}
	}
	return l, nil
}

// number is a pointer to a copy, which keeps nothing else in memory.
func number(i int) *int { return &i }

// list collects the names that any place of a directory has, with the places.
func (s *Stack) list(lv level) (map[string][]int, error) {
	names := map[string][]int{}
	for i, p := range lv.places {
		l := s.layers[p.layer]
		fd, err := fsat.OpenDirBeneath(l.root, p.path)
		if err != nil {
			if absent(err) == nil {
				continue
			}
			return nil, s.problem(p.layer, p.path, err)
		}
		err = fsat.ReadDir(fd, func(e fsat.Dirent) error {
			name := e.Name
			if len(name) > unix.NAME_MAX {
				return nil
			}
			if l.Dialect.ReadsMarkers() {
				switch m, target := whiteout.ParseMarker(name); m {
				case whiteout.NotMarker:
				case whiteout.MarkerWhiteout:
					name = target
				default:
					return nil
				}
			}
			have := names[name]
			if len(have) > 0 && have[len(have)-1] == i {
				return nil
			}
			if len(names) == maxNames && have == nil {
				return fmt.Errorf("more than %d names", maxNames)
			}
			names[name] = append(have, i)
			return nil
		})
		fsat.Close(fd)
		if err != nil {
			return nil, s.problem(p.layer, p.path, err)
		}
	}
	return names, nil
}
