package explain

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout"
	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// thing is what one layer has under one name.
type thing struct {
	object bool        // else there is a whiteout only
	st     unix.Stat_t // of the object, owner and type as the mount shows them
	id     id          // of the file
	// whiteout and opaque are forms; "" is none.
	whiteout, opaque string
	// redirect and metacopy are what the object says of itself, malformed what is wrong
	// with that.
	redirect  string
	metacopy  bool
	malformed error
}

func (t *thing) typ() uint32 { return t.st.Mode & unix.S_IFMT }
func (t *thing) isDir() bool { return t.object && t.typ() == unix.S_IFDIR }

// errTooMuch says that a call has looked at maxLooks places.
var errTooMuch = errors.New("the layers refer to each other too often to be explained")

// look returns what a layer has under name in the directory dir; nil if nothing. It is
// layer.classify and layer.markAt of unionfs for one name.
func (s *Stack) look(l *layer, dir, name string) (*thing, error) {
	if s.looks--; s.looks < 0 {
		return nil, errTooMuch
	}
	dirfd, err := fsat.OpenBeneath(l.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, absent(err)
	}
	defer fsat.Close(dirfd)
	t := &thing{}
	hidden := false // the name means something else in this dialect
	if l.Dialect.ReadsMarkers() {
		m, _ := whiteout.ParseMarker(name)
		hidden = m != whiteout.NotMarker
		marker := whiteout.MarkerPrefix + name
		if m, _ := whiteout.ParseMarker(marker); m == whiteout.MarkerWhiteout && len(marker) <= unix.NAME_MAX {
			var st unix.Stat_t
			switch err := fsat.Stat(dirfd, marker, &st); {
			case err == nil:
				t.whiteout = "file " + marker
			case !fsat.IsAbsent(err):
				return nil, err
			}
		}
	}
	if !hidden {
		if err := s.lookAtObject(l, dirfd, name, t); err != nil {
			return nil, err
		}
	}
	if !t.object && t.whiteout == "" {
		return nil, nil
	}
	return t, nil
}

// absent drops errors that mean that there is nothing: in a directory that is hidden,
// the way may lead through anything.
func absent(err error) error {
	if fsat.IsAbsent(err) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	return err
}

func (s *Stack) lookAtObject(l *layer, dirfd int, name string, t *thing) error {
	fd, err := fsat.OpenBeneath(dirfd, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return absent(err)
	}
	defer fsat.Close(fd)
	if err := fsat.Fstat(fd, &t.st); err != nil {
		return err
	}
	t.id = id{t.st.Dev, t.st.Ino}
	if l.Dialect.ReadsDevices() && whiteout.IsDevice(t.st.Mode, t.st.Rdev) {
		t.whiteout = "device 0:0"
		return nil
	}
	if t.typ() == unix.S_IFREG && t.st.Size == 0 {
		mark, err := l.Dialect.Mark(dirfd)
		if err != nil {
			return fmt.Errorf("read opaque attribute: %w", err)
		}
		if mark != whiteout.Plain {
			for _, d := range forms(l.Dialect) {
				is, err := d.IsXWhiteout(fd)
				if err != nil {
					return err
				}
				if is {
					t.whiteout = "attribute " + d.Attr("whiteout")
					return nil
				}
			}
		}
	}
	t.object = true
	if err := s.describe(l, fd, &t.st); err != nil {
		t.malformed = err
	}
	if t.isDir() {
		if t.opaque, err = l.opaque(fd, false); err != nil {
			return err
		}
	}
	if l.Direct || !t.isDir() && t.typ() != unix.S_IFREG {
		return nil
	}
	return t.readIndirect(l, fd)
}

// readIndirect reads what an object says about its content being elsewhere. That the
// mount does not follow it is another question.
func (t *thing) readIndirect(l *layer, fd int) (err error) {
	if t.typ() == unix.S_IFREG {
		t.metacopy, err = l.Dialect.Metacopy(fd, "")
	}
	if err == nil && (t.isDir() || t.metacopy) {
		t.redirect, err = l.Dialect.Redirect(fd, "")
	}
	if errors.Is(err, whiteout.ErrMalformed) {
		t.malformed, err = err, nil
	}
	return err
}

// opaque returns the form in which the directory fd says that it hides all below; "" if it
// does not. The attribute on the root of a layer says nothing.
func (l *layer) opaque(fd int, isRoot bool) (string, error) {
	if !isRoot {
		attrs := make([]string, 0, 3)
		for _, d := range forms(l.Dialect) {
			if d.ReadsDevices() {
				attrs = append(attrs, d.Attr("opaque"))
			}
		}
		mark, err := l.Dialect.Mark(fd)
		if err != nil {
			return "", fmt.Errorf("read opaque attribute: %w", err)
		}
		if mark == whiteout.Opaque {
			for _, a := range append(attrs, whiteout.FusePrefix+"opaque") {
				var buf [1]byte
				if n, err := xattrat.Get(fd, "", a, buf[:]); err == nil && n == 1 && buf[0] == 'y' {
					return a + "=y", nil
				}
			}
			return "attribute", nil
		}
	}
	if !l.Dialect.ReadsMarkers() {
		return "", nil
	}
	marker, err := fsat.OpenBeneath(fd, whiteout.OpaqueMarker, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", absent(err)
	}
	fsat.Close(marker)
	return "file " + whiteout.OpaqueMarker, nil
}
