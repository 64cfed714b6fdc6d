package unionfs

// The kernel keeps attributes until it changes them itself or is told to forget
// them. That takes a message, and the next user a request, so it is done only
// where the kernel does not know that something has changed, or may not notice in
// time: it forgets the attributes of a directory in which it has changed a name,
// but an answer to somebody else that is still under way, with those from before,
// would be kept. That cannot happen if nobody but the thread that makes the change
// has been told any since the kernel last forgot them.

// toldMany stands for several threads, or some that we do not know.
const toldMany = ^uint32(0)

// tell notes that the thread pid is about to be told the attributes of n. It comes
// before they are read.
func (n *inode) tell(pid uint32) {
	for {
		switch t := n.told.Load(); {
		case t == pid && pid != 0, t == toldMany:
			return
		case t == 0 && pid != 0:
			if n.told.CompareAndSwap(0, pid) {
				return
			}
		default:
			n.told.Store(toldMany)
			return
		}
	}
}

// changed is called when the thread pid has changed something of n that the kernel
// forgets by itself, before it is answered.
func (fs *FS) changed(n *inode, pid uint32) {
	if t := n.told.Load(); t != 0 && t != pid {
		fs.staleAttr(n)
	}
}

// staleAttr makes the kernel forget the attributes of n, which have changed.
func (fs *FS) staleAttr(n *inode) {
	if n.told.Swap(0) != 0 {
		fs.invalidate(n.id, -1, 0)
	}
}

// staleAll makes it forget all that it has of n, pages or listing as well.
func (fs *FS) staleAll(n *inode) {
	n.told.Store(0)
	fs.invalidate(n.id, 0, 0)
}
