package unionfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fault"
	"github.com/plyfs/plyfs/cow/fsat"
	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/inject"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/whiteout/override"
)

// FS is one union. It implements fuse.RawFileSystem; serve it with
// unionfs/transport.
type FS struct {
	log    *zap.Logger
	counts *counters.Counters
	lowers lowerTree
	upper  *layer    // nil: read-only
	work   *cow.Work // nil: read-only

	euid, egid int // of this process
	owners     owners
	later      sync.WaitGroup // what New has left to do

	volatile bool
	rules    indirection // of lowers and upper alike
	redirect bool        // directories of the lowers can be renamed
	metacopy bool        // a change of attributes copies no data
	xattrs   bool        // the upper can hold our attributes
	xwhite   bool        // whiteouts are files with an attribute
	markers  bool        // whiteouts are files beside the name, see marker.go
	index    *linkIndex  // nil: hard links of the lowers are not kept
	atime    Atime       // of files, and of directories with
	dirAtime bool

	ttl         time.Duration // how long the kernel may keep what we tell it
	changing    bool          // it may not keep it for ever
	staticNlink bool
	countsDirs  bool
	shortInodes bool
	noXattrs    bool
	noACL       bool

	own     []realID // the upper and the workdir
	lockFd  int      // the upper directory, open for its lock
	mountFd int      // the private copy of the mount that the upper lies in, or -1
	lowerFd int      // that of the mount that the lowers lie in, or -1

	ledger *ledger.Ledger // nil: nobody can go on with the mount; immutable
	kept   keeping
	past   *past // while an earlier server's objects are taken over

	inos  *inoMap
	fds   *fdCache
	nodes *table
	root  *inode
	trim  *trimmer

	tellLayers bool           // see Options; immutable
	complete   bool           // the kernel keeps nothing; immutable
	faults     *inject.Faults // what requests meet; nil: nothing. Immutable once requests come
	layers     []*layer       // the lowers; immutable
	io         IO             // resolved; immutable
	backing    backing
	store      store
	resumed    bool         // the kernel may know objects from an earlier server
	noBacking  atomic.Bool  // the kernel refuses
	backings   atomic.Int64 // how many files are registered

	// orphans counts those that are held by descriptor; from maxOrphans on
	// others get a name in the workdir.
	orphans    atomic.Int64
	maxOrphans int64

	renameMu sync.RWMutex

	// invalidate is what SetInvalidator has set.
	invalidate func(nodeid uint64, off, length int64)
}

// Counters are what the union counts in; the transport counts requests there.
func (fs *FS) Counters() *counters.Counters { return fs.counts }

// Caching is how long the kernel may keep names and attributes.
func (fs *FS) Caching() time.Duration { return fs.ttl }

// SetFaults tells the union of faults that its files are to meet. The holder of the
// connection calls it before the first request.
func (fs *FS) SetFaults(f *inject.Faults) { fs.faults = f }

// forever is how long the kernel may keep what we tell it.
const forever = 365 * 24 * time.Hour

// ErrInvalid says that the options do not describe a union.
var ErrInvalid = errors.New("invalid union")

// maxCachedFds is how many descriptors are kept open without need. Each takes a
// kilobyte in the kernel; to open one again takes some microseconds.
const maxCachedFds = 4096

// maxLowers is what a scanObj can count.
const maxLowers = 1 << 16

// New opens the directories of a union, checks that they fit together, locks
// and sweeps the workdir. It clears the process's umask: the modes of new
// objects come with the requests.
func New(o Options) (*FS, error) {
	fault.Arm(o.Restarts == 0)
	if len(o.Lowers) == 0 {
		return nil, fmt.Errorf("%w: no lower directory given", ErrInvalid)
	}
	if len(o.Lowers) > maxLowers {
		return nil, fmt.Errorf("%w: %d lower directories given, the limit is %d", ErrInvalid, len(o.Lowers), maxLowers)
	}
	if (o.Upper == "") != (o.Work == "") {
		return nil, fmt.Errorf("%w: upperdir and workdir go together; give both or neither", ErrInvalid)
	}
	if err := checkNesting(o); err != nil {
		return nil, err
	}
	fs := &FS{log: o.Logger, counts: counters.New(), inos: newInoMap(), nodes: newTable(), trim: newTrimmer(), volatile: o.Volatile, lockFd: -1, mountFd: -1, lowerFd: -1, euid: os.Geteuid(), egid: os.Getegid()}
	fs.invalidate = func(uint64, int64, int64) {}
	if fs.log == nil {
		fs.log = zap.NewNop()
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read the limit on open files: %w", err)
	}
	fs.fds = newFdCache(int(min(limit.Cur/2, maxCachedFds)))
	table := int(min(limit.Cur, 2*maxCachedFds))
	if len(o.Lowers) > 32 {
		fsat.ReserveFds(table)
	} else {
		fs.later.Go(func() { fsat.ReserveFds(table) }) // it will be needed, but not yet
	}
	fs.maxOrphans = int64(min(limit.Cur/8, 1<<20))
	fs.ttl, fs.changing = forever, o.Timeout != 0
	if fs.changing {
		fs.ttl = max(o.Timeout, 0)
	}
	if fs.complete = o.Complete; fs.complete {
		fs.ttl, fs.changing, o.IO = 0, true, IOCache
	}
	fs.tellLayers = o.TellLayers
	fs.staticNlink, fs.shortInodes, fs.noXattrs, fs.noACL = o.StaticNlink, o.ShortInodes, o.NoXattrs, o.NoACL
	fs.countsDirs = o.CountSubdirs && !o.StaticNlink
	fs.io = o.IO.resolve(o.Upper == "" && !fs.changing, fs.euid == 0)
	fs.owners = newOwners(o.Owners)
	fs.rules.redirect = o.Redirect >= RedirectFollow
	fs.rules.metacopy = fs.rules.redirect && o.Metacopy
	if err := fs.open(o); err != nil {
		_ = fs.Close() // the first error is the one to report
		return nil, err
	}
	unix.Umask(0)
	return fs, nil
}

