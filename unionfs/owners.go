package unionfs

import (
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/whiteout/override"
)

// Owners says how the user and group ids that the layers have become those that the
// kernel is told, and back. The zero value leaves them as they are.
type Owners struct {
	UIDs IDMap `json:"uids,omitzero"`
	GIDs IDMap `json:"gids,omitzero"`
	// FilesOfRoot says that in layers with an override form all files belong to
	// root, id 0, that do not say otherwise: such layers are written by one
	// user, who owns their files, and may not give them away.
	FilesOfRoot bool `json:"filesOfRoot,omitempty"`
}

// IDMap maps ids.
type IDMap struct {
	// Ranges are looked at from the last to the first (so does fuse-overlayfs).
	// None: ids stay as they are.
	Ranges []IDRange `json:"ranges,omitempty"`
	// Rest is what is shown of an id that no range has, and what is stored of one
	// that is none of the shown.
	Rest uint32 `json:"rest,omitempty"`
	// Squash, if not nil, is what all ids are shown as. Whoever changes an owner
	// then, or makes an object, is not told if that could not be done.
	Squash *uint32 `json:"squash,omitempty"`
}

// IDRange maps Length ids, from Stored on, to those from Shown on.
type IDRange struct {
	Stored uint32 `json:"stored"`
	Shown  uint32 `json:"shown"`
	Length uint32 `json:"length"`
}

// plain reports whether nothing is changed.
func (m *IDMap) plain() bool { return m.Squash == nil && len(m.Ranges) == 0 }

// shown is what the kernel is told of a stored id.
func (m *IDMap) shown(id uint32) uint32 {
	if m.Squash != nil {
		return *m.Squash
	}
	if len(m.Ranges) == 0 {
		return id
	}
	for i := len(m.Ranges) - 1; i >= 0; i-- {
		if r := m.Ranges[i]; id >= r.Stored && id-r.Stored < r.Length {
			return r.Shown + (id - r.Stored)
		}
	}
	return m.Rest
}

// stored is what is stored of an id that the kernel has sent.
func (m *IDMap) stored(id uint32) uint32 {
	if len(m.Ranges) == 0 {
		return id
	}
	for i := len(m.Ranges) - 1; i >= 0; i-- {
		if r := m.Ranges[i]; id >= r.Shown && id-r.Shown < r.Length {
			return r.Stored + (id - r.Shown)
		}
	}
	return m.Rest
}

// Shown is what programs see of the id that a layer has, and Stored the inverse, for
// those who look at the layers themselves.
func (m *IDMap) Shown(id uint32) uint32 { return m.shown(id) }

// Stored is the inverse of Shown.
func (m *IDMap) Stored(id uint32) uint32 { return m.stored(id) }

// change is what becomes of the stored id of an object whose owner is changed to id:
// what it is shown as already is no change. So the owners of an image survive where
// only one can be shown.
func (m *IDMap) change(old, id uint32) uint32 {
	if m.Squash == nil && len(m.Ranges) > 0 && m.shown(old) == id {
		return old
	}
	return m.stored(id)
}

// owners is Owners as the union uses it. Immutable.
type owners struct {
	uids, gids IDMap
	plain      bool // nothing is mapped
	squash     bool
	// filesOfRoot is as in Owners. The user who owns the files is the owner of a
	// layer's root.
	filesOfRoot bool
}

func newOwners(o Owners) owners {
	w := owners{uids: o.UIDs, gids: o.GIDs, filesOfRoot: o.FilesOfRoot}
	w.plain = w.uids.plain() && w.gids.plain()
	w.squash = w.uids.Squash != nil || w.gids.Squash != nil
	return w
}

// show turns the stored owner of an object into what the kernel is told.
func (w *owners) show(st *unix.Stat_t) {
	if !w.plain {
		st.Uid, st.Gid = w.uids.shown(st.Uid), w.gids.shown(st.Gid)
	}
}

// store turns the owner of an object in a layer whose mount maps ids already into
// what is stored elsewhere.
func (w *owners) store(st *unix.Stat_t) {
	st.Uid, st.Gid = w.uids.stored(st.Uid), w.gids.stored(st.Gid)
}

// storeACL is store for the attribute disk of an object, if it is an ACL that the mount
// has mapped. What is kept in another attribute no mount knows.
func (l *layer) storeACL(disk string, value []byte) {
	if l.mapped && isACL(disk) {
		l.owners.mapACL(value, false)
	}
}

// describe completes what stat(2) says about the file (dirfd, name) of the layer by
// what the layer says about the object.
func (l *layer) describe(dirfd int, name string, st *unix.Stat_t) error {
	_, err := l.saying(dirfd, name, st)
	return err
}

// saying is describe that also tells whether the object has the attribute that says so.
func (l *layer) saying(dirfd int, name string, st *unix.Stat_t) (says bool, err error) {
	if l.mapped {
		l.owners.store(st)
	}
	self := -1
	if l.owners.filesOfRoot {
		self = l.owner
	}
	if l.override == override.None {
		if self >= 0 && int(st.Uid) == self {
			st.Uid, st.Gid = 0, 0
		}
		return false, nil
	}
	return l.override.Stat(dirfd, name, st, self)
}

// toDisk returns the name under which an object of the given type (S_IFMT) in the layer has
// an attribute that users call attr. A symbolic link can have no others than it has.
func (l *layer) toDisk(typ uint32, attr string) string {
	attr = l.dialect.ToDisk(attr)
	if typ == unix.S_IFLNK {
		return attr
	}
	return l.override.ToDisk(attr)
}

// fromDisk is the inverse of toDisk; visible is false for what is no user's business.
func (l *layer) fromDisk(typ uint32, disk string) (attr string, visible bool) {
	if typ == unix.S_IFLNK {
		if l.override.Own(disk) { // of an empty file
			return "", false
		}
		return l.dialect.FromDisk(disk)
	}
	if attr, visible = l.override.FromDisk(disk); !visible {
		return "", false
	}
	return l.dialect.FromDisk(attr)
}

// readlink reads the target of a symbolic link, which may be an empty file that says so.
func (l *layer) readlink(dirfd int, name string) (string, error) {
	target, err := fsat.Readlink(dirfd, name)
	if (err == unix.EINVAL || err == unix.ENOENT && name == "") && l.override != override.None {
		return l.override.Readlink(dirfd, name)
	}
	return target, err
}

// isPrefix reports whether attr is no name, but only what private or kept names begin with.
func (l *layer) isPrefix(attr string) bool {
	return l.dialect.IsPrefix(attr) || l.override.IsPrefix(attr)
}

// statUpper says what the object (dirfd, name) of the upper is, with the owner as it is
// stored.
func (fs *FS) statUpper(dirfd int, name string, st *unix.Stat_t) error {
	if err := fsat.Stat(dirfd, name, st); err != nil {
		return err
	}
	return fs.upper.describe(dirfd, name, st)
}

// statLocked says what the object behind n is, with the owner as it is stored.
// Preconditions: n.mu is held.
func (fs *FS) statLocked(n *inode, st *unix.Stat_t) error {
	if !n.upper {
		return fs.lowers.stat(n.low, st)
	}
	return fs.withRealLocked(n, func(dirfd int, name string) error { return fs.statUpper(dirfd, name, st) })
}

// statShown says what the object behind n is, with the owner as callers see it.
func (fs *FS) statShown(n *inode, st *unix.Stat_t) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	err := fs.statLocked(n, st)
	fs.owners.show(st)
	return err
}
