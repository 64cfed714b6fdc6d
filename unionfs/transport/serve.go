package transport

import (
	"fmt"
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/inject"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// ServeOptions tune the request loop.
type ServeOptions struct {
	// Ready is called once, after the kernel's INIT was answered. What it gets lets
	// another process go on; nil if none can.
	Ready func(*Resume)
	// Resume, if not nil, is from the server of this connection that has died.
	Resume *Resume
	// Ledger, if not nil, is where it is written down which requests are being answered,
	// and Suspects are those during which servers have ended by themselves, as it says. A
	// request that has ended two is answered with EIO, and Refused, if not nil, called.
	Ledger   *ledger.Ledger
	Suspects map[uint64]int
	Refused  func()
	// Spin is how long the reader looks for the next request before it
	// sleeps, while requests keep coming: 0 means 100 microseconds, a negative
	// value not at all.
	Spin time.Duration
	// NoOpen says that the file system answers OPEN with ENOSYS.
	NoOpen bool
	// NoACL leaves POSIX ACLs alone: the kernel does not ask for any.
	NoACL bool
	// Complete has the kernel keep no links.
	Complete bool
	// StackDepth is how many file systems may lie on each other if files are
	// passed through; 0 if none are.
	StackDepth int
	// GoFuse leaves the requests to go-fuse's own server instead of our loop: slower,
	// but without anything of ours between the kernel and the file system.
	GoFuse bool
	// Debug logs every request.
	Debug  bool
	Logger *zap.Logger
	// Counters, if not nil, count what is asked for; GoFuse has none of requests.
	Counters *counters.Counters
	// Trace, if not nil, is who tells those that watch, and Faults what requests meet. Both
	// need a file system that is a [trace.Resolver]; GoFuse has neither.
	Trace  *trace.Hub
	Faults *inject.Faults
}

const (
	maxWrite      = 1 << 20
	maxBackground = 64
	defaultSpin   = 100 * time.Microsecond
)

// Serve answers the requests that arrive on dev until the file system is
// unmounted (nil) or the connection breaks (an error).
func Serve(dev *os.File, fs fuse.RawFileSystem, o ServeOptions) error {
	log := o.Logger
	if log == nil {
		log = zap.NewNop()
	}
	raw, err := dev.SyscallConn()
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	// Control, not Fd: Fd would make the descriptor blocking for the runtime
	// poller, and keeps it from being closed under our feet.
	cerr := raw.Control(func(fd uintptr) {
		if o.GoFuse {
			err = serveGoFuse(int(fd), fs, o, log)
			return
		}
		err = serveLoop(int(fd), fs, o, log)
	})
	if cerr != nil {
		return fmt.Errorf("serve: %w", cerr)
	}
	fs.OnUnmount()
	return err
}

func serveLoop(fd int, fs fuse.RawFileSystem, o ServeOptions, log *zap.Logger) error {
	l := newLoop(fs, o.fuseOptions(log), o, log)
	l.fd = fd
	n := notifier{fd, log, l.counts}
	notifying(fs, n)
	o.pass(fd, fs)
	if o.Resume != nil {
		if err := l.resume(o.Resume, n); err != nil {
			return err
		}
	}
	l.run()
	return l.err
}

// serveGoFuse leaves the connection to go-fuse's own server. It never changes the
// connection's descriptor, so it gets one of its own.
func serveGoFuse(fd int, fs fuse.RawFileSystem, o ServeOptions, log *zap.Logger) error {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	notifying(fs, notifier{fd, log, o.counters()})
	o.pass(fd, fs)
	opts := o.fuseOptions(log)
	opts.DisableSplice = true // a full read does not fit in a pipe, which is logged each time
	srv, err := fuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", own), opts)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	if o.Ready != nil {
		o.Ready(nil) // NewServer has answered INIT
	}
	srv.Serve()
	return nil
}

// counters returns those that were given, or some that nobody reads.
func (o *ServeOptions) counters() *counters.Counters {
	if o.Counters == nil {
		return counters.New()
	}
	return o.Counters
}

// fuseOptions is what both ways of serving tell go-fuse.
func (o *ServeOptions) fuseOptions(log *zap.Logger) *fuse.MountOptions {
	opts := &fuse.MountOptions{
		MaxWrite:                 maxWrite,
		MaxBackground:            maxBackground,
		EnableAcl:                !o.NoACL,
		EnableSymlinkCaching:     !o.Complete,
		ExplicitDataCacheControl: true,
		Debug:                    o.Debug,
		Logger:                   zap.NewStdLog(log.Named("fuse")),
		// Without CAP_ASYNC_DIO: the kernel drops the pages that an asynchronous
		// direct write has made stale when it is submitted, not when it is done.
		// With CAP_NO_EXPORT_SUPPORT: node ids are forgotten, so a file handle
		// would not lead back for long; name_to_handle_at(2) says EOPNOTSUPP.
		DisabledCapabilities: fuse.CAP_ALLOW_IDMAP,
		MaxStackDepth:        max(o.StackDepth, 1),
		ExtraCapabilities: fuse.CAP_DONT_MASK | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_HANDLE_KILLPRIV_V2 |
			fuse.CAP_SETXATTR_EXT | fuse.CAP_DIRECT_IO_ALLOW_MMAP | fuse.CAP_NO_EXPORT_SUPPORT,
		PanicHandler: func(v any) fuse.Status {
			log.Error("a request made the server panic", zap.Any("panic", v), zap.Stack("stack"))
			return fuse.EIO
		},
	}
	if o.StackDepth == 0 {
		opts.DisabledCapabilities |= fuse.CAP_PASSTHROUGH
	}
	if o.NoOpen { // nobody would see the truncation
		opts.ExtraCapabilities &^= fuse.CAP_ATOMIC_O_TRUNC
	}
	return opts
}

// pass tells fs how to register files for passthrough.
func (o *ServeOptions) pass(fd int, fs fuse.RawFileSystem) {
	if p, ok := fs.(passer); ok && o.StackDepth > 0 {
		p.SetBacking(backing{fd}.open, backing{fd}.close)
	}
}

// notifying tells fs how to send what the kernel has not asked for.
func notifying(fs fuse.RawFileSystem, n notifier) {
	if inv, ok := fs.(invalidator); ok {
		inv.SetInvalidator(n.invalidate)
	}
	if s, ok := fs.(storer); ok {
		s.SetStore(StoreHeadroom, n.store)
	}
}

// invalidator is a file system that changes attributes without the kernel's
// knowledge.
type invalidator interface {
	SetInvalidator(fn func(nodeid uint64, off, length int64))
}

// storer is a file system that hands out data before it is asked for.
type storer interface {
	SetStore(headroom int, fn func(nodeid uint64, buf []byte))
}

// passer is a file system whose files can be read and written without it.
type passer interface {
	SetBacking(open func(fd int) (id int32, err error), shut func(id int32))
}