func (fs *FS) open(o Options) error {
	// The upper comes first: its inode numbers are shown as they are.
	if o.Upper != "" {
		if err := fs.openUpper(o); err != nil {
			return err
		}
	}
	layers, mount, err := openLowers(o.Lowers, &fs.owners)
	if err != nil {
		return err
	}
	fs.layers, fs.lowerFd = layers, mount
	if o.Chain != "" {
		tree, err := newIndexed(o.Chain, o.ChainID, layers, fs.fds, fs.inos, fs.euid == 0 || o.Owners.FilesOfRoot)
		if err == nil {
			fs.lowers = tree
			return fs.openRoot()
		}
		fs.log.Warn("the layers are read without their index", zap.Error(err))
	}
	tree, err := newScan(layers, fs.fds, fs.inos, fs.rules)
	if err != nil {
		return err
	}
	fs.lowers = tree
	fs.trap(tree)
	tree.ahead = newPrefetcher(tree)
	return fs.openRoot()
}

func (fs *FS) openUpper(o Options) error {
	upper, workdir, err := fs.openPair(o)
	if err != nil {
		return err
	}
	if err = fs.openWork(o, upper, workdir); err == nil {
		err = fs.openAtime(o)
	}
	if err != nil {
		fsat.Close(workdir)
		return err
	}
	fs.xattrs = fs.work.Keeps(fs.upper.dialect.Attr("opaque"))
	if o.Override != override.None {
		if fs.work.Keeps(o.Override.Attr()) {
			fs.upper.override = o.Override
			if err := fs.markOverride(); err != nil {
				fsat.Close(workdir)
				return err
			}
		} else {
			fs.log.Warn("owners are not kept: the file system cannot hold the attribute", zap.String("path", o.Upper), zap.String("attribute", o.Override.Attr()))
		}
	}
	fs.redirect = fs.xattrs && o.Redirect == RedirectOn
	if !fs.xattrs && !fs.upper.dialect.ReadsMarkers() {
		fs.log.Warn("no extended attributes: opaque directories are marked by files in them, names that begin with .wh. are refused", zap.String("path", o.Upper))
		fs.upper.dialect = fs.upper.dialect.Mixed()
	}
	if fs.xwhite, err = fs.work.ProbeWhiteouts(fs.upper.dialect.Attr("whiteout"), o.NoDevices); err != nil {
		fsat.Close(workdir)
		return err
	}
	// Who reads markers writes them too, so that fuse-overlayfs can go on with it.
	fs.markers = fs.xwhite && fs.upper.dialect.ReadsMarkers()
	fs.xwhite = fs.xwhite && fs.xattrs
	fs.metacopy = fs.redirect && o.Metacopy
	if !fs.xattrs || o.NoIndex {
		fsat.Close(workdir)
		return nil
	}
	return fs.openIndex(workdir)
}

