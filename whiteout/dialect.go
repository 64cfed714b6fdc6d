package whiteout

import "fmt"

// Dialect is the way one layer writes down "this name is deleted" and "this
// directory hides everything below it". It is a property of a whole layer.
type Dialect uint8

const (
	// Overlay is kernel overlayfs as root: a whiteout is a character device
	// 0:0 (or, in a directory marked opaque=x, an empty file with
	// trusted.overlay.whiteout), an opaque directory has
	// trusted.overlay.opaque=y.
	Overlay Dialect = iota
	// UserXattr is kernel overlayfs mounted with -o userxattr: the same with
	// user.overlay.* attributes.
	UserXattr
	// AUFS is the form of image layer tars: ".wh.NAME" and ".wh..wh..opq".
	AUFS
	// Auto reads all of the above, and user.fuseoverlayfs.opaque, mixed in
	// one layer, as fuse-overlayfs and containers/storage leave it behind.
	Auto
	// AutoUser is Auto for an upper in which a user without privileges writes:
	// what we add is in the form of UserXattr, and in Auto in that of Overlay.
	AutoUser
)

var dialectNames = [...]string{Overlay: "overlay", UserXattr: "userxattr", AUFS: "aufs", Auto: "auto", AutoUser: "auto-user"}

// String returns the name used in options, records and messages.
func (d Dialect) String() string {
	if int(d) < len(dialectNames) {
		return dialectNames[d]
	}
	return fmt.Sprintf("dialect(%d)", uint8(d))
}

// ParseDialect is the inverse of String.
func ParseDialect(s string) (Dialect, error) {
	for d, n := range dialectNames {
		if n == s {
			return Dialect(d), nil
		}
	}
	return 0, fmt.Errorf("unknown whiteout dialect %q: expected overlay, userxattr, aufs or auto", s)
}

// Mixed returns the dialect that writes as d does and reads all forms; d is Overlay
// or UserXattr.
func (d Dialect) Mixed() Dialect {
	if d == UserXattr {
		return AutoUser
	}
	return Auto
}

// MarshalText and UnmarshalText give JSON the same names.
func (d Dialect) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText parses what MarshalText wrote.
func (d *Dialect) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDialect(string(b))
	return err
}
