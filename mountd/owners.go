package mountd

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs"
)

// The store of a user without privileges keeps the owners of an image beside its
// files, which all belong to the user. Which of them a mount can show depends on who
// makes it:
//
//	root of the first user namespace   a store of its own, with real owners
//	root of another user namespace     every id that the namespace has, as it is; others as root
//	a user, by fusermount3             all as that user, who is root to the image
//
// What cannot be shown is kept: an owner changes only when somebody changes it to
// another than it shows.

// ownersHere says how owners show in a mount that this process makes of a store
// without privileges.
func ownersHere() (unionfs.Owners, error) {
	o := unionfs.Owners{FilesOfRoot: true}
	euid, egid := uint32(os.Geteuid()), uint32(os.Getegid())
	if euid != 0 {
		o.UIDs, o.GIDs = onlyID(euid), onlyID(egid)
		return o, nil
	}
	var err error
	if o.UIDs, err = namespaceIDs("/proc/self/uid_map"); err != nil {
		return o, err
	}
	o.GIDs, err = namespaceIDs("/proc/self/gid_map")
	return o, err
}

// onlyRootWrites reports whether nobody but root can change a store. What the rows and
// indexes of another one say about owners is up to whoever wrote them.
func onlyRootWrites(store string) bool {
	var st unix.Stat_t
	err := unix.Lstat(store, &st)
	return err == nil && st.Uid == 0 && st.Mode&0o022 == 0
}

// onlyID shows root, and everybody else, as one id.
func onlyID(id uint32) unionfs.IDMap {
	return unionfs.IDMap{Ranges: []unionfs.IDRange{{Stored: 0, Shown: id, Length: 1}}, Rest: id}
}

// namespaceIDs shows the ids that a user namespace has as they are (user_namespaces(7)).
func namespaceIDs(path string) (m unionfs.IDMap, err error) {
	f, err := os.Open(path)
	if err != nil {
		return m, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var inside, outside, length uint32
		if _, err := fmt.Sscan(strings.TrimSpace(sc.Text()), &inside, &outside, &length); err != nil {
			return m, fmt.Errorf("%s: line %q: %w", path, sc.Text(), err)
		}
		m.Ranges = append(m.Ranges, unionfs.IDRange{Stored: inside, Shown: inside, Length: length})
	}
	if len(m.Ranges) == 0 {
		return m, fmt.Errorf("%s: no ids are mapped: %w", path, unix.EINVAL)
	}
	return m, nil
}