// openWork takes the upper and the workdir into use.
func (fs *FS) openWork(o Options, upper, workdir int) (err error) {
	if fs.upper, err = newLayer(upper, o.Upper, o.UpperDialect, make(fileSystems)); err != nil {
		return err
	}
	fs.upper.owners = &fs.owners
	if fs.upper.remote {
		fs.maxOrphans = 0 // all keep a name
	}
	fs.inos.shown(fs.upper.dev, 1)
	fs.upper.nodev = fs.mountFd >= 0
	var st unix.Stat_t
	if err := fsat.Fstat(workdir, &st); err != nil {
		return fmt.Errorf("stat workdir %q: %w", o.Work, err)
	}
	if st.Dev != fs.upper.dev {
		return fmt.Errorf("%w: workdir %q is not on the file system of upperdir %q", ErrInvalid, o.Work, o.Upper)
	}
	fs.own = []realID{{st.Dev, st.Ino}}
	if err := fsat.Fstat(upper, &st); err != nil {
		return fmt.Errorf("stat upperdir %q: %w", o.Upper, err)
	}
	fs.own = append(fs.own, realID{st.Dev, st.Ino})
	um, uerr := fsat.MountID(upper)
	wm, werr := fsat.MountID(workdir)
	if uerr == nil && werr == nil && um != wm {
		return fmt.Errorf("%w: workdir %q and upperdir %q are reached through different mounts, so nothing can be renamed between them",
			ErrInvalid, o.Work, o.Upper)
	}
	if fs.lockFd, err = fsat.OpenName(upper, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return fmt.Errorf("open upperdir %q: %w", o.Upper, err)
	}
	if err := cow.LockDir(fs.lockFd); err != nil {
		return fmt.Errorf("upperdir %q: %w", o.Upper, err)
	}
	if fs.work, err = cow.OpenWork(workdir, cow.WorkOptions{Volatile: o.Volatile, TakeUnsynced: o.TakeUnsynced, Generation: o.Restarts}); err != nil {
		return fmt.Errorf("workdir %q: %w", o.Work, err)
	}
	return nil
}

