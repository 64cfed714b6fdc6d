package whiteout

import "strings"

// Prefixes of the attributes that overlay implementations keep for
// themselves.
const (
	TrustedPrefix = "trusted.overlay."
	UserPrefix    = "user.overlay."
	FusePrefix    = "user.fuseoverlayfs."

	// escape stands between the prefix and the rest of a user's own name
	// (kernel: OVL_XATTR_ESCAPE_PREFIX in fs/overlayfs/overlayfs.h).
	escape = "overlay."
)

var privatePrefixes = [...][]string{
	Overlay:   {TrustedPrefix},
	UserXattr: {UserPrefix},
	AUFS:      {TrustedPrefix},
	Auto:      {TrustedPrefix, UserPrefix, FusePrefix},
	AutoUser:  {TrustedPrefix, UserPrefix, FusePrefix},
}

// Prefix is where the dialect's own attributes live when it is written.
func (d Dialect) Prefix() string {
	if d == UserXattr || d == AutoUser {
		return UserPrefix
	}
	return TrustedPrefix
}

// Attr returns the on-disk name of one of the dialect's own attributes:
// "opaque", "whiteout", "redirect", "metacopy", "origin".
func (d Dialect) Attr(what string) string {
	if name, ok := attrNames[attrKey{d.Prefix(), what}]; ok {
		return name
	}
	return d.Prefix() + what
}

type attrKey struct{ prefix, what string }

// attrNames has those that are asked for at every look at an object.
var attrNames = func() map[attrKey]string {
	names := make(map[attrKey]string)
	for _, p := range []string{TrustedPrefix, UserPrefix} {
		for _, what := range []string{"opaque", "whiteout", "redirect", "metacopy", "origin", "impure", "protattr"} {
			names[attrKey{p, what}] = p + what
		}
	}
	return names
}()

func (d Dialect) privatePrefix(name string) (prefix string, ok bool) {
	if int(d) >= len(privatePrefixes) {
		return "", false
	}
	for _, p := range privatePrefixes[d] {
		if strings.HasPrefix(name, p) {
			return p, true
		}
	}
	return "", false
}

// IsPrefix reports whether name is nothing but one of the dialect's private
// prefixes: not a name at all (the kernel says EINVAL).
func (d Dialect) IsPrefix(name string) bool {
	p, ok := d.privatePrefix(name)
	return ok && p == name
}

// ToDisk returns the name under which an attribute that a user calls name is
// stored.
func (d Dialect) ToDisk(name string) string {
	if p, ok := d.privatePrefix(name); ok {
		return p + escape + name[len(p):]
	}
	return name
}

// FromDisk is the inverse of ToDisk. visible is false for the dialect's own
// attributes, which no user may see.
func (d Dialect) FromDisk(name string) (user string, visible bool) {
	p, ok := d.privatePrefix(name)
	if !ok {
		return name, true
	}
	if rest, ok := strings.CutPrefix(name[len(p):], escape); ok {
		return p + rest, true
	}
	return "", false
}
