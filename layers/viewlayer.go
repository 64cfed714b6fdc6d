package layers

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/merge"
	"github.com/plyfs/plyfs/whiteout/override"
)

// viewLayer is one directory of a view.
type viewLayer struct {
	fd int
	encoding
	virtual bool    // files tell nothing: record does
	record  *record // nil: there is none
	uuid    fsat.UUID
}

// newViewLayer looks at the directory fd, which is that of d.
func newViewLayer(fd int, d LayerDir) (viewLayer, error) {
	l := viewLayer{fd: fd, encoding: encoding{dialect: d.Dialect, override: d.Override, ids: d.ids}, virtual: d.Virtual, record: newRecord(d)}
	if d.Override == override.None && !d.Virtual {
		return l, nil
	}
	// Whoever made the directory made all that is in it.
	var st unix.Stat_t
	err := fsat.Fstat(fd, &st)
	if err == nil && d.ids != nil {
		err = inside(d.ids, &st)
	}
	l.mapped, l.self = true, st.Uid
	return l, err
}

// isWhiteout looks at one object of a layer; marked says that its directory
// may hold whiteouts in attribute form.
func (l viewLayer) isWhiteout(fd int, st *unix.Stat_t, marked bool) (bool, error) {
	if l.dialect.ReadsDevices() && whiteout.IsDevice(st.Mode, st.Rdev) {
		return true, nil
	}
	if marked && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 {
		return l.dialect.IsXWhiteout(fd)
	}
	return false, nil
}

// hasMarker reports whether a marker in a directory hides what the layers below have of a
// name.
func (l viewLayer) hasMarker(dir, name string) (bool, error) {
	if !l.dialect.ReadsMarkers() || len(whiteout.MarkerPrefix)+len(name) > unix.NAME_MAX {
		return false, nil
	}
	fd, err := fsat.OpenBeneath(l.fd, join(dir, whiteout.MarkerPrefix+name), unix.O_PATH|unix.O_NOFOLLOW)
	if fsat.IsAbsent(err) {
		return false, nil
	}
	fsat.Close(fd)
	return err == nil, err
}

// opaqueAt reports whether the directory fd hides what lies below it.
func (l viewLayer) opaqueAt(fd int) (bool, error) {
	m, err := l.dialect.Mark(fd)
	if err != nil || m == whiteout.Opaque || !l.dialect.ReadsMarkers() {
		return m == whiteout.Opaque, err
	}
	var st unix.Stat_t
	err = fsat.Stat(fd, whiteout.OpaqueMarker, &st)
	if fsat.IsAbsent(err) {
		return false, nil
	}
	return err == nil, err
}

// marked reports whether a directory may hold whiteouts in attribute form: one
// that says so, or an opaque one, which can have said so before.
func (l viewLayer) marked(dir string) (bool, error) {
	fd, err := fsat.OpenBeneath(l.fd, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer fsat.Close(fd)
	m, err := l.dialect.Mark(fd)
	return m != whiteout.Plain, err
}

// listing reads one layer's directory.
func (l viewLayer) listing(path string) (merge.Listing, error) {
	var out merge.Listing
	fd, err := fsat.OpenDirBeneath(l.fd, path)
	if err != nil {
		return out, err
	}
	defer fsat.Close(fd)
	mark, err := l.dialect.Mark(fd)
	if err != nil {
		return out, err
	}
	marked := mark != whiteout.Plain
	err = fsat.ReadDir(fd, func(e fsat.Dirent) error {
		if l.dialect.ReadsMarkers() {
			switch m, target := whiteout.ParseMarker(e.Name); m {
			case whiteout.NotMarker:
			case whiteout.MarkerWhiteout:
				out.Entries = append(out.Entries, merge.Entry{Name: target, Kind: merge.Whiteout})
				return nil
			case whiteout.MarkerOpaque:
				out.Opaque = true
				return nil
			default:
				return nil
			}
		}
		k := merge.Other
		typ := e.Type
		if typ == unix.DT_CHR || typ == unix.DT_UNKNOWN || (marked && typ == unix.DT_REG) {
			p, err := fsat.OpenName(fd, e.Name, unix.O_PATH, 0)
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			if err != nil {
				return err
			}
			defer fsat.Close(p)
			var st unix.Stat_t
			if err := fsat.Fstat(p, &st); err != nil {
				return err
			}
			w, err := l.isWhiteout(p, &st, marked)
			if err != nil {
				return err
			}
			if w {
				k = merge.Whiteout
			} else if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				k = merge.Dir
			}
		} else if typ == unix.DT_DIR {
			k = merge.Dir
		}
		out.Entries = append(out.Entries, merge.Entry{Name: e.Name, Kind: k})
		return nil
	})
	return out, err
}
