package foreign

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
)

// IDRange says that the files of Length ids from Disk on belong to the ids from Inside
// on.
type IDRange struct{ Disk, Inside, Length uint32 }

// IDs are the owners of files in a store of a user, seen from outside of the user's
// namespace. The zero value is for files whose owners are what they seem to be.
type IDs struct{ UIDs, GIDs []IDRange }

// None reports whether owners are what they seem to be.
func (i IDs) None() bool { return i.UIDs == nil }

// Inside returns what an id on disk is in the user's namespace.
func Inside(ranges []IDRange, id uint32) (uint32, bool) {
	for _, r := range ranges {
		if id >= r.Disk && id-r.Disk < r.Length {
			return r.Inside + (id - r.Disk), true
		}
	}
	return 0, false
}

// Owners says who the files of containers in the store belong to: its owner is root in
// them, and the others are the owner's subordinate ids (subuid(5)), in order.
func (s *Store) Owners() (IDs, error) {
	if ids, ok := remapped(filepath.Base(s.Path)); ok && s.Kind == KindDocker {
		return ids, nil
	}
	uid, err := s.owner()
	if err != nil || uid == 0 || !firstUserNamespace() {
		return IDs{}, err
	}
	names := []string{strconv.FormatUint(uint64(uid), 10)}
	gid := uid
	if u, err := user.LookupId(names[0]); err == nil {
		names = append(names, u.Username)
		if n, err := strconv.ParseUint(u.Gid, 10, 32); err == nil {
			gid = uint32(n)
		}
	}
	ids := IDs{UIDs: []IDRange{{uid, 0, 1}}, GIDs: []IDRange{{gid, 0, 1}}}
	for _, f := range []struct {
		path string
		to   *[]IDRange
	}{{"/etc/subuid", &ids.UIDs}, {"/etc/subgid", &ids.GIDs}} {
		raw, err := os.ReadFile(f.path)
		if err != nil {
			return ids, fmt.Errorf("ids of user %d: %w", uid, err)
		}
		*f.to = append(*f.to, subordinates(raw, names)...)
	}
	return ids, nil
}

// remapped reads the name of a root of Docker with userns-remap, which is that of the
// first ids: "100000.100000".
func remapped(name string) (IDs, bool) {
	u, g, ok := strings.Cut(name, ".")
	uid, err1 := strconv.ParseUint(u, 10, 32)
	gid, err2 := strconv.ParseUint(g, 10, 32)
	const length = 1 << 16 // of the one range that it uses
	if !ok || err1 != nil || err2 != nil || uid == 0 || uid+length > 1<<32-1 || gid+length > 1<<32-1 {
		return IDs{}, false
	}
	return IDs{UIDs: []IDRange{{uint32(uid), 0, length}}, GIDs: []IDRange{{uint32(gid), 0, length}}}, true
}

// subordinates reads subuid(5).
func subordinates(file []byte, names []string) (out []IDRange) {
	next := uint32(1)
	for sc := bufio.NewScanner(bytes.NewReader(file)); sc.Scan(); {
		f := strings.Split(strings.TrimSpace(sc.Text()), ":")
		if len(f) != 3 || f[0] != names[0] && f[0] != names[len(names)-1] {
			continue
		}
		first, err1 := strconv.ParseUint(f[1], 10, 32)
		n, err2 := strconv.ParseUint(f[2], 10, 32)
		if err1 != nil || err2 != nil || n == 0 || first+n > 1<<32-1 || uint64(next)+n > 1<<32-1 {
			continue
		}
		out = append(out, IDRange{uint32(first), next, uint32(n)})
		next += uint32(n)
	}
	return out
}
