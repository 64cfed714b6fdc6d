package layers

import (
	"context"
	"fmt"
)

// Diff lists what a container has changed against its image and init layer,
// in order of paths.
func (s *Store) Diff(ctx context.Context, nameOrID string) ([]Change, error) {
	st, err := s.ContainerStack(ctx, nameOrID)
	if err != nil {
		return nil, err
	}
	return diffStack(ctx, st)
}

func diffStack(ctx context.Context, st Stack) ([]Change, error) {
	list, err := differences(ctx, st, false)
	if err != nil {
		return nil, err
	}
	out := make([]Change, len(list))
	for i, d := range list {
		out[i] = Change{d.Kind, string(d.Path)}
	}
	return out, nil
}

// DiffContainer is Diff that also says, if details are wanted, what the paths are and in
// what those that were changed differ, times included.
func (s *Store) DiffContainer(ctx context.Context, nameOrID string, details bool) ([]Difference, error) {
	st, err := s.ContainerStack(ctx, nameOrID)
	if err != nil {
		return nil, err
	}
	return differences(ctx, st, details)
}

func differences(ctx context.Context, st Stack, details bool) (_ []Difference, err error) {
	d := differ{ctx: ctx, details: details, names: map[[2]uint64]Path{}}
	if d.union, err = openUnion(ctx, st); err != nil {
		return nil, err
	}
	defer d.union.Close()
	if d.lower, err = openView(ctx, st.Lowers); err != nil {
		return nil, err
	}
	defer d.lower.Close()
	if d.links, err = d.union.otherLinks(ctx, false); err != nil {
		return nil, err
	}
	root, err := d.union.root()
	if err != nil {
		return nil, err
	}
	below, err := d.lower.root()
	if err != nil {
		return nil, err
	}
	_, err = d.dir(root, below, false)
	return d.out, err
}

type differ struct {
	ctx          context.Context
	union, lower *view
	links        nameSet // names with changes that the upper does not have
	details      bool
	names        map[[2]uint64]Path // of files with several, by device and inode
	out          []Difference
}

// add notes a path that is n, and below is what the lower layers have of it; of the two,
// one may be nil.
func (d *differ) add(kind, path string, n, below *vnode) error {
	out := Difference{Kind: kind, Path: absolute(path)}
	if d.details {
		if err := d.describe(&out, n, below); err != nil {
			return fmt.Errorf("%q: %w", out.Path, err)
		}
	}
	d.out = append(d.out, out)
	return nil
}

// dir compares a directory of the union with what the lower layers have in its
// place, nil if nothing, and reports whether anything in it changed. Of a
// directory that is merged with it, only what the upper has can differ; whole
// says that this one is not.
func (d *differ) dir(n, below *vnode, whole bool) (changed bool, err error) {
	if err := d.ctx.Err(); err != nil {
		return false, err
	}
	names := map[string]bool{}
	if whole {
		for _, side := range []struct {
			v *view
			n *vnode
		}{{d.union, n}, {d.lower, below}} {
			if side.n == nil {
				continue
			}
			list, err := side.v.list(side.n)
			if err != nil {
				return false, err
			}
			for _, c := range list {
				names[c.name] = true
			}
		}
	} else {
		for name := range d.links[n.path] {
			names[name] = true
		}
		if n.layer == 0 {
			l, err := d.union.layers[0].listing(n.at)
			if err != nil {
				return false, fmt.Errorf("%q: %w", "/"+n.path, err)
			}
			for _, e := range l.Entries {
				names[e.Name] = true
			}
		}
	}
	for _, name := range sortedNames(names) {
		did, err := d.name(n, below, name, whole)
		if err != nil {
			return false, err
		}
		changed = changed || did
	}
	return changed, nil
}

func (d *differ) name(dir, lowerDir *vnode, name string, whole bool) (changed bool, err error) {
	n, err := d.union.child(dir, name)
	if err != nil {
		return false, err
	}
	var below *vnode
	if lowerDir != nil {
		if below, err = d.lower.child(lowerDir, name); err != nil {
			return false, err
		}
	}
	path := join(dir.path, name)
	switch {
	case n == nil:
		if below != nil {
			err = d.add("D", path, nil, below)
		}
		return below != nil, err
	case below == nil || !n.isDir() || !below.isDir():
		kind := "A"
		if below != nil {
			if kind = "C"; below.st.Dev == n.st.Dev && below.st.Ino == n.st.Ino {
				return false, nil // one of several hard links
			}
		}
		if err = d.add(kind, path, n, below); err == nil && n.isDir() {
			_, err = d.dir(n, nil, true)
		}
		return true, err
	}
	at := len(d.out)
	if err := d.add("C", path, n, below); err != nil {
		return false, err
	}
	inside, err := d.dir(n, below, whole || n.moved || n.parts[len(n.parts)-1].layer == 0)
	if err != nil {
		return false, err
	}
	same, err := d.sameDir(n, below)
	if err != nil {
		return false, fmt.Errorf("%q: %w", "/"+path, err)
	}
	if same && !inside {
		d.out = d.out[:at] // copied up, and nothing came of it
		return false, nil
	}
	return true, nil
}

func (d *differ) sameDir(n, below *vnode) (bool, error) {
	a, err := d.union.attrs(n)
	if err != nil {
		return false, err
	}
	b, err := d.lower.attrs(below)
	return err == nil && a.String() == b.String(), err
}
