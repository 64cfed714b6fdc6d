package unionfs

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// The form of an ACL in an extended attribute (kernel:
// include/uapi/linux/posix_acl_xattr.h): a version and entries of 8 bytes.
const (
	aclVersion   = 2
	aclHeader    = 4
	aclEntrySize = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// What a directory is known to say about default ACLs (dirState.defaultACL).
const (
	aclUnknown = iota
	aclNone
	aclPresent
)

// defaultACL returns the default ACL of a directory in the upper, nil if it has
// none. dirfd is the directory.
func (fs *FS) defaultACL(d *dirState, dirfd int) ([]byte, error) {
	if d.acl.Load() == aclNone {
		return nil, nil
	}
	v, err := fsat.GetxattrValue(dirfd, "", fs.upper.toDisk(unix.S_IFDIR, aclDefault))
	switch {
	case err == nil && len(v) > aclHeader:
		d.acl.Store(aclPresent)
		return v, nil
	case err == nil, errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		d.acl.Store(aclNone)
		return nil, nil
	}
	return nil, err
}

// validACL reports whether an attribute has the form of an ACL.
func validACL(acl []byte) bool {
	return len(acl) >= aclHeader && (len(acl)-aclHeader)%aclEntrySize == 0 && binary.LittleEndian.Uint32(acl) == aclVersion
}

// aclPerm returns where an ACL has the permissions of its first entry with a tag; nil if
// it has none.
func aclPerm(acl []byte, tag uint16) []byte {
	for e := acl[aclHeader:]; len(e) > 0; e = e[aclEntrySize:] {
		if binary.LittleEndian.Uint16(e) == tag {
			return e[2:4]
		}
	}
	return nil
}

// inheritACL applies a default ACL to a new object (kernel: posix_acl_create).
// It returns the mode the object gets and the attributes that go with it.
func inheritACL(def []byte, mode uint32, dir bool) (uint32, []cow.Xattr, error) {
	if !validACL(def) {
		return 0, nil, unix.EINVAL
	}
	acc := append([]byte(nil), def...)
	perm := func(tag uint16) []byte { return aclPerm(acc, tag) }
	group, extended := perm(aclMask), true
	if group == nil {
		group, extended = perm(aclGroupObj), len(acc) > aclHeader+3*aclEntrySize
	}
	user, other := perm(aclUserObj), perm(aclOther)
	if user == nil || group == nil || other == nil {
		return 0, nil, unix.EINVAL
	}
	limit := func(p []byte, bits uint32) uint32 {
		v := uint32(binary.LittleEndian.Uint16(p)) & bits & 7
		binary.LittleEndian.PutUint16(p, uint16(v))
		return v
	}
	mode = mode&^0o777 | limit(user, mode>>6)<<6 | limit(group, mode>>3)<<3 | limit(other, mode)
	var attrs []cow.Xattr
	if extended {
		attrs = append(attrs, cow.Xattr{Name: aclAccess, Value: acc})
	}
	if dir {
		attrs = append(attrs, cow.Xattr{Name: aclDefault, Value: def})
	}
	return mode, attrs, nil
}
