package unionfs

import (
	"errors"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/metadata/chainindex"
	"github.com/plyfs/plyfs/unionfs/ledger"
)

// A server may take over the mount of one that has died. The kernel goes on with the
// node ids, the lookup counts and the open files that it has, of which the new server
// knows nothing but what is in the ledger.
//
// An object of indexed layers that is not in the ledger is nothing but what is remembered
// of it: its node id is a slot of the index, which tells its path, and it is made again
// when the kernel asks for that id. All others are made again before the first request. So
// lookups need not be counted exactly: each that the kernel may know has one reference
// that stands for all that it had before, and of what it forgets, only the part counts
// that this server has told it.

// Resumable reports whether another process with the same options can go on with the
// mount of this union when this one has died.
func (fs *FS) Resumable() bool {
	if fs.ledger != nil {
		return fs.ledger.Complete()
	}
	_, ok := fs.lowers.(*indexed)
	return ok && fs.readOnly() && fs.io == IONoOpen && !fs.changing
}

// NeedsLedger reports whether the union must keep a ledger for another process to go on
// with it.
func (fs *FS) NeedsLedger() bool { return !fs.Resumable() }

// SetLedger makes the union write down what another process needs. Call it before the
// first request.
func (fs *FS) SetLedger(l *ledger.Ledger) {
	fs.ledger = l
	fs.nodes.newID = l.NextID
}

// FirstID is where node ids of a new ledger begin.
const FirstID uint64 = upperIDs

// Resume takes over from a server that has died, before the first request: the kernel
// knows objects from it. past is what its ledger says, nil if it had none, and fds are
// descriptors of objects without a name, by node id, which are taken over.
func (fs *FS) Resume(records *ledger.Past, fds map[uint64]int) {
	fs.resumed = true
	if records == nil {
		return
	}
	p := newPast(fs, records, fds)
	fs.past = p
	if fs.work != nil {
		if err := fs.work.SweepAfter(p.working()); err != nil {
			fs.log.Warn("the workdir is not clean", zap.Error(err))
		}
	}
	p.settleAll(records.Pending)
	for id := range p.byID {
		if _, err := p.inode(id); err != nil {
			p.lose(id, err)
		}
	}
	for i := range records.Opens {
		o := &records.Opens[i]
		n, err := p.inode(o.ID)
		if err != nil || n.typ() != unix.S_IFREG {
			fs.ledger.Drop(o.Ref)
			continue
		}
		p.reopen(n, o)
	}
	fs.past = nil
	for _, n := range p.paths {
		fs.unref(n, 1)
	}
	for _, fd := range p.fds {
		fsat.Close(fd) // of nothing that the kernel knows
	}
}

// natural returns the referenced inode of an object of indexed layers that is where they
// have it; parent finds that of its directory.
func (fs *FS) natural(id uint64, parent func(uint64) (*inode, error)) (*inode, error) {
	t, ok := fs.lowers.(*indexed)
	if !ok || id >= upperIDs || id == fuse.FUSE_ROOT_ID {
		return nil, errStale
	}
	dir, err := t.x.Parent(chainindex.Slot(id))
	if err != nil {
		return nil, err
	}
	path, err := t.x.Path(chainindex.Slot(id))
	if err != nil {
		return nil, err
	}
	p, err := parent(uint64(dir))
	if err != nil {
		return nil, err
	}
	if !p.isDir() {
		return nil, errStale
	}
	n, err := fs.child(p, path[strings.LastIndexByte(path, '/')+1:], nil)
	if err == nil && n.id != id {
		fs.unref(n, 1)
		err = errStale
	}
	return n, err
}

// finishMove is for a rename that an earlier server may have done. It reports whether that
// is so, and does what follows the step that makes it visible.
func (fs *FS) finishMove(from, to *inode, oldName, newName string, code ledger.Code, op *ledger.Op) (done bool, err error) {
	if err := errors.Join(fs.load(from), fs.load(to)); err != nil {
		return false, err
	}
	if code == ledger.Swap {
		return fs.swapped(from, to, &ledger.Request{Name: oldName, Name2: newName, Moved: op.Moved()}), nil
	}
	f, g := from.dir.find(oldName, false), to.dir.find(newName, false)
	if f.upper || !g.upper {
		return false, nil
	}
	// What is left is a whiteout, where the file system cannot make one on the way.
	if f.visible() {
		c, err := fs.beginChange(from)
		if err != nil {
			return true, err
		}
		defer c.end()
		if err := fs.hideByMarker(c, &f); err != nil {
			return true, err
		}
		if f.needsWhiteout() {
			if err := errors.Join(fs.allowWhiteouts(c), fs.work.WhiteoutAt(c.h.fd, f.name)); err != nil {
				return true, err
			}
			from.dir.setGone(f.name, true, fs.xwhite)
		}
	}
	return true, nil
}

// node returns the inode of a node id that the kernel holds.
func (fs *FS) node(id uint64) *inode {
	if n := fs.nodes.get(id); n != nil || !fs.resumed {
		return n
	}
	n, err := fs.revive(id)
	if err != nil {
		fs.log.Error("an object that an earlier server has shown cannot be found", zap.Uint64("node", id), zap.Error(err))
	}
	return n
}

// revive makes the inode of a node id from an earlier server. Its reference stands for
// those that the kernel has.
func (fs *FS) revive(id uint64) (*inode, error) {
	n, err := fs.natural(id, func(id uint64) (*inode, error) {
		if n := fs.node(id); n != nil {
			return n, nil
		}
		return nil, errStale
	})
	if err != nil {
		return nil, err
	}
	if n.ownExtra().revived.Swap(true) {
		fs.unref(n, 1) // another request was faster
		return n, nil
	}
	n.ownExtra().lookups.Add(1)
	return n, nil
}

// passed counts a reference to n that has passed to the kernel.
func (fs *FS) passed(n *inode) {
	if fs.resumed {
		n.ownExtra().lookups.Add(1)
	}
}

// forgotten says how many of the references that the kernel gives back are ours.
func (fs *FS) forgotten(n *inode, count int64) int64 {
	if !fs.resumed {
		return count
	}
	lookups := &n.ownExtra().lookups
	for {
		have := lookups.Load()
		if ours := min(have, count); lookups.CompareAndSwap(have, have-ours) {
			return ours
		}
	}
}
