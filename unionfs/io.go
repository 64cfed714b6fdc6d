package unionfs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/ledger"
)

// IO is how the data of files reaches programs.
type IO uint8

const (
	// IOAuto takes IONoOpen for a read-only union, IOPassthrough for a writable one
	// of root's, and IOCache for one of a user's, who may not register files.
	IOAuto IO = iota
	// IOPassthrough lets the kernel read and write files of the upper, and of the
	// lowers in a read-only union, directly, without asking.
	IOPassthrough
	// IONoOpen opens files without asking. What opening them does otherwise is
	// done when they are written to: so an error of copying a file up is one of
	// writing, and reading changes an access time only where it reaches us.
	IONoOpen
	// IOCache keeps data in the page cache of the mount.
	IOCache
)

var ioNames = [...]string{IOAuto: "auto", IOPassthrough: "passthrough", IONoOpen: "noopen", IOCache: "cache"}

// String returns the word of the mount option io.
func (io IO) String() string {
	if int(io) < len(ioNames) {
		return ioNames[io]
	}
	return fmt.Sprintf("io(%d)", uint8(io))
}

// MarshalText gives JSON the same words.
func (io IO) MarshalText() ([]byte, error) { return []byte(io.String()), nil }

// UnmarshalText parses what MarshalText wrote.
func (io *IO) UnmarshalText(b []byte) error {
	for v, n := range ioNames {
		if n == string(b) {
			*io = IO(v)
			return nil
		}
	}
	return fmt.Errorf("unknown way of I/O %q: expected auto, passthrough, noopen or cache", b)
}

// resolve decides what IOAuto means.
func (io IO) resolve(readOnly, root bool) IO {
	switch {
	case io != IOAuto:
		return io
	case readOnly:
		return IONoOpen
	case root:
		return IOPassthrough
	}
	return IOCache
}

// IO returns how this union does it. What the kernel refuses later is not counted.
func (fs *FS) IO() IO { return fs.io }

// backing registers real files with the kernel, so that it reads and writes them
// itself (FUSE_DEV_IOC_BACKING_OPEN).
type backing struct {
	// open may be refused: EPERM outside the initial user namespace, ELOOP if too
	// many file systems lie on each other. nil: no registration.
	open  func(fd int) (id int32, err error)
	close func(id int32)
}

// SetBacking tells the union how to register the file behind a descriptor with the
// kernel, and how to take that back. The transport calls it before the first request.
func (fs *FS) SetBacking(open func(fd int) (id int32, err error), shut func(id int32)) {
	fs.backing = backing{open, shut}
}

// StackDepth is how many file systems may lie on each other below the mount for
// passthrough: 2 if a file system whose files we register lies on others itself. The
// mount can then not become a layer of kernel overlayfs.
func (fs *FS) StackDepth() int {
	fds := make([]int, 0, 1)
	if fs.upper != nil {
		fds = append(fds, fs.upper.root)
	} else {
		for _, l := range fs.layers {
			fds = append(fds, l.root)
		}
	}
	const ecryptfs = 0xf15f
	for _, fd := range fds {
		var st unix.Statfs_t
		if unix.Fstatfs(fd, &st) != nil {
			continue
		}
		switch st.Type {
		case unix.OVERLAYFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, ecryptfs:
			return 2
		}
	}
	return 1
}

// fileIO is how a regular file is open, in a union without IONoOpen. The kernel
// allows one way at a time (fs/fuse/iomode.c): all opens of a file go through the
// page cache of the mount, or all to one registered file. A lower file of a writable
// union goes through the page cache, so that whoever has it open sees what is
// written after it has been copied up; the copy is passed through once nobody has it
// open otherwise.
type fileIO struct {
	mu sync.Mutex
	// passed and cached count the handles that the kernel has of either kind, for
	// at least as long as it counts them; guarded by mu.
	passed, cached int
	open           atomic.Int32 // their sum, for those who do not hold mu
	backing        int32        // id, 0: none; guarded by mu
	// pushed: the file has been handed to the kernel, or was not fit for that;
	// guarded by mu.
	pushed bool
	// stale: the page cache of the mount may have been passed by; guarded by mu.
	stale bool

	// opens is the record of all this in the ledger, nil if there is none. Guarded by mu.
	opens *ledger.Opens
	rec   ledger.Ref
}

