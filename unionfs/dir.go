package unionfs

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
)

// dirState is what the union knows about the names in one directory: the merged
// listing of the lowers, which never changes, and every name about which there
// is more to say.
type dirState struct {
	opMu sync.Mutex

	mu     sync.RWMutex
	loaded bool      // guarded by mu
	list   lowerList // nil if no lower contributes; immutable once loaded
	// names holds the names that the upper has or hides; nil if there are none.
	// Guarded by mu.
	names map[string]*dirent
	// kids holds the known objects of names that only the lowers have, by
	// position in list; nil if there are none. Not references. Guarded by mu.
	kids []*inode
	// born holds the names that the lowers do not have, in the order of their cookies,
	// and fresh those that nobody has listed yet, without an order; removed ones stay
	// until there are many. Guarded by mu.
	born, fresh []*dirent
	removed     int // how many of both are; guarded by mu

	dead bool // the directory has been removed; guarded by opMu

	acl atomic.Int32 // aclUnknown, aclNone or aclPresent
	// group is what handedGroup returns, where that is not read from the file system
	// each time; nil: not known. Whoever changes owner or mode forgets it; the kernel lets
	// nobody make a name in the directory meanwhile.
	group atomic.Pointer[int]
	// flags are the inode flags that new regular files and directories get;
	// nil: not known yet.
	flags atomic.Pointer[handedDown]
	// impure: the directory in the upper is marked as one that holds copies.
	impure atomic.Bool
	// xmarked: it is marked as one that holds whiteouts in the form of files.
	xmarked atomic.Bool
}

// Directory positions. They follow from the name, so that a reader who renames what it
// reads, away and back, comes to an end, and so that another server can go on with a
// listing: a name that the lowers have has the position that it has in their sorted
// listing, whatever the upper does to it; others have a hash.
const (
	cookieDot    = 1
	cookieDotDot = 2
	cookieLower  = 3 // + position
	cookieBorn   = 1 << 40
)

// dirent is one name. All fields are guarded by dirState.mu, except for name.
type dirent struct {
	name   string
	cookie uint64
	ino    uint64 // of an upper object: what to show as d_ino
	child  *inode // if the kernel knows the object; not a reference
	typ    uint8  // DT_* of an upper object
	upper  bool   // the upper has an object of this name
	white  bool   // the upper hides the lower name
	entry  bool   // by an entry of this name (which an object would replace)
	xform  bool   // which is an empty file with an attribute
	gone   bool   // removed, but still in born or fresh
}

func newDirState() *dirState { return &dirState{} }

// bornCookie is the position of a name that the lowers do not have, if no other name
// has the same. It need not be secret: who makes names that collide in a directory of
// his finds them in it one behind the other.
func bornCookie(name string) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211 // FNV-1a
	h := uint64(offset)
	for i := range len(name) {
		h = (h ^ uint64(name[i])) * prime
	}
	return cookieBorn + h>>2
}

// load reads the directory, once.
func (fs *FS) load(n *inode) error {
	d := n.dir
	d.mu.RLock()
	loaded := d.loaded
	d.mu.RUnlock()
	if loaded {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded {
		return nil
	}
	var list lowerList
	if n.low != nil {
		var err error
		if list, err = fs.lowers.list(n.low); err != nil {
			return err
		}
	}
	var names map[string]*dirent
	var born []*dirent
	// A directory that is copied up while this runs starts empty there, and
	// whoever adds a name to it waits for this load.
	if n.inUpper() {
		entries, err := fs.readUpper(n, list)
		if err != nil {
			return err
		}
		for _, e := range entries {
			de := &dirent{name: e.name, typ: e.typ, upper: e.object, white: e.whiteout, entry: e.entry, xform: e.xform}
			if e.object {
				de.ino = e.ino
			}
			if pos, inLower := findIn(list, e.name); inLower {
				de.cookie = cookieLower + uint64(pos)
			} else if e.object {
				de.cookie = bornCookie(e.name)
				born = append(born, de)
			}
			if names == nil {
				names = make(map[string]*dirent)
			}
			names[e.name] = de
		}
	}
	d.list, d.names, d.fresh, d.loaded = list, names, born, true
	return nil
}

// readUpper lists the directory of the upper behind n, sorted by name, with the
// inode numbers to show. list is what the lowers contribute to it.
func (fs *FS) readUpper(n *inode, list lowerList) ([]layerEntry, error) {
	h, err := fs.dirFd(n)
	if err != nil {
		return nil, err
	}
	defer h.release()
	entries, _, err := fs.upper.readDirAt(h.fd, nil)
	if err != nil {
		return nil, fmt.Errorf("read directory of the upper: %w", err)
	}
	_, err = fsat.Getxattr(h.fd, "", fs.upper.dialect.Attr("impure"), nil)
	n.dir.impure.Store(err == nil)
	sort.Slice(entries, func(i, j int) bool { return entries[i].name < entries[j].name })
	for i := range entries {
		e := &entries[i]
		if !e.object {
			continue
		}
		e.ino = fs.inos.shown(fs.upper.dev, e.ino)
		var low lowerObj
		if pos, ok := findIn(list, e.name); ok && !e.whiteout {
			_, low = list.at(pos)
		}
		bothDirs := low != nil && low.typ() == unix.DT_DIR && e.typ == unix.DT_DIR
		if n.dir.impure.Load() || bothDirs {
			if ino, ok := fs.copyIno(n, h.fd, e, low); ok {
				e.ino = ino
			}
		}
	}
	return entries, nil
}

func findIn(list lowerList, name string) (pos int, ok bool) {
	if list == nil {
		return 0, false
	}
	return list.find(name)
}

// found is what a directory says about one name.
type found struct {
	name  string
	upper bool     // the upper has an object of this name
	white bool     // the upper hides the lower name
	entry bool     // by an entry of this name
	xform bool     // which is an empty file with an attribute
	low   lowerObj // the lower object of this name, even where hidden
	typ   uint8    // DT_* of the object that shows
	ino   uint64   // of an upper object: its d_ino
	child *inode   // referenced, if the kernel knows the object
}

// visible reports whether the name exists.
func (f *found) visible() bool { return f.upper || f.low != nil && !f.white }

// needsWhiteout reports whether the name would show again if the upper's object
// were simply removed.
func (f *found) needsWhiteout() bool { return f.low != nil && (!f.white || f.entry) }

// reset says that the directory is empty and opaque now.
func (d *dirState) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.list, d.names, d.kids, d.born, d.fresh, d.removed = nil, nil, nil, nil, nil, 0
}

