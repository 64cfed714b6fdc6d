package unionfs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// indirection says which attributes are believed that place the content of a
// directory, or the data of a file, somewhere else in the layers below.
type indirection struct{ redirect, metacopy bool }

// errIndirect says that such an attribute is not believed. To show the object
// as it is would show holes (kernel: redirect_dir=nofollow and metacopy=off
// refuse likewise).
func errIndirect(d whiteout.Dialect, attr, name string) error {
	return fmt.Errorf("%q has the attribute %s, which this mount does not follow: %w", name, d.Attr(attr), unix.EPERM)
}

// read returns what the object (dirfd, name) of a layer says of itself.
func (r indirection) read(d whiteout.Dialect, dirfd int, name string, dtype uint8) (redirect string, metacopy bool, err error) {
	refused := func(attr string) (string, bool, error) { return "", false, errIndirect(d, attr, name) }
	if dtype == unix.DT_REG {
		metacopy, err = d.Metacopy(dirfd, name)
		if !r.metacopy && (metacopy || errors.Is(err, whiteout.ErrMalformed)) {
			return refused("metacopy")
		}
		if err != nil || !metacopy {
			return "", false, err
		}
	} else if dtype != unix.DT_DIR {
		return "", false, nil
	}
	redirect, err = d.Redirect(dirfd, name)
	if !r.redirect && (redirect != "" || errors.Is(err, whiteout.ErrMalformed)) {
		return refused("redirect")
	}
	return redirect, metacopy, err
}

// elsewhere is where an indirect object of a scan has its content.
type elsewhere struct {
	dirs []*scanDir // of a directory: those that make it up, topmost first
	data scanPlace  // of a file
}

type scanPlace struct {
	tree *scan
	obj  *scanObj
}

// scanObj.state
const (
	stateUnexamined = iota
	stateDirect
	stateIndirect
	stateBare // direct, and without any extended attribute
)

// known returns what examine has found out.
func (s *scan) known(o *scanObj) *elsewhere {
	if o.state.Load() != stateIndirect {
		return nil
	}
	e, _ := s.indirect.Load(o)
	return e.(*elsewhere)
}

func (s *scan) dataElsewhere(o lowerObj) bool { return s.known(o.(*scanObj)) != nil }

// examine finds out whether the object has its content elsewhere; nil if not.
func (s *scan) examine(o *scanObj) (*elsewhere, error) {
	switch {
	case o.state.Load() == stateDirect || o.state.Load() == stateBare || o.list == nil:
		return nil, nil
	case o.state.Load() == stateIndirect:
		return s.known(o), nil
	}
	var e *elsewhere
	var err error
	switch o.dtype {
	case unix.DT_DIR:
		e, err = s.examineDir(o)
	case unix.DT_REG:
		if o.list.dirs[o.top].layer.direct {
			break
		}
		var bare bool
		if bare, err = s.hasNone(o); bare {
			o.state.Store(stateBare)
			return nil, nil
		}
		if err == nil {
			e, err = s.examineFile(o)
		}
	}
	switch {
	case err != nil:
		return nil, err
	case e == nil:
		o.state.Store(stateDirect)
	default:
		have, _ := s.indirect.LoadOrStore(o, e)
		e = have.(*elsewhere)
		o.state.Store(stateIndirect)
	}
	return e, nil
}

// hasNone reports whether a file has no extended attribute that we can see, and so none
// that matters: most have none.
func (s *scan) hasNone(o *scanObj) (none bool, err error) {
	err = s.with(o, func(dirfd int, name string) error {
		n, e := xattrat.List(dirfd, name, nil)
		none = e == nil && n == 0 || errors.Is(e, unix.EOPNOTSUPP)
		if errors.Is(e, unix.EOPNOTSUPP) {
			e = nil
		}
		return e
	})
	return none, err
}

// readPart is indirection.read of o's part in its parent's directory number i.
func (s *scan) readPart(o *scanObj, i uint16) (redirect string, metacopy bool, err error) {
	d := o.list.dirs[i]
	if d.layer.direct {
		return "", false, nil
	}
	h, err := s.dirFd(d)
	if err != nil {
		return "", false, err
	}
	defer h.release()
	return s.rules.read(d.layer.dialect, h.fd, o.name(), o.dtype)
}

// examineDir follows the first redirect among the parts of a directory: what
// the layers below contribute then comes from there (kernel: ovl_lookup).
func (s *scan) examineDir(o *scanObj) (*elsewhere, error) {
	parts := append([]uint16{o.top}, o.below()...)
	for n, i := range parts {
		if n < len(o.dir.marks) && o.dir.marks[n] == whiteout.Opaque {
			break // it hides what it could refer to (kernel: ovl_lookup_single)
		}
		redirect, _, err := s.readPart(o, i)
		if err != nil {
			return nil, err
		}
		if redirect == "" {
			continue
		}
		e := &elsewhere{dirs: o.sameName()[:n+1]}
		at, err := s.below(o, i, redirect)
		switch {
		case errors.Is(err, unix.ENOENT): // nothing below any more
		case err != nil:
			return nil, err
		case at.obj.dtype == unix.DT_DIR:
			dirs, err := at.tree.dirsOf(at.obj)
			if err != nil {
				return nil, err
			}
			e.dirs = append(e.dirs, dirs...)
		}
		return e, nil
	}
	return nil, nil
}

// examineFile finds the data of a file that has only attributes.
func (s *scan) examineFile(o *scanObj) (*elsewhere, error) {
	redirect, metacopy, err := s.readPart(o, o.top)
	if err != nil || !metacopy {
		return nil, err
	}
	if redirect == "" {
		redirect = o.name()
	}
	at, err := s.below(o, o.top, redirect)
	if err == nil && at.obj.dtype != unix.DT_REG {
		err = unix.ENOENT
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("the data of %q is missing in the layers below %q: %w", s.path(o), s.layer(o).path, unix.EIO)
	}
	if err != nil {
		return nil, err
	}
	return &elsewhere{data: at}, nil
}

// below resolves the redirect of o's part in its parent's directory number i
// in the layers below that part.
func (s *scan) below(o *scanObj, i uint16, redirect string) (scanPlace, error) {
	dirs := o.list.dirs
	layer := dirs[i].layer.index + 1
	if redirect[0] != '/' {
		// A name next to it: in what the layers below contribute to its
		// directory.
		if int(i)+1 >= len(dirs) {
			return scanPlace{}, unix.ENOENT
		}
		next := dirs[i+1]
		layer, redirect = next.layer.index, next.path+"/"+redirect
	}
	t, err := s.sub(layer)
	if err != nil {
		return scanPlace{}, err
	}
	obj, err := t.lookup(redirect)
	if err != nil {
		return scanPlace{}, err
	}
	return scanPlace{t, obj.(*scanObj)}, nil
}

// sub returns the tree of the layers from index first on.
func (s *scan) sub(first int) (*scan, error) {
	first -= s.layers[0].index
	if first >= len(s.layers) {
		return nil, unix.ENOENT
	}
	if t := s.subs[first].Load(); t != nil {
		return t, nil
	}
	t, err := newScan(s.layers[first:], s.fds, s.inos, s.rules)
	if err != nil {
		return nil, err
	}
	t.traps = s.traps
	s.subs[first].CompareAndSwap(nil, t)
	return s.subs[first].Load(), nil
}
