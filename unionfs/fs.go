package unionfs

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/cow"
	"github.com/plyfs/plyfs/cow/fsat"
)

// FS is one union. It implements fuse.RawFileSystem; serve it with
// unionfs/transport.
type FS struct {
	log    *zap.Logger
	lowers lowerTree
	upper  *layer    // nil: read-only
	work   *cow.Work // nil: read-only

	volatile bool
	lockFd   int // the upper directory, open for its lock

	inos  *inoMap
	fds   *fdCache
	nodes *table
	root  *inode

	renameMu sync.RWMutex

	// invalidate makes the kernel forget the attributes of a node. It is set
	// before the first request.
	invalidate func(nodeid uint64)
}

// forever is how long the kernel may keep what we tell it.
const forever = 365 * 24 * time.Hour

// ErrInvalid says that the options do not describe a union.
var ErrInvalid = errors.New("invalid union")

// New opens the directories of a union, checks that they fit together, locks
// and sweeps the workdir. It clears the process's umask: the modes of new
// objects come with the requests.
func New(o Options) (*FS, error) {
	if len(o.Lowers) == 0 {
		return nil, fmt.Errorf("%w: no lower directory given", ErrInvalid)
	}
	if (o.Upper == "") != (o.Work == "") {
		return nil, fmt.Errorf("%w: upperdir and workdir go together; give both or neither", ErrInvalid)
	}
	if err := checkNesting(o); err != nil {
		return nil, err
	}
	fs := &FS{log: o.Logger, inos: newInoMap(), nodes: newTable(), volatile: o.Volatile, lockFd: -1}
	fs.invalidate = func(uint64) {}
	if fs.log == nil {
		fs.log = zap.NewNop()
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read the limit on open files: %w", err)
	}
	fs.fds = newFdCache(int(min(limit.Cur/2, 1<<20)))
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
	layers := make([]*layer, 0, len(o.Lowers))
	for _, l := range o.Lowers {
		opened, err := openLayer(l.Path, l.Dialect)
		if err != nil {
			for _, l := range layers {
				l.close()
			}
			return err
		}
		layers = append(layers, opened)
	}
	tree, err := newScan(layers, fs.fds, fs.inos)
	if err != nil {
		return err
	}
	fs.lowers = tree
	return fs.openRoot()
}

func (fs *FS) openUpper(o Options) (err error) {
	if fs.upper, err = openLayer(o.Upper, o.UpperDialect); err != nil {
		return err
	}
	fs.inos.shown(fs.upper.dev, 1)
	workdir, err := fsat.OpenTrusted(o.Work)
	if err != nil {
		return fmt.Errorf("open workdir %q: %w", o.Work, err)
	}
	defer fsat.Close(workdir)
	var st unix.Stat_t
	if err := fsat.Fstat(workdir, &st); err != nil {
		return fmt.Errorf("stat workdir %q: %w", o.Work, err)
	}
	if st.Dev != fs.upper.dev {
		return fmt.Errorf("%w: workdir %q is not on the file system of upperdir %q", ErrInvalid, o.Work, o.Upper)
	}
	if fs.lockFd, err = fsat.OpenName(fs.upper.root, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return fmt.Errorf("open upperdir %q: %w", o.Upper, err)
	}
	if err := cow.LockDir(fs.lockFd); err != nil {
		return fmt.Errorf("upperdir %q: %w", o.Upper, err)
	}
	if fs.work, err = cow.OpenWork(workdir, o.Volatile); err != nil {
		return fmt.Errorf("workdir %q: %w", o.Work, err)
	}
	return nil
}

func (fs *FS) openRoot() error {
	low := fs.lowers.root()
	if fs.upper == nil {
		fs.root = newInode(fuse.FUSE_ROOT_ID, low.ino(), unix.S_IFDIR, low)
		fs.nodes.add(fs.root)
		return nil
	}
	_, opaque, err := fs.upper.readDir(fs.upper.root)
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

// checkNesting refuses directories that lie in each other: what is written to
// one would change the other behind our back.
func checkNesting(o Options) error {
	if o.Upper == "" {
		return nil
	}
	resolve := func(p string) (string, error) {
		abs, err := filepath.Abs(p)
		if err != nil {
			return "", err
		}
		return filepath.EvalSymlinks(abs)
	}
	upper, err := resolve(o.Upper)
	if err != nil {
		return fmt.Errorf("upperdir %q: %w", o.Upper, err)
	}
	work, err := resolve(o.Work)
	if err != nil {
		return fmt.Errorf("workdir %q: %w", o.Work, err)
	}
	within := func(a, b string) bool { return a == b || strings.HasPrefix(a, strings.TrimSuffix(b, "/")+"/") }
	if within(upper, work) || within(work, upper) {
		return fmt.Errorf("%w: upperdir %q and workdir %q lie in one another", ErrInvalid, o.Upper, o.Work)
	}
	for _, l := range o.Lowers {
		lower, err := resolve(l.Path)
		if err != nil {
			return fmt.Errorf("lower %q: %w", l.Path, err)
		}
		if within(upper, lower) || within(work, lower) || within(lower, upper) || within(lower, work) {
			return fmt.Errorf("%w: upperdir or workdir and lower %q lie in one another", ErrInvalid, l.Path)
		}
	}
	return nil
}

// Close writes the upper's file system out, unless the union is volatile, and
// closes every descriptor. Call it when no request can come any more.
func (fs *FS) Close() error {
	var err error
	if fs.upper != nil {
		if !fs.volatile && fs.lockFd >= 0 {
			if e := fsat.Syncfs(fs.lockFd); e != nil {
				err = fmt.Errorf("sync upperdir %q: %w", fs.upper.path, e)
			}
		}
		fs.upper.close()
	}
	fsat.Close(fs.lockFd)
	fs.lockFd = -1
	if fs.work != nil {
		fs.work.Close()
	}
	if fs.lowers != nil {
		fs.lowers.close()
	}
	fs.fds.closeAll()
	return err
}

// readOnly reports whether the union has no upper.
func (fs *FS) readOnly() bool { return fs.upper == nil }

// String names the union in messages.
func (fs *FS) String() string { return "plyfs" }

// SetDebug is part of fuse.RawFileSystem; requests are logged by the transport.
func (fs *FS) SetDebug(bool) {}

// Init is called by go-fuse's own server only.
func (fs *FS) Init(s *fuse.Server) {
	fs.SetInvalidator(func(nodeid uint64) { s.InodeNotify(nodeid, -1, 0) })
}

// SetInvalidator tells the union how to make the kernel forget the attributes
// of a node. The transport calls it before the first request.
func (fs *FS) SetInvalidator(fn func(nodeid uint64)) { fs.invalidate = fn }

// OnUnmount is called after the last request.
func (fs *FS) OnUnmount() {}