// find looks a name up; with ref, a known child comes with a reference. The name in
// the result stays valid, which that of a request does not.
// Preconditions: the directory is loaded.
func (d *dirState) find(name string, ref bool) found {
	f := found{name: name}
	d.mu.RLock()
	defer d.mu.RUnlock()
	pos, inLower := findIn(d.list, name)
	if inLower {
		f.name, f.low = d.list.at(pos)
		f.typ = f.low.typ()
	}
	var child *inode
	if e := d.names[name]; e != nil {
		f.name = e.name
		f.upper, f.white, f.entry, f.xform = e.upper, e.white, e.entry, e.xform
		if e.upper {
			f.typ, f.ino = e.typ, e.ino
		}
		child = e.child
	} else if inLower && d.kids != nil {
		child = d.kids[pos]
	}
	if ref && child != nil && child.tryRef() {
		f.child = child
	}
	return f
}

// childAt returns where the object of a name is kept. Preconditions: mu is held
// exclusively, the name is visible.
func (d *dirState) childAt(name string) **inode {
	if e := d.names[name]; e != nil {
		return &e.child
	}
	pos, ok := findIn(d.list, name)
	if !ok {
		return nil
	}
	if d.kids == nil {
		d.kids = make([]*inode, d.list.length())
	}
	return &d.kids[pos]
}

// adopt makes n the object behind name and registers it, unless there is one
// already, which it then returns referenced. ok is false if the name has
// changed meanwhile.
func (d *dirState) adopt(f *found, n *inode, nodes *table) (have *inode, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.names[f.name]; e == nil && f.upper ||
		e != nil && (e.upper != f.upper || e.upper && e.typ != f.typ || !e.upper && e.white) {
		return nil, false
	}
	child := d.childAt(f.name)
	if child == nil {
		return nil, false
	}
	if *child != nil && *child != n && (*child).tryRef() {
		return *child, true
	}
	if !nodes.add(n) {
		return nil, false
	}
	*child = n
	return nil, true
}

// lowerCookie is the position of a name that the lowers have. Preconditions:
// mu is held.
func (d *dirState) lowerCookie(name string) uint64 {
	if pos, ok := findIn(d.list, name); ok {
		return cookieLower + uint64(pos)
	}
	return 0
}

// forget cuts the connection from a name to an object that is being dropped.
func (d *dirState) forget(n *inode, name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.names[name]; e == nil && d.kids == nil {
		return
	}
	if child := d.childAt(name); child != nil && *child == n {
		*child = nil
	}
}

// entry returns what is to be changed about a name. Preconditions: mu is held
// exclusively.
func (d *dirState) entry(name string) *dirent {
	e := d.names[name]
	if e == nil {
		e = &dirent{name: name, cookie: d.lowerCookie(name)}
		if d.names == nil {
			d.names = make(map[string]*dirent)
		}
		d.names[name] = e
		if d.kids != nil {
			if pos, ok := findIn(d.list, name); ok {
				e.child, d.kids[pos] = d.kids[pos], nil
			}
		}
	}
	return e
}

