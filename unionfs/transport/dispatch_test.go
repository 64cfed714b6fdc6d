package transport

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/fuseop"
)

// hotOps are what dispatch decodes.
var hotOps = []uint32{fuseop.Lookup, fuseop.Forget, fuseop.Getattr, fuseop.Open, fuseop.Read, fuseop.Write, fuseop.Release, fuseop.Getxattr, fuseop.BatchForget}

// scribe writes down what it is asked, and answers by what it is asked.
type scribe struct {
	fuse.RawFileSystem
	calls []string
}

func (s *scribe) note(format string, args ...any) {
	s.calls = append(s.calls, fmt.Sprintf(format, args...))
}

func (s *scribe) status(node uint64) fuse.Status {
	return []fuse.Status{fuse.OK, fuse.OK, fuse.ENOENT, fuse.ENOSYS, fuse.ERANGE, fuse.OK, fuse.EIO}[node%7]
}

func (s *scribe) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	s.note("lookup %+v %q", *h, name)
	out.NodeId, out.Ino = h.NodeId+1, uint64(len(name))
	return s.status(h.NodeId)
}

func (s *scribe) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	s.note("getattr %+v", *in)
	out.Ino, out.Mode = in.NodeId, 0o100644
	return s.status(in.NodeId)
}

func (s *scribe) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	s.note("open %+v", *in)
	out.Fh, out.OpenFlags = uint64(in.Flags), fuse.FOPEN_KEEP_CACHE
	return s.status(in.NodeId)
}

// read fills buf, or the start of it.
func (s *scribe) read(in *fuse.ReadIn, buf []byte) (int, fuse.Status) {
	s.note("read %+v into %d bytes", *in, len(buf))
	n := min(len(buf), int(in.NodeId%3000))
	for i := range buf[:n] {
		buf[i] = byte(i) + byte(in.Offset)
	}
	if st := s.status(in.NodeId); st != fuse.OK {
		return 0, st
	}
	return n, fuse.OK
}

func (s *scribe) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, st := s.read(in, buf)
	return fuse.ReadResultData(buf[:n]), st
}

func (s *scribe) ReadInto(in *fuse.ReadIn, buf []byte) (int, fuse.Status) { return s.read(in, buf) }

func (s *scribe) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	s.note("write %+v %q", *in, data)
	return uint32(len(data) / 2), s.status(in.NodeId)
}

func (s *scribe) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func (s *scribe) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { s.note("release %+v", *in) }

func (s *scribe) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, buf []byte) (uint32, fuse.Status) {
	s.note("getxattr %+v %q into %d bytes", *h, name, len(buf))
	if st := s.status(h.NodeId); st != fuse.OK {
		return 0, st
	}
	value := strings.Repeat(name, 3)
	if len(buf) < len(value) {
		return uint32(len(value)), fuse.ERANGE
	}
	return uint32(copy(buf, value)), fuse.OK
}

func (s *scribe) Forget(node, nlookup uint64) { s.note("forget %d %d", node, nlookup) }

// fenced returns n bytes behind which there is nothing: to touch more is a fault.
func fenced(t testing.TB, n int) []byte {
	t.Helper()
	page := unix.Getpagesize()
	size := (n + page - 1) / page * page
	m, err := unix.Mmap(-1, 0, size+page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mprotect(m[size:], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(m); err != nil {
			t.Error(err)
		}
	})
	return m[size-n : size : size]
}

// quiet keeps go-fuse from reporting every bad request.
var quiet = sync.OnceFunc(func() { log.SetOutput(io.Discard) })

func newScribe(slow bool) (*loop, *scribe) {
	quiet()
	s := &scribe{RawFileSystem: fuse.NewDefaultRawFileSystem()}
	opts := &fuse.MountOptions{MaxWrite: maxWrite, Logger: log.New(io.Discard, "", 0)}
	l := newLoop(s, opts, ServeOptions{}, zap.NewNop())
	l.slow = slow
	return l, s
}

const fencedOut = 1 << 12

// answerTo has a request answered, by dispatch if it can or by go-fuse alone.
func answerTo(t testing.TB, request []byte, goFuse bool) (reply []byte, calls []string) {
	t.Helper()
	l, s := newScribe(goFuse)
	b := &buffer{in: fenced(t, len(request)), out: fenced(t, fencedOut)}
	copy(b.in, request)
	for i := range b.out {
		b.out[i] = 0xaa // of the last request
	}
	reply, more := l.handle(b, len(request))
	if !more {
		t.Error("no more requests are expected")
	}
	return bytes.Clone(reply), s.calls
}

