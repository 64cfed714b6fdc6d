package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/fuseop"
	"github.com/plyfs/plyfs/unionfs/ledger"
	"github.com/plyfs/plyfs/unionfs/trace"
)

const (
	headroom    = 8 << 10 // headers around the largest payload
	idleWorkers = 2       // workers that may wait for their turn to read
	maxWorkers  = 256     // further requests wait in the kernel

	// stallTick is how often the watch looks whether the reader is stuck in
	// the request it answers.
	stallTick = 2 * time.Millisecond

	// struct fuse_in_header and fuse_out_header (include/uapi/linux/fuse.h).
	inHeaderSize  = 40
	outHeaderSize = 16
)

// loop is one connection being served. See the package comment.
type loop struct {
	fd     int
	fs     fuse.RawFileSystem
	reader Reader // fs, if it is one
	idler  Idler  // fs, if it is one
	diary  Diary  // fs, if it is one
	proto  *fuse.ProtocolServer
	log    *zap.Logger
	ready  func(*Resume)
	counts *counters.Counters

	token   chan struct{} // whoever has taken it reads
	waiting atomic.Int32  // workers waiting for the token
	busy    atomic.Int32  // workers answering requests without the token
	total   atomic.Int32  // workers
	workers sync.WaitGroup
	buffers bufferPool
	init    *Resume // what was agreed with the kernel; nil: nobody can go on with it
	running *ledger.Ledger
	suspect *suspects // nil: none
	refused func()
	eyes    watchers

	// inline is the number of the work that the reader does while it keeps the
	// token; 0: none, or the watch has taken the token from it.
	inline  atomic.Uint64
	works   uint64 // guarded by the token
	queued  int    // of the requests read, how many in a row were there at once, from different clients; guarded by the token
	last    uint32 // the client that made the last one; guarded by the token
	spin    spinner
	slow    bool          // leave all requests to go-fuse
	asleep  atomic.Bool   // the watch sleeps
	stirred chan struct{} // wakes it

	done chan struct{} // closed when the connection has ended
	once sync.Once
	err  error // why; written before done is closed
}

func newLoop(fs fuse.RawFileSystem, mo *fuse.MountOptions, o ServeOptions, log *zap.Logger) *loop {
	l := &loop{
		fs: fs, proto: fuse.NewProtocolServer(fs, mo), log: log, ready: o.Ready,
		counts: o.counters(),
		token:  make(chan struct{}, 1), stirred: make(chan struct{}, 1), done: make(chan struct{}),
	}
	l.running, l.refused = o.Ledger, o.Refused
	l.eyes = newWatchers(fs, o)
	if len(o.Suspects) > 0 {
		l.suspect = &suspects{deaths: o.Suspects}
		l.suspect.left.Store(int32(len(o.Suspects)))
	}
	l.spin.budget = o.Spin
	if o.Spin == 0 {
		l.spin.budget = defaultSpin
	}
	if runtime.NumCPU() == 1 {
		l.spin.budget = -1 // it would keep the client from running
	}
	l.spin.credit = spinCredit
	l.reader, _ = fs.(Reader)
	l.idler, _ = fs.(Idler)
	l.diary, _ = fs.(Diary)
	l.slow = o.Debug // go-fuse logs what it decodes
	return l
}

// run serves until the connection ends.
func (l *loop) run() {
	if err := unix.SetNonblock(l.fd, true); err != nil {
		l.end(fmt.Errorf("serve: %w", err))
		return
	}
	l.workers.Go(l.watch)
	l.token <- struct{}{}
	l.start()
	l.workers.Wait()
	l.buffers.drop()
}

// start adds a worker unless there are enough.
func (l *loop) start() {
	if l.total.Add(1) > maxWorkers {
		l.total.Add(-1)
		return
	}
	l.workers.Go(func() {
		defer l.total.Add(-1)
		l.work()
	})
}

func (l *loop) end(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.done)
	})
}

// pass lets another worker read. Preconditions: the token is the caller's to
// give.
func (l *loop) pass() {
	if l.waiting.Load() == 0 {
		l.start()
	}
	l.token <- struct{}{} // there is one token, so this never blocks
}

// work is one worker.
func (l *loop) work() {
	b, err := l.buffers.get()
	if err != nil {
		l.end(fmt.Errorf("serve: memory for a request: %w", err))
		return
	}
	defer l.buffers.put(b)
	for {
		if l.waiting.Add(1) > idleWorkers {
			l.waiting.Add(-1)
			return
		}
		select {
		case <-l.token:
			l.waiting.Add(-1)
		case <-l.done:
			l.waiting.Add(-1)
			return
		}
		if !l.read(b) {
			return
		}
	}
}

