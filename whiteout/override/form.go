package override

import (
	"fmt"
	"strings"
)

// Form is the attribute in which a layer overrides what its files are.
type Form uint8

const (
	// None: files are what they are.
	None Form = iota
	// Containers is user.containers.override_stat, what is written today.
	Containers
	// Fuse is user.fuseoverlayfs.override_stat, its older name.
	Fuse
	// Privileged is security.fuseoverlayfs.override_stat, which only root of
	// the first user namespace can write.
	Privileged
)

var formNames = [...]string{None: "none", Containers: "containers", Fuse: "fuseoverlayfs", Privileged: "privileged"}

var attrs = [...]string{
	Containers: "user.containers.override_stat",
	Fuse:       "user.fuseoverlayfs.override_stat",
	Privileged: "security.fuseoverlayfs.override_stat",
}

// prefix is where Containers keeps all that is its own.
const prefix = "user.containers.override_"

// TargetAttr holds the target of a symbolic link that is an empty file, which is so if
// the link belongs to somebody else than root. Nobody but plyfs writes it.
const TargetAttr = prefix + "target"

// String returns the name used in records and messages.
func (f Form) String() string {
	if int(f) < len(formNames) {
		return formNames[f]
	}
	return fmt.Sprintf("override(%d)", uint8(f))
}

// MarshalText gives JSON the same names.
func (f Form) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText parses what MarshalText wrote.
func (f *Form) UnmarshalText(b []byte) error {
	for v, n := range formNames {
		if n == string(b) {
			*f = Form(v)
			return nil
		}
	}
	return fmt.Errorf("unknown form of override_stat %q: expected none, containers, fuseoverlayfs or privileged", b)
}

// Attr is the name of the attribute; "" for None.
func (f Form) Attr() string {
	if int(f) < len(attrs) {
		return attrs[f]
	}
	return ""
}

// ToDisk returns the name under which an attribute that a user calls name is
// stored.
func (f Form) ToDisk(name string) string {
	if f == Containers && kept(name) {
		return prefix + name
	}
	return name
}

// FromDisk is the inverse of ToDisk. visible is false for what is the form's own.
func (f Form) FromDisk(name string) (user string, visible bool) {
	switch {
	case f == None:
		return name, true
	case f == Containers && strings.HasPrefix(name, prefix):
		user = name[len(prefix):]
		return user, kept(user)
	case f == Containers && kept(name):
		// It was not set through us, and the one that was has precedence.
		return "", false
	}
	return name, name != f.Attr()
}

// Own reports whether an attribute says what its object is.
func (f Form) Own(disk string) bool {
	return f != None && (disk == f.Attr() || f == Containers && disk == TargetAttr)
}

// IsPrefix reports whether name is nothing but what kept names begin with: not a name
// at all (the kernel says EINVAL).
func (f Form) IsPrefix(name string) bool {
	return f == Containers && (name == "security." || name == "trusted." || name == prefix)
}

// kept reports whether an attribute is kept under the prefix: a user cannot set it,
// or it means something only together with an owner that the file does not have.
func kept(name string) bool {
	return strings.HasPrefix(name, "security.") || strings.HasPrefix(name, "trusted.") ||
		strings.HasPrefix(name, "system.posix_acl_") || strings.HasPrefix(name, prefix)
}