// openPair opens the upper and the workdir through one private copy of the
// mount that both lie in (renames do not work from one mount to another), so
// that what is mounted below them later does not show; without the privilege
// for that, or in different mounts, as they are.
func (fs *FS) openPair(o Options) (upperFd, workFd int, err error) {
	var r fsat.Resolver
	u, err := r.Resolve(o.Upper)
	if err != nil {
		return -1, -1, fmt.Errorf("upperdir %q: %w", o.Upper, err)
	}
	w, err := r.Resolve(o.Work)
	if err != nil {
		return -1, -1, fmt.Errorf("workdir %q: %w", o.Work, err)
	}
	if upperFd, err = fsat.OpenTrusted(u); err != nil {
		return -1, -1, fmt.Errorf("open upperdir %q: %w", o.Upper, err)
	}
	if workFd, err = fsat.OpenTrusted(w); err != nil {
		fsat.Close(upperFd)
		return -1, -1, fmt.Errorf("open workdir %q: %w", o.Work, err)
	}
	common := u
	for !within(w, common) {
		common = filepath.Dir(common)
	}
	base := -1
	switch {
	case o.Mount != nil:
		base, err = unix.FcntlInt(o.Mount.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	case o.Restarts == 0:
		base, err = fsat.CloneTree(common, false, o.atimeAttr())
	}
	if err != nil || base < 0 {
		return upperFd, workFd, nil
	}
	if private := openAgain(base, common, u, upperFd); private >= 0 {
		if privateWork := openAgain(base, common, w, workFd); privateWork >= 0 {
			fs.mountFd = base
			fsat.Close(upperFd)
			fsat.Close(workFd)
			return private, privateWork, nil
		}
		fsat.Close(private)
	}
	fsat.Close(base)
	return upperFd, workFd, nil
}

// Mount is the private copy of the mount that the upper lies in, -1 if there is none.
// Descriptors of its objects belong to it: whoever goes on with this union needs it to
// give them names. It stays the union's.
func (fs *FS) Mount() int { return fs.mountFd }

// openAgain opens path, which is open as fd, through a copy of the mount at common; -1 if it
// cannot be reached there. The copy has what lies below other mounts: a directory of
// the same path there is another one.
func openAgain(base int, common, path string, fd int) int {
	rel, err := filepath.Rel(common, path)
	if err != nil {
		return -1
	}
	again, err := fsat.OpenBeneath(base, rel, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1
	}
	var a, b unix.Stat_t
	if fsat.Fstat(again, &a) != nil || fsat.Fstat(fd, &b) != nil || a.Dev != b.Dev || a.Ino != b.Ino {
		fsat.Close(again)
		return -1
	}
	return again
}

func (fs *FS) openRoot() error {
	low := fs.lowers.root()
	if fs.upper == nil {
		fs.root = newInode(fuse.FUSE_ROOT_ID, low.ino(), unix.S_IFDIR, low)
		fs.nodes.add(fs.root)
		return nil
	}
	_, opaque, err := fs.upper.readDirAt(fs.upper.root, nil)
	if err != nil {
		return fmt.Errorf("read upperdir %q: %w", fs.upper.path, err)
	}
	ino := low.ino()
	if opaque {
		low = nil
	}
	fs.root = newInode(fuse.FUSE_ROOT_ID, ino, unix.S_IFDIR, low)
	fs.root.upper = true
	fs.nodes.add(fs.root)
	return nil
}

// within reports whether path a is b or lies below it.
func within(a, b string) bool {
	return a == b || strings.HasPrefix(a, strings.TrimSuffix(b, "/")+"/")
}

// checkNesting refuses directories that lie in each other where one would be the
// other's content. The upper and the workdir may lie in a lower: see trap.
func checkNesting(o Options) error {
	if o.Upper == "" {
		return nil
	}
	var r fsat.Resolver
	upper, err := r.Resolve(o.Upper)
	if err != nil {
		return fmt.Errorf("upperdir %q: %w", o.Upper, err)
	}
	work, err := r.Resolve(o.Work)
	if err != nil {
		return fmt.Errorf("workdir %q: %w", o.Work, err)
	}
	if newNesting(upper).inside(work) || newNesting(work).inside(upper) {
		return fmt.Errorf("%w: upperdir %q and workdir %q lie in one another", ErrInvalid, o.Upper, o.Work)
	}
	both := newNesting(upper, work)
	for _, l := range o.Lowers {
		lower, err := r.Resolve(l.Path)
		if err != nil {
			return fmt.Errorf("lower %q: %w", l.Path, err)
		}
		if both.inside(lower) {
			return fmt.Errorf("%w: lower %q lies in upperdir or workdir, or is one of them", ErrInvalid, l.Path)
		}
	}
	return nil
}

// nesting finds out whether directories lie in one of some others, by whatever names
// they are called.
type nesting struct {
	paths []string
	ids   []os.FileInfo
	known map[string]bool
}

func newNesting(paths ...string) *nesting {
	n := &nesting{paths: paths, known: make(map[string]bool)}
	for _, p := range paths {
		if st, err := os.Stat(p); err == nil {
			n.ids = append(n.ids, st)
		}
	}
	return n
}

// inside reports whether the real path dir is one of the directories or lies below.
func (n *nesting) inside(dir string) bool {
	in, ok := n.known[dir]
	if ok {
		return in
	}
	if st, err := os.Stat(dir); err == nil {
		in = slices.ContainsFunc(n.ids, func(id os.FileInfo) bool { return os.SameFile(st, id) })
	}
	in = in || slices.Contains(n.paths, dir) || dir != "/" && n.inside(filepath.Dir(dir))
	n.known[dir] = in
	return in
}

// trap makes the lowers refuse the upper and the workdir, which may lie in one of
// them, by whatever path they were named: what is written there would change the
// lowers behind our back (kernel: ovl_setup_trap).
func (fs *FS) trap(s *scan) {
	for _, l := range s.layers {
		if fs.upper != nil && l.dev == fs.upper.dev {
			s.traps = fs.own
		}
	}
}

// Close writes the upper's file system out and closes every descriptor. Call it when no request can come any more.
func (fs *FS) Close() error {
	fs.later.Wait()
	fs.trim.stop()
	var err error
	if fs.upper != nil {
		// A volatile union is synced here too, and only here: then its upper
		// is as good as any.
		if fs.lockFd >= 0 {
			if e := fsat.Syncfs(fs.lockFd); e != nil {
				err = fmt.Errorf("sync upperdir %q: %w", fs.upper.path, e)
			}
		}
		fs.upper.close()
	}
	fault.Point("close.synced")
	if err == nil && fs.work != nil {
		fs.work.Clean()
	}
	fsat.Close(fs.lockFd)
	fsat.Close(fs.mountFd)
	fs.lockFd, fs.mountFd = -1, -1
	fs.index.close()
	if fs.work != nil {
		fs.work.Close()
	}
	if fs.lowers != nil {
		fs.lowers.close()
	}
	for _, l := range fs.layers {
		l.close()
	}
	fsat.Close(fs.lowerFd)
	fs.lowerFd = -1
	fs.fds.closeAll()
	return err
}

// Known is how many objects the kernel knows, and by how many names.
func (fs *FS) Known() (objects, names int) { return fs.nodes.size() }

// readOnly reports whether the union has no upper.
func (fs *FS) readOnly() bool { return fs.upper == nil }

// String names the union in messages.
func (fs *FS) String() string { return "plyfs" }

// SetDebug is part of fuse.RawFileSystem; requests are logged by the transport.
func (fs *FS) SetDebug(bool) {}

// Init is called by go-fuse's own server only.
func (fs *FS) Init(*fuse.Server) {}

// SetInvalidator tells the union how to make the kernel forget the attributes of a
// node, and the pages of a file or the listing of a directory from off on: length
// bytes, or all if length is 0. If off is negative, only the attributes. The
// transport calls it before the first request.
func (fs *FS) SetInvalidator(fn func(nodeid uint64, off, length int64)) { fs.invalidate = fn }

// OnUnmount is called after the last request.
func (fs *FS) OnUnmount() {}