// read reads and answers requests for as long as the worker keeps the token.
// False: the connection has ended.
func (l *loop) read(b *buffer) bool {
	for {
		n, err := l.next(b.in)
		if err == errPassed {
			return true
		}
		if err != nil || n == 0 {
			l.end(err)
			return false
		}
		if l.passFirst(b.in) {
			l.busy.Add(1)
			l.pass()
			answer, more := l.handle(b, n)
			ok := l.finish(b, answer)
			l.busy.Add(-1)
			return ok && more
		}
		var answer []byte
		var more bool
		// The client runs as soon as it is answered, perhaps in our place: that
		// is no reason for the watch to worry.
		kept := l.kept(func() { answer, more = l.handle(b, n) })
		if !l.finish(b, answer) || !more {
			l.end(nil)
			return false
		}
		if !kept {
			return true // the watch has passed the token on
		}
	}
}

// kept does some work and reports whether the token is still ours afterwards: the watch
// passes it on from a reader that is stuck.
func (l *loop) kept(work func()) bool {
	l.works++
	this := l.works
	l.inline.Store(this)
	if l.asleep.Load() {
		select {
		case l.stirred <- struct{}{}:
		default:
		}
	}
	work()
	return l.inline.CompareAndSwap(this, 0)
}

// passFirst decides whether somebody else should read while this request is
// answered: when it is bound to wait for a disk, and when more requests are
// there already.
func (l *loop) passFirst(in []byte) bool {
	switch binary.NativeEndian.Uint32(in[4:]) {
	case fuseop.Fsync, fuseop.Fsyncdir, fuseop.Fallocate, fuseop.CopyFileRange:
		return true
	case fuseop.Forget, fuseop.BatchForget, fuseop.Release, fuseop.Interrupt:
		return false // nobody waits for these
	}
	if pid := binary.NativeEndian.Uint32(in[32:]); pid != l.last { // the caller's thread
		l.last = pid
		l.queued++
	}
	return l.queued > 2
}

// watch takes the token from a reader that has been stuck in one request for
// longer than a tick. It sleeps while nothing happens.
func (l *loop) watch() {
	tick := time.NewTicker(stallTick)
	defer tick.Stop()
	const patience = 50 // ticks without a request
	for {
		tick.Stop()
		l.asleep.Store(true)
		// A reader stores inline and then looks at asleep, so one of the two
		// sees the other.
		if l.inline.Load() == 0 {
			select {
			case <-l.done:
				return
			case <-l.stirred:
			}
		}
		l.asleep.Store(false)
		tick.Reset(stallTick)
		last := uint64(0)
		for quiet := 0; quiet < patience; quiet++ {
			select {
			case <-l.done:
				return
			case <-tick.C:
			}
			now := l.inline.Load()
			if now != 0 && now == last && l.inline.CompareAndSwap(now, 0) {
				l.pass()
			}
			if now != last {
				quiet = 0
			}
			last = now
		}
	}
}

// errPassed says that somebody else reads now.
var errPassed = errors.New("token passed on")

// next returns the next request. Zero bytes without an error: unmounted.
func (l *loop) next(buf []byte) (int, error) {
	n, err := l.tryRead(buf)
	if n != 0 || err != unix.EAGAIN {
		return n, err
	}
	l.queued, l.last = 0, 0
	for l.idler != nil && l.idler.HasWork() {
		if !l.kept(l.idler.Idle) {
			return 0, errPassed
		}
		if n, err := l.tryRead(buf); err != unix.EAGAIN {
			return n, err
		}
	}
	if l.busy.Load() == 0 {
		if n, err := l.spin.wait(func() (int, error) { return l.tryRead(buf) }); err != unix.EAGAIN {
			return n, err
		}
	}
	for {
		if err := l.sleep(); err != nil {
			return 0, err
		}
		if n, err := l.tryRead(buf); err != unix.EAGAIN {
			return n, err
		}
	}
}

// tryRead reads a request if there is one; EAGAIN if not.
func (l *loop) tryRead(buf []byte) (int, error) {
	for {
		n, err := unix.Read(l.fd, buf)
		switch err {
		case nil:
			if n < inHeaderSize {
				return 0, fmt.Errorf("serve: the kernel sent %d bytes, less than a header", n)
			}
			return n, nil
		case unix.ENODEV, unix.ECONNABORTED: // the latter when the end came while a request was handed out
			return 0, nil
		case unix.EINTR, unix.ENOENT: // ENOENT: interrupted before it was read
		case unix.EAGAIN:
			return 0, err
		default:
			return 0, fmt.Errorf("serve: read request: %w", err)
		}
	}
}

// sleep waits until there is something to read.
func (l *loop) sleep() error {
	p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
		return fmt.Errorf("serve: wait for request: %w", err)
	}
	return nil
}