// request makes one; its length is right.
func request(op uint32, node uint64, body ...any) []byte {
	var b bytes.Buffer
	for _, f := range body {
		if s, ok := f.(string); ok {
			b.WriteString(s)
		} else if err := binary.Write(&b, binary.NativeEndian, f); err != nil {
			panic(err) // a mistake in the test
		}
	}
	h := make([]byte, inHeaderSize)
	binary.NativeEndian.PutUint32(h, uint32(inHeaderSize+b.Len()))
	binary.NativeEndian.PutUint32(h[4:], op)
	binary.NativeEndian.PutUint64(h[8:], 0x1234567890)
	binary.NativeEndian.PutUint64(h[16:], node)
	binary.NativeEndian.PutUint32(h[24:], 1000) // uid
	binary.NativeEndian.PutUint32(h[28:], 2000) // gid
	binary.NativeEndian.PutUint32(h[32:], 3000) // pid
	return append(h, b.Bytes()...)
}

// same compares the answers of dispatch and of go-fuse to a request.
func same(t *testing.T, req []byte) (calls []string) {
	t.Helper()
	got, gotCalls := answerTo(t, req, false)
	want, wantCalls := answerTo(t, req, true)
	if !bytes.Equal(got, want) {
		t.Errorf("request %x:\nanswer  %x\ngo-fuse %x", req, got, want)
	}
	if binary.NativeEndian.Uint32(req[4:]) == fuseop.BatchForget && len(gotCalls) < len(wantCalls) {
		wantCalls = wantCalls[:len(gotCalls)] // it goes by the length, not by the number
	}
	if !slices.Equal(gotCalls, wantCalls) {
		t.Errorf("request %x:\nasks    %q\ngo-fuse %q", req, gotCalls, wantCalls)
	}
	return gotCalls
}

type (
	u32 = uint32
	u64 = uint64
)

// hotRequests are well-formed requests of every kind, to a node whose number decides
// how they end.
func hotRequests(node uint64) map[string][]byte {
	read := func(size u32) []byte {
		return request(fuseop.Read, node, u64(7), u64(4096), size, u32(0), u64(0), u32(unix.O_RDWR), u32(0))
	}
	return map[string][]byte{
		"lookup":               request(fuseop.Lookup, node, "a name\x00"),
		"lookup of nothing":    request(fuseop.Lookup, node, "\x00"),
		"lookup, more follows": request(fuseop.Lookup, node, "name\x00rest\x00"),
		"getattr":              request(fuseop.Getattr, node, u32(1), u32(0), u64(9)),
		"open":                 request(fuseop.Open, node, u32(unix.O_RDWR), u32(1)),
		"read":                 read(100),
		"read of nothing":      read(0),
		"read to the end":      read(fencedOut - outHeaderSize),
		"read of too much":     read(fencedOut - outHeaderSize + 1),
		"read of far too much": read(^u32(0)),
		"write":                request(fuseop.Write, node, u64(7), u64(4096), u32(5), u32(4), u64(0), u32(unix.O_WRONLY), u32(0), "hello"),
		"write of nothing":     request(fuseop.Write, node, u64(7), u64(4096), u32(0), u32(0), u64(0), u32(unix.O_WRONLY), u32(0)),
		"release":              request(fuseop.Release, node, u64(1), u32(unix.O_RDONLY), u32(0), u64(0)),
		"getxattr":             request(fuseop.Getxattr, node, u32(100), u32(0), "user.attr\x00"),
		"size of an attribute": request(fuseop.Getxattr, node, u32(0), u32(0), "user.attr\x00"),
		"getxattr, small":      request(fuseop.Getxattr, node, u32(3), u32(0), "user.attr\x00"),
		"getxattr, too large":  request(fuseop.Getxattr, node, u32(fencedOut), u32(0), "user.attr\x00"),
		"forget":               request(fuseop.Forget, node, u64(3)),
		"forget several":       request(fuseop.BatchForget, node, u32(2), u32(0), u64(10), u64(1), u64(11), u64(2)),
		"forget none":          request(fuseop.BatchForget, node, u32(0), u32(0)),
	}
}

