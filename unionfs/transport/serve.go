package transport

import (
	"fmt"
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
)

// ServeOptions tune the request loop.
type ServeOptions struct {
	// Ready is called once, after the kernel's INIT was answered.
	Ready func()
	// Spin is how long the reader looks for the next request before it
	// sleeps, while requests keep coming: 0 means 100 microseconds, a negative
	// value not at all.
	Spin time.Duration
	// Debug logs every request.
	Debug  bool
	Logger *zap.Logger
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
	opts := &fuse.MountOptions{
		MaxWrite:                 maxWrite,
		MaxBackground:            maxBackground,
		EnableAcl:                true,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		Debug:                    o.Debug,
		Logger:                   zap.NewStdLog(log.Named("fuse")),
		// Without CAP_ASYNC_DIO: the kernel drops the pages that an asynchronous
		// direct write has made stale when it is submitted, not when it is done.
		// With CAP_NO_EXPORT_SUPPORT: node ids are forgotten, so a file handle
		// would not lead back for long; name_to_handle_at(2) says EOPNOTSUPP.
		// Data is passed through the page cache of the mount only.
		DisabledCapabilities: fuse.CAP_PASSTHROUGH | fuse.CAP_ALLOW_IDMAP,
		ExtraCapabilities: fuse.CAP_DONT_MASK | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_HANDLE_KILLPRIV_V2 |
			fuse.CAP_SETXATTR_EXT | fuse.CAP_DIRECT_IO_ALLOW_MMAP | fuse.CAP_NO_EXPORT_SUPPORT,
		PanicHandler: func(v any) fuse.Status {
			log.Error("a request made the server panic", zap.Any("panic", v), zap.Stack("stack"))
			return fuse.EIO
		},
	}
	l := newLoop(fuse.NewProtocolServer(fs, opts), o, log)
	// Control, not Fd: Fd would make the descriptor blocking for the runtime
	// poller, and keeps it from being closed under our feet.
	cerr := raw.Control(func(fd uintptr) {
		l.fd = int(fd)
		if inv, ok := fs.(invalidator); ok {
			inv.SetInvalidator(l.invalidate)
		}
		l.run()
	})
	if cerr != nil {
		return fmt.Errorf("serve: %w", cerr)
	}
	fs.OnUnmount()
	return l.err
}

// invalidator is a file system that changes attributes without the kernel's
// knowledge.
type invalidator interface {
	SetInvalidator(fn func(nodeid uint64, off, length int64))
}