// setUpper records that the upper now has an object of this name.
func (d *dirState) setUpper(name string, n *inode) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.entry(name)
	if e.cookie == 0 {
		e.cookie = bornCookie(name)
		d.fresh = append(d.fresh, e)
	}
	if e.entry {
		e.white, e.entry, e.xform = false, false, false
	}
	e.upper, e.typ, e.ino, e.child = true, n.dtype, n.ino, n
}

// mark records that a marker hides the lower name.
func (d *dirState) mark(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.entry(name)
	e.white, e.entry, e.xform = true, false, false
}

// unmark records that no marker hides the lower name any more.
func (d *dirState) unmark(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.names[name]; e != nil && !e.entry {
		e.white = false
	}
}

// setGone records that the name no longer exists; white says that a whiteout
// took its place, xform that it is a file with an attribute.
func (d *dirState) setGone(name string, white, xform bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.entry(name)
	if e.cookie >= cookieBorn {
		// The entry stays where it is listed.
		e.gone, e.upper, e.child = true, false, nil
		if d.removed++; d.removed >= 64 && d.removed*2 >= len(d.born)+len(d.fresh) {
			d.place()
		}
		e = &dirent{name: name, white: e.white, entry: e.entry, xform: e.xform}
		d.names[name] = e
	}
	e.upper, e.child, e.ino, e.typ = false, nil, 0, 0
	if white {
		e.white, e.entry, e.xform = true, true, xform
	}
	if !e.white {
		delete(d.names, name)
	}
}

// place puts the fresh names where they belong among those that can be listed, and
// drops removed ones: readers find their place by cookie, so names may go at any time. A
// name whose position is taken gets the next that is free. Preconditions: mu is held
// exclusively.
func (d *dirState) place() {
	isGone := func(e *dirent) bool { return e.gone }
	old, fresh := slices.DeleteFunc(d.born, isGone), slices.DeleteFunc(d.fresh, isGone)
	slices.SortFunc(fresh, func(a, b *dirent) int {
		return cmp.Or(cmp.Compare(a.cookie, b.cookie), cmp.Compare(a.name, b.name))
	})
	all := make([]*dirent, 0, len(old)+len(fresh))
	last := uint64(0)
	for _, e := range fresh {
		for {
			for len(old) > 0 && old[0].cookie <= e.cookie {
				all, last, old = append(all, old[0]), old[0].cookie, old[1:]
			}
			if last < e.cookie {
				break
			}
			e.cookie = last + 1
		}
		all, last = append(all, e), e.cookie
	}
	d.born, d.fresh, d.removed = append(all, old...), nil, 0
}

// dirEntry is one name as a directory stream shows it.
type dirEntry struct {
	name   string
	cookie uint64
	ino    uint64
	typ    uint8
}

// entriesAfter appends up to limit entries whose cookies follow after.
// Preconditions: the directory is loaded.
func (d *dirState) entriesAfter(after uint64, limit int, out []dirEntry) []dirEntry {
	d.mu.RLock()
	if len(d.fresh) > 0 {
		d.mu.RUnlock()
		d.mu.Lock()
		d.place()
		d.mu.Unlock()
		d.mu.RLock()
	}
	defer d.mu.RUnlock()
	if d.list != nil && after < cookieBorn {
		pos := 0
		if after >= cookieLower {
			pos = int(after-cookieLower) + 1
		}
		for ; pos < d.list.length() && len(out) < limit; pos++ {
			name, o := d.list.at(pos)
			de := dirEntry{name: name, cookie: cookieLower + uint64(pos), ino: o.ino(), typ: o.typ()}
			if e := d.names[name]; e != nil {
				switch {
				case e.upper:
					de.ino, de.typ = e.ino, e.typ
				case e.white:
					continue
				}
			}
			out = append(out, de)
		}
	}
	i := 0
	if after >= cookieBorn {
		i = sort.Search(len(d.born), func(i int) bool { return d.born[i].cookie > after })
	}
	for ; i < len(d.born) && len(out) < limit; i++ {
		if e := d.born[i]; !e.gone {
			out = append(out, dirEntry{name: e.name, cookie: e.cookie, ino: e.ino, typ: e.typ})
		}
	}
	return out
}

// subdirs counts the directories among the names. Preconditions: loaded.
func (d *dirState) subdirs() (n uint32) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, e := range d.names {
		if e.upper && e.typ == unix.DT_DIR {
			n++
		}
	}
	if d.list == nil {
		return n
	}
	for pos := range d.list.length() {
		name, o := d.list.at(pos)
		if o.typ() != unix.DT_DIR {
			continue
		}
		if e := d.names[name]; e == nil || !e.upper && !e.white {
			n++
		}
	}
	return n
}

// empty reports whether the directory shows no name. Preconditions: loaded.
func (d *dirState) empty() bool { return len(d.entriesAfter(0, 1, nil)) == 0 }
