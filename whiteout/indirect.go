package whiteout

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/whiteout/xattrat"
)

// An object of an overlay or userxattr layer can say that a part of it is
// elsewhere in the layers below: a directory its lower content (after a
// rename), a regular file its data (after a change of its attributes alone).

// ErrMalformed says that one of a dialect's own attributes has a value that
// nobody could have written.
var ErrMalformed = errors.New("malformed overlay attribute")

// maxRedirect bounds what is read of a redirect: no path is longer.
const maxRedirect = unix.PathMax

// Redirect returns where the layers below have what the object (dirfd, name;
// with an empty name dirfd itself, O_PATH will do) was renamed or copied from:
// an absolute path from the roots of the layers, or a single name in the same
// directory; "" if it has not moved. It never contains "." or "..".
func (d Dialect) Redirect(dirfd int, name string) (string, error) {
	v, err := d.readAttr(dirfd, name, "redirect", maxRedirect)
	if err != nil || v == nil {
		return "", err
	}
	if err := checkRedirect(string(v)); err != nil {
		return "", fmt.Errorf("%s of %q: %w", d.Attr("redirect"), name, err)
	}
	return string(v), nil
}

// checkRedirect applies the rules of the kernel (ovl_get_redirect_xattr), and
// refuses the names that it refuses to look up.
func checkRedirect(v string) error {
	names := []string{v}
	if strings.HasPrefix(v, "/") {
		names = strings.Split(v[1:], "/")
	}
	for _, n := range names {
		if n == "" || n == "." || n == ".." || len(n) > unix.NAME_MAX || strings.ContainsAny(n, "/\x00") {
			return fmt.Errorf("%w: %q is not a path", ErrMalformed, v)
		}
	}
	return nil
}

// Metacopy reports whether the regular file (dirfd, name) has attributes only,
// and its data lies in the layers below.
func (d Dialect) Metacopy(dirfd int, name string) (bool, error) {
	const digestMax = 64
	v, err := d.readAttr(dirfd, name, "metacopy", 4+digestMax)
	if err != nil || v == nil {
		return false, err
	}
	// Empty, or version, length, flags, digest algorithm and a digest
	// (kernel: struct ovl_metacopy). The digest is for fs-verity.
	if len(v) != 0 && (len(v) < 4 || v[0] != 0 || int(v[1]) != len(v)) {
		return false, fmt.Errorf("%s of %q: %w", d.Attr("metacopy"), name, ErrMalformed)
	}
	return true, nil
}

// readAttr reads one of the dialect's own attributes of at most limit bytes;
// nil if the object has none. Auto reads only those that root alone can write.
func (d Dialect) readAttr(dirfd int, name, what string, limit int) ([]byte, error) {
	if !d.ReadsDevices() {
		return nil, nil
	}
	// Few objects have any: what there is, is read into a buffer only then.
	attr := d.Attr(what)
	if _, err := xattrat.Get(dirfd, name, attr, nil); errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	buf := make([]byte, limit)
	n, err := xattrat.Get(dirfd, name, attr, buf)
	switch {
	case err == nil:
		return buf[:n:n], nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		return nil, nil
	case errors.Is(err, unix.ERANGE):
		return nil, fmt.Errorf("%s of %q: %w: more than %d bytes", attr, name, ErrMalformed, limit)
	}
	return nil, fmt.Errorf("read %s of %q: %w", attr, name, err)
}
