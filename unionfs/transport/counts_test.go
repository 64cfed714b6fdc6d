package transport

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/unionfs/counters"
	"github.com/plyfs/plyfs/unionfs/fuseop"
)

// countedFS knows one name, and reads and writes some bytes.
type countedFS struct{ fakeFS }

func (f *countedFS) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	switch name {
	case "there":
		out.NodeId = 5
	case "broken":
		return fuse.EIO
	case "gone":
		return fuse.ENOENT
	}
	return fuse.OK // without a node: the kernel may remember that there is none
}

func (f *countedFS) Read(_ <-chan struct{}, _ *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	return fuse.ReadResultData(buf[:10]), fuse.OK
}

func (f *countedFS) ReadInto(_ *fuse.ReadIn, buf []byte) (int, fuse.Status) { return 10, fuse.OK }

func (f *countedFS) Write(_ <-chan struct{}, in *fuse.WriteIn, _ []byte) (uint32, fuse.Status) {
	if in.NodeId == 9 {
		return 0, fuse.Status(unix.ENOSPC)
	}
	return in.Size, fuse.OK
}

func (f *countedFS) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status {
	return fuse.Status(unix.EACCES)
}

func TestRequestsAreCounted(t *testing.T) {
	c := counters.New()
	k := connect(t, &countedFS{fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem()}}, ServeOptions{Counters: c})
	unique := uint64(10)
	ask := func(op uint32, node uint64, body []byte) {
		unique++
		k.send(unique, op, node, body)
		k.expect(unique)
	}
	for _, name := range []string{"there", "there", "absent", "gone", "broken"} {
		ask(fuseop.Lookup, 1, append([]byte(name), 0))
	}
	read := make([]byte, 40)
	read[16] = 100 // its size
	ask(fuseop.Read, 5, read)
	write := make([]byte, 40+7)
	write[16] = 7
	ask(fuseop.Write, 5, write)
	ask(fuseop.Write, 9, write) // no bytes: it fails
	ask(fuseop.Unlink, 1, []byte("x\x00"))

	s := c.Snapshot()
	for _, want := range []struct {
		op                    string
		count, absent, failed uint64
	}{{"init", 1, 0, 0}, {"lookup", 5, 2, 1}, {"read", 1, 0, 0}, {"write", 2, 0, 1}, {"unlink", 1, 0, 1}} {
		o := s.Operation(want.op)
		if o.Count != want.count || o.Absent() != want.absent || o.Failed() != want.failed {
			t.Errorf("%+v, want %+v", o, want)
		}
	}
	if s.BytesRead != 10 || s.BytesWritten != 7 {
		t.Errorf("%d bytes read, %d written", s.BytesRead, s.BytesWritten)
	}
	if e := s.Operation("write").Errors; e["no_space"] != 1 {
		t.Errorf("errors of write: %v", e)
	}
}

func TestRequestsAtOnceAreCounted(t *testing.T) {
	fs := &fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem(), release: make(chan struct{}), entered: make(chan struct{}, 8)}
	c := counters.New()
	k := connect(t, fs, ServeOptions{Counters: c})
	for u := uint64(100); u < 105; u++ {
		k.send(u, fuseop.Getattr, 2, make([]byte, 16))
		<-fs.entered
	}
	if s := c.Snapshot(); s.Answering != 5 || s.AnsweringMost != 5 {
		t.Errorf("%d being answered, %d at most", s.Answering, s.AnsweringMost)
	}
	close(fs.release)
}

// BenchmarkAnswer is a request without the kernel: what counting costs is a part of it.
func BenchmarkAnswer(b *testing.B) {
	l := newLoop(&countedFS{fakeFS{RawFileSystem: fuse.NewDefaultRawFileSystem()}}, &fuse.MountOptions{MaxWrite: maxWrite}, ServeOptions{}, nil)
	buf := &buffer{in: make([]byte, 4096), out: make([]byte, 4096)}
	buf.in[4] = fuseop.Lookup
	copy(buf.in[inHeaderSize:], "there\x00")
	b.ReportAllocs()
	for b.Loop() {
		if reply, _ := l.handle(buf, inHeaderSize+6); len(reply) == 0 {
			b.Fatal("no answer")
		}
	}
}