// handle makes the answer to the request in b.in[:n], and counts it; the answer is empty
// if there is none, and more is false if no other request follows.
func (l *loop) handle(b *buffer, n int) (reply []byte, more bool) {
	op := binary.NativeEndian.Uint32(b.in[4:])
	unique := binary.NativeEndian.Uint64(b.in[8:]) &^ resendBit
	deaths, done := l.suspect.admit(unique)
	if done != nil {
		defer done()
	}
	l.running.Run(b.number, unique, deaths)
	var call *trace.Call
	if l.eyes.on() || l.eyes.hub.MayCopy(op, b.in[:n], l.eyes.resolver) {
		call = l.eyes.begin(op, b.in[:n])
	}
	began := l.counts.Begin()
	switch {
	case deaths >= maxEnds:
		reply, more = l.refuse(b.in, b.out), true
	case call != nil:
		reply, more = l.meetFaults(b, n, call)
	default:
		reply, more = l.respond(b, n)
	}
	if deaths > 0 {
		l.running.Acquit(unique)
	}
	errno := errnoOf(reply)
	if op == fuseop.Lookup && errno == 0 && isAbsent(reply) {
		errno = unix.ENOENT
	}
	l.counts.End(op, began, errno)
	if call != nil {
		call.End(reply, errno)
	}
	if errno == 0 {
		l.countData(op, reply)
	}
	return reply, more
}

// refuse answers a request that has ended servers again and again.
func (l *loop) refuse(in, out []byte) []byte {
	l.log.Error("a request is refused: two servers have ended while they answered it",
		zap.Uint32("opcode", binary.NativeEndian.Uint32(in[4:])), zap.Uint64("node", binary.NativeEndian.Uint64(in[16:])))
	if l.refused != nil {
		l.refused()
	}
	switch binary.NativeEndian.Uint32(in[4:]) {
	case fuseop.Forget, fuseop.BatchForget:
		return nil
	}
	return errorReply(out, in, unix.EIO)
}

// countData counts the bytes of a request that has not failed.
func (l *loop) countData(op uint32, reply []byte) {
	switch op {
	case fuseop.Read:
		l.counts.Read(len(reply) - outHeaderSize)
	case fuseop.Write, fuseop.CopyFileRange:
		if len(reply) >= outHeaderSize+4 {
			l.counts.Written(binary.NativeEndian.Uint32(reply[outHeaderSize:])) // struct fuse_write_out
		}
	}
}

// isAbsent reports whether the answer to a LOOKUP is that there is no such name, which the
// kernel may remember: an entry without a node (struct fuse_entry_out).
func isAbsent(reply []byte) bool {
	return len(reply) >= outHeaderSize+8 && binary.NativeEndian.Uint64(reply[outHeaderSize:]) == 0
}

// errnoOf returns the error that an answer brings; 0 if none, or if there is no answer.
func errnoOf(reply []byte) unix.Errno {
	if len(reply) < outHeaderSize {
		return 0
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(reply[4:])))
}

// respond is handle without counting.
func (l *loop) respond(b *buffer, n int) (reply []byte, more bool) {
	op := binary.NativeEndian.Uint32(b.in[4:])
	if op == fuseop.Interrupt {
		return errorReply(b.out, b.in, unix.ENOSYS), true
	}
	if !l.slow {
		if body, status, done := l.dispatch(b.in[:n], b.out); done {
			if body == noReply {
				return nil, true
			}
			return answer(b.out, b.in, body, status), true
		}
	}
	var init *Resume
	if op == fuseop.Init {
		init = newResume(b.in[:n])
	}
	size, status := l.proto.HandleRequest([][]byte{b.in[:n]}, [][]byte{b.out})
	if status != fuse.OK {
		return errorReply(b.out, b.in, unix.Errno(status)), true
	}
	if init != nil {
		init.Reply = bytes.Clone(b.out[:size])
		l.init = init
	}
	return b.out[:size], op != fuseop.Destroy
}

// finish sends an answer; false: the connection has ended.
func (l *loop) finish(b *buffer, reply []byte) bool {
	if len(reply) == 0 {
		return true
	}
	if !l.write(reply) {
		return false
	}
	if l.diary != nil && noted(binary.NativeEndian.Uint32(b.in[4:])) {
		l.diary.Answered(binary.NativeEndian.Uint64(b.in[8:]))
	}
	if binary.NativeEndian.Uint32(b.in[4:]) == fuseop.Init && l.ready != nil {
		l.ready(l.init)
	}
	return true
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
		case unix.ENODEV, unix.ECONNABORTED:
			return false
		default:
			// The kernel refused the reply; the caller gets an error instead
			// of waiting for ever.
			l.log.Error("reply refused", zap.Error(err), zap.Int("size", len(reply)))
			if len(reply) <= outHeaderSize {
				return true
			}
			reply = errorReply(reply, reply, unix.EIO)
		}
	}
}
