package unionfs

import (
	"strings"

	"go.uber.org/zap"

	"github.com/plyfs/plyfs/metadata/chainindex"
)

// A server may take over the mount of one that has died. The kernel goes on with the
// node ids and the lookup counts that it has, of which the new server knows nothing.
//
// In a read-only union of indexed layers that is little to know. A node id is the slot
// of the object in the index, which tells its path; an inode is nothing but what is
// remembered of it, and can be made again whenever the kernel asks for its id; and there
// are no handles. So lookups need not be counted exactly, either: what is dropped too early
// comes back, and of what the kernel forgets, only the part counts that this server
// has told it.

// Resumable reports whether another process with the same options can go on with the
// mount of this union when this one has died.
func (fs *FS) Resumable() bool {
	_, ok := fs.lowers.(*indexed)
	return ok && fs.readOnly() && fs.io == IONoOpen && !fs.changing
}

// Resume says, before the first request, that the kernel knows objects from an earlier
// server. The union must be [FS.Resumable].
func (fs *FS) Resume() { fs.resumed = true }

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
	t := fs.lowers.(*indexed)
	if id >= upperIDs {
		return nil, errStale
	}
	path, err := t.x.Path(chainindex.Slot(id))
	if err != nil {
		return nil, err
	}
	n := fs.root
	n.refs.Add(1)
	for name := range strings.SplitSeq(path, "/") {
		child, err := fs.child(n, name, nil)
		fs.unref(n, 1)
		if err != nil {
			return nil, err
		}
		n = child
	}
	if n.id != id {
		fs.unref(n, 1)
		return nil, errStale
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