// mirror brings the ledger up to date. The registration comes first: a file that is open
// has one. Preconditions: mu is held.
func (fs *FS) mirror(n *inode, f *fileIO) {
	f.open.Store(int32(f.passed + f.cached))
	if fs.ledger == nil {
		return
	}
	if f.passed+f.cached == 0 && f.backing == 0 {
		fs.ledger.Drop(f.rec)
		f.opens, f.rec = nil, 0
		return
	}
	if f.opens == nil {
		if f.opens, f.rec = fs.ledger.AddOpens(n.id); f.opens == nil {
			return
		}
	}
	f.opens.Backing.Store(f.backing)
	f.opens.Writers.Store(n.extra().writers.Load())
	f.opens.Passed.Store(int32(f.passed))
	f.opens.Cached.Store(int32(f.cached))
}

// Handles carry nothing but how the file is open.
const (
	handleCached = 0
	handlePassed = 1
	handleDirect = 2 // every read and write is a request; the kernel counts it as neither
)

// maxIdleBacking is how many files stay registered in total while nobody has them
// open: each pins an open file in the kernel.
const maxIdleBacking = 1 << 15

// ioState returns the fileIO of n.
func (n *inode) ioState() *fileIO {
	e := n.ownExtra()
	if f := e.io.Load(); f != nil {
		return f
	}
	e.io.CompareAndSwap(nil, &fileIO{})
	return e.io.Load()
}

// Direct reports whether reads and writes that come with a handle are those of programs, not
// of the page cache. Of a file that is passed through none come, unless they have to.
func (fs *FS) Direct(fh uint64) bool { return fh != handleCached }

// openHandle decides how a new handle of the file does its I/O, and counts it.
func (fs *FS) openHandle(n *inode, write bool, out *fuse.OpenOut) {
	out.OpenFlags = fs.openFlags()
	if fs.io == IONoOpen {
		fs.counts.OpenedCached() // the kernel asks once, then it opens files by itself
		return
	}
	direct := fs.direct(n)
	f := n.ioState()
	f.mu.Lock()
	defer f.mu.Unlock()
	defer fs.mirror(n, f)
	if direct && f.passed > 0 {
		// The kernel wants the registered file named as long as others have it; reads and
		// writes are requests all the same.
		f.passed++
		fs.counts.OpenedCached()
		out.Fh, out.OpenFlags, out.BackingID = handlePassed, fuse.FOPEN_PASSTHROUGH|fuse.FOPEN_DIRECT_IO|fuse.FOPEN_NOFLUSH, f.backing
		return
	}
	if direct {
		f.stale = true
		fs.counts.OpenedCached()
		out.Fh, out.OpenFlags = handleDirect, fuse.FOPEN_DIRECT_IO|fuse.FOPEN_NOFLUSH
		return
	}
	if f.passed > 0 || fs.io == IOPassthrough && f.cached == 0 && fs.mayPass(n, write) && fs.register(n, f) {
		f.passed++
		fs.counts.OpenedPassed()
		f.stale = true
		out.Fh, out.OpenFlags, out.BackingID = handlePassed, fuse.FOPEN_PASSTHROUGH|fuse.FOPEN_NOFLUSH, f.backing
		return
	}
	if f.cached == 0 && !write && !f.pushed && !fs.changing {
		f.pushed = true
		fs.push(n)
	}
	f.cached++
	fs.counts.OpenedCached()
	out.Fh = handleCached
	if f.stale {
		out.OpenFlags &^= fuse.FOPEN_KEEP_CACHE
		f.stale = false
	}
}

// direct reports whether every read and write of a file that is being opened has to be a
// request.
func (fs *FS) direct(n *inode) bool {
	if fs.complete || fs.faults == nil || !fs.faults.HasData() {
		return fs.complete
	}
	n.mu.RLock()
	at := n.where
	n.mu.RUnlock()
	return fs.faults.Direct(fs.pathOf(n, at))
}