// TestDispatchAnswersAsGoFuse compares whole answers, and what the file system is asked.
func TestDispatchAnswersAsGoFuse(t *testing.T) {
	for node := range uint64(7) {
		for name, req := range hotRequests(100*7 + node) {
			t.Run(fmt.Sprintf("%s/%d", name, node), func(t *testing.T) {
				tooMuch := strings.Contains(name, "too")
				if calls := same(t, req); len(calls) == 0 != (tooMuch || name == "forget none") {
					t.Errorf("the file system is asked %q", calls)
				}
				l, _ := newScribe(false)
				if _, _, done := l.dispatch(req, fenced(t, fencedOut)); done == tooMuch {
					t.Errorf("answered without go-fuse: %v", done)
				}
			})
		}
	}
}

// TestDispatchOfBadRequests cuts requests off at every length, and makes their sizes lie.
func TestDispatchOfBadRequests(t *testing.T) {
	for name, req := range hotRequests(7) {
		t.Run(name, func(t *testing.T) {
			for n := inHeaderSize; n < len(req); n++ {
				same(t, req[:n])
			}
			same(t, append(bytes.Clone(req), make([]byte, 100)...))
			for at := inHeaderSize; at+4 <= len(req); at += 4 {
				for _, v := range []uint32{0x7fffffff, 0x80000000, 0xffffffff, 1 << 16} {
					lie := bytes.Clone(req)
					binary.NativeEndian.PutUint32(lie[at:], v)
					same(t, lie)
				}
			}
			// Extensions behind the arguments are go-fuse's to take apart.
			ext := bytes.Clone(req)
			binary.NativeEndian.PutUint16(ext[36:], 1)
			same(t, ext)
		})
	}
}

// TestDispatchAllocatesNothing, apart from what the file system does.
func TestDispatchAllocatesNothing(t *testing.T) {
	fs := &fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem()}
	l := newLoop(fs, &fuse.MountOptions{MaxWrite: maxWrite}, ServeOptions{}, zap.NewNop())
	req, out := request(fuseop.Getattr, 1, u32(0), u32(0), u64(0)), make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if body, st, done := l.dispatch(req, out); done {
			answer(out, req, body, st)
		}
	}); n > 0 {
		t.Errorf("%v allocations per request", n)
	}
}

// FuzzDispatch compares the answers to requests as they should not be.
func FuzzDispatch(f *testing.F) {
	for i := range uint64(2) {
		for _, req := range hotRequests(i) {
			op := slices.Index(hotOps, binary.NativeEndian.Uint32(req[4:]))
			f.Add(byte(op), i, uint16(0), req[inHeaderSize:])
		}
	}
	f.Fuzz(func(t *testing.T, op byte, node uint64, ext uint16, body []byte) {
		if len(body) > maxWrite {
			return
		}
		req := request(hotOps[int(op)%len(hotOps)], node, string(body))
		binary.NativeEndian.PutUint16(req[36:], ext)
		// go-fuse keeps a node and a name for itself, to make sure of polling.
		if polls := bytes.Repeat([]byte{0xff}, 8); bytes.Contains(req, polls) || bytes.Contains(body, []byte("epoll")) {
			return
		}
		same(t, req)
	})
}

func TestBufferPool(t *testing.T) {
	var p bufferPool
	get := func() *buffer {
		t.Helper()
		b, err := p.get()
		if err != nil {
			t.Fatal(err)
		}
		if len(b.in) != bufferSize || len(b.out) != bufferSize {
			t.Fatalf("buffers of %d and %d bytes, want %d", len(b.in), len(b.out), bufferSize)
		}
		if cap(b.in) != bufferSize {
			t.Error("appending to a request would write into the reply")
		}
		b.in[bufferSize-1], b.out[0] = 1, 2
		if b.in[bufferSize-1] != 1 {
			t.Error("request and reply share memory")
		}
		return b
	}
	first := get()
	p.put(first)
	if again := get(); again != first {
		t.Error("a buffer that is not in use is not used again")
	}
	p.put(first)

	var all []*buffer
	seen := make(map[*buffer]bool)
	for range 20 {
		b := get()
		if seen[b] {
			t.Fatal("one buffer for two workers")
		}
		seen[b] = true
		all = append(all, b)
	}
	for _, b := range all {
		p.put(b)
	}
	if n := len(p.idle); n > idleWorkers+1 {
		t.Errorf("%d buffers are kept for %d workers", n, idleWorkers)
	}
	p.drop()
	if len(p.idle) != 0 {
		t.Errorf("%d buffers are left", len(p.idle))
	}
	p.put(get()) // a pool is good for the next connection
	p.drop()
}
