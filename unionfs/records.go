package unionfs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/ledger"
)

// What another server cannot find out by itself is in the ledger (package ledger), if
// the mount has one: which node id an object of the upper has, of a hard link, or of
// anything in layers without an index; and requests that change names or counts.

// recorded reports whether the names of n have to be in the ledger. In indexed layers a
// node id is a slot, which tells the name.
func (fs *FS) recorded(n *inode) bool {
	return fs.ledger != nil && (n.upper || n.id >= upperIDs || n.linked || !fs.lowers.sharesSlots())
}

// record writes down that n has the name a. Preconditions: n.mu is held exclusively, or
// nobody else knows n.
func (fs *FS) record(n *inode, a alias) ledger.Ref {
	if !fs.recorded(n) {
		return 0
	}
	if was := fs.past.at(a.parent.id, a.name); was != nil && was.ID == n.id {
		return was.Ref
	}
	return fs.ledger.Add(ledger.Name, n.id, a.parent.id, a.name, n.ino)
}

// recordNames writes down the names of an object that is about to be copied up: from then
// on its slot does not tell where it is. Preconditions: n.mu is held exclusively.
func (fs *FS) recordNames(n *inode) {
	if fs.ledger == nil {
		return
	}
	if n.rec == 0 && n.where.parent != nil {
		n.rec = fs.ledger.Add(ledger.Name, n.id, n.where.parent.id, n.where.name, n.ino)
	}
	more := n.extra().more
	for i := range more {
		if a := &more[i]; a.rec == 0 {
			a.rec = fs.ledger.Add(ledger.Name, n.id, a.parent.id, a.name, n.ino)
		}
	}
}

// renumber changes the inode number of n. Preconditions: n.mu is held exclusively.
func (fs *FS) renumber(n *inode, ino uint64) {
	n.ino = ino
	fs.ledger.SetIno(n.rec, ino)
	for _, a := range n.extra().more {
		fs.ledger.SetIno(a.rec, ino)
	}
}

// idFor returns a node id for an object of a lower tree: its slot, unless a redirect that
// somebody has copied or forged shows it twice. Without an index slots are those of one
// process, and the kernel may know others.
func (fs *FS) idFor(low lowerObj) (id uint64, twice bool) {
	if fs.resumed && !fs.lowers.sharesSlots() {
		return fs.nodes.newID(), false
	}
	if n := fs.nodes.get(low.slot()); n != nil && n.refs.Load() > 0 {
		return fs.nodes.newID(), true
	}
	return low.slot(), false
}

// resendBit marks the unique number of a request that the kernel sends again
// (FUSE_UNIQUE_RESEND, include/uapi/linux/fuse.h).
const resendBit = 1 << 63

// begin writes down a request.
func (fs *FS) begin(h *fuse.InHeader, q ledger.Request) *ledger.Op {
	if fs.ledger == nil {
		return nil
	}
	return fs.ledger.Begin(h.Unique&^resendBit, q)
}

// Answered is called when a request has been answered.
func (fs *FS) Answered(unique uint64) { fs.ledger.Answered(unique &^ resendBit) }

// resent is called before a request that may change something. If the server that had it
// first has copied one of the objects up, it has told nobody: the kernel would keep the
// attributes of the originals.
func (fs *FS) resent(h *fuse.InHeader, nodes ...*inode) {
	if h.Unique&resendBit == 0 {
		return
	}
	for _, n := range nodes {
		for n != nil {
			n.told.Store(toldMany)
			fs.staleAttr(n)
			n.mu.RLock()
			parent := n.where.parent
			n.mu.RUnlock()
			n = parent
		}
	}
}

// shows reports whether a name in p is one of n.
func (fs *FS) shows(p *inode, name string, n *inode) bool {
	c, err := fs.child(p, name, nil)
	if err != nil {
		return false
	}
	fs.unref(c, 1)
	return c == n
}

// unclaim gives back what the kernel was thought to have of an object that an earlier
// server had made for a request without answering it.
func (fs *FS) unclaim(id uint64) {
	n := fs.nodes.get(id)
	if n == nil || id == fuse.FUSE_ROOT_ID {
		return
	}
	if count := fs.forgotten(n, 1); count > 0 {
		fs.unref(n, count)
	}
}

// counted notes in op that a handle has been counted.
func counted(op *ledger.Op, fh uint64, write bool) {
	var mark ledger.Mark
	switch fh {
	case handleCached:
		mark = ledger.Cached
	case handlePassed:
		mark = ledger.Passed
	}
	if write {
		mark |= ledger.Writer
	}
	op.Set(mark)
}

// uncount takes back the handle that an earlier server has counted for a request that it
// has not answered.
func (fs *FS) uncount(n *inode, op *ledger.Op) {
	const any = ledger.Passed | ledger.Cached | ledger.Writer
	if op == nil || op.Before&any == 0 {
		return
	}
	if op.Had(ledger.Writer) {
		n.ownExtra().writers.Add(-1)
	}
	switch {
	case op.Had(ledger.Passed):
		fs.closeHandle(n, handlePassed)
	case op.Had(ledger.Cached):
		fs.closeHandle(n, handleCached)
	}
	op.Clear(any)
	op.Before &^= any
}

// loose writes down where an object is found that loses its last known name: by a
// descriptor or a name in the workdir (kind, text), and by its path in the lowers what
// has content there. Preconditions: n.mu is held exclusively.
func (fs *FS) loose(n *inode, kind ledger.Kind, text string) (refs [2]ledger.Ref) {
	if fs.ledger == nil {
		return refs
	}
	if kind != ledger.Lower {
		refs[0] = fs.ledger.Add(kind, n.id, 0, text, n.ino)
	}
	if n.low != nil && (!n.upper || n.meta) {
		refs[1] = fs.ledger.Add(ledger.Lower, n.id, 0, fs.lowers.path(n.low), n.ino)
	}
	return refs
}

// isOpen reports whether the kernel has the file open, or may have.
func (fs *FS) isOpen(n *inode) bool {
	if n.typ() != unix.S_IFREG {
		return false
	}
	if fs.io == IONoOpen {
		return true
	}
	f := n.extra().io.Load()
	return f != nil && f.open.Load() > 0
}
