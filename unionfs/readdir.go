package unionfs

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// OpenDir implements OPENDIR. ENOSYS tells the kernel that directories need no
// handle: it stops asking, and keeps listings in its page cache, for ever.
func (fs *FS) OpenDir(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if fs.changing {
		// Kept while it is read, so that names that come and go meanwhile do not confuse
		// anybody, but read anew by who opens it next.
		out.OpenFlags = fuse.FOPEN_CACHE_DIR
		return fuse.OK
	}
	return fuse.ENOSYS
}

// ReleaseDir implements RELEASEDIR: a handle holds nothing.
func (fs *FS) ReleaseDir(*fuse.ReleaseIn) {}

// ReadDir implements READDIR.
func (fs *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	n := fs.node(in.NodeId)
	return fs.readDir(n, in, func(e *dirEntry) bool {
		return out.AddDirEntry(fuse.DirEntry{Name: e.name, Ino: fs.shownIno(e.ino), Mode: uint32(e.typ) << 12, Off: e.cookie})
	})
}

// ReadDirPlus implements READDIRPLUS: each entry is looked up as well.
func (fs *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	n := fs.node(in.NodeId)
	first := in.Offset == 0
	seen := look{pid: in.Pid} // one for all entries: it escapes
	return fs.readDir(n, in, func(e *dirEntry) bool {
		if first && n.low != nil {
			first = false
			fs.lowers.walked(n.low)
		}
		eo := out.AddDirLookupEntry(fuse.DirEntry{Name: e.name, Ino: fs.shownIno(e.ino), Mode: uint32(e.typ) << 12, Off: e.cookie})
		if eo == nil {
			return false
		}
		if e.cookie < cookieLower {
			return true // "." and "..": node id 0, not to be cached
		}
		seen.n = nil
		c, err := fs.child(n, e.name, &seen)
		if err == nil {
			err = fs.reply(c, &seen, eo)
		}
		if err != nil {
			// The name is still right; the kernel looks it up when asked.
			*eo = fuse.EntryOut{}
		}
		return true
	})
}

// HasWork reports whether there is something to prepare for requests to come.
func (fs *FS) HasWork() bool { return fs.lowers.hasWork() }

// Idle prepares a piece of it. The transport calls it when it has no request to answer.
func (fs *FS) Idle() { fs.lowers.step() }

const entryBatch = 128

// What a batch holds on to is soon overwritten.
var entryBatches = sync.Pool{New: func() any { return new([entryBatch]dirEntry) }}

// readDir passes the entries that follow in.Offset to add until it says no.
func (fs *FS) readDir(n *inode, in *fuse.ReadIn, add func(*dirEntry) bool) fuse.Status {
	if n == nil || !n.isDir() {
		return fuse.Status(unix.ESTALE)
	}
	if err := fs.load(n); err != nil {
		return fs.status("readdir", n, err)
	}
	if in.Offset == 0 {
		fs.accessed(n, in.Flags)
	}
	after := in.Offset
	if after < cookieDot {
		if !add(&dirEntry{name: ".", cookie: cookieDot, ino: n.ino, typ: unix.DT_DIR}) {
			return fuse.OK
		}
		after = cookieDot
	}
	if after < cookieDotDot {
		if !add(&dirEntry{name: "..", cookie: cookieDotDot, ino: fs.parentIno(n), typ: unix.DT_DIR}) {
			return fuse.OK
		}
		after = cookieDotDot
	}
	bp := entryBatches.Get().(*[entryBatch]dirEntry)
	defer entryBatches.Put(bp)
	for {
		entries := n.dir.entriesAfter(after, entryBatch, bp[:0])
		for i := range entries {
			if !add(&entries[i]) {
				return fuse.OK
			}
			after = entries[i].cookie
		}
		if len(entries) < entryBatch {
			return fuse.OK
		}
	}
}

func (fs *FS) parentIno(n *inode) uint64 {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.where.parent == nil {
		return n.ino
	}
	return n.where.parent.ino
}
