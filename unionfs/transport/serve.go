package transport

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// ServeOptions tune the request loop.
type ServeOptions struct {
	// Ready is called once, after the kernel's INIT was answered.
	Ready func()
	// Debug logs every request.
	Debug  bool
	Logger *zap.Logger
}

const (
	maxWrite      = 1 << 20
	headroom      = 8 << 10 // headers around the largest payload
	maxBackground = 64
	idleWorkers   = 2
	maxWorkers    = 256 // further requests wait in the kernel

	opInit      = 26
	opInterrupt = 36
	opDestroy   = 38

	// struct fuse_in_header and fuse_out_header (include/uapi/linux/fuse.h).
	inHeaderSize  = 40
	outHeaderSize = 16
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
		// Data is passed through the page cache of the mount only.
		DisabledCapabilities: fuse.CAP_PASSTHROUGH | fuse.CAP_ALLOW_IDMAP,
		ExtraCapabilities: fuse.CAP_DONT_MASK | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_HANDLE_KILLPRIV_V2 |
			fuse.CAP_SETXATTR_EXT | fuse.CAP_DIRECT_IO_ALLOW_MMAP | fuse.CAP_ASYNC_DIO,
		PanicHandler: func(v any) fuse.Status {
			log.Error("a request made the server panic", zap.Any("panic", v), zap.Stack("stack"))
			return fuse.EIO
		},
	}
	l := &loop{proto: fuse.NewProtocolServer(fs, opts), log: log, ready: o.Ready}
	// Control, not Fd: Fd would make the descriptor blocking for the runtime
	// poller, and keeps it from being closed under our feet.
	cerr := raw.Control(func(fd uintptr) {
		l.fd = int(fd)
		if inv, ok := fs.(invalidator); ok {
			inv.SetInvalidator(l.invalidate)
		}
		l.start()
		l.workers.Wait()
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
	SetInvalidator(fn func(nodeid uint64))
}

// loop is one connection being served.
type loop struct {
	fd    int
	proto *fuse.ProtocolServer
	log   *zap.Logger
	ready func()

	workers sync.WaitGroup
	idle    atomic.Int32 // workers waiting for a request
	total   atomic.Int32 // workers
	once    sync.Once
	err     error // why the loop ended; guarded by once
}

// start adds a worker unless there are enough.
func (l *loop) start() {
	if l.total.Add(1) > maxWorkers {
		l.total.Add(-1)
		return
	}
	l.idle.Add(1)
	l.workers.Go(func() {
		defer l.total.Add(-1)
		l.work()
	})
}

func (l *loop) end(err error) { l.once.Do(func() { l.err = err }) }

var buffers = sync.Pool{New: func() any {
	return &buffer{in: make([]byte, maxWrite+headroom), out: make([]byte, maxWrite+headroom)}
}}

type buffer struct{ in, out []byte }

// work is one worker. It counts as idle when called.
func (l *loop) work() {
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	for {
		n, err := l.read(b.in)
		left := l.idle.Add(-1)
		if err != nil || n == 0 {
			l.end(err)
			return
		}
		if left == 0 {
			l.start()
		}
		if !l.handle(b, n) {
			return
		}
		if l.idle.Add(1) > idleWorkers {
			l.idle.Add(-1)
			return
		}
	}
}

// read waits for a request. Zero bytes without an error: unmounted.
func (l *loop) read(buf []byte) (int, error) {
	for {
		n, err := unix.Read(l.fd, buf)
		switch err {
		case nil:
			if n < inHeaderSize {
				return 0, fmt.Errorf("serve: the kernel sent %d bytes, less than a header", n)
			}
			return n, nil
		case unix.ENODEV:
			return 0, nil
		case unix.EINTR, unix.ENOENT: // ENOENT: interrupted before it was read
		case unix.EAGAIN:
			if err := l.poll(); err != nil {
				return 0, err
			}
		default:
			return 0, fmt.Errorf("serve: read request: %w", err)
		}
	}
}

// poll waits on a descriptor that somebody made non-blocking.
func (l *loop) poll() error {
	p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
		return fmt.Errorf("serve: wait for request: %w", err)
	}
	return nil
}

// handle answers the request in b.in[:n]; false ends the worker.
func (l *loop) handle(b *buffer, n int) bool {
	op := binary.NativeEndian.Uint32(b.in[4:])
	if op == opInterrupt {
		return l.write(errorReply(b.out, b.in, unix.ENOSYS))
	}
	size, status := l.proto.HandleRequest([][]byte{b.in[:n]}, [][]byte{b.out})
	if status != fuse.OK {
		return l.write(errorReply(b.out, b.in, unix.Errno(status)))
	}
	if size > 0 && !l.write(b.out[:size]) {
		return false
	}
	if op == opInit && l.ready != nil {
		l.ready()
	}
	return op != opDestroy
}

func errorReply(out, in []byte, errno unix.Errno) []byte {
	out = out[:outHeaderSize]
	binary.NativeEndian.PutUint32(out, outHeaderSize)
	binary.NativeEndian.PutUint32(out[4:], uint32(-int32(errno)))
	copy(out[8:], in[8:16]) // unique
	return out
}

func (l *loop) write(reply []byte) bool {
	for {
		_, err := unix.Write(l.fd, reply)
		switch err {
		case nil, unix.ENOENT: // ENOENT: nobody waits for this answer any more
			return true
		case unix.EINTR, unix.EAGAIN:
		case unix.ENODEV:
			l.end(nil)
			return false
		default:
			// The kernel refused the reply; the caller gets an error instead
			// of waiting for ever.
			l.log.Error("reply refused", zap.Error(err), zap.Int("size", len(reply)))
			if len(reply) > outHeaderSize {
				binary.NativeEndian.PutUint32(reply, outHeaderSize)
				binary.NativeEndian.PutUint32(reply[4:], ^uint32(unix.EIO)+1)
				reply = reply[:outHeaderSize]
				continue
			}
			return true
		}
	}
}

// invalidate tells the kernel to forget the attributes of a node
// (FUSE_NOTIFY_INVAL_INODE without a range). A node it does not know is no
// error.
func (l *loop) invalidate(nodeid uint64) {
	const notifyInvalInode = 2
	var msg [outHeaderSize + 24]byte
	binary.NativeEndian.PutUint32(msg[0:], uint32(len(msg)))
	binary.NativeEndian.PutUint32(msg[4:], notifyInvalInode)
	binary.NativeEndian.PutUint64(msg[16:], nodeid)
	binary.NativeEndian.PutUint64(msg[24:], ^uint64(0)) // offset -1: attributes only
	for {
		_, err := unix.Write(l.fd, msg[:])
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case nil, unix.ENOENT, unix.ENODEV:
		default:
			l.log.Warn("invalidation refused", zap.Uint64("node", nodeid), zap.Error(err))
		}
		return
	}
}
