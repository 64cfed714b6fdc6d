package unionfs

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
)

// linkIndex is the directory WORKDIR/index. For each lower object with several
// hard links that has been copied up it holds one more link to the copy, under
// the name of the original's origin in hexadecimal: so the names that are not
// in the upper find the copy. The form is that of kernel overlayfs mounted with
// index=on (ovl_get_index_name), and so is that of the attribute "nlink", which
// says how many names the union has.
type linkIndex struct {
	workdir int // O_PATH

	mu    sync.RWMutex
	fd    int             // O_PATH; -1: the directory does not exist yet; guarded by mu
	names map[string]bool // guarded by mu
}

const indexName = "index"

// openIndex reads the index below the directory workdir, which it takes over.
func (fs *FS) openIndex(workdir int) error {
	x := &linkIndex{workdir: workdir, fd: -1, names: make(map[string]bool)}
	fs.index = x
	fd, err := fsat.OpenName(workdir, indexName, unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %q in the workdir: %w", indexName, err)
	}
	x.fd = fd
	err = fsat.ReadDirBeneath(fd, func(e fsat.Dirent) error { x.names[e.Name] = true; return nil })
	if err != nil {
		return fmt.Errorf("read %q in the workdir: %w", indexName, err)
	}
	for name := range x.names {
		// A crash can leave a link to an object whose last name is gone
		// (kernel: ovl_verify_index).
		var st unix.Stat_t
		if err := fsat.Stat(fd, name, &st); err != nil || st.Mode&unix.S_IFMT == unix.S_IFDIR || st.Nlink > 1 {
			continue
		}
		if diff, of, ok := fs.readNlink(fd, name); ok && of == 'U' && int64(st.Nlink)+diff <= 0 {
			x.remove(name)
		}
	}
	return nil
}

func (x *linkIndex) close() {
	if x != nil {
		fsat.Close(x.fd)
		fsat.Close(x.workdir)
	}
}

func (x *linkIndex) empty() bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.names) == 0
}

func (x *linkIndex) has(name string) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.names[name]
}

// dir returns the descriptor of the directory, making it if need be.
func (x *linkIndex) dir() (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.fd >= 0 {
		return x.fd, nil
	}
	if err := fsat.Mkdir(x.workdir, indexName, 0o700); err != nil && err != unix.EEXIST {
		return -1, fmt.Errorf("create %q in the workdir: %w", indexName, err)
	}
	fd, err := fsat.OpenName(x.workdir, indexName, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, fmt.Errorf("open %q in the workdir: %w", indexName, err)
	}
	x.fd = fd
	return fd, nil
}

func (x *linkIndex) add(name string) {
	x.mu.Lock()
	x.names[name] = true
	x.mu.Unlock()
}

// remove takes an entry away. What cannot be removed is found at the next
// mount to have no name any more.
func (x *linkIndex) remove(name string) {
	x.mu.Lock()
	delete(x.names, name)
	fd := x.fd
	x.mu.Unlock()
	_ = fsat.Unlink(fd, name)
}

// indexEntry returns the name that the lower object has or would have in the
// index; "" if its file system cannot describe it.
func (fs *FS) indexEntry(low lowerObj) (string, error) {
	o, err := fs.lowers.origin(low)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil
	}
	return hex.EncodeToString(o), err
}

// lowerLink completes the new inode n of the lower object behind a name, which
// is one of several hard links, if it has been copied up through another of
// them; or it returns the inode that is known already, referenced.
func (fs *FS) lowerLink(n *inode, facts *lowerFacts) (*inode, error) {
	if have := fs.nodes.byReal(facts.id, lowerLinks); have != nil {
		return have, nil
	}
	e := n.ownExtra()
	e.group = &linkGroup{lower: facts.id, links: facts.links}
	if fs.index.empty() {
		return nil, nil
	}
	name, err := fs.indexEntry(n.low)
	if err != nil || !fs.index.has(name) {
		return nil, err
	}
	dir, err := fs.index.dir()
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := fs.statUpper(dir, name, &st); err != nil {
		return nil, fmt.Errorf("look at the link index: %w", err)
	}
	if st.Mode&unix.S_IFMT != n.typ() {
		return nil, fmt.Errorf("entry %s of the link index is of another type than its original: %w", name, unix.EIO)
	}
	if have := fs.nodes.byReal(realID{st.Dev, st.Ino}, upperObjects); have != nil {
		return have, nil
	}
	_, meta, err := fs.rules.read(fs.upper.dialect, dir, name, n.dtype)
	if err != nil {
		return nil, err
	}
	n.upper, n.meta, e.upID = true, meta, realID{st.Dev, st.Ino}
	if n.prot, err = fs.readProtection(dir, name); err != nil {
		return nil, err
	}
	e.group.index = name
	e.group.links = fs.unionLinks(dir, name, &st, facts.links)
	return nil, nil
}

