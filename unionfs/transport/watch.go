package transport

import (
	"encoding/binary"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/fuseop"
	"github.com/plyfs/plyfs/unionfs/inject"
	"github.com/plyfs/plyfs/unionfs/trace"
)

// watchers are those who look at requests, or change what becomes of them.
type watchers struct {
	hub      *trace.Hub
	faults   *inject.Faults
	resolver trace.Resolver
}

// newWatchers returns what the options say. Without a resolver nobody can watch.
func newWatchers(fs fuse.RawFileSystem, o ServeOptions) watchers {
	w := watchers{o.Trace, o.Faults, nil}
	w.resolver, _ = fs.(trace.Resolver)
	if w.hub == nil || w.resolver == nil {
		w.hub = new(trace.Hub) // nobody can listen to it
	}
	if w.faults == nil || w.resolver == nil {
		w.faults = new(inject.Faults)
	}
	return w
}

func (w *watchers) on() bool { return w.hub.On() || w.faults.On() }

func (w *watchers) begin(op uint32, in []byte) *trace.Call {
	return w.hub.Begin(op, counters.OpName(op), in, w.resolver)
}

// isDirect reports whether a READ or WRITE is for a program, which gets as much as is answered. All
// others are for the page cache: to it, less than was asked for is the end of the file.
func (w *watchers) isDirect(in []byte) bool {
	const fhAt = 40 // struct fuse_read_in, fuse_write_in
	d, ok := w.resolver.(interface{ Direct(fh uint64) bool })
	return ok && len(in) >= fhAt+8 && d.Direct(binary.NativeEndian.Uint64(in[fhAt:]))
}

// meetFaults is respond for a request that may meet faults.
func (l *loop) meetFaults(b *buffer, n int, call *trace.Call) (reply []byte, more bool) {
	if !l.eyes.faults.On() {
		return l.respond(b, n)
	}
	f, hit := l.eyes.faults.Decide(call.Event(), l.eyes.isDirect(b.in[:n]))
	if !hit {
		return l.respond(b, n)
	}
	call.Injected()
	f.Wait() // others are answered meanwhile: the watch passes the token on
	if f.Errno != 0 {
		return errorReply(b.out, b.in, f.Errno), true
	}
	if f.Short > 0 {
		n = shorten(b.in, n, f.Short)
	}
	return l.respond(b, n)
}

// shorten makes a READ or WRITE one of fewer bytes, and returns the new length of the request.
// Both have their size at the same place (struct fuse_read_in, fuse_write_in).
func shorten(in []byte, n int, most int64) int {
	const sizeAt, dataAt = 56, 80
	if n < dataAt || int64(binary.NativeEndian.Uint32(in[sizeAt:])) <= most {
		return n
	}
	binary.NativeEndian.PutUint32(in[sizeAt:], uint32(most))
	if binary.NativeEndian.Uint32(in[4:]) == fuseop.Write {
		n = dataAt + int(most)
		binary.NativeEndian.PutUint32(in, uint32(n))
	}
	return n
}