// mayPass reports whether the file may be passed through: never one of the lowers
// in a writable union; nor one that is setuid or setgid and opened for writing,
// because who writes to it then, and may have to lose these bits, is only known from
// an earlier request (SETATTR of nothing), which other calls cause too.
func (fs *FS) mayPass(n *inode, write bool) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if !n.upper {
		return fs.readOnly() && !fs.lowers.dataElsewhere(n.low)
	}
	if n.meta || !write {
		return !n.meta
	}
	var st unix.Stat_t
	err := fs.statLocked(n, &st)
	return err == nil && st.Mode&(unix.S_ISUID|unix.S_ISGID) == 0
}

// register makes sure that the file is registered. Preconditions: f.mu is held.
func (fs *FS) register(n *inode, f *fileIO) bool {
	if f.backing != 0 {
		return true
	}
	if fs.backing.open == nil || fs.noBacking.Load() {
		return false
	}
	h, err := fs.dataFd(n, false)
	if err != nil {
		return false
	}
	defer h.release()
	id, err := fs.backing.open(h.fd)
	if err != nil {
		if errors.Is(err, unix.EPERM) && !fs.noBacking.Swap(true) {
			fs.log.Info("the kernel does not let this process pass files through; they are read and written through the mount's page cache",
				zap.Error(err))
		}
		return false
	}
	f.backing = id
	fs.backings.Add(1)
	return true
}

// store puts data into the kernel's page cache that it has not asked for yet.
type store struct {
	headroom int
	fn       func(nodeid uint64, buf []byte) // nil: not possible
}

// SetStore tells the union how to hand data of a node to the kernel: the whole
// content, with headroom bytes of space in front of it. The transport calls it
// before the first request.
func (fs *FS) SetStore(headroom int, fn func(nodeid uint64, buf []byte)) {
	fs.store = store{headroom, fn}
}

// handOut is how large a file may be that is handed to the kernel when it is opened
// for the first time, which saves the request to read it.
const handOut = 32 << 10

var storeBufs = sync.Pool{New: func() any { b := make([]byte, 512+handOut+1); return &b }}

// push hands a small file to the kernel, one of the lowers whose data is in the page
// cache of its own file system. Nobody may have the file open: a reader of a page would
// have to be waited for. Preconditions: the fileIO's mu is held.
func (fs *FS) push(n *inode) {
	if fs.store.fn == nil {
		return
	}
	// While n.mu is held, the file is not copied up, and so neither truncated nor
	// written to.
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.upper || fs.lowers.dataElsewhere(n.low) {
		return
	}
	h, err := fs.dataFdLocked(n, false)
	if err != nil {
		return
	}
	defer h.release()
	bp := storeBufs.Get().(*[]byte)
	defer storeBufs.Put(bp)
	// One byte more than may be: larger files show.
	data := (*bp)[fs.store.headroom : fs.store.headroom+handOut+1]
	flags := unix.RWF_NOWAIT
	if fs.lowers.layer(n.low).inMemory {
		flags = 0 // it does not know the flag, and never waits for a disk
	}
	got, err := unix.Preadv2(h.fd, [][]byte{data}, 0, flags)
	if err != nil || got <= 0 || got > handOut {
		return
	}
	fs.store.fn(n.id, (*bp)[:fs.store.headroom+got])
}

// closeHandle counts a handle that has been closed.
func (fs *FS) closeHandle(n *inode, fh uint64) {
	f := n.extra().io.Load()
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	defer fs.mirror(n, f)
	switch fh {
	case handleDirect:
		return
	case handleCached:
		f.cached--
		return
	}
	f.passed--
	if f.passed == 0 && fs.backings.Load() > maxIdleBacking {
		fs.unregister(f)
	}
}

// unregister gives the file's registration back. Preconditions: f.mu is held, or
// nobody else knows f.
func (fs *FS) unregister(f *fileIO) {
	if f.backing != 0 {
		fs.backing.close(f.backing)
		f.backing = 0
		fs.backings.Add(-1)
	}
}