// indexedUpper returns the group of an object that was found in the upper, if
// it has an entry in the index.
func (fs *FS) indexedUpper(f *found, st *unix.Stat_t, origin []byte) (*linkGroup, error) {
	if fs.index == nil || len(origin) == 0 || st.Nlink < 2 {
		return nil, nil
	}
	name := hex.EncodeToString(origin)
	if !fs.index.has(name) {
		return nil, nil
	}
	dir, err := fs.index.dir()
	if err != nil {
		return nil, err
	}
	var entry unix.Stat_t
	if err := fsat.Stat(dir, name, &entry); err != nil || entry.Dev != st.Dev || entry.Ino != st.Ino {
		return nil, err
	}
	g := &linkGroup{index: name}
	var lower uint32
	if f.low != nil {
		if have, err := fs.indexEntry(f.low); err == nil && have == name {
			if facts, err := fs.lowers.admit(f.low); err == nil {
				g.lower, lower = facts.id, facts.links
			}
		}
	}
	if lower == 0 {
		if facts, ok := fs.lowers.byOrigin(origin); ok {
			lower = facts.links
		}
	}
	g.links = fs.unionLinks(dir, name, st, lower)
	return g, nil
}

// unionLinks returns how many names the union has for the copy (dirfd, name),
// whose original has the given number of links, or 0 if that is not known.
func (fs *FS) unionLinks(dirfd int, name string, st *unix.Stat_t, lower uint32) uint32 {
	upper := int64(st.Nlink) - 1 // without the index itself
	diff, of, ok := fs.readNlink(dirfd, name)
	switch {
	case ok && of == 'U':
		return uint32(max(int64(st.Nlink)+diff, 1))
	case ok && lower > 0:
		return uint32(max(int64(lower)+diff, 1))
	}
	return uint32(max(upper, 1))
}

// readNlink reads the attribute "nlink": the difference between the union's
// link count and that of the copy (of == 'U') or of the original ('L').
func (fs *FS) readNlink(dirfd int, name string) (diff int64, of byte, ok bool) {
	v, err := fsat.GetxattrValue(dirfd, name, fs.upper.dialect.Attr("nlink"))
	if err != nil || len(v) < 2 || v[0] != 'U' && v[0] != 'L' {
		return 0, 0, false
	}
	diff, err = strconv.ParseInt(string(v[1:]), 10, 32)
	return diff, v[0], err == nil
}

func nlinkValue(of byte, diff int64) []byte { return fmt.Appendf(nil, "%c%+d", of, diff) }

// ensureCounted brings one of several hard links of the lowers into the upper
// before one of its names goes: only there the number of those that remain can
// be kept (kernel: ovl_nlink_start).
func (fs *FS) ensureCounted(n *inode) error {
	n.mu.RLock()
	grouped := n.extra().group != nil
	n.mu.RUnlock()
	if !grouped {
		return nil
	}
	return fs.ensureUpper(n)
}

// linksWillChange writes the link count of the union in relation to that of the
// copy, just before both change together: whichever crash comes, their sum is
// right (kernel: ovl_nlink_start). Preconditions: n.mu is held exclusively, n
// has been copied up.
func (fs *FS) linksWillChange(n *inode) error {
	g := n.extra().group
	if g == nil || g.index == "" {
		return nil
	}
	return fs.withRealLocked(n, func(dirfd int, name string) error {
		var st unix.Stat_t
		if err := fsat.Stat(dirfd, name, &st); err != nil {
			return err
		}
		v := nlinkValue('U', int64(g.links)-int64(st.Nlink))
		return fsat.Setxattr(dirfd, name, fs.upper.dialect.Attr("nlink"), v, 0)
	})
}

// linksLost records that a name is gone. With the last one the object leaves
// the index. Preconditions: n.mu is held exclusively.
func (fs *FS) linksLost(n *inode) {
	g := n.extra().group
	if g == nil {
		return
	}
	if g.links--; g.links > 0 {
		return
	}
	if g.index != "" {
		fault.Point("unlink.last")
		fs.index.remove(g.index)
	}
	fs.nodes.removeFrom(n, g.lower, lowerLinks)
	n.extra().group = nil
}

// linkUp gives a copied-up object the name in the upper that it has only in the
// lowers. Preconditions: c.p's opMu and n.mu are held.
func (fs *FS) linkUp(c *change, n *inode, f *found) error {
	g := n.extra().group
	if g == nil || g.index == "" || f.upper {
		return nil
	}
	var low, before unix.Stat_t
	if err := fs.lowers.stat(f.low, &low); err != nil {
		return err
	}
	if err := fsat.Fstat(c.h.fd, &before); err != nil {
		return err
	}
	dir, err := fs.index.dir()
	if err != nil {
		return err
	}
	// The copy gets a link more, the union does not.
	v := nlinkValue('L', int64(g.links)-int64(low.Nlink))
	if err := fsat.Setxattr(dir, g.index, fs.upper.dialect.Attr("nlink"), v, 0); err != nil {
		return fmt.Errorf("link up: %w", err)
	}
	fault.Point("linkup.counted")
	if err := fs.markImpure(c.p, c.h.fd); err != nil {
		return err
	}
	if err := fsat.Link(dir, g.index, c.h.fd, f.name); err != nil {
		return fmt.Errorf("link up: %w", err)
	}
	fault.Point("linkup.linked")
	_ = fsat.Utimes(c.h.fd, "", [2]unix.Timespec{before.Atim, before.Mtim})
	c.p.dir.setUpper(f.name, n)
	f.upper = true
	// The copy may soon have only names that do not lead to the original.
	return fs.linksWillChange(n)
}
